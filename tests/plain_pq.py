"""A plain contiguous model of the cache, for tests: no pages, no ring, no sharing. Lists of tokens per row.

It is a transformers cache that works with any attention: `update` returns dequantized K and V for every column. It
follows DESIGN's semantics (sinks, window, flush of whole pages, encode once) in the most literal way. Exact tokens lie
behind the codec's map and are read through its inverse, which is that of rounded matrices. Keys are fitted to the first
page that a row codes, and turned back to anchors where the codec has them.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class PlainPQLayer(DynamicLayer):
    """Keeps every column's vector as it would be read, and a mark per column whether it has been quantized."""

    def __init__(self, codec, page_size: int, residual: int, sinks: int, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.codec, self.page_size, self.residual, self.sinks = codec, page_size, residual, sinks
        self.mask = mask  # bool [B, columns], False at pads
        self.coded: list[int] = []
        self.fits: list[tuple[torch.Tensor, torch.Tensor]] = []  # scale and shift [H, d] of a row's keys
        self.raw: dict[str, torch.Tensor] = {}  # as the model made them: what is encoded

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.coded = [0] * keys.shape[0]
            self.fits = [()] * keys.shape[0]
            self.raw = {"keys": keys[:, :, :0], "values": values[:, :, :0]}
        start = self.raw["keys"].shape[2]
        self.raw = {name: torch.cat([self.raw[name], x], 2) for name, x in (("keys", keys), ("values", values))}
        seen = tuple(x.clone() for x in super().update(keys, values))  # a chunk sees itself exactly, then is stored
        for name, codec in self._sides():
            stored = getattr(self, name).clone()
            x, index = stored[:, :, start:], self._indexes(stored.shape[2])[:, None, start:]
            x = x if codec.anchors is None else codec.anchors.back(x, index)
            x = codec.from_code_space(codec.to_code_space(x))
            stored[:, :, start:] = x if codec.anchors is None else codec.anchors.forth(x, index)
            setattr(self, name, stored)
        self._flush()
        return seen if keys.shape[2] > 1 else (self.keys, self.values)

    def _indexes(self, columns: int) -> torch.Tensor:
        """Code index of every column in its row, [B, columns]; below 0 for sinks."""
        real = torch.ones(len(self.coded), columns, dtype=torch.long)
        if self.mask is not None:
            known = self.mask[:, :columns]
            real[:, : known.shape[1]] = known
        return real.cumsum(1) - 1 - self.sinks

    def _sides(self):
        return ("keys", self.codec.k), ("values", self.codec.v)

    def _flush(self) -> None:
        for row in range(self.keys.shape[0]):
            columns = torch.arange(self.keys.shape[2])
            if self.mask is not None:
                real = torch.ones(len(columns), dtype=torch.bool)
                known = self.mask[row, : len(columns)]
                real[: len(known)] = known
                columns = columns[real]
            body = columns[self.sinks :]
            window = len(body) - self.coded[row]
            if window < self.residual + self.page_size:
                continue
            end = (len(body) - self.residual) // self.page_size * self.page_size
            chosen = body[self.coded[row] : end]
            for name, codec in self._sides():
                x = self.raw[name][row][:, chosen]
                if codec.anchors is None:
                    seen = self._decoded(row, codec, x)
                else:
                    index = torch.arange(self.coded[row], end)
                    seen = codec.anchors.forth(self._decoded(row, codec, codec.anchors.back(x, index)), index)
                getattr(self, name)[row][:, chosen] = seen.to(x.dtype)
            self.coded[row] = end

    def _decoded(self, row: int, codec, x: torch.Tensor) -> torch.Tensor:
        if not codec.can_fit:
            return codec.decode(codec.encode(x))
        y = codec.to_code_space(x)
        if not self.coded[row]:
            self.fits[row] = codec.fit(y[:, : min(64, self.page_size)])
        scale, shift = (part[:, None] for part in self.fits[row])
        return codec.from_code_space((codec.dequantize(codec.quantize(y * scale + shift)) - shift) / scale)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.raw = {name: x[:, :, : self.keys.shape[2]] for name, x in self.raw.items()}
        for row in range(len(self.coded)):
            real = self.keys.shape[2]
            if self.mask is not None:
                real = int(self.mask[row, :real].sum()) + max(0, real - self.mask.shape[1])
            self.coded[row] = min(self.coded[row], max(0, real - self.sinks))

    def reorder_cache(self, beam_idx) -> None:
        super().reorder_cache(beam_idx)
        self.raw = {name: x[beam_idx] for name, x in self.raw.items()}
        self.coded, self.fits = ([old[i] for i in beam_idx.tolist()] for old in (self.coded, self.fits))
        if self.mask is not None:
            self.mask = self.mask[beam_idx]


def plain_pq_cache(model, codebooks, config, attention_mask=None) -> DynamicCache:
    """A `DynamicCache` whose full-attention layers are `PlainPQLayer`; attention_mask [B, n] marks the pads."""
    cache = DynamicCache(config=model.config)
    mask = None if attention_mask is None else attention_mask.bool()
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PlainPQLayer(
                codebooks.layer(i), config.page_size, config.residual_length, config.num_sinks, mask
            )
    return cache
