"""Where a decode step's time goes, part by part: a clock on a CPU, CUDA events on a GPU (inside a CUDA graph).

The parts, and how a step is cut into them: `step_parts`.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .. import kernels
from ..cache import PagedPQCache
from ..config import CacheConfig
from ..errors import ConfigError
from ..kernels import ops
from ..kernels.backend import decode_part
from ..model_runs import cudnn_attention_off
from ..quantization import Codebooks
from .decode_steps import SDPA, Step, captured, decode_step
from .filled_caches import filled_buffers, filled_dynamic, filled_paged
from .step_parts import FUSED, PARTS, EventWatch, Watch, cuts

if TYPE_CHECKING:
    import pandas as pd

WARM_UP = 3


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
            waits for the host, and the time of a part holds that waiting; cuDNN attention is off then, since it would
            build a plan for every length of a cache that grows.

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
    watch = EventWatch(external=graph) if on_gpu else Watch()
    step = decode_step(model, cache, attention, context)
    try:
        with nullcontext() if graph else cudnn_attention_off():
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
        "how": "CUDA graph, events" if graph else "eager, events, no cuDNN attention" if on_gpu else "eager, clock",
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


def _pair(
    model: PreTrainedModel, cache: Cache, step: Step, attention: str, watch: Watch, graph: bool
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

        with cuts(model, cache, attention, watch, calls):
            timed = captured(cut)
        return lambda: _milliseconds(plain, watch), lambda: _milliseconds(timed, watch), calls
    _milliseconds(lambda: _empty(watch), watch)
    watch.calibrate()

    def measured() -> float:
        def cut() -> None:
            with watch:
                step()

        with cuts(model, cache, attention, watch, calls):
            return _milliseconds(cut, watch)

    return lambda: _milliseconds(step, watch), measured, calls


def _empty(watch: Watch) -> None:
    with watch:
        for _ in range(64):
            watch.mark()


def _replayed(function: Callable[[], None]) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()


def _milliseconds(function: Callable[[], Any], watch: Watch) -> float:
    watch.wait()
    begin = time.perf_counter()
    function()
    watch.wait()
    return (time.perf_counter() - begin) * 1e3


def _measure(
    plain: Callable[[], float], timed: Callable[[], float], watch: Watch, steps: int, page: int
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


def _split_fused(parts: dict[str, float], calls: list[tuple], watch: Watch) -> None:
    """Take from the fused kernel what its calls cost without codes, and of a whole step what they cost without maps and
    without storing; in place."""
    if not calls:
        return
    whole_step = calls[0][0] is ops.step_
    at = (9, 10) if whole_step else (4,)  # where the lengths are
    exact_only = torch.tensor([1, 0, 1], dtype=torch.int32, device=calls[0][1][at[0]].device)
    less = [(run, [x * exact_only if i in at else x for i, x in enumerate(args)]) for run, args in calls]
    kinds = {FUSED: calls}
    if whole_step:
        plain = [(run, [*args[:17], *(None,) * 7, 0]) for run, args in less]  # no maps, no anchors
        kinds |= {"maps": less, "store": plain}
        less = [(ops.decode, decode_part(args)) for _, args in plain]
    kinds["exact tokens"] = less
    times = [_all_calls(these, watch) for these in kinds.values()]
    scale, left = parts[FUSED] / times[0], times[0]
    for part, without in zip(kinds, [*times[1:], 0.0], strict=True):  # each kind costs what it takes to do the next
        parts[part] = max(0.0, left - without) * scale
        left = min(left, without)


def _all_calls(calls: list[tuple], watch: Watch) -> float:
    """Time of the calls one after the other, in any unit."""

    def run() -> None:
        for function, args in calls:
            function(*args)

    if isinstance(watch, EventWatch):
        from .decode_bench import Timer

        return Timer(replays=10)(run)
    return statistics.median(_milliseconds(run, watch) for _ in range(5))
