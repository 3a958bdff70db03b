"""From a model and a text to codebooks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import kernels
from ..config import PQConfig
from ..paging.layout import SIDES
from .codebook import Codebooks, LayerCodec, Origin
from .codec import PQCodec
from .geometry import PQSpec, attention_geometry, num_layers, setting
from .kmeans import ITERATIONS, product_kmeans
from .samples import NUM_SINKS, NUM_TOKENS, WINDOW, Samples, collect_kv

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); the stages are those of `STAGES`, in this order."""

STAGES = ("read the text", "compile kernels", "train codebooks")

_DEFAULT = PQConfig()
_KERNEL_SECONDS = 300  # to wait for a build; without compiled kernels training takes many times longer


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    config: PQSpec = _DEFAULT,
    *,
    num_tokens: int = NUM_TOKENS,
    window: int = WINDOW,
    num_sinks: int = NUM_SINKS,
    iterations: int = ITERATIONS,
    seed: int = 0,
    text_name: str = "",
    progress: bool | Report = True,
) -> Codebooks:
    """Codebooks of every (full-attention layer, kv head, side), trained on the keys and values of a text.

    Args:
        text: one text or several; see `collect_kv` for what is taken of it.
        config: M and nbits for all, as a pair for K and V, or as such a pair by layer index.
        num_tokens: tokens of the text that are read, in windows of `window` tokens.
        num_sinks: first tokens of every window that are no samples.
        iterations: of k-means.
        text_name: for people; it is kept in `Codebooks.origin` with the text's hash.
        progress: True draws bars, False is silent, a function is called with (stage, done, total).

    Raises:
        ValueError: the text gives no sample, or the model's keys and values are not finite.
        ConfigError: M does not divide the head size.
        UnsupportedModelError: the model has nothing to quantize.
    """
    for i, (_, head_dim) in attention_geometry(model).items():
        for pq in setting(config, i):
            pq.num_subspaces(head_dim)  # raises before the long work
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
        layers = train(samples, config, iterations=iterations, seed=seed, report=report)
    from ..models import fingerprint

    joined = text if isinstance(text, str) else "\0".join(text)
    origin = Origin(
        model=Path(getattr(model.config, "_name_or_path", "")).name or type(model).__name__,
        fingerprint=fingerprint(model),
        num_layers=num_layers(model),
        text=text_name,
        text_sha256=sha256(joined.encode()).hexdigest(),
        num_samples=samples.num_samples,
        num_sinks=num_sinks,
        window=window,
        iterations=iterations,
        seed=seed,
        pqlab_version=_version(),
    )
    return Codebooks(layers, origin)


def train(
    samples: Samples,
    config: PQSpec = _DEFAULT,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    report: Report | None = None,
) -> dict[int, LayerCodec]:
    """Codecs of every layer, trained on its samples; all (layer, side)s of one M and nbits in one batch."""
    report = report or _silent
    batches: dict[tuple[int, int, int], list[tuple[int, str]]] = defaultdict(list)  # (d, M, C) -> (layer, side)s
    for i, keys in samples.keys.items():
        d = keys.shape[-1]
        for side, pq in zip(SIDES, setting(config, i), strict=True):
            batches[d, pq.num_subspaces(d), 2**pq.nbits].append((i, side))
    most = max(count for _, _, count in batches)
    if samples.num_samples < most:
        warnings.warn(
            f"{samples.num_samples} samples cannot fill {most} centroids; give a longer text or a smaller nbits",
            stacklevel=3,
        )
    report(STAGES[1], 0, 1)
    kernels.wait(_KERNEL_SECONDS)
    report(STAGES[1], 1, 1)

    parts = {"k": samples.keys, "v": samples.values}
    device = next(iter(samples.keys.values())).device
    total = sum(parts[side][i].shape[0] for members in batches.values() for i, side in members) * iterations
    done = 0
    codecs: dict[tuple[int, str], PQCodec] = {}
    for (_, m, num_centroids), members in batches.items():
        vectors = [parts[side][i].to(device) for i, side in members]  # each [H, n, d]
        books = product_kmeans(
            torch.cat(vectors),
            m,
            num_centroids,
            iterations=iterations,
            seed=seed,
            progress=lambda part, _, before=done: report(STAGES[2], before + part, total),
        )
        heads = [v.shape[0] for v in vectors]
        done += sum(heads) * iterations
        for member, centroids in zip(members, books.split(heads), strict=True):
            codecs[member] = PQCodec(centroids.clone())
    return {i: LayerCodec(codecs[i, "k"], codecs[i, "v"]) for i in samples.keys}


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
