"""From "how one page is stored" to a method that can be evaluated and weighed.

A `Storage` is handed whole pages, as a paged cache flushes them, and returns the very tensors that it would keep,
packed. So the token bits of a peer are measured on these tensors instead of being claimed, and a token's value cannot
change after its page was flushed: `from_storage` checks that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..paging.layout import SIDES
from .methods import Method, Setting, token_elements


class Storage(ABC):
    """How K and V of any layer are stored. Side is "k" or "v", P the page size, H kv heads of d elements."""

    @abstractmethod
    def store(self, side: str, pages: Tensor) -> Any:
        """What is kept of float32 pages [H, p, P, d]: a tuple of packed tensors, if `tensors` is not overridden."""

    @abstractmethod
    def load(self, side: str, stored: Any) -> Tensor:
        """Pages [H, p, P, d], any floating dtype, of what `store` returned."""

    def tensors(self, stored: Any) -> Iterable[Tensor]:
        """Every tensor that is kept; their bytes are the storage's."""
        return stored


def from_storage(name: str, storage: Storage, setting: Setting, note: str = "") -> Method:
    """A method that keeps whole pages in a storage.

    Raises:
        ConfigError: values of a page depend on the pages that are stored with it.
        Whatever the storage raises for this page size and these heads.
    """
    page_size = setting.config.page_size
    page_bytes = 0
    for heads, head_dim in setting.geometry.values():
        page_bytes += _measured_page(name, storage, heads, page_size, head_dim)

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _round_trip("k", layer, k), _round_trip("v", layer, v)

    def _round_trip(side: str, layer: int, x: Tensor) -> Tensor:
        pages = x.float().unflatten(-2, (-1, page_size))
        found = storage.load(side, storage.store(side, pages)).flatten(-3, -2).to(x.dtype)
        if not found.isfinite().all():
            raise ValueError(
                f"{name}: {side.upper()} of layer {layer} comes back with values that are not finite; its scales "
                f"cannot hold the model's largest value, {float(x.abs().max()):.3g}"
            )
        return found

    return Method(
        name=name,
        quantize=quantize,
        config=setting.config,
        token_elements=token_elements(setting.geometry),
        page_bytes=page_bytes,
        note=note,
    )


def _measured_page(name: str, storage: Storage, heads: int, page_size: int, head_dim: int) -> int:
    """Bytes of one page of one layer, K and V; raises `ConfigError` unless each page is stored for itself."""
    pages = torch.randn(heads, 2, page_size, head_dim, generator=torch.Generator().manual_seed(0))
    num_bytes = 0
    for side in SIDES:
        together = storage.load(side, storage.store(side, pages))
        for i in range(2):
            alone = storage.store(side, pages[:, i : i + 1])
            if not torch.equal(storage.load(side, alone), together[:, i : i + 1]):
                raise ConfigError(
                    f"{name}: the stored {side.upper()} of a page of {page_size} tokens changes with the pages beside "
                    "it; a page is never encoded twice, so set a page_size that is a multiple of the tokens that share "
                    "a scale"
                )
        num_bytes += sum(tensor.nbytes for tensor in storage.tensors(alone))
    return num_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 to 2**bits - 1, [..., n], as uint8 [..., n * bits / 8]: one behind the other, lowest bits first.

    Raises `ConfigError` when n codes do not fill whole bytes.
    """
    if codes.shape[-1] * bits % 8:
        good = 8 // gcd(bits, 8)
        raise ConfigError(f"{codes.shape[-1]} codes of {bits} bits do not fill bytes; set a multiple of {good}")
    stream = (codes.to(torch.uint8)[..., None] >> _shifts(codes, bits)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, 8)) << _shifts(codes, 8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., n]."""
    stream = (packed[..., None] >> _shifts(packed, 8)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, bits)) << _shifts(packed, bits)).sum(-1, dtype=torch.uint8)


def _shifts(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.uint8)


def groups_of(x: Tensor, dim: int, size: int, name: str, what: str) -> Tensor:
    """x with dimension `dim` split into [groups, size]; `ConfigError` names `what` when size does not divide it."""
    if x.shape[dim] % size:
        raise ConfigError(f"{name} shares a scale among {size} {what}; {x.shape[dim]} is no multiple of {size}")
    return x.unflatten(dim, (-1, size))
