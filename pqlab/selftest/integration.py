"""Phase 3: a real model through plain `generate()`, and which level of kernels it gets: chosen, forced, forbidden.

Exact storage is held to transformers' DynamicCache, quantized storage to the contiguous PQ of `contiguous`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from transformers.cache_utils import DynamicCache

from .. import kernels
from ..cache import PagedPQCache
from ..cache.contiguous import contiguous_cache
from ..config import CacheConfig
from ..errors import KernelMissingError
from ..kernels import dispatch, use_backend
from ..model_runs import Followed, Runs, apart, attention, counted, follow, generate, top_gap
from ..quantization import Codebooks
from .session import DETAILS, Check, Disagreement, Phase, Session, expect

CONFIG = CacheConfig(page_size=16, residual_length=32)
"""Small, so that a short text fills several pages while it is generated."""

NEAR = {"cpu": 1e-3, "cuda": 5e-2}
"""Logits of the same codes, in units of their spread: sums in another order; on CUDA centroids in fp16, too."""

TIE = {"cpu": 1e-5, "cuda": 1e-3}
"""Exact logits closer than this may change places: the sums are in another order."""


def checks(session: Session) -> Iterator[Check]:
    yield "exact storage is DynamicCache", lambda: exact_storage(session)
    yield "quantized cache runs fused", lambda: runs_fused(session)
    yield "selection in levels", lambda: levels(session)
    yield "standard attention falls back", lambda: falls_back(session)
    yield "forced where it cannot run", lambda: forced_in_vain(session)


def exact_storage(session: Session) -> str:
    model, _ = session.loaded
    prompt, new = session.prompt(session.amount(150, 600), "exact"), session.amount(40, 120)
    with attention(model, "sdpa"):
        wanted = generate(model, DynamicCache(config=model.config), prompt, new)
    cache = PagedPQCache(model, Codebooks.identity(model), CONFIG, context=prompt.shape[1] + new)
    with attention(model, "pqlab"):
        got = generate(model, cache, prompt, new)
    flushed = int(cache.lengths[0, 1])
    expect(flushed >= 2 * CONFIG.page_size, f"only {flushed} tokens lie in pages: the pages were not tried")
    same = (got == wanted)[0].long().cumprod(0).sum().item()
    text = f"{new} tokens of generate() over {flushed} tokens in pages equal DynamicCache's"
    if same == wanted.shape[1]:
        return text
    with attention(model, "sdpa"), torch.inference_mode():
        gap = float(top_gap(model(wanted[:, :same], use_cache=False).logits[:, -1].float()))
    expect(
        gap < TIE[session.device.type],
        f"token {same - prompt.shape[1]} of {new} is {got[0, same].item()}, DynamicCache gives "
        f"{wanted[0, same].item()}, {gap:.2g} ahead of the second",
    )
    return f"{text}, up to token {same - prompt.shape[1]}, where the best two are {gap:.1g} apart"


def runs_fused(session: Session) -> str:
    """Every decode of every layer on the best backend; logits of contiguous PQ along the same tokens."""
    model, _ = session.loaded
    prompt, new = session.prompt(session.amount(150, 600), "fused"), session.amount(24, 100)
    books = session.codebooks
    make = lambda: PagedPQCache(model, books, CONFIG, context=prompt.shape[1] + new)  # noqa: E731
    with attention(model, "pqlab"):
        if session.device.type == "cuda":  # asks for the configurations that are not built yet
            generate(model, make(), prompt, 2 * CONFIG.page_size)
            kernels.wait()
        cache = make()
        with counted() as runs:
            ids = generate(model, cache, prompt, new)
    layers, best = len(cache.quantized_layers), expected_level(session.device.type)
    decodes = _reads(runs)
    wanted = layers * (new - 1)
    right = {backend for backend, _ in decodes} == {best} and decodes.total() == wanted
    expect(right, f"attention ran as {dict(decodes)}, should be {wanted} calls on {best}; {_report()}")
    expect(not any(op == "attention" for op, *_ in runs), f"the cache was dequantized: {runs}")
    with attention(model, "pqlab"):
        ours = follow(model, make(), ids, prompt.shape[1])
    with attention(model, "sdpa"):
        plain = follow(model, contiguous_cache(model, books, CONFIG), ids, prompt.shape[1])
    off = _same_logits(session, ours, plain, "contiguous PQ")
    return f"{layers} layers x {new - 1} steps decoded by {best}; logits within {off:.1g} of contiguous PQ"


def levels(session: Session) -> str:
    """Automatic, each level forbidden in turn, and each forced, exact attention too: the right one runs, they agree."""
    model, _ = session.loaded
    device = session.device.type
    ids, start = session.prompt(session.amount(130, 400), "levels"), session.amount(118, 360)
    usable = [name for name in dispatch.LEVELS[device] if name in dispatch.backends() and _ready(name)]
    settings = {"auto": usable[0], **{name: name for name in usable}}
    for i in range(1, len(usable)):
        settings[",".join(f"-{name}" for name in usable[:i])] = usable[i]
    first: Followed | None = None
    worst, said = 0.0, []
    for setting, wanted in settings.items():
        cache = PagedPQCache(model, session.codebooks, CONFIG, context=ids.shape[1])
        with attention(model, "pqlab"), use_backend(setting), counted() as runs:
            result = follow(model, cache, ids, start)
        ran = {backend for backend, _ in _reads(runs)}
        expect(ran == {wanted}, f'setting "{setting}": decode ran on {ran}, should be {wanted}; {_report()}')
        reasons = {reason for _, reason in _reads(runs)}
        DETAILS.debug("setting %s: %s", setting, runs)
        if setting.startswith("-"):
            expect(all("forbidden" in reason for reason in reasons), f'"{setting}": the reason given is {reasons}')
        first = first or result
        worst = max(worst, _same_logits(session, result, first, f'the "auto" run, under "{setting}"'))
        said.append(f"{setting}: {wanted}")
    cache = PagedPQCache(model, session.codebooks, CONFIG, context=ids.shape[1])
    with attention(model, "pqlab"), use_backend("exact"), counted() as runs:
        result = follow(model, cache, ids, start)
    dequantized = runs.get(("attention", "dequantize", "forced"), 0)
    expect(dequantized and not _reads(runs), f'setting "exact": codes were read by {dict(_reads(runs))}; {_report()}')
    worst = max(worst, _same_logits(session, result, first, 'the "auto" run, under "exact"'))
    said.append("exact: dequantized")
    return f"{'; '.join(said)}; logits within {worst:.1g} of each other"


def falls_back(session: Session) -> str:
    """Under transformers' own attention the cache dequantizes, says so once, and gives the same logits."""
    model, _ = session.loaded
    ids = session.prompt(120, "fallback")
    make = lambda: PagedPQCache(model, session.codebooks, CONFIG, context=ids.shape[1])  # noqa: E731
    with attention(model, "pqlab"):
        fused = follow(model, make(), ids, 110)
    with warnings.catch_warnings(record=True) as caught, attention(model, "sdpa"), counted() as runs:
        warnings.simplefilter("always")
        result = follow(model, make(), ids, 110)
    texts = [str(w.message) for w in caught if "Falling back to standard implementation" in str(w.message)]
    expect(len(texts) == 1, f"the fallback was said {len(texts)} times, should be once")
    reasons = {reason for op, backend, reason in runs if (op, backend) == ("attention", "dequantize")}
    expect(reasons and '"sdpa"' in str(reasons), f"the fallback is not in backend_report(): {runs}")
    off = _same_logits(session, result, fused, "the fused run")
    return f"said once, reported as {reasons.pop()!r}, logits within {off:.1g} of the fused run"


def forced_in_vain(session: Session) -> str:
    """A backend that cannot take this device's tensors, forced: PQC002 before anything is stored, then all goes on."""
    model, _ = session.loaded
    ids = session.prompt(60, "forced")
    impossible = "cpu" if session.device.type == "cuda" else "cuda"
    cache = PagedPQCache(model, session.codebooks, CONFIG, context=100)
    with attention(model, "pqlab"):
        try:
            with use_backend(impossible):
                follow(model, cache, ids, 50)
        except KernelMissingError as error:
            expect(error.code == "PQC002" and "PQLAB_BACKEND=auto" in error.remedy, f"the message is: {error}")
        else:
            raise Disagreement(f"{impossible} was forced for {session.device.type} tensors and nothing was said")
        cache.reset()
        again = follow(model, cache, ids, 50)
        fresh = follow(model, PagedPQCache(model, session.codebooks, CONFIG, context=100), ids, 50)
    _same_logits(session, again, fresh, "a fresh cache, after a forced failure and reset()")
    return f"{impossible} forced: PQC002 with its remedy; after reset() the cache gives a fresh cache's logits"


def expected_level(device: str) -> str:
    """The first level that this machine has, by the states of the builds."""
    return next(name for name in dispatch.LEVELS[device] if name in dispatch.backends() and _ready(name))


def _ready(name: str) -> bool:
    return dispatch.backends()[name].status().state in ("none", "ready")


def _reads(runs: Runs) -> Counter[tuple[str, str]]:
    """(backend, reason) -> calls that attended to what is stored: `decode`, alone or as a part of `step_`."""
    found: Counter[tuple[str, str]] = Counter()
    for (op, backend, reason), count in runs.items():
        if op in ("decode", "step_"):
            found[backend, reason] += count
    return found


def _report() -> str:
    builds = kernels.backend_report().builds
    return "; ".join(f"{name}: {status.state} {status.detail}" for name, status in builds.items())


def _same_logits(session: Session, ours: Followed, theirs: Followed, what: str) -> float:
    off = apart(ours.logits, theirs.logits)
    limit = NEAR[session.device.type]
    expect(off < limit, f"logits differ by {off:.2g} of their spread from those of {what}, at most {limit:g} is right")
    return off


PHASE = Phase(
    "phase3",
    "Phase 3: integration with a real model, selection of kernels",
    checks,
    "If phase 2 failed too, mend that first: PQLAB_BACKEND=reference shows whether the kernels are the cause. If the "
    "model could not be loaded: make setup (or python -m pqlab setup) fetches it, or --model names a local folder.",
)
