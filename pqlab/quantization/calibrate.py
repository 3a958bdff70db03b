"""From a model and a text to codebooks."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import kernels
from ..config import PQConfig
from ..errors import ConfigError
from ..models import fingerprint
from ..models.texts import BETWEEN
from ..paging.layout import SIDES
from .anchors import Anchors, check_span
from .codebook import Codebooks, LayerCodec, Origin
from .codec import PQCodec, to_float, to_half
from .geometry import PQSpec, attention_geometry, num_layers, setting
from .kmeans import ITERATIONS, all_finite, product_kmeans
from .maps import alike, balanced_map, compact_map
from .rotary import Rotary
from .samples import NUM_SINKS, NUM_TOKENS, Samples, collect_kv, window_for
from .sensitivity import value_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("pqlab")

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); the stages are those of `STAGES`, in this order."""

STAGES = ("read the text", "compile kernels", "train codebooks")

SCOPES = ("head", "layer", "model")
"""What shares a codebook."""

MERGED_VECTORS = 2**17
"""Vectors that a shared codebook is trained on, at most, spread evenly over those that share it: 512 a centroid."""

_DEFAULT = PQConfig()
_KERNEL_SECONDS = 300  # to wait for a build; without compiled kernels training takes many times longer


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    pq: PQSpec = _DEFAULT,
    *,
    num_tokens: int = NUM_TOKENS,
    window: int | None = None,
    num_sinks: int = NUM_SINKS,
    maps: bool = True,
    weighted: bool = True,
    scope: str = "head",
    span: int = 0,
    iterations: int = ITERATIONS,
    seed: int = 0,
    text_name: str = "",
    progress: bool | Report = True,
) -> Codebooks:
    """Codebooks of every (full-attention layer, kv head, side), trained on the keys and values of a text.

    Args:
        text: one text or several; see `collect_kv` for what is taken of it.
        pq: M and nbits for all, as a pair for K and V, or as such a pair by layer index.
        num_tokens: tokens of the text that are read, in windows of `window` tokens; see `collect_kv`.
        num_sinks: first tokens of every window that are no samples.
        maps: put the map of `maps.balanced_map` in front of every quantizer.
        weighted: count a token's error by the attention it got (`Sensitivity.weights`). Keys are mapped and both sides
            weighted by queries; a model whose attention shows none is calibrated without, which is logged.
        scope: what shares a codebook, one of `SCOPES`: "head" (every kv head has its own), "layer" (the kv heads of a
            layer share one) or "model" (one for K and one for V of all layers). Maps are per head either way.
        span: tokens whose keys are turned back to one anchor (`anchors.SPAN` is a good number); 0 leaves keys as the
            model makes them.
        iterations: of k-means.
        text_name: for people; it is kept in `Codebooks.origin` with the text's hash.
        progress: True draws bars, False is silent, a function is called with (stage, done, total).

    Raises:
        ValueError: the text gives no sample, or the model's keys and values are not finite.
        ConfigError: `pq` is no setting of a quantizer, or its M does not divide the head size; or the span is none, or
            goes without maps or with a model whose rotary embedding cannot be undone.
        UnsupportedModelError: the model has nothing to quantize.
    """
    for i, (_, head_dim) in attention_geometry(model).items():
        for one in setting(pq, i):
            one.num_subspaces(head_dim)  # raises before the long work
    anchors = anchors_of(model, span)
    _check_maps(maps, anchors)
    with _reporting(progress) as report:
        samples = collect_kv(
            model,
            tokenizer,
            text,
            num_tokens=num_tokens,
            window=window,
            num_sinks=num_sinks,
            progress=lambda done, total: report(STAGES[0], done, total),
        )
        layers = train(
            samples,
            pq,
            value_metrics=value_metrics(model),
            maps=maps,
            weighted=weighted,
            scope=scope,
            anchors=anchors,
            iterations=iterations,
            seed=seed,
            report=report,
        )
    origin = replace(
        origin_of(model, text, samples, text_name),
        num_sinks=num_sinks,
        window=window or window_for(text),
        maps=maps,
        weighted=weighted and bool(samples.sensitivity),
        scope=scope,
        span=span,
        iterations=iterations,
        seed=seed,
    )
    return Codebooks(layers, origin)


def anchors_of(model: PreTrainedModel, span: int) -> Anchors | None:
    """What keys of a model are turned back to, span by span; None for a span of 0.

    Raises `ConfigError` for a span that is none, and where the model's rotary embedding cannot be undone (`Rotary`).
    """
    if not span:
        return None
    check_span(span)
    return Anchors(span, Rotary(model).frequencies)


def origin_of(model: PreTrainedModel, text: str | Sequence[str], samples: Samples, text_name: str = "") -> Origin:
    """Where codebooks for `model` come from that are trained on `samples` of a text with the default settings."""
    joined = text if isinstance(text, str) else BETWEEN.join(text)
    return Origin(
        model=Path(getattr(model.config, "_name_or_path", "")).name or type(model).__name__,
        fingerprint=fingerprint(model),
        num_layers=num_layers(model),
        text=text_name,
        text_sha256=sha256(joined.encode()).hexdigest(),
        num_samples=samples.num_samples,
        num_sinks=NUM_SINKS,
        window=window_for(text),
        maps=True,
        weighted=bool(samples.sensitivity),
        iterations=ITERATIONS,
        pqlab_version=_version(),
    )


def train(
    samples: Samples,
    pq: PQSpec = _DEFAULT,
    *,
    value_metrics: Mapping[int, Tensor] | None = None,
    maps: bool = True,
    weighted: bool = True,
    scope: str = "head",
    anchors: Anchors | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    report: Report | None = None,
) -> dict[int, LayerCodec]:
    """Codecs of every layer, trained on its samples; all (layer, side)s of one M and nbits in one batch.

    Args:
        value_metrics: [H, d, d] by layer index, `sensitivity.value_metrics(model)`; a missing one is the identity.
        maps, weighted, scope: see `calibrate`.
        anchors: what keys are turned back to, of `anchors_of`.
    """
    if scope not in SCOPES:
        raise ConfigError(f"scope = {scope!r} is not one of {', '.join(SCOPES)}")
    _check_maps(maps, anchors)
    report = report or _silent
    value_metrics = value_metrics or {}
    if (maps or weighted) and not samples.sensitivity:
        log.warning("the model's attention shows no queries: keys are mapped by their variance alone, without weights")
    batches: dict[tuple[Any, ...], list[tuple[int, str]]] = defaultdict(list)
    for i, keys in samples.keys.items():
        heads, _, d = keys.shape
        for side, one in zip(SIDES, setting(pq, i), strict=True):
            alone = {"head": "", "layer": heads, "model": side}[scope]  # groups of a batch are equally large
            batches[one.num_subspaces(d), 2**one.nbits, alone, d].append((i, side))
    most = max(count for _, count, *_ in batches)
    if samples.num_samples < most:
        warnings.warn(
            f"{samples.num_samples} samples cannot fill {most} centroids; give a longer text or a smaller nbits",
            stacklevel=3,
        )
    report(STAGES[1], 0, 1)
    kernels.wait(_KERNEL_SECONDS)
    report(STAGES[1], 1, 1)

    parts = {"k": samples.keys, "v": samples.values}
    if anchors:
        index = samples.code_indexes()
        parts["k"] = {i: anchors.back(x, index.to(x.device)) for i, x in samples.keys.items()}
    device = next(iter(samples.keys.values())).device
    sharers = {
        key: _sharers([parts[side][i].shape[0] for i, side in members], scope) for key, members in batches.items()
    }
    total, done = sum(map(len, sharers.values())) * iterations, 0
    codecs: dict[tuple[int, str], PQCodec] = {}
    for key, members in batches.items():
        m, num_centroids, *_ = key
        weights, directions, moments = [], [], []
        for i, side in members:
            x, seen = parts[side][i].to(device).float(), samples.sensitivity.get(i)  # [H, n, d]
            if not all_finite(x):
                raise ValueError(f"layer {i}: {'keys' if side == 'k' else 'values'} of the text are not finite")
            if maps:
                metric = value_metrics.get(i) if side == "v" else seen and seen.key_metric
                forward, backward = balanced_map(x, metric, m)
                if scope == "head":
                    forward, backward = compact_map(forward, m)
                else:
                    forward, backward = alike(x, forward, backward, m)
                directions.append((forward, backward))
                moments.append({**_moments(x @ to_float(forward)), "anchors": anchors} if side == "k" else {})
            both = seen.weights() if weighted and seen else None
            weights.append(torch.ones_like(x[..., 0]) if both is None else both[SIDES.index(side)].to(device))
        sides = [parts[side][i] for i, side in members]
        books = product_kmeans(
            _Shared(sides, [forward for forward, _ in directions], sharers[key], device),
            m,
            num_centroids,
            weights=_Shared([w[..., None] for w in weights], [], sharers[key], device)[:][..., 0],
            iterations=iterations,
            seed=seed,
            progress=lambda part, _, before=done: report(STAGES[2], before + part, total),
        )
        done += len(sharers[key]) * iterations
        books = to_half(books)
        number = {head: g for g, group in enumerate(sharers[key]) for head in group}
        for j, member in enumerate(members):
            heads, first = len(sides[j]), number[j, 0]
            own = scope == "head"
            centroids = books[first : first + heads].clone() if own else books[first].expand(heads, -1, -1, -1)
            codecs[member] = (PQCodec(centroids, *directions[j], **moments[j]) if maps else PQCodec(centroids)).half()
    return {i: LayerCodec(codecs[i, "k"], codecs[i, "v"]) for i in samples.keys}


def _check_maps(maps: bool, anchors: Anchors | None) -> None:
    if anchors and not maps:
        raise ConfigError(f"span = {anchors.span} goes with maps only; leave maps on, or span at 0")


def _moments(y: Tensor) -> dict[str, Tensor]:
    """Of [H, n, d] in code space, what `PQCodec.fit` needs."""
    return {"mean": y.mean(1), "spread": y.std(1)}


def _sharers(heads: Sequence[int], scope: str) -> list[list[tuple[int, int]]]:
    """Who shares a codebook: lists, equally long, of (number of the member, head); heads: of every member."""
    every = [[(j, head) for head in range(count)] for j, count in enumerate(heads)]
    if scope == "layer":
        return every
    together = [head for member in every for head in member]
    return [together] if scope == "model" else [[head] for head in together]


class _Shared:
    """Samples of the groups that share a codebook, `kmeans.Groups`: taken of members [H, n, d], mapped, some at a time.

    Args:
        maps: [H, d, d] of every member, or empty.
        groups: of `_sharers`; many sharers give evenly spread samples of each.
    """

    def __init__(
        self,
        members: Sequence[Tensor],
        maps: Sequence[Tensor],
        groups: Sequence[Sequence[tuple[int, int]]],
        device: torch.device,
    ) -> None:
        self.members, self.maps, self.groups, self.device = members, maps, groups, device
        _, self.every, d = members[0].shape
        self.count = min(self.every, max(1, MERGED_VECTORS // len(groups[0])))  # of a sharer
        self.shape = (len(groups), self.count * len(groups[0]), d)
        self._at, self._mapped = -1, torch.empty(0)  # the member that was looked at last

    def __getitem__(self, groups: slice) -> Tensor:
        return torch.stack([torch.cat([self._of(*sharer) for sharer in group]) for group in self.groups[groups]])

    def _of(self, member: int, head: int) -> Tensor:
        if member != self._at:
            x = self.members[member].to(self.device).float()
            self._at, self._mapped = member, x @ to_float(self.maps[member]) if self.maps else x
        if self.count == self.every:
            return self._mapped[head]
        chosen = torch.arange(self.count, device=self.device) * self.every // self.count
        return self._mapped[head, chosen]


@contextmanager
def _reporting(progress: bool | Report) -> Iterator[Report]:
    """A report function for the `progress` argument; bars are closed at the end."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield _silent
        return
    from tqdm.auto import tqdm

    units = {STAGES[0]: "tokens", STAGES[1]: "build", STAGES[2]: "codebook rounds"}
    bars: dict[str, tqdm] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, unit=f" {units[stage]}")
        bars[stage].update(done - bars[stage].n)
        if done >= total:
            bars[stage].close()

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _version() -> str:
    try:
        return version("pqlab")
    except PackageNotFoundError:  # run from a folder that was never installed
        return ""
