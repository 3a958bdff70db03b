"""Time per output token of a whole model, paged PQ beside exact attention, each in one CUDA graph (and eagerly).

The model has random weights and a cache filled with random tokens: speed does not depend on what they say. Cases:

    paged      PagedPQCache in static mode, flushes included, as a graph
    exact ...  K and V in static fp16 buffers of exactly the context, with each exact attention torch offers, as a graph
    none       the same graph without attention and cache: what everything else costs
    compiled   any of these with the model compiled by inductor before it is captured
    ... eager  without a graph: DynamicCache + sdpa, and PagedPQCache in eager mode
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .. import kernels
from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..quantization import Codebooks
from ..transformers_api import cache_argument

SHAPES = {
    "7b": {"num_key_value_heads": 32, "intermediate_size": 11008},
    "8b": {"num_key_value_heads": 8, "intermediate_size": 14336},
    "smollm2": {
        "num_key_value_heads": 3, "intermediate_size": 1536, "hidden_size": 576, "num_attention_heads": 9,
        "num_hidden_layers": 30, "vocab_size": 49152, "head_dim": 64,
    },
    "tiny": {
        "num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 16,
    },
}  # fmt: skip
EXACT_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REPEATS = 30
ROOM = 256
"""Tokens of capacity behind the context: every timed step adds one."""


@dataclass
class Timing:
    case: str
    milliseconds: float | None
    note: str = ""


def bench_model(
    shape: str, context: int, *, dtype=torch.float16, device="cuda", eager: bool = True, compiled: bool = True
) -> list[Timing]:
    """Milliseconds a token of every case for a model shape of `SHAPES` at `context` tokens, batch 1."""
    model = random_model(shape, context + ROOM, dtype, device)
    rows: list[Timing] = []

    def measure(case: str, make: Callable[[], Callable[[], object]], graph: bool) -> None:
        try:
            step = make()
            step()  # kernels are built for what they are asked
            kernels.wait()
            ms = _time_graph(step) if graph and device == "cuda" else _time_eager(step, device)
            rows.append(Timing(case, ms))
        except Exception as error:  # an exact attention that refuses these shapes is a row, not the end
            rows.append(Timing(case, None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"))
        torch._dynamo.reset()  # compiled graphs hold caches
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    def as_graphs(how: str, exact: Sequence[str]) -> None:
        make = partial(_step, model, context=context, compiled=bool(how))
        measure(f"none{how}", lambda: make(_exact_cache(model, 0), "pqlab_bench_none"), graph=True)
        for name in exact:
            measure(f"exact {name}{how}", lambda name=name: _exact_step(model, context, name, make), graph=True)
        measure(f"paged{how}", lambda: make(filled_cache(model, context, "static"), "pqlab"), graph=True)

    as_graphs("", list(EXACT_BACKENDS))
    if compiled:
        as_graphs(" compiled", ("flash", "cudnn"))  # the others are far behind already
    if eager:
        measure("exact eager", lambda: _step(model, _filled_dynamic(model, context), "sdpa", context), graph=False)
        paged = lambda: _step(model, filled_cache(model, context, "eager"), "pqlab", context)  # noqa: E731
        measure("paged eager", paged, graph=False)
    return rows


def random_model(shape: str, context: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama of one of `SHAPES` with small random weights, made on the device."""
    settings = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000}
    config = LlamaConfig(**(settings | SHAPES[shape]), max_position_embeddings=context)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=device).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its buffers are no parameters
    return model.eval().requires_grad_(False)


def filled_cache(model: LlamaForCausalLM, context: int, mode: str, config: CacheConfig | None = None) -> PagedPQCache:
    """A paged cache that holds `context` random tokens: random codes in shuffled pages, random exact tokens."""
    config = config or CacheConfig(mode=mode)
    books = Codebooks.random(model.config, config=PQConfig())
    cache = PagedPQCache(model, books, config, context=context + ROOM)
    heads, d = model.config.num_key_value_heads, model.config.head_dim
    new = torch.randn(1, heads, 1, d, dtype=model.dtype, device=model.device)
    coded = (context - config.num_sinks - config.residual_length) // config.page_size * config.page_size
    group = cache.group
    with torch.inference_mode(False), torch.no_grad():
        group._add_rows(1)
        group._record_columns(None, context)
        group._extend([coded])
        group.tokens, group.columns = [context], context
        group._refresh_lengths()
        cache.pool.buffer.random_(0, 256)
        for layer in cache.quantized_layers:
            layer.lazy_initialization(new, new)
            layer.columns = context
            for tensor in (layer.sink_k, layer.sink_v, layer.window_k, layer.window_v):
                tensor.normal_()
    return cache


class _ExactStaticLayer(CacheLayerMixin):
    """K and V of exactly context + 1 tokens; every step writes the last one: the least an exact cache can do."""

    is_compileable = True

    def __init__(self, config: LlamaConfig, context: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        shape = (1, config.num_key_value_heads, context + 1, config.head_dim)
        self.keys, self.values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int):
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _no_attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2).contiguous(), None


def _plain_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _grouped_matmul(module, query, key, value, attention_mask, scaling=None, **kwargs):
    batch, heads, n, d = key.shape
    grouped = query.view(batch, heads, -1, d)
    weights = (grouped @ key.mT * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).view(batch, 1, -1, d), None


AttentionInterface.register("pqlab_bench_none", _no_attention)
AttentionInterface.register("pqlab_bench_sdpa", _plain_sdpa)
AttentionInterface.register("pqlab_bench_matmul", _grouped_matmul)


def _exact_cache(model, context: int) -> Cache:
    """Room for `context` tokens and the new one. Without context that one is written all the same, or a compiler would
    leave out the projections that make it."""
    make = partial(_ExactStaticLayer, model.config, context, model.dtype, str(model.device))
    return Cache(layers=[make() for _ in range(model.config.num_hidden_layers)])


def _exact_step(model, context: int, backend: str, make: Callable[..., Callable[[], object]]) -> Callable[[], object]:
    name = "pqlab_bench_matmul" if backend == "math" else "pqlab_bench_sdpa"
    step = make(_exact_cache(model, context), name)

    def run():
        with sdpa_kernel(EXACT_BACKENDS[backend]):
            return step()

    return run


def _filled_dynamic(model, context: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    heads, d = model.config.num_key_value_heads, model.config.head_dim
    for i in range(model.config.num_hidden_layers):
        k, v = (torch.randn(1, heads, context, d, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(k, v, i)
    return cache


def _step(model, cache: Cache, attention: str, context: int, compiled: bool = False) -> Callable[[], object]:
    """One decode step as a function without arguments; nothing in it depends on the host."""
    forward = torch.compile(model.forward, fullgraph=True) if compiled else model.forward
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    position = torch.full((1, 1), context, dtype=torch.long, device=model.device)
    held = cache_argument(model, cache)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # 4D: taken as it is, read by nobody here

    @torch.no_grad()
    def run():
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        known = None if attention in ("sdpa", "pqlab") and not cache.is_compileable else mask
        return forward(token, **held, position_ids=position, attention_mask=known).logits

    return run


def _time_graph(step: Callable[[], object]) -> float:
    """Median milliseconds of a replay. The logits are poisoned first and must come back finite."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    logits.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the graph's logits are not finite: something in the step was not captured")
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _time_eager(step: Callable[[], object], device: str) -> float:
    import time

    times = []
    for i in range(8):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", default=["7b", "8b"], choices=list(SHAPES))
    parser.add_argument("--context", nargs="+", type=int, default=[32768], help="tokens in the cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-eager", action="store_true", help="only what runs as one CUDA graph")
    parser.add_argument("--no-compiled", action="store_true", help="leave out the rows compiled by inductor")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")


def run(args: argparse.Namespace) -> int:
    """Time every case, print a table (and JSON); the exit status."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    records = []
    for shape in args.shape:
        for context in args.context:
            print(f"{shape}, {context:,} tokens, batch 1: ms a token", flush=True)
            for timing in bench_model(
                shape, context, dtype=dtype, device=args.device, eager=not args.no_eager, compiled=not args.no_compiled
            ):
                ms = "-" if timing.milliseconds is None else f"{timing.milliseconds:.3f}"
                print(f"  {timing.case:<22}{ms:>9}  {timing.note}", flush=True)
                records.append({"shape": shape, "context": context, **asdict(timing)})
    if args.json:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        print(json.dumps({"benchmark": "model", "device": device, "torch": torch.__version__, "records": records}))
    return 0
