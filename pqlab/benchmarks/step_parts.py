"""What a decode step is cut into, and the watches that tell its parts' time: a clock, or CUDA events.

A step is cut at the boundaries of the model's modules, its rotary function, its attention, and pqlab's operations;
every moment belongs to the innermost part that is open, so the parts add up to the step. Parts:

    embedding, norms, mlp, lm head   modules
    projection     q, k, v and o
    rotary         cosines and sines, and their application to q and k
    store          the new token's K and V into the cache (exact: concatenation or a buffer; paged: the window)
    flush          encoding of a page that leaves the window; on a GPU it is a part of the same kernel as `store`
    maps           into the codebooks' space and back; on a GPU parts of the kernels of `store` and of the attention
    codes          attention over codes
    exact tokens   sinks and window, combining, and what a call costs by itself: the share of the attention's time that
                   calls without any codes take (they are one kernel, so this is a second measurement). Where a step
                   is one kernel altogether, store and maps are measured in the same way
    attention      exact attention
    bookkeeping    of the paged cache: the plan of a step, page table, masks, checks and dispatch of the operations
    rest           residual sums, reshaping, Python and transformers between the modules
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache import PagedPQCache
from ..kernels import dispatch, ops, reference

PARTS = (
    "embedding", "norms", "projection", "rotary", "maps", "store", "flush", "codes", "exact tokens", "attention",
    "bookkeeping", "mlp", "lm head", "rest",
)  # fmt: skip
FUSED = "codes"
"""What the fused kernel's time is called until the other parts that it does are taken out of it."""


class Watch:
    """Time between marks, by the part that was open; measures while it is entered. This one reads a clock."""

    def __init__(self) -> None:
        self.marks: list[tuple[Any, str]] = []
        self.open = ["rest"]
        self.on = False
        self.cost = 0.0

    def __enter__(self) -> Watch:
        self.marks, self.open, self.on = [], ["rest"], True
        self.mark()
        return self

    def __exit__(self, *exc: object) -> None:
        self.mark()
        self.on = False

    def enter(self, part: str) -> None:
        if self.on:
            self.open.append(part)
            self.mark()

    def leave(self) -> None:
        if self.on:
            self.open.pop()
            self.mark()

    def mark(self) -> None:
        self.marks.append((self.now(), self.open[-1]))

    def now(self) -> Any:
        return time.perf_counter()

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds."""
        return (last - first) * 1e3

    def wait(self) -> None:
        """Until everything that was asked for has been done."""

    def intervals(self) -> list[tuple[str, float]]:
        """Parts and milliseconds, in order."""
        return [(part, self.between(a, b)) for (a, part), (b, _) in pairwise(self.marks)]

    def read(self) -> dict[str, float]:
        """Milliseconds of every part, without what the marks cost themselves."""
        parts: dict[str, float] = defaultdict(float)
        for part, milliseconds in self.intervals():
            parts[part] += max(0.0, milliseconds - self.cost)
        return parts

    def calibrate(self) -> None:
        """Take the intervals as empty ones: what a mark costs."""
        self.cost = statistics.median(milliseconds for _, milliseconds in self.intervals())

    def wrap(self, function: Callable, part: str) -> Callable:
        """The function as a part."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed


class EventWatch(Watch):
    """Events of a GPU. Those of a graph (`external`) become nodes of it, and every replay records them anew."""

    def __init__(self, external: bool) -> None:
        super().__init__()
        self.external = external

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=self.external)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return first.elapsed_time(last)

    def wait(self) -> None:
        torch.cuda.synchronize()


@contextmanager
def cuts(model: PreTrainedModel, cache: Cache, attention: str, watch: Watch, calls: list[tuple]) -> Iterator[None]:
    """Everything that is a part tells the watch while this is open.

    Args:
        attention: name of the attention implementation that the step runs under.
        calls: the fused kernel's calls of one step are put here: (function, arguments).
    """
    with ExitStack() as stack:
        for module, part in _modules(model):
            enter = module.register_forward_pre_hook(lambda *_, part=part: watch.enter(part))
            leave = module.register_forward_hook(lambda *_: watch.leave())
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        for source in {type(module).__module__ for module, _ in _attentions(model)}:
            if hasattr(sys.modules[source], "apply_rotary_pos_emb"):
                _replace(stack, sys.modules[source], "apply_rotary_pos_emb", watch, "rotary")
        paged = isinstance(cache, PagedPQCache)
        original = ALL_ATTENTION_FUNCTIONS[attention]
        AttentionInterface.register(attention, watch.wrap(original, "bookkeeping" if paged else "attention"))
        stack.callback(AttentionInterface.register, attention, original)
        if not paged:
            _replace(stack, cache, "update", watch, "store")
            yield
            return

        def kept(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if watch.on and len(calls) < len(cache.quantized_layers):
                    calls.append((function, args))
                return function(*args, **kwargs)

            return call

        _replace(stack, reference, "apply_map", watch, "maps")
        for backend in dispatch.backends().values():
            _replace(stack, backend, "append_", watch, "store")
            _replace(stack, backend, "encode_pages_", watch, "flush")
            if not whole_step(model):
                _replace(stack, backend, "decode", watch, FUSED, kept(backend.decode))
        if whole_step(model):
            _replace(stack, ops, "step_", watch, FUSED, kept(ops.step_))
        yield


def whole_step(model: PreTrainedModel) -> bool:
    """Whether the backend of this model's device does a step in one kernel, which cannot be cut."""
    return dispatch.backends()[dispatch.chosen("step_", model.device.type)[0]].fuses_step


def _replace(stack: ExitStack, owner: Any, name: str, watch: Watch, part: str, inner: Callable | None = None) -> None:
    """Put a timed function in the place of an attribute until the stack is closed."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, watch.wrap(inner or original, part))
    stack.callback(setattr, owner, name, original) if own else stack.callback(delattr, owner, name)


def _attentions(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Attention modules and the decoder layers that they are in."""
    return [
        (module, model.get_submodule(name.rpartition(".")[0]))
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx")
    ]


def _modules(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Modules that are parts, each once."""
    found = {model.get_input_embeddings(): "embedding", model.get_output_embeddings(): "lm head"}
    for module in model.modules():
        name = type(module).__name__
        if "RotaryEmbedding" in name:
            found[module] = "rotary"
        elif "Norm" in name:
            found.setdefault(module, "norms")
    for attention, layer in _attentions(model):
        for parent, part in ((attention, "projection"), (layer, "mlp")):
            for child in parent.children():
                if child is not attention and any(True for _ in child.parameters()):
                    found.setdefault(child, part)
    return [(module, part) for module, part in found.items() if module is not None]
