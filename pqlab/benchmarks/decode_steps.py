"""A decode step of a model as a function without arguments, with any exact attention that torch has, and as a graph."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from ..transformers_api import cache_argument
from .filled_caches import filled_buffers

Step = Callable[[], torch.Tensor]

REPEATS = 30

EXACT_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NONE, SDPA, MATMUL = "pqlab_bench_none", "pqlab_bench_sdpa", "pqlab_bench_matmul"
"""Names in transformers' register: no attention at all (what everything else costs), torch's SDPA with the backend that
`exact_step` sets, and matrix products that read K and V once for the query heads of a group."""


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


_REFUSAL = r"(?s).*Triggered internally at .*sdp_utils"
"""Torch warns of each reason by itself; what they have in common is the source file that is named behind them."""


@contextmanager
def refusals_unsaid() -> Iterator[None]:
    """Leave out torch's warnings of why an attention kernel refuses its arguments: dozens of lines for each call.

    For callers that ask for one kernel by name: its refusal is an error that reaches them anyway.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _REFUSAL, UserWarning)
        yield


AttentionInterface.register(NONE, _no_attention)
AttentionInterface.register(SDPA, _plain_sdpa)
AttentionInterface.register(MATMUL, _grouped_matmul)


def decode_step(model: PreTrainedModel, cache: Cache, attention: str, context: int, compiled: bool = False) -> Step:
    """One step of one token behind `context` tokens, batch 1, that returns its logits; nothing in it asks the host."""
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


def exact_step(model: PreTrainedModel, context: int, backend: str, compiled: bool = False) -> Step:
    """A step over K and V in buffers of exactly the context, with a name of `EXACT_BACKENDS`."""
    attention = MATMUL if backend == "math" else SDPA
    step = decode_step(model, filled_buffers(model, context), attention, context, compiled)

    def run():
        with sdpa_kernel(EXACT_BACKENDS[backend]):
            return step()

    return run


def captured(step: Step) -> Step:
    """The step as a CUDA graph: each call replays it and gives the same logits tensor.

    Raises:
        RuntimeError: the logits of a replay are not finite, so something in the step was not captured.
    """
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

    def replay(_held: Step = step) -> torch.Tensor:  # a graph reads the step's tensors, and does not own them
        graph.replay()
        return logits

    replay()
    torch.cuda.synchronize()
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the graph's logits are not finite: something in the step was not captured")
    return replay


def time_graph(
    step: Step, repeats: int = REPEATS, average: Callable[[Sequence[float]], float] = statistics.median
) -> float:
    """Median (or another average) of the milliseconds of a replay of the step's graph."""
    replay = captured(step)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return average(times)
