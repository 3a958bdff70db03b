"""Standard contiguous PQ beside paged PQ: the same tokens and logits, and the time and memory of both."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache

from .. import kernels
from ..cache import PagedPQCache
from ..cache.contiguous import ContiguousPQLayer, contiguous_cache
from ..config import CacheConfig
from ..memory import readable_bytes
from ..model_runs import Followed, apart, attention, cudnn_attention_off, follow, generate, top_gap
from .integration import NEAR
from .session import Check, Phase, Session, expect


@dataclass
class Row:
    """One way to keep the same text."""

    name: str
    run: Followed
    held: int  # bytes of K and V in whatever form, without the codebooks
    peak: int | None  # bytes on a GPU at the worst moment, above the model


def checks(session: Session) -> Iterator[Check]:
    yield "contiguous beside paged PQ", lambda: contiguous_beside_paged(session)


def contiguous_beside_paged(session: Session) -> str:
    model, _ = session.loaded
    books, config = session.codebooks, CacheConfig()
    prompt, new = session.amount(700, 2000), session.amount(24, 60)
    text = session.prompt(prompt, "compare")
    paged = lambda: PagedPQCache(model, books, config, context=prompt + new)  # noqa: E731
    with attention(model, "pqlab"):
        ids = generate(model, paged(), text, new)  # and the kernels are built, if they were not
        kernels.wait()
        ids = generate(model, paged(), text, new)
    ways: list[tuple[str, str, Callable[[], Cache]]] = [
        ("exact, DynamicCache", "sdpa", lambda: DynamicCache(config=model.config)),
        ("contiguous PQ, dequantized", "sdpa", lambda: contiguous_cache(model, books, config)),
        ("paged PQ, dequantized", "sdpa", paged),
        ("paged PQ, fused", "pqlab", paged),
    ]
    rows = [_measure(session, name, how, make, ids, prompt) for name, how, make in ways]
    say = session.console.info
    say(
        f"{prompt} tokens of prompt, {new} steps, exact tokens in {model.dtype}: prefill s, ms a token, bytes held"
        + (", peak; without cuDNN attention" if session.device.type == "cuda" else "")
    )
    for row in rows:
        peak = f"  {readable_bytes(row.peak):>11}" if row.peak is not None else ""
        times = f"{row.run.prefill_seconds:7.2f} {1e3 * row.run.token_seconds:8.2f}"
        say(f"  {row.name:<28}{times}  {readable_bytes(row.held):>11}{peak}")
    exact, plain, dequantized, fused = rows
    limit = NEAR[session.device.type]
    worst, ties = 0.0, 0
    for row in (dequantized, fused):
        off = apart(row.run.logits, plain.run.logits)
        worst = max(worst, off)
        expect(off < limit, f"{row.name}: logits differ by {off:.2g} of their spread, at most {limit:g} is right")
        other = row.run.logits.argmax(-1) != plain.run.logits.argmax(-1)
        gap = top_gap(plain.run.logits)[other]
        expect((gap < limit * plain.run.logits.std()).all(), f"{row.name}: another token where it is no near tie")
        ties += int(other.sum())
    steps = len(plain.run.logits)
    ratio = plain.run.token_seconds / fused.run.token_seconds
    tied = f" but {ties} near ties" if ties else ""
    return (
        f"{steps} steps give the same tokens{tied}, logits within {worst:.1g}; paged and fused is {ratio:.2f}x as "
        f"fast as contiguous; memory below exact: {exact.held / fused.held:.2f}x paged, "
        f"{exact.held / plain.held:.2f}x contiguous"
    )


def _measure(session: Session, name: str, how: str, make: Callable[[], Cache], ids, prompt: int) -> Row:
    model, _ = session.loaded
    gc.collect()
    before = 0
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cache = make()
    with attention(model, how), cudnn_attention_off(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the second paged row dequantizes is its purpose
        run = follow(model, cache, ids, prompt)
    peak = torch.cuda.max_memory_allocated() - before if session.device.type == "cuda" else None
    return Row(name, run, _held(cache), peak)


def _held(cache: Cache) -> int:
    if isinstance(cache, PagedPQCache):
        return cache.reserved_bytes
    layers = cache.layers
    return sum(x.nbytes if isinstance(x, ContiguousPQLayer) else x.keys.nbytes + x.values.nbytes for x in layers)


PHASE = Phase(
    "compare",
    "Comparison: standard contiguous PQ against paged PQ",
    checks,
    "Both keep the same codes, so one of them is wrong: run --phase2 (kernels) and --phase1 (pages).",
)
