"""Where a decode step's time goes, part by part: a clock on a CPU, CUDA events on a GPU (inside a CUDA graph).

A step is cut at the boundaries of the model's modules, its rotary function, its attention, and pqlab's operations;
every moment belongs to the innermost part that is open, so the parts add up to the step. Parts:

    embedding, norms, mlp, lm head   modules
    projection     q, k, v and o
    rotary         cosines and sines, and their application to q and k
    store          the new token's K and V into the cache (exact: concatenation or a buffer; paged: the window)
    flush          encoding of a page that leaves the window; on a GPU it is a part of the same kernel as `store`
    maps           into the codebooks' space and back
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
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import kernels
from ..cache import PagedPQCache
from ..config import CacheConfig
from ..errors import ConfigError
from ..kernels import ops, reference
from ..kernels.backend import Backend, decode_part
from ..quantization import Codebooks
from .decode_steps import SDPA, Step, captured, decode_step
from .filled_caches import filled_buffers, filled_dynamic, filled_paged

if TYPE_CHECKING:
    import pandas as pd

PARTS = (
    "embedding", "norms", "projection", "rotary", "maps", "store", "flush", "codes", "exact tokens", "attention",
    "bookkeeping", "mlp", "lm head", "rest",
)  # fmt: skip
WARM_UP = 3
_FUSED = "codes"
"""What the fused kernel's time is called until the exact tokens are taken out of it."""


def breakdown(
    model: PreTrainedModel,
    kind: str | Callable[[], Cache] = "paged",
    context: int = 1024,
    steps: int | None = None,
    *,
    codebooks: Codebooks | None = None,
    config: CacheConfig | None = None,
    graph: bool | None = None,
) -> pd.DataFrame:
    """Milliseconds of every part of a decode step behind `context` tokens, batch 1.

    Steps with and without measuring take turns, so that their difference is what the measuring costs; a mean over
    whole pages holds flushes in their true proportion.

    Args:
        kind: "paged" or "exact", over random tokens; or a function that makes a cache which holds `context` tokens.
        steps: measured steps; default: a page of the cache.
        codebooks, config: of "paged"; default: random codebooks with maps, default settings.
        graph: measure inside a CUDA graph; default: on a GPU, for "paged" and "exact". Eagerly, a small batch on a GPU
            waits for the host, and the time of a part holds that waiting.

    Returns:
        DataFrame of the parts that this step has, in the order of `PARTS`: part, milliseconds (mean of the steps),
        share (of their sum). `.attrs`: step_milliseconds (of a step without measuring), sum_milliseconds (of
        the parts), overhead (of measured steps over others, as a share), steps, context, kind, how.

    Raises:
        ConfigError: a graph is asked for without a GPU or of a cache whose shapes change.
        UnsupportedModelError: a model with layers that are no full attention needs a function for `kind`.
    """
    import pandas as pd

    on_gpu = model.device.type == "cuda"
    graph = on_gpu and isinstance(kind, str) if graph is None else graph
    if graph and not on_gpu:
        raise ConfigError("graph=True needs a model on a GPU; leave it out on a CPU")
    page = (config or CacheConfig()).page_size
    steps = page if steps is None else steps
    room = 2 * steps + 4 * WARM_UP + 8
    cache, attention = _cache(model, kind, context, codebooks, config, graph, room)
    if graph and not cache.is_compileable:
        raise ConfigError(f'a graph needs fixed shapes: a cache of mode="static", not {type(cache).__name__}')
    before = model.config._attn_implementation
    watch = _EventWatch(external=graph) if on_gpu else _Watch()
    step = decode_step(model, cache, attention, context)
    try:
        for _ in range(WARM_UP):
            step()  # kernels are built for what they are asked
            kernels.wait()
        plain, timed, calls = _pair(model, cache, step, attention, watch, graph)
        plain_ms, timed_ms, parts = _measure(plain, timed, watch, steps, page)
        _split_fused(parts, calls, watch)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    found = [(part, parts[part]) for part in PARTS if part in parts]
    frame = pd.DataFrame(found, columns=["part", "milliseconds"])
    total = float(frame.milliseconds.sum())
    frame["share"] = frame.milliseconds / total
    frame.attrs |= {
        "kind": kind if isinstance(kind, str) else type(cache).__name__, "context": context, "steps": steps,
        "step_milliseconds": plain_ms, "sum_milliseconds": total, "overhead": timed_ms / plain_ms - 1,
        "how": "CUDA graph, events" if graph else "eager, CUDA events" if on_gpu else "eager, clock",
    }  # fmt: skip
    return frame


def _cache(
    model: PreTrainedModel, kind: str | Callable[[], Cache], context: int, codebooks: Codebooks | None,
    config: CacheConfig | None, graph: bool, room: int,
) -> tuple[Cache, str]:  # fmt: skip
    """The filled cache, and the attention that reads it."""
    if kind == "paged":
        settings = replace(config or CacheConfig(), mode="static" if graph else "eager")
        return filled_paged(model, context, settings, codebooks=codebooks, room=room), "pqlab"
    if kind == "exact":
        return (filled_buffers(model, context), SDPA) if graph else (filled_dynamic(model, context), "sdpa")
    if isinstance(kind, str):
        raise ConfigError(f'kind = {kind!r} is unknown; "paged", "exact", or a function that makes a cache')
    cache = kind()
    current = model.config._attn_implementation
    if isinstance(cache, PagedPQCache):
        return cache, "pqlab"
    return cache, "sdpa" if current == "pqlab" else current


# -- cutting a step into parts ----------------------------------------------------------------------------------------


class _Watch:
    """Time between marks, by the part that was open; measures while it is entered. This one reads a clock."""

    def __init__(self) -> None:
        self.marks: list[tuple[Any, str]] = []
        self.open = ["rest"]
        self.on = False
        self.cost = 0.0

    def __enter__(self) -> _Watch:
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


class _EventWatch(_Watch):
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
def _cuts(
    model: PreTrainedModel, cache: Cache, attention: str, watch: _Watch, calls: list[tuple]
) -> Iterator[None]:  # fmt: skip
    """Everything that is a part tells the watch while this is open; the fused kernel's calls of a step are kept."""
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
        _replace(stack, reference, "apply_map", watch, "maps")
        for backend in ops.backends().values():
            _replace(stack, backend, "append_", watch, "store")
            _replace(stack, backend, "encode_pages_", watch, "flush")
            name = "step_" if backend.fuses_step else "decode"
            run = getattr(backend, name)

            def kept(*args: Any, run: Callable = run, backend: Backend = backend, **kwargs: Any) -> Any:
                if watch.on and len(calls) < len(cache.quantized_layers):
                    calls.append((run, args, backend))
                return run(*args, **kwargs)

            _replace(stack, backend, name, watch, _FUSED, kept)
        yield


def _replace(stack: ExitStack, owner: Any, name: str, watch: _Watch, part: str, inner: Callable | None = None) -> None:
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


# -- measuring -------------------------------------------------------------------------------------------------------


def _pair(
    model: PreTrainedModel, cache: Cache, step: Step, attention: str, watch: _Watch, graph: bool
) -> tuple[Callable[[], float], Callable[[], float], list[tuple]]:
    """Functions that run a step without and with measuring, in milliseconds; the fused kernel's calls of one step."""
    calls: list[tuple] = []
    if graph:
        plain = captured(step)
        _replayed(lambda: _empty(watch))
        watch.calibrate()

        def cut() -> torch.Tensor:
            if not torch.cuda.is_current_stream_capturing():  # warming up
                return step()
            with watch:
                return step()

        with _cuts(model, cache, attention, watch, calls):
            timed = captured(cut)
        return lambda: _milliseconds(plain, watch), lambda: _milliseconds(timed, watch), calls
    _milliseconds(lambda: _empty(watch), watch)
    watch.calibrate()

    def measured() -> float:
        def cut() -> None:
            with watch:
                step()

        with _cuts(model, cache, attention, watch, calls):
            return _milliseconds(cut, watch)

    return lambda: _milliseconds(step, watch), measured, calls


def _empty(watch: _Watch) -> None:
    with watch:
        for _ in range(64):
            watch.mark()


def _replayed(function: Callable[[], None]) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()


def _milliseconds(function: Callable[[], Any], watch: _Watch) -> float:
    watch.wait()
    begin = time.perf_counter()
    function()
    watch.wait()
    return (time.perf_counter() - begin) * 1e3


def _measure(
    plain: Callable[[], float], timed: Callable[[], float], watch: _Watch, steps: int, page: int
) -> tuple[float, float, dict[str, float]]:
    """Mean milliseconds of a plain and of a measured step, and of the parts.

    The two take turns, and the turns change once a page: each of them meets every place of a page once in two pages.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    parts: dict[str, float] = defaultdict(float)
    for i in range(2 * steps):
        measured = bool((i + i // page) % 2)
        times[measured].append(timed() if measured else plain())
        if measured:
            for part, milliseconds in watch.read().items():
                parts[part] += milliseconds / steps
    return statistics.fmean(times[False]), statistics.fmean(times[True]), parts


def _split_fused(parts: dict[str, float], calls: list[tuple], watch: _Watch) -> None:
    """Take from the fused kernel what its calls cost without codes, and of a whole step what they cost without maps and
    without storing; in place."""
    if not calls:
        return
    backend = calls[0][2]
    at = (9, 10) if backend.fuses_step else (4,)  # where the lengths are
    exact_only = torch.tensor([1, 0, 1], dtype=torch.int32, device=calls[0][1][at[0]].device)
    less = [(run, [x * exact_only if i in at else x for i, x in enumerate(args)]) for run, args, _ in calls]
    kinds = {_FUSED: [call[:2] for call in calls]}
    if backend.fuses_step:
        plain = [(run, (*args[:17], *(None,) * 4)) for run, args in less]
        kinds |= {"maps": less, "store": plain}
        less = [(backend.decode, decode_part(args)) for _, args in plain]
    kinds["exact tokens"] = less
    times = [_all_calls(these, watch) for these in kinds.values()]
    scale, left = parts[_FUSED] / times[0], times[0]
    for part, without in zip(kinds, [*times[1:], 0.0], strict=True):  # each kind costs what it takes to do the next
        parts[part] = max(0.0, left - without) * scale
        left = min(left, without)


def _all_calls(calls: list[tuple], watch: _Watch) -> float:
    """Time of the calls one after the other, in any unit."""

    def run() -> None:
        for function, args in calls:
            function(*args)

    if isinstance(watch, _EventWatch):
        from .decode_bench import Timer

        return Timer(replays=10)(run)
    return statistics.median(_milliseconds(run, watch) for _ in range(5))
