"""One quantized layer as transformers sees it: tokens are handed over, planned for, attended to, and stored.

What it keeps, and how that is written and read, is `layer_storage.LayerStorage`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ..attention import NAME, handed_over
from ..errors import KernelMissingError, UnsupportedModelError
from ..kernels import dispatch
from ..kernels.backend import EXACT, current_setting
from ..kernels.reference import attend_dense, merge
from .exact_attention import attend_exactly, chunk_mask
from .exact_buffers import ExactBuffers
from .gradients import no_gradients
from .layer_states import LayerStates
from .layer_storage import LayerStorage
from .sequences import SequenceGroup, StepPlan, plain_state

if TYPE_CHECKING:
    from ..quantization import LayerCodec

FEW_QUERIES = 16
"""Up to this many new tokens each reads the codes with the fused kernel; beyond it dequantizing once is cheaper."""


class _Handover(NamedTuple):
    """New tokens between `update` (which is not given the mask) and `attend` (which is)."""

    keys: torch.Tensor  # [B, H, S, d]
    values: torch.Tensor


class PagedPQLayer(LayerStorage, CacheLayerMixin):
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
        CacheLayerMixin.__init__(self)
        LayerStorage.__init__(self, index, group, codec, k_pages, v_pages, exact_buffers)
        self.config = config
        self.is_first = self.is_last = False  # of the quantized layers; set by the cache
        self.leading: LayerStates | None = None  # given to the first of the quantized layers by the cache
        self.columns = 0
        self.pending: _Handover | None = None

    # -- transformers' side -------------------------------------------------------------------------------------

    @plain_state
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate sinks and window for the batch, dtype and device of the first tokens, [B, H, S, d]."""
        self._allocate(key_states, value_states)
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
        if attention != NAME and EXACT in current_setting().forbidden:
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
        if attention == NAME:
            self.pending = _Handover(key_states, value_states)
            return handed_over(key_states, self), value_states
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
        self._drop()

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

    def _store(self, plan: StepPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the new tokens of a step that the layer has attended to."""
        self._write(plan, keys, values)
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
