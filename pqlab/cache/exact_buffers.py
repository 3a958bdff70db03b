"""Sinks and windows of all quantized layers, in one piece of memory.

Each layer needs its own in the middle of the first prompt, between activations that come and go. Made one by one there,
these small lasting blocks keep the C library's heap from being joined and given back: a prompt of 1024 tokens can peak
at twice the memory (`paging/LOG.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

_ALIGNED = 64  # elements: every buffer begins on a cache line


class Exact(NamedTuple):
    """One layer's exact tokens: sinks [B, H, num_sinks, d], window [B, H, W, d], of K and of V."""

    sink_k: torch.Tensor
    sink_v: torch.Tensor
    window_k: torch.Tensor
    window_v: torch.Tensor


class ExactBuffers:
    """Hands every layer its zeroed buffers.

    Args:
        shapes: {layer: (kv heads, head size)} of all layers that will ask.
        num_sinks, window_length: tokens of a sink buffer and of a window.
    """

    def __init__(self, shapes: Mapping[int, tuple[int, int]], num_sinks: int, window_length: int) -> None:
        self.shapes = dict(shapes)
        self.lengths = num_sinks, num_sinks, window_length, window_length
        self._made: dict[int, Exact] = {}
        self._key: tuple | None = None

    def take(self, layer: int, batch: int, dtype: torch.dtype, device: torch.device) -> Exact:
        """The layer's buffers for a batch; the first layer that asks makes those of all layers."""
        key = batch, dtype, device
        if self._key != key or layer not in self._made:
            self._make(*key)
        return self._made.pop(layer)

    def _make(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        parts = {}
        total = 0
        for layer, (heads, head_dim) in self.shapes.items():
            for length in self.lengths:
                shape = batch, heads, length, head_dim
                parts.setdefault(layer, []).append((total, shape))
                total += -(-batch * heads * length * head_dim // _ALIGNED) * _ALIGNED
        whole = torch.zeros(total, dtype=dtype, device=device)

        def view(start: int, shape: tuple[int, ...]) -> torch.Tensor:
            return whole[start : start + shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

        self._made = {layer: Exact(*(view(*part) for part in of_layer)) for layer, of_layer in parts.items()}
        self._key = batch, dtype, device
