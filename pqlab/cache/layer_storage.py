"""What one quantized layer keeps: exact buffers and pages, how tokens get there, and how attention reads them.

The layer keeps everything in code space (the space the codec's map leads to; the head space itself when there is no
map), so one kernel reads sinks, codes and window with one query::

    sinks   [B, H, num_sinks, d]   the first tokens of each row, exact
    pages   [max_pages, H, T, M, 2 * nbits] uint8, K and V: views of the pool
    window  [B, H, W, d]           ring of the newest tokens, exact; the token with code index u lies in slot u % W

Keys may be turned back to anchors in front of that space (`quantization.anchors`; those in the window, too, each by its
own code index), and fitted to their sequence behind it (`key_fit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kernels import ops
from ..kernels.reference import turn_back
from ..paging.layout import read_pages
from .exact_buffers import ExactBuffers
from .key_fit import KeyFit, fit_tokens
from .sequences import SequenceGroup, StepPlan, plain_state
from .side import Side

if TYPE_CHECKING:
    from ..quantization import LayerCodec


class LayerStorage:
    """Sinks, codes and window of one layer.

    Args:
        index: the model's layer index.
        group: the token counts and the page table shared with the other quantized layers.
        codec: K and V codecs of this layer.
        k_pages, v_pages: uint8 [max_pages, H, T, M, tile bytes], views of the pool.
        exact_buffers: where sinks and windows come from; None makes them one by one.
    """

    def __init__(
        self,
        index: int,
        group: SequenceGroup,
        codec: LayerCodec,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        exact_buffers: ExactBuffers | None = None,
    ) -> None:
        self.index = index
        self.group = group
        self.codec = codec
        self.k_pages, self.v_pages = k_pages, v_pages
        self.exact_buffers = exact_buffers
        self.sink_k = self.sink_v = self.window_k = self.window_v = None
        self.fit: KeyFit | None = None  # where the codec can
        self.turns: torch.Tensor | None = None  # of the anchors of all spans so far, where the codec has anchors

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate sinks and window for the batch, dtype and device of the first tokens, [B, H, S, d]."""
        batch, heads, _, head_dim = key_states.shape
        wanted = (self.codec.k.num_heads, self.codec.k.head_dim, self.codec.v.head_dim)
        if wanted != (heads, head_dim, value_states.shape[-1]):
            raise ValueError(
                f"layer {self.index} brings {heads} kv heads of size {head_dim} (K) and {value_states.shape[-1]} (V), "
                f"its codebooks are for {wanted[0]} heads of size {wanted[1]} and {wanted[2]}; calibrate on this model"
            )
        if key_states.device != self.k_pages.device:
            raise ValueError(
                f"layer {self.index} brings keys on {key_states.device}, the cache's pages are on "
                f"{self.k_pages.device}; make the cache from the model where it runs, PagedPQCache(model, ...): one "
                "made from model.config alone, or before model.to(...), does not follow it"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.exact_buffers is not None:
            made = self.exact_buffers.take(self.index, batch, self.dtype, self.device)
        else:
            sinks, window = self.group.config.num_sinks, self.group.config.window_length
            made = (key_states.new_zeros(batch, heads, n, head_dim) for n in (sinks, sinks, window, window))
        self.sink_k, self.sink_v, self.window_k, self.window_v = made
        self.fit = KeyFit(self.codec.k, batch, self.device) if self.codec.k.can_fit else None

    def _drop(self) -> None:
        """Forget the exact buffers and what was fitted to them; the pages are the group's."""
        self.sink_k = self.sink_v = self.window_k = self.window_v = self.fit = None

    @plain_state
    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i of the exact buffers becomes the old row rows[i]."""
        if self.sink_k is not None:
            rows = rows.to(self.device)
            for name in ("sink_k", "sink_v", "window_k", "window_v"):
                setattr(self, name, getattr(self, name).index_select(0, rows))
            if self.fit is not None:
                self.fit.select(rows)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the exact buffers (sinks and window, K and V)."""
        buffers = (self.sink_k, self.sink_v, self.window_k, self.window_v)
        return sum(b.nbytes for b in buffers if b is not None)

    def stored(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a reader of the cache sees, dequantized, in token order.

        Args:
            lengths: int32 [B, 3]: (sinks, coded, window) of each row.

        Returns:
            K and V [B, H, n, d] in the cache's dtype, n = the longest row; bool [B, n], True where a row has a token.
        """
        rows = lengths.tolist()
        n = max((sum(row) for row in rows), default=0)
        valid = torch.arange(n, device=self.device) < lengths.sum(1, keepdim=True).to(self.device)
        where = self.group.page_table(), self.group.config.page_size
        k, v = (side.read(rows, n, *where) for side in self.sides)
        if self.fit is not None:
            k = self.fit.undo(k)
        k = self.codec.k.from_code_space(k)
        if self.codec.k.anchors is not None:
            num_sinks = self.group.config.num_sinks
            k = self.codec.k.anchors.forth(k, torch.arange(n, device=self.device) - num_sinks, n)
        return k, self.codec.v.from_code_space(v), valid

    def codes(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [H, coded, M] of a row's pages, K and V, in token order."""
        coded = int(self.group.lengths[row, 1])
        page_ids = self.group.page_table()[row, : -(-coded // self.group.config.page_size)]
        return tuple(read_pages(side.pages, page_ids, side.codec.nbits)[:, :coded] for side in self.sides)

    @property
    def sides(self) -> tuple[Side, Side]:
        """K and V."""
        k = Side(self.codec.k, self.k_pages, self.sink_k, self.window_k)
        return k, Side(self.codec.v, self.v_pages, self.sink_v, self.window_v)

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, before: torch.Tensor, after: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        """Store one token a row, [B, H, 1, d], between two states of the lengths, int32 [B, 3], and attend to all."""
        k, v, fit = self.codec.k, self.codec.v, self.fit
        out, _ = ops.step_(
            self.sink_k, self.sink_v, self.window_k, self.window_v, self.k_pages, self.v_pages,
            keys, values, self.group.page_table(), before, after, k.centroids, v.centroids, k.nbits, v.nbits,
            query, scaling, k.forward, k.backward, v.forward, v.backward,
            *((None, None) if fit is None else (fit.scale, fit.shift)),
            self.turns, 0 if self.turns is None else k.anchors.span,
        )  # fmt: skip
        return out

    def _attend_stored(self, query: torch.Tensor, plan: StepPlan, scaling: float):
        """(out [B, Hq, S, d], lse [B, Hq, S]) over everything stored before a step."""
        anchors, spans = self.codec.k.anchors, 0
        if anchors is not None:  # a query for every span
            spans = self._spans(max(plan.tokens))
            query = turn_back(query, anchors.turns(spans)[:spans, None, None, None])
        asked = self.codec.k.map_query(query)
        offsets = None
        if self.fit is not None:
            asked, shifted = self.fit.ask(asked)
            offsets = -scaling * shifted
        out, lse = ops.decode(
            asked, self.k_pages, self.v_pages, self.group.page_table(), plan.before,
            self.codec.k.centroids, self.codec.v.centroids, self.sink_k, self.sink_v, self.window_k, self.window_v,
            self.codec.k.nbits, self.codec.v.nbits, scaling,
            *((anchors.span, offsets) if spans else ()),
        )  # fmt: skip
        if offsets is not None and not spans:  # new tokens, which lse is compared with, are not stored yet
            lse = lse + offsets
        return self.codec.v.from_code_space(out), lse

    def _reach(self, plan: StepPlan) -> None:
        """Have turns of all spans that the tokens of a step lie in."""
        if self.codec.k.anchors is not None:
            spans = self._spans(max(n + c for n, c in zip(plan.tokens, plan.counts, strict=True)))
            if self.turns is None or len(self.turns) < spans:
                self.turns = self.codec.k.anchors.turns(spans)

    def _spans(self, tokens: int) -> int:
        """Spans that a row of so many tokens lies in, one at least."""
        return max(0, tokens - self.group.config.num_sinks - 1) // self.codec.k.anchors.span + 1

    def _fit_first(self, plan: StepPlan, keys: torch.Tensor | None = None) -> None:
        """Fit the rows whose first tokens are coded in this step, and bring what they have stored to that.

        Args:
            keys: [B, H, S, d] in code space, the tokens of a chunk; a single new token is not among the first.
        """
        if self.fit is None:
            return
        for flush in plan.flushes:
            if flush.first:
                continue
            row, count = flush.row, fit_tokens(self.group.config.page_size)
            waiting = max(0, plan.tokens[row] - self.group.config.num_sinks)
            sinks, window = (self.fit.undo(x[row], row) for x in (self.sink_k, self.window_k))
            first = window[:, : min(waiting, count)]  # in ring slots from 0: nothing was ever coded before them
            if waiting < count:
                new = keys[row] if plan.real is None else keys[row][:, plan.real[row].to(keys.device)]
                new_sinks = max(0, self.group.config.num_sinks - plan.tokens[row])
                first = torch.cat([first, new[:, new_sinks : new_sinks + count - waiting]], 1)
            self.fit.take(row, first)
            self.sink_k[row], self.window_k[row] = self.fit.apply(sinks, row), self.fit.apply(window, row)

    def _write(self, plan: StepPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the new tokens of a step, flushing what the plan says. Nothing is encoded twice."""
        if self.codec.k.anchors is not None:
            index, most = self.group.code_indexes(plan)
            keys = self.codec.k.anchors.back(keys, index, most)
        keys, values = self.codec.k.to_code_space(keys), self.codec.v.to_code_space(values)
        self._fit_first(plan, keys)
        if self.fit is not None:
            keys = self.fit.apply(keys)
        if plan.num_columns == 1:
            ops.append_(
                self.sink_k, self.sink_v, self.window_k, self.window_v, self.k_pages, self.v_pages, keys, values,
                self.group.page_table(), plan.before, plan.after, self.codec.k.centroids, self.codec.v.centroids,
                self.codec.k.nbits, self.codec.v.nbits,
            )  # fmt: skip
        else:
            by_row = {flush.row: flush for flush in plan.flushes}
            for row, count in enumerate(plan.counts):
                if count:
                    keep = slice(None) if plan.real is None else plan.real[row].to(keys.device)
                    for side, x in zip(self.sides, (keys, values), strict=True):
                        side.write(row, x[row][:, keep], plan.tokens[row], by_row.get(row))
