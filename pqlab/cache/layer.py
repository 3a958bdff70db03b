"""One quantized layer: its exact buffers, its pages, and how attention reads them.

The layer keeps everything in code space (the space the codec's map leads to; the head space itself when there is no
map), so one kernel reads sinks, codes and window with one query::

    sinks   [B, H, num_sinks, d]   the first tokens of each row, exact
    pages   [max_pages, H, T, M, 2 * nbits] uint8, K and V: views of the pool
    window  [B, H, W, d]           ring of the newest tokens, exact; the token with code index u lies in slot u % W

Keys may be turned back to anchors in front of that space (`quantization.anchors`; those in the window, too, each by its
own code index), and fitted to their sequence behind it (`key_fit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ..errors import KernelMissingError, UnsupportedModelError
from ..kernels import dispatch, ops
from ..kernels.backend import EXACT, current_setting
from ..kernels.reference import attend_dense, merge, turn_back
from ..paging.layout import read_pages
from .exact_attention import attend_exactly, chunk_mask
from .exact_buffers import ExactBuffers
from .gradients import no_gradients
from .key_fit import KeyFit, fit_tokens
from .layer_states import LayerStates
from .sequences import SequenceGroup, StepPlan, plain_state
from .side import Side

if TYPE_CHECKING:
    from ..quantization import LayerCodec

FEW_QUERIES = 16
"""Up to this many new tokens each reads the codes with the fused kernel; beyond it dequantizing once is cheaper."""


class _Handover(NamedTuple):
    """New tokens between `update` (which is not given the mask) and `attend` (which is)."""

    keys: torch.Tensor  # [B, H, S, d]
    values: torch.Tensor


class PagedPQLayer(CacheLayerMixin):
    """Cache layer whose older tokens are PQ codes in pages; see `PagedPQCache`, which makes and owns it.

    Args:
        index: the model's layer index.
        group: the token counts and the page table shared with the other quantized layers.
        codec: K and V codecs of this layer.
        k_pages, v_pages: uint8 [max_pages, H, T, M, tile bytes], views of the pool.
        config: the model's config; read at each step to see which attention is set.
        exact_buffers: where sinks and windows come from; None makes them one by one.
    """

    is_sliding = False
    is_compileable = is_static = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        index: int,
        group: SequenceGroup,
        codec: LayerCodec,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        config: PreTrainedConfig,
        exact_buffers: ExactBuffers | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.group = group
        self.codec = codec
        self.k_pages, self.v_pages = k_pages, v_pages
        self.config = config
        self.exact_buffers = exact_buffers
        self.is_first = self.is_last = False  # of the quantized layers; set by the cache
        self.leading: LayerStates | None = None  # given to the first of the quantized layers by the cache
        self.columns = 0
        self.pending: _Handover | None = None
        self.sink_k = self.sink_v = self.window_k = self.window_v = None
        self.fit: KeyFit | None = None  # where the codec can
        self.turns: torch.Tensor | None = None  # of the anchors of all spans so far, where the codec has anchors

    # -- transformers' side -------------------------------------------------------------------------------------

    @plain_state
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
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
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take the new K and V [B, H, S, d] of a step.

        Under the "pqlab" attention they are only handed over (`attend` stores them: it has the mask). Under any other
        attention they are stored now, and the whole K and V [B, H, columns, d] are dequantized and returned: the
        fallback, correct with every attention and recorded in `backend_report()`.
        """
        if self.pending is not None:
            raise RuntimeError(
                f"layer {self.index} got new tokens twice without an attention in between. Either the last step was "
                "interrupted there: call cache.reset() before going on. Or the model does not pass its keys through "
                'transformers\' attention interface: use model.set_attn_implementation("sdpa") instead'
            )
        attention = self.config._attn_implementation
        if attention != "pqlab" and EXACT in current_setting().forbidden:
            raise KernelMissingError(
                "exact attention over the dequantized cache is forbidden, and the model's attention is "
                f'"{attention}", not "pqlab".',
                'Use model.set_attn_implementation("pqlab"), or set PQLAB_BACKEND=auto (pqlab.use_backend("auto")).',
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.is_first and (key_states.dtype != self.dtype or key_states.device != self.device):
            raise ValueError(
                f"layer {self.index} brings {key_states.dtype} on {key_states.device}, the cache holds {self.dtype} on "
                f"{self.device}: the model was cast or moved since; call cache.reset() and begin again, and make a new "
                "cache on another device"
            )
        if attention == "pqlab":
            self.pending = _Handover(key_states, value_states)
            marked = key_states.view_as(key_states)
            marked.pqlab_layer = self
            return marked, value_states
        why = f'attention is "{attention}", not "pqlab"'
        dispatch.record("attention", "dequantize", why)
        real = self.group.take_announced(self.columns, key_states.shape[2])
        return self._store_and_dequantize(key_states, value_states, real)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise NotImplementedError(
            f"layer {self.index} is paged: its codes lie in one pool with all layers', on {self.k_pages.device}, and "
            "are not moved layer by layer; they are small, so leave offloading off"
        )

    prefetch = offload

    def reset(self) -> None:
        """Drop the exact buffers; the pages go back through `PagedPQCache.reset`."""
        self.columns, self.pending, self.is_initialized = 0, None, False
        self.sink_k = self.sink_v = self.window_k = self.window_v = self.fit = None

    @plain_state
    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i of the exact buffers becomes the old row rows[i]."""
        if self.is_initialized:
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

    # -- attention's side ---------------------------------------------------------------------------------------

    @no_gradients
    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of the handed-over step, and its tokens stored.

        A single new token is stored first and then read back with everything else. A chunk sees itself exactly and
        what was stored before it as the cache keeps it; then it is stored.

        Args:
            query: [B, Hq, S, d].
            mask: bool [B, 1, S, columns + S] as transformers' `sdpa_mask` makes it, or None without pads.
            scaling: factor on the scores.

        Returns:
            [B, Hq, S, d].
        """
        keys, values = self._take_pending()
        if current_setting().exact:
            return self._attend_dequantized(query, keys, values, mask, scaling)
        batch, _, steps, _ = keys.shape
        start = self.columns
        mask = None if mask is None else mask[..., : start + steps]  # a static cache's mask spans its capacity
        real = None if mask is None else mask[:, 0, :, start:].diagonal(dim1=-2, dim2=-1)
        plan = self._plan(steps, batch, real, mask)
        if steps == 1:
            self._fit_first(plan)
            self._reach(plan)
            out = self._step(query, keys, values, plan.before, plan.after, scaling)
            self.columns = start + 1
        elif plan.starts_empty:
            out = attend_exactly(query, keys, values, self.group.first_chunk_mask(plan, mask), scaling)
            self._store(plan, keys, values)
        elif steps <= FEW_QUERIES:
            old = self._attend_stored(query, plan, scaling)
            new = attend_dense(query, keys, values, chunk_mask(mask, start, keys), scaling)
            out, _ = merge(*old, *new)
            self._store(plan, keys, values)
        else:
            old_k, old_v, valid = self.stored(plan.before)
            seen = valid[:, None].expand(batch, steps, -1)
            joint = torch.cat([seen, chunk_mask(mask, start, keys)], -1)[:, None]
            out = attend_exactly(query, torch.cat([old_k, keys], 2), torch.cat([old_v, values], 2), joint, scaling)
            self._store(plan, keys, values)
        if self.group.probe is not None:
            self.group.probe(self, plan, query, keys, values, out, scaling)
        return out

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

    # -- inside -------------------------------------------------------------------------------------------------

    def _take_pending(self) -> _Handover:
        if self.pending is None:
            raise RuntimeError(
                f"layer {self.index} is asked for attention without new tokens: the model shares one layer's keys "
                'among several layers; use model.set_attn_implementation("sdpa") with this cache'
            )
        pending, self.pending = self.pending, None
        return pending

    def _plan(self, steps: int, batch: int, real: torch.Tensor | None, mask: torch.Tensor | None = None) -> StepPlan:
        """The step's plan: the first layer has it checked and made, the others follow it.

        Where it is refused, what was made for the step is dropped (the next one may be of another size), and what
        exact layers before this one have stored of it is taken back.
        """
        if not self.is_first:
            return self.group.plan_step(self.columns, steps, batch, real)
        real = None if real is None else real.to("cpu")
        try:
            self.group.admit_step(self.columns, batch, real, mask)
            plan = self.group.plan_step(self.columns, steps, batch, real)
        except Exception:
            if not self.columns:
                self.reset()
            self._refused()
            raise
        if self.leading is not None:
            self.leading.forget()
        return plan

    def _refused(self) -> None:
        """Take back what exact layers before this one have stored of a step."""
        if self.leading is not None:
            self.leading.put_back()

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

    def _attend_dequantized(self, query, keys, values, mask, scaling: float) -> torch.Tensor:
        """The step of `attend` as another attention would compute it: over the whole K and V, dequantized."""
        if self.is_static:
            raise UnsupportedModelError('static mode reads codes; set mode="eager", or PQLAB_BACKEND to auto')
        dispatch.record("attention", "dequantize", "forced")
        start, steps = self.columns, keys.shape[2]
        if mask is None:
            mask = torch.ones(steps, start + steps, dtype=torch.bool, device=keys.device).tril(start)[None, None]
        real = mask[:, 0, :, start : start + steps].diagonal(dim1=-2, dim2=-1).expand(keys.shape[0], -1)
        out = attend_exactly(query, *self._store_and_dequantize(keys, values, real), mask, scaling)
        if self.group.probe is not None:
            self.group.probe(self, self.group.plan, query, keys, values, out, scaling)
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

    def _store(self, plan: StepPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the new tokens of a step, flushing what the plan says. Nothing is encoded twice."""
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
        self.columns = plan.start + plan.num_columns

    @no_gradients
    def _store_and_dequantize(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None):
        """The fallback's step: K and V [B, H, columns, d] as a plain cache would return them, pads where they were."""
        start, steps = self.columns, keys.shape[2]
        plan = self._plan(steps, keys.shape[0], real)
        if steps == 1:
            self._store(plan, keys, values)
            old_k, old_v, _ = self.stored(plan.after)
            start = plan.start + 1
        else:
            old_k, old_v, _ = self.stored(plan.before)
            self._store(plan, keys, values)
        if self.group.has_pads:
            index = self.group.column_to_token()[:, None, :start, None].to(self.device)
            if old_k.shape[2] == 0:  # only pads so far: any finite vector does, the mask hides it
                old_k, old_v = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (keys, values))
            old_k = old_k.gather(2, index.expand(*old_k.shape[:2], -1, old_k.shape[3]))
            old_v = old_v.gather(2, index.expand(*old_v.shape[:2], -1, old_v.shape[3]))
        if steps == 1:
            return old_k, old_v
        return torch.cat([old_k, keys], 2), torch.cat([old_v, values], 2)
