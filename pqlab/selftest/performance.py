"""Short ratios against exact attention, on this machine: one layer, the whole model, and bytes.

A ratio is what it is; what can fail is that a fused kernel is slower than plain torch over the same codes, or that a
cache holds other bytes than `pqlab.cost` says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from .. import kernels
from ..benchmarks.cpu_bench import exact_contenders, interleaved
from ..benchmarks.decode_bench import Case, Timer, exact_times
from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..cost import CacheCost
from ..kernels import ops, use_backend
from ..memory import readable_bytes
from ..model_runs import attention, cudnn_attention_off, follow
from ..paging.layout import PageLayout
from ..shapes import ModelShape
from .integration import expected_level
from .session import Check, Phase, Session, expect

LAYERS = {"9/3 heads of 64": (9, 3, 64), "32/8 heads of 128": (32, 8, 128), "32/32 heads of 128": (32, 32, 128)}


def checks(session: Session) -> Iterator[Check]:
    for name in LAYERS:
        yield f"one layer, {name}", lambda name=name: one_layer(session, name)
    yield "whole model", lambda: whole_model(session)
    yield "bytes of a cache", lambda: bytes_of_a_cache(session)


def one_layer(session: Session, name: str) -> str:
    """One new token over many: fused decode beside exact attention and beside plain torch over the same codes.

    A call keeps the host busy for longer than a GPU, so that on one both are replays of CUDA graphs.
    """
    heads, kv_heads, d = LAYERS[name]
    device, level = session.device, expected_level(session.device.type)
    on_gpu = device.type == "cuda"
    tokens = session.amount(32768, 131072) if on_gpu else session.amount(4096, 16384)
    dtype = torch.float16 if on_gpu else torch.float32
    call = decode_call(session.generator(name), heads, kv_heads, d, tokens, dtype, device)
    with use_backend(level):
        ops.decode(*call)  # builds the configuration
        kernels.wait()
        case = Case(heads, kv_heads, (tokens,), d // 2, d)
        if level == "cuda":
            times = replayed(lambda: ops.decode(*call), case, Timer(replays=10))
        else:
            times = called(lambda: ops.decode(*call), case, device)
    with use_backend("reference"):
        plain = _median(lambda: ops.decode(*call), device, repeats=5)
    said = (
        f"{level} {1e3 * times.fused:.3f} ms at {tokens:,} tokens, 4 bits, {dtype}: {times.beside_exact}; {times.how}; "
        f"{plain / times.fused:.1f}x plain torch on the same codes ({1e3 * plain:.3f} ms, calls)"
    )
    if level == "reference":
        return f"no fused kernel here: {said}"
    remedy = "see with python -m pqlab doctor which instructions the CPU has, and whether other programs hold its cores"
    expect(times.fused < plain, f"the fused kernel is slower than plain torch: {said}", remedy)
    return said


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's attention to one new token.

    Attributes:
        fused: of the operation over codes.
        exact: of each exact attention, by name; empty where torch has none for these heads.
        how: what was timed.
    """

    fused: float
    exact: dict[str, float]
    how: str

    @property
    def beside_exact(self) -> str:
        """The fastest exact attention beside it, in words."""
        if not self.exact:
            return "torch has no exact attention for these heads"
        name, seconds = min(self.exact.items(), key=lambda item: item[1])
        return f"{seconds / self.fused:.2f}x exact attention ({name}, {1e3 * seconds:.3f} ms)"


def replayed(decode: Callable[[], object], case: Case, timer: Timer) -> LayerTimes:
    """On a GPU: replays of CUDA graphs, as `bench decode` takes them."""
    fused = timer(decode) / 1e6
    exact = {name: microseconds / 1e6 for name, microseconds in exact_times(case, timer).items()}
    return LayerTimes(fused, exact, "replays of CUDA graphs with a cold L2")


def called(decode: Callable[[], object], case: Case, device: torch.device) -> LayerTimes:
    """Elsewhere: ordinary calls, in turns with every exact attention that torch has, as `bench cpu` takes them."""

    def waited(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {"": decode, **exact_contenders(case, device)}
    times = interleaved({name: waited(call) for name, call in calls.items()}, seconds=0.1)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return LayerTimes(medians.pop(""), medians, "ordinary calls in turns")


def whole_model(session: Session) -> str:
    """Milliseconds a token of the real model, eagerly, paged beside exact; on a GPU without cuDNN attention."""
    model, _ = session.loaded
    context, steps = session.amount(700, 4000), session.amount(16, 60)
    ids = session.prompt(context + steps, "whole model")
    make = lambda: PagedPQCache(model, session.codebooks, CacheConfig(), context=context + steps)  # noqa: E731
    with attention(model, "pqlab"):
        follow(model, make(), ids[:, : context + 2], context)
        kernels.wait()
        paged = follow(model, make(), ids, context)
    with attention(model, "sdpa"), cudnn_attention_off():
        exact = follow(model, DynamicCache(config=model.config), ids, context)
    without = ", cuDNN attention off" if session.device.type == "cuda" else ""
    agree = (paged.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean()
    alike = "" if session.found.random else f"; the same next token in {agree:.0%} of {steps + 1} steps"
    expect(torch.isfinite(paged.logits).all(), "a logit is not finite")
    return (
        f"eager steps, {model.dtype}: {1e3 * paged.token_seconds:.1f} ms a token paged, "
        f"{1e3 * exact.token_seconds:.1f} exact{without} ({exact.token_seconds / paged.token_seconds:.2f}x) at "
        f"{context} tokens; prefill {paged.prefill_seconds:.2f} and {exact.prefill_seconds:.2f} s{alike}"
    )


def bytes_of_a_cache(session: Session) -> str:
    """What a filled cache holds, tensor by tensor, beside what `pqlab.cost` computes from the settings."""
    model, _ = session.loaded
    ids = session.prompt(session.amount(700, 4000), "bytes")
    config = CacheConfig()
    cache = PagedPQCache(model, session.codebooks, config, context=ids.shape[1])
    with attention(model, "pqlab"):
        follow(model, cache, ids, ids.shape[1])
    codec = session.codebooks.layer(session.codebooks.layer_ids[0]).k
    held, element = cache.nbytes(), cache.quantized_layers[0].window_k.element_size()
    cost = CacheCost(
        ModelShape.from_config(model.config), PQConfig(M=codec.num_subspaces, nbits=codec.nbits), config,
        context=ids.shape[1], exact_bytes=element,
    )  # fmt: skip
    free = cost.pool_bytes - cost.code_bytes
    wanted = {"codes": cost.code_bytes, "free_pages": free, "exact_tokens": cost.sink_bytes + cost.window_bytes}
    for what, size in wanted.items():
        expect(held[what] == size, f"{what}: the cache holds {held[what]:,} bytes, pqlab.cost says {size:,}")
    total, baseline = held["codes"] + held["exact_tokens"], cost.baseline_bytes
    return (
        f"{readable_bytes(held['codes'])} of codes and {readable_bytes(held['exact_tokens'])} exact at {ids.shape[1]} "
        f"tokens, as pqlab.cost says; {baseline / total:.2f}x less than exact ({readable_bytes(baseline)}, "
        f"{8 * element} bits), {element * 8 / cost.token_bits:.1f}x where the text is long"
    )


def decode_call(
    g: torch.Generator, heads: int, kv_heads: int, d: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple:
    """Arguments of `ops.decode` for one row of `tokens` coded tokens at 4 bits an element, in shuffled pages."""
    m, page_size = d // 2, 64
    pages = tokens // page_size
    shape = (pages, *PageLayout(page_size, kv_heads, m, 8).shape)
    codes = [torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device) for _ in "kv"]
    books = [torch.randn(kv_heads, m, 256, d // m, generator=g).to(device) for _ in "kv"]
    table = torch.randperm(pages, generator=g)[None].int().to(device)
    lengths = torch.tensor([[4, tokens, 128]], dtype=torch.int32, device=device)
    exact = [torch.randn(1, kv_heads, n, d, generator=g).to(device, dtype) for n in (4, 4, 192, 192)]
    q = torch.randn(1, heads, 1, d, generator=g).to(device, dtype)
    return (q, *codes, table, lengths, *books, *exact, 8, 8, d**-0.5)


def _median(call: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Seconds of a call that is warm."""
    times = []
    for i in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


PHASE = Phase(
    "performance",
    "Performance: short ratios against exact attention",
    checks,
    "Timings need a quiet machine: end other programs and run --performance again; --phase2 says whether the kernels "
    "are right.",
)
