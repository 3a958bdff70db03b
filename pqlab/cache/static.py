"""Static mode: fixed capacity and shapes, so that a decode step can be captured in a CUDA graph or compiled."""

from __future__ import annotations

import logging

import torch
from transformers.utils import is_torchdynamo_compiling

from .. import kernels
from ..errors import UnsupportedModelError
from ..kernels import dispatch
from ..kernels.backend import StepShape
from .gradients import no_gradients
from .layer import PagedPQLayer
from .static_sequences import StaticGroup

log = logging.getLogger("pqlab")


class StaticPagedPQLayer(PagedPQLayer):
    """A `PagedPQLayer` whose decode step is tensors only; chunks go the eager way.

    Keys are fitted to a sequence by a chunk that codes its first tokens: a prompt of a page more than R and the sinks.
    Where a captured step is the first to code any, they stay as they are, which is said.
    """

    is_croppable = False
    is_compileable = True  # unless `allow_capture` finds otherwise
    is_static = True
    is_warm = has_said = False
    follows_exact = False  # exact layers are in front of this one, the first that is quantized; set by the cache
    group: StaticGroup

    def allow_capture(self, dtype: torch.dtype, query_heads: int) -> str | None:
        """Build what a step of this layer needs; where that leaves no step that a CUDA graph can hold, say why, and
        have `generate` run steps as they are.

        Args:
            dtype, query_heads: of the model's attention.
        """
        k, v = self.codec.k, self.codec.v
        group = query_heads // k.num_heads
        shape = (k.head_dim, k.num_subspaces, k.nbits, v.num_subspaces, v.nbits, group, dtype)
        step = StepShape(*shape, anchored=k.anchors is not None)
        why = dispatch.uncapturable(self.group.device, step)
        self.is_compileable = why is None
        return why

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.batch_size = key_states.shape[0]
        if anchors := self.codec.k.anchors:  # of all spans that fit, since a captured step cannot ask for more
            self.turns = anchors.turns(-(-self.group.capacity // anchors.span))
        if not is_torchdynamo_compiling():
            sides = [(side.centroids, side.forward, side.backward) for side in (self.codec.k, self.codec.v)]
            buffers = (self.sink_k, self.sink_v, self.window_k, self.window_v, self.k_pages, self.v_pages)
            fit = () if self.fit is None else (self.fit.scale, self.fit.shift)
            turns = () if self.turns is None else (self.turns,)
            for tensor in (*buffers, *fit, *turns, *(t for side in sides for t in side if t is not None)):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        attention = self.config._attn_implementation
        if attention != "pqlab":
            raise UnsupportedModelError(
                f'a static cache needs model.set_attn_implementation("pqlab"), it is "{attention}"'
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length > 1 and not self.is_initialized:  # the first prompt, whose mask is mostly needless at this size
            return query_length, 0
        return self.group.capacity, 0

    def get_seq_length(self):
        return self.group.position if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.group.capacity

    def reset(self) -> None:
        """Forget the tokens; the buffers keep their addresses."""
        self.pending, self.columns = None, 0
        if self.fit is not None:
            self.fit.reset()

    @no_gradients
    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        if query.shape[2] > 1 or not self.group.num_rows or self.group.plan is not None:
            keys, values = pending = self._take_pending()
            self.columns = self.group.begin_chunk(query.shape[2], self.is_first, self.follows_exact)
            self.pending = pending
            out = super().attend(query, mask, scaling)
            self._warm_up(query[:, :, -1:], keys[:, :, -1:], values[:, :, -1:], scaling)
            if self.is_last:
                self._say_unfitted()
                self.group.end_chunk()
            return out
        pending = self._take_pending()
        if self.is_first:
            self.group.begin_decode(query.shape[0], self.follows_exact)
            self.group.advance()
        out = self._step(query, *pending, self.group.before, self.group.lengths, scaling)
        if self.is_last:
            self.group.end_decode()
        return out

    def _refused(self) -> None:
        self.group.is_midway |= self.follows_exact

    def _say_unfitted(self) -> None:
        """Once a cache: that captured steps will be the first to code a sequence, and cannot fit its keys."""
        if self.fit is None or self.has_said or all(self.group.coded(row) for row in range(self.group.num_rows)):
            return
        self.has_said = True
        enough = self.group.config.num_sinks + self.group.config.window_length
        log.warning(
            "static mode: the prompt is too short for its keys to be fitted, they are coded as they are; %d tokens are "
            'enough, or set mode="eager"',
            enough,
        )

    def _warm_up(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> None:
        """Run a decode step's operation once, with no token to store.

        Kernels are built and backends make what they keep (workspaces, prepared codebooks) at the first call; inside
        a graph capture that memory would belong to the graph.
        """
        if self.is_warm:
            return
        self.is_warm = True
        self._step(query, keys, values, self.group.lengths, self.group.lengths, scaling)
        if query.is_cuda:  # it asked for other kernels than `allow_capture` expected where a model was cast since
            kernels.wait()
