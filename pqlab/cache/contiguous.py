"""Standard, contiguous product quantization: what paged PQ is held to. No pages, no ring, no fused kernel.

Codes and exact tokens are tensors that grow by concatenation, and every step dequantizes all codes for the model's own
attention (MILLION without its kernels). Tokens leave the exact window by the same rule as in `PagedPQCache`, so the
two hold the same tokens in the same form and must give the same logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..config import CacheConfig
from ..quantization import Codebooks, LayerCodec, PQCodec
from .key_fit import KeyFit, fit_tokens

_CHUNK = 512  # tokens whose distances to all centroids are held at a time


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """uint8 [B, H, n, M]: nearest centroids by argmax(x . c - |c|^2 / 2), as a matrix product.

    In float64: the differences of that sum are too coarse in float32, and a near tie decided otherwise is another
    code, which would hide a fault of the same size.

    Args:
        x: [B, H, n, d]; centroids: [H, M, C, dm].
    """
    batch, heads, n, _ = x.shape
    _, m, count, dm = centroids.shape
    rows = x.double().unflatten(-1, (m, dm)).permute(1, 3, 0, 2, 4).reshape(heads * m, batch * n, dm)
    books = centroids.double().reshape(heads * m, count, dm)
    bias = -0.5 * books.square().sum(-1)[:, None]
    parts = [torch.baddbmm(bias, part, books.mT).argmax(-1) for part in rows.split(_CHUNK, 1)]
    return torch.cat(parts, 1).view(heads, m, batch, n).permute(2, 0, 3, 1).to(torch.uint8)


class ContiguousPQLayer(DynamicLayer):
    """One layer: `[sinks exact | codes | window exact]`, each a tensor that grows by `torch.cat`."""

    def __init__(self, codec: LayerCodec, config: CacheConfig) -> None:
        super().__init__()
        self.codec, self.config = codec, config
        self.sinks: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.window: list[Tensor] = []
        self.fit: KeyFit | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        new = [key_states, value_states]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.sinks = [x[:, :, :0] for x in new]
            self.window = [x[:, :, :0] for x in new]
            heads_m = [(*x.shape[:2], 0, side.num_subspaces) for x, side in zip(new, self._sides, strict=True)]
            self.codes = [torch.empty(shape, dtype=torch.uint8, device=self.device) for shape in heads_m]
        before = self.stored() if key_states.shape[2] > 1 else None  # a chunk sees itself exactly
        room = max(0, self.config.num_sinks - self.sinks[0].shape[2])
        self.sinks = [torch.cat([old, x[:, :, :room]], 2) for old, x in zip(self.sinks, new, strict=True)]
        self.window = [torch.cat([old, x[:, :, room:]], 2) for old, x in zip(self.window, new, strict=True)]
        self._flush()
        if before is None:
            return self.stored()
        return tuple(torch.cat([old, x], 2) for old, x in zip(before, new, strict=True))

    def stored(self) -> tuple[Tensor, Tensor]:
        """K and V [B, H, n, d] of all tokens, codes dequantized; exact ones as they come back from behind the map."""
        return tuple(
            torch.cat([_through_map(side, sinks), self._decoded(i).to(sinks.dtype), self._seen(side, window)], 2)
            for i, (side, sinks, window) in enumerate(zip(self._sides, self.sinks, self.window, strict=True))
        )

    def _seen(self, side: PQCodec, window: Tensor) -> Tensor:
        """The window as a query sees it, turned back where the map is."""
        if side.anchors is None:
            return _through_map(side, window)
        coded = self.codes[0].shape[2]
        index = torch.arange(coded, coded + window.shape[2], device=window.device)
        return side.anchors.forth(_through_map(side, side.anchors.back(window, index)), index)

    def _decoded(self, i: int) -> Tensor:
        side = self._sides[i]
        y = side.dequantize(self.codes[i])
        x = side.from_code_space(y if self.fit is None or i else self.fit.undo(y))
        return side.anchors.forth(x, torch.arange(x.shape[2], device=x.device)) if side.anchors else x

    def get_seq_length(self) -> int:
        return sum(part[0].shape[2] for part in (self.sinks, self.codes, self.window)) if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        fit = 0 if self.fit is None else self.fit.nbytes
        return sum(x.nbytes for part in (self.sinks, self.codes, self.window) for x in part) + fit

    @property
    def _sides(self) -> tuple[PQCodec, PQCodec]:
        return self.codec.k, self.codec.v

    def _flush(self) -> None:
        coded = self.codes[0].shape[2]
        leaving = self.config.flush_count(coded, self.window[0].shape[2])
        if not leaving:
            return
        for i, side in enumerate(self._sides):
            x = self.window[i][:, :, :leaving]
            if side.anchors:
                x = side.anchors.back(x, torch.arange(coded, coded + leaving, device=x.device))
            y = side.to_code_space(x)
            if side.can_fit:
                if not coded:
                    self.fit = KeyFit(side, len(y), y.device)
                    for row, first in enumerate(y[:, :, : fit_tokens(self.config.page_size)]):
                        self.fit.take(row, first)
                y = self.fit.apply(y)
            fresh = nearest(y, side.centroids)
            self.codes[i] = torch.cat([self.codes[i], fresh], 2)
            self.window[i] = self.window[i][:, :, leaving:].clone()  # a view would keep what has left


def _through_map(side: PQCodec, x: Tensor) -> Tensor:
    """What a query sees of exact tokens that lie in code space: the map's rounded inverse is not quite its inverse."""
    return side.from_code_space(side.to_code_space(x))


def contiguous_cache(model, books: Codebooks, config: CacheConfig) -> DynamicCache:
    """A transformers cache with a `ContiguousPQLayer` for every layer that has a codec; other layers stay exact."""
    cache = DynamicCache(config=model.config)
    books = books.to(model.device)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and i not in books.exact:
            cache.layers[i] = ContiguousPQLayer(books.layer(i), config)
    return cache
