"""K or V of one layer where it lies: written row by row in chunks, and read back in token order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops
from ..paging.layout import read_pages
from ..quantization import Codec
from .sequences import Flush


class Side(NamedTuple):
    """What `layer` keeps of its keys or of its values, all of it in code space (see there for the shapes)."""

    codec: Codec
    pages: Tensor
    sink: Tensor
    window: Tensor

    def write(self, row: int, x: Tensor, token: int, flush: Flush | None) -> None:
        """Store a row's part of a chunk: sinks, then codes straight from the chunk, then the ring.

        Args:
            x: [H, n, d], real tokens.
            token: tokens of the row before them.
            flush: what leaves the window with them, if anything.
        """
        num_sinks, ring = self.sink.shape[2], self.window.shape[2]
        new_sinks = min(max(0, num_sinks - token), x.shape[1])
        if new_sinks:
            self.sink[row, :, token : token + new_sinks] = x[:, :new_sinks]
            x = x[:, new_sinks:]
        if not x.shape[1]:
            return
        first = token + new_sinks - num_sinks  # code index of x's first token
        keep_from = first
        if flush is not None:
            end = flush.first + flush.count
            leaving = x[:, : max(0, end - first)]
            if first > flush.first:  # so many of the flushed tokens wait in the ring
                waiting = self._ring(row, flush.first, min(first, end))
                leaving = torch.cat([waiting, leaving], 1) if leaving.shape[1] else waiting
            pages = (flush.page_ids, flush.first_slot, self.codec.nbits)
            ops.encode_pages_(self.pages, leaving, self.codec.centroids, *pages)
            keep_from = max(first, end)
        slots = torch.arange(keep_from, first + x.shape[1], device=x.device) % ring
        self.window[row, :, slots] = x[:, keep_from - first :]

    def read(self, rows: Sequence[Sequence[int]], n: int, table: Tensor, page_size: int) -> Tensor:
        """[B, H, n, d] as stored: sinks, decoded pages and ring of each row, in token order; zeros behind.

        Args:
            rows: (sinks, coded, window) of each row; table: int32 [B, pages].
        """
        batch, heads, _, head_dim = self.window.shape
        out = self.window.new_zeros(batch, heads, n, head_dim)
        for row, (sinks, coded, exact) in enumerate(rows):
            out[row, :, :sinks] = self.sink[row, :, :sinks]
            if coded:
                codes = read_pages(self.pages, table[row, : -(-coded // page_size)], self.codec.nbits)[:, :coded]
                out[row, :, sinks : sinks + coded] = self.codec.dequantize(codes).to(out.dtype)
            out[row, :, sinks + coded : sinks + coded + exact] = self._ring(row, coded, coded + exact)
        return out

    def _ring(self, row: int, start: int, stop: int) -> Tensor:
        """[H, stop - start, d]: the ring's tokens with these code indexes."""
        slots = torch.arange(start, stop, device=self.window.device)
        return self.window[row].index_select(1, slots % self.window.shape[2])
