"""Time of a whole model, paged PQ beside exact attention: per output token, and to the first one.

The model has random weights and a cache filled with random tokens: speed does not depend on what they say. Cases:

    paged      PagedPQCache in static mode, flushes included, as a graph; codebooks with maps, as calibration makes them
    plan ..    the same with M and nbits by layer and side as a plan has them (--plan), stretched over the layers
    exact ...  K and V in static buffers of exactly the context, with each exact attention torch offers, as a graph
    none       the same graph without attention and cache: what everything else costs
    compiled   any of these with the model compiled by inductor before it is captured
    ... eager  without a graph: DynamicCache + sdpa, and PagedPQCache in eager mode; on a GPU the exact one again with
               cuDNN attention off (`model_runs.cudnn_attention_off` says why), and the faster of both counts
    prefill .. a prompt of the context's length, from its ids to the first new token (--prefill)
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .. import kernels
from ..arguments import add_device, add_json, input_file, whole
from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..evaluation.plan import Plan
from ..model_runs import cudnn_attention_off
from ..models.load import check_device
from ..quantization import SPAN, Codebooks, attention_geometry
from ..results.provenance import commit, device_name, today, versions
from ..transformers_api import cache_argument
from .decode_steps import EXACT_BACKENDS, NONE, Step, decode_step, exact_step, refusals_unsaid, time_graph
from .filled_caches import ROOM, filled_buffers, filled_dynamic, filled_paged
from .random_models import SHAPES, random_model

HELP = "One row, random weights and tokens: fp16 on a GPU, where a step is one CUDA graph, and fp32 on a CPU."
_WARM_TURNS, _TURNS = 3, 9
PREFILLS = 4
"""Prompts of each kind that are read in turns; the first of them is not counted."""


@dataclass
class Timing:
    case: str
    milliseconds: float | None
    note: str = ""


def bench_model(
    shape: str,
    context: int,
    *,
    dtype=torch.float16,
    device="cuda",
    eager: bool = True,
    compiled: bool = True,
    plans: Mapping[str, Plan] | None = None,
) -> Iterator[Timing]:
    """Milliseconds a token of a model shape of `SHAPES` at `context` tokens, batch 1: each case when it is measured,
    eager ones together at the end.

    Args:
        plans: by name, each another case; of whatever model.
    """
    model = random_model(shape, context + ROOM, dtype, device)

    def measure(cases: Mapping[str, Callable[[], Step]], clock: Callable[..., Sequence[float]]) -> Iterator[Timing]:
        """The cases together; `clock` gives the milliseconds of steps."""
        steps: dict[str, Step] = {}
        times: dict[str, float] = {}
        refused: dict[str, str] = {}  # an exact attention that does not take these shapes is a row, not the end
        with _hints_unsaid():
            for case, make in cases.items():
                try:
                    step = make()
                    step()  # kernels are built for what they are asked
                    kernels.wait()
                    steps[case] = step
                except Exception as error:
                    refused[case] = _first_line(error)
            try:
                times = dict(zip(steps, clock(*steps.values()), strict=True))
            except Exception as error:
                refused |= dict.fromkeys(steps, _first_line(error))
        steps.clear()
        step = None
        torch._dynamo.reset()  # compiled graphs hold caches
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield from (Timing(case, times.get(case), refused.get(case, "")) for case in cases)

    def as_graph(case: str, make: Callable[[], Step], note: str = "") -> Iterator[Timing]:
        def clock(*steps: Step) -> list[float]:
            return [time_graph(step) for step in steps] if device == "cuda" else _in_turns(steps, device)

        return (replace(timing, note=timing.note or note) for timing in measure({case: make}, clock))

    def paged(mode: str, how: bool, maps: bool = True, plan: Plan | None = None, span: int = 0) -> Step:
        pq = stretched(plan, model) if plan else PQConfig()
        books = Codebooks.random(model.config, pq=pq, maps=maps, span=span)
        cache = filled_paged(model, context, CacheConfig(mode=mode), codebooks=books)
        return decode_step(model, cache, "pqlab", context, compiled=how)

    def as_graphs(how: bool, exact: Sequence[str]) -> Iterator[Timing]:
        end = " compiled" if how else ""
        yield from as_graph(f"none{end}", lambda: decode_step(model, filled_buffers(model, 0), NONE, context, how))
        for name in exact:
            yield from as_graph(f"exact {name}{end}", lambda name=name: exact_step(model, context, name, how))
        yield from as_graph(f"paged{end}", lambda: paged("static", how))
        yield from as_graph(f"paged, anchors{end}", lambda: paged("static", how, span=SPAN))
        yield from as_graph(f"paged, no maps{end}", lambda: paged("static", how, maps=False))
        for name, plan in (plans or {}).items():
            note = f"{plan.bits:.4g} bits an element"
            name = name if name.startswith("plan") else f"plan {name}"
            yield from as_graph(f"{name}{end}", lambda plan=plan: paged("static", how, plan=plan), note)

    yield from as_graphs(False, list(EXACT_BACKENDS) if device == "cuda" else ("flash", "math"))
    if compiled:
        yield from as_graphs(True, ("flash", "cudnn"))  # the others are far behind already
    if eager:  # in turns: a host's speed changes within minutes, and it is what these wait for
        exact = cache(lambda: decode_step(model, filled_dynamic(model, context), "sdpa", context))
        cases = {"exact eager": exact}
        if device == "cuda":
            cases["exact eager, no cuDNN"] = lambda: _without_cudnn(exact())
        cases["paged eager"] = lambda: paged("eager", False)
        yield from measure(cases, lambda *steps: _in_turns(steps, device))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:120]}"


def _without_cudnn(step: Step) -> Step:
    def run() -> torch.Tensor:
        with cudnn_attention_off():
            return step()

    return run


@contextmanager
def _hints_unsaid() -> Iterator[None]:
    """Leave out what torch warns of and a row says anyway, and inductor's advice to round float32 products."""
    with refusals_unsaid():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        yield


def stretched(plan: Plan, model: PreTrainedModel) -> dict[int, tuple[PQConfig, PQConfig]]:
    """(K, V) settings of the model's layers: those of the plan's at the same depth, as many bits an element."""
    given, wanted = plan.codebooks.layers, attention_geometry(model)
    settings = {}
    for place, (layer, (_, d)) in enumerate(wanted.items()):
        codec = list(given.values())[place * len(given) // len(wanted)]
        sides = (codec.k, codec.v)
        settings[layer] = tuple(PQConfig(M=side.num_subspaces * d // side.head_dim, nbits=side.nbits) for side in sides)
    return settings


def _whole(plan: Plan) -> Plan:
    if plan.codebooks.exact:
        raise ConfigError(f"the plan leaves layers {sorted(plan.codebooks.exact)} exact; give one without")
    return plan


def bench_prefill(shape: str, context: int, *, dtype=torch.float16, device="cuda") -> list[Timing]:
    """Milliseconds from a prompt of `context` random tokens to the first new one, the kinds of cache in turns.

    Exact attention is as torch chooses it: a prompt is one length, so cuDNN builds one plan, in the turn that is not
    counted.
    """
    model = random_model(shape, context + 1, dtype, device)
    ids = torch.randint(model.config.vocab_size, (1, context), device=device)
    books = Codebooks.random(model.config, pq=PQConfig(), maps=True)

    def paged(mode: str) -> Cache:
        return PagedPQCache(model, books, CacheConfig(mode=mode), context=context + 1)

    kinds: dict[str, tuple[str, Callable[[], Cache]]] = {
        "prefill exact": ("sdpa", lambda: DynamicCache(config=model.config)),
        "prefill paged": ("pqlab", lambda: paged("eager")),
        "prefill paged static": ("pqlab", lambda: paged("static")),
    }
    for attention, make in kinds.values():
        model.set_attn_implementation(attention)
        _first_token(model, make(), ids[:, : min(context, 1024)])
        kernels.wait()  # for what the short prompt had built
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, int] = {}
    for turn in range(PREFILLS):
        for kind, (attention, make) in kinds.items():
            model.set_attn_implementation(attention)
            cache = make()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            _first_token(model, cache, ids)
            if turn:
                times[kind].append((time.perf_counter() - begin) * 1e3)
            if device == "cuda":
                peaks[kind] = torch.cuda.max_memory_allocated()
            del cache
    rows = []
    for kind, measured in times.items():
        over = statistics.median(measured) / statistics.median(times["prefill exact"]) - 1
        notes = [f"{over:+.1%} beside exact"] if kind != "prefill exact" else []
        notes += [f"peak {peaks[kind] / 2**30:.1f} GiB with weights"] if kind in peaks else []
        rows.append(Timing(kind, statistics.median(measured), ", ".join(notes)))
    return rows


@torch.inference_mode()
def _first_token(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> int:
    logits = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())  # waits for the device


def _in_turns(steps: Sequence[Step], device: str) -> list[float]:
    """Median of the milliseconds of each step, a call from Python, after warm ones."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(_WARM_TURNS + _TURNS):
        for step, found in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= _WARM_TURNS:
                found.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(found) for found in times]


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = f"{parser.description}.\n\n{HELP}"
    add("--shape", nargs="+", default=["7b", "8b"], choices=list(SHAPES), help="Llamas with random weights")
    add(
        "--context",
        nargs="+",
        type=whole(),
        default=[32768],
        metavar="TOKENS",
        help="tokens in the cache or the prompt",
    )
    add_device(parser, numbered=False)
    add("--prefill", action="store_true", help="the time to the first token instead of that per token")
    add("--no-eager", action="store_true", help="on a GPU: only what runs as one CUDA graph")
    add("--no-compiled", action="store_true", help="leave out the rows compiled by inductor")
    add("--plan", nargs="+", type=input_file, default=[], metavar="FILE", help="files of `pqlab plan`, a case each "
        "(default: none)")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Time every case, print a table (and JSON); the exit status. Raises for a file that is no plan."""
    check_device(args.device)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    plans = {path.stem: _whole(Plan.load(path)) for path in args.plan}
    records = []
    for shape in args.shape:
        for context in args.context:
            what = "to the first token" if args.prefill else "a token"
            print(f"{shape}, {context:,} tokens, batch 1: ms {what}", flush=True)
            if args.prefill:
                timings = bench_prefill(shape, context, dtype=dtype, device=args.device)
            else:
                options = {"eager": not args.no_eager, "compiled": not args.no_compiled, "plans": plans}
                timings = bench_model(shape, context, dtype=dtype, device=args.device, **options)
            for timing in timings:
                ms = "-" if timing.milliseconds is None else f"{timing.milliseconds:.3f}"
                print(f"  {timing.case:<26}{ms:>10}  {timing.note}", flush=True)
                records.append({"shape": shape, "context": context, **asdict(timing)})
    if args.json:
        about = {"benchmark": "model", "device": device_name(args.device), "dtype": str(dtype).removeprefix("torch.")}
        about |= {"date": today(), "commit": commit(), "versions": versions()}
        print(json.dumps({**about, "records": records}))
    return 0
