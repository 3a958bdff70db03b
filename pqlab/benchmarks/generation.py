"""How long plain `generate` takes to the first token and for each one after it, and what its cache holds."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import BaseStreamer

from .. import kernels
from ..cache import PagedPQCache
from ..cache.contiguous import ContiguousPQLayer
from ..evaluation.longbench.answers import MakeCache
from ..memory_peak import memory_peak
from ..model_runs import attention, counted
from ..process_memory import release
from ..transformers_api import cache_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_WARM = 2  # tokens of the run that is not timed
_WARM_COMPILED = 6  # the first steps of a compiled model are compiled, warmed up and captured


@dataclass(frozen=True)
class Generation:
    """One timed `generate`.

    Attributes:
        batch, context, new_tokens: rows, tokens of a prompt, tokens made.
        first_token_seconds: from the prompt to the first token of all rows.
        token_ms: median from one token to the next; every row makes one in that time.
        slowest_ms: the slowest of them, which may have flushed a page.
        cache_bytes: held for the tokens at the end: codes, exact tokens, page table.
        reserved_bytes: taken for pages in advance, free ones included; 0 without pages.
        constant_bytes: codebooks and maps.
        peak_bytes, before_bytes: memory while generating, and right before: see `memory_peak`.
        memory: how these two were counted.
        backends: which backend ran each fused operation.
        cudnn_attention: whether torch's SDPA could choose cuDNN (see `cudnn_attention_off`); None on a CPU.
    """

    batch: int
    context: int
    new_tokens: int
    first_token_seconds: float
    token_ms: float
    slowest_ms: float
    cache_bytes: int
    reserved_bytes: int
    constant_bytes: int
    peak_bytes: int | None
    before_bytes: int | None
    memory: str
    backends: dict[str, str]
    cudnn_attention: bool | None

    @property
    def tokens_per_second(self) -> float:
        """Of all rows, behind the first token."""
        return self.batch / self.token_ms * 1e3

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


@torch.inference_mode()
def time_generation(
    model: PreTrainedModel, ids: torch.Tensor, make_cache: MakeCache, new_tokens: int, *, static: bool = False
) -> Generation:
    """Generate greedily behind prompts, once to warm up and once by the clock.

    Args:
        ids: int64 [batch, context], without pads.
        make_cache: called with the tokens of a sequence, prompt and new ones.
        new_tokens: 2 at least; the end of a text does not end it.
        static: the caches are static ones, whose steps `generate` compiles on a GPU. Compiled steps are of one cache's
            memory, so the same one is emptied and used again.
    """
    ids = ids.to(model.device)
    total = ids.shape[1] + new_tokens
    kept = make_cache(total) if static else None
    _generate(model, ids, *(kept or make_cache(total)), min(new_tokens, _WARM_COMPILED) if static else _WARM, None)
    kernels.wait()  # kernels are built for what they are asked
    release(model.device)  # or what the warm-up left free would hide what the timed run takes
    if kept:
        kept[0].reset()
    clock = _Clock()
    with memory_peak(model.device) as peak, counted() as runs:
        cache, name = kept or make_cache(total)
        _generate(model, ids, cache, name, new_tokens, clock)
    steps = [1e3 * (b - a) for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    held, reserved, constants = cache_bytes(cache)
    return Generation(
        batch=ids.shape[0],
        context=ids.shape[1],
        new_tokens=new_tokens,
        first_token_seconds=clock.times[1] - clock.times[0],
        token_ms=statistics.median(steps),
        slowest_ms=max(steps),
        cache_bytes=held,
        reserved_bytes=reserved,
        constant_bytes=constants,
        peak_bytes=peak.peak,
        before_bytes=peak.before,
        memory=peak.what,
        backends={op: backend for op, backend, _ in runs},
        cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled() if model.device.type == "cuda" else None,
    )


def cache_bytes(cache: Cache) -> tuple[int, int, int]:
    """Bytes of a cache: for its tokens, reserved for pages, and constants that all sequences share."""
    if isinstance(cache, PagedPQCache):
        return cache.stored_bytes, cache.pool.layout.num_bytes, cache.codebooks.nbytes
    held, books = 0, {}
    for layer in cache.layers:
        if isinstance(layer, ContiguousPQLayer):
            held += layer.nbytes
            for codec in (layer.codec.k, layer.codec.v):
                parts = (codec.centroids, codec.forward, codec.backward, codec.mean, codec.spread)
                books |= {part.data_ptr(): part.untyped_storage().nbytes() for part in parts if part is not None}
        elif layer.is_initialized:
            held += layer.keys.nbytes + layer.values.nbytes
    return held, 0, sum(books.values())


class _Clock(BaseStreamer):
    """When the prompt and every token came. What `generate` hands over is on the CPU: the device is done with it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def _generate(model, ids, cache, name: str, new_tokens: int, clock: _Clock | None) -> None:
    with attention(model, name):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(model, cache), do_sample=False, streamer=clock,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        )  # fmt: skip
