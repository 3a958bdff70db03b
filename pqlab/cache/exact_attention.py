"""Attention over keys and values as they are: what a chunk of new tokens sees of itself, and what was dequantized."""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import repeat_kv


def chunk_mask(mask: torch.Tensor | None, start: int, keys: torch.Tensor) -> torch.Tensor:
    """bool [B, S, S]: which tokens of the chunk (keys [B, H, S, d]) each of its tokens sees."""
    batch, _, steps, _ = keys.shape
    if mask is None:
        return torch.ones(steps, steps, dtype=torch.bool, device=keys.device).tril().expand(batch, -1, -1)
    return mask[:, 0, :, start:].expand(batch, -1, -1)


def attend_exactly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Computed as transformers' sdpa path does: a first chunk is bit-equal to it.

    Args:
        query: [B, Hq, S, d]; keys, values: [B, H, n, d].
        mask: bool, broadcast to [B, Hq, S, n]; None is causal, with n = S.

    Returns:
        [B, Hq, S, d].
    """
    groups = query.shape[1] // keys.shape[1]
    if mask is None and keys.shape[-1] == values.shape[-1] <= 256:  # then no attention needs heads to be copied
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=scaling, is_causal=True, enable_gqa=groups > 1
        )
    if mask is not None:  # a pad sees nothing: let it see everything instead of dividing by zero
        mask = mask | ~mask.any(-1, keepdim=True)
    return torch.nn.functional.scaled_dot_product_attention(
        query, repeat_kv(keys, groups), repeat_kv(values, groups), attn_mask=mask, scale=scaling, is_causal=mask is None
    )
