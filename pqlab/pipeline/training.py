"""Stage "training": codebooks from the sampled vectors, one a head (with maps and weights) or one for all (-m)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from .. import kernels
from ..quantization import Codebooks, LayerCodec, Samples, origin_of, train, train_merged
from ..quantization.codebook_file import remove_drafts
from ..quantization.kmeans import ITERATIONS
from ..quantization.sensitivity import value_metrics
from .job import Job
from .sampling import kept_samples


def run(job: Job) -> dict[str, Any]:
    """Train, unless the file is there already (and not forced)."""
    path = job.codebooks_file
    kept = path.is_file() and not job.force
    if not kept:
        remove_drafts(path)  # of a killed run: a run has its folder for itself
        _train(job).save(path)
    books = Codebooks.load(path, job.loaded[0])
    return {
        "file": path.name,
        "kept": kept,
        "merged": job.settings.merged,
        "span": books.span,
        "bits_per_element": books.bits_per_element,
        "constant_bytes": books.nbytes,
    }


def _train(job: Job) -> Codebooks:
    model, s = job.loaded[0], job.settings
    samples, about = kept_samples(job)
    samples = samples.to(model.device)
    origin = replace(
        origin_of(model, job.corpus.train_text, samples, about["text"]["name"]),
        num_sinks=s.sinks,
        maps=not s.merged,
        weighted=not s.merged and bool(samples.sensitivity),
        iterations=ITERATIONS,
        span=s.span,
        seed=s.seed,
    )
    return Codebooks(_layers(job, samples), origin)


def _layers(job: Job, samples: Samples) -> dict[int, LayerCodec]:
    model, s = job.loaded[0], job.settings
    kernels.wait(300)  # without compiled kernels training takes many times longer
    with tqdm(desc="training", unit="codebook round") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if s.merged:
            return train_merged(samples, job.pq, seed=s.seed)
        metrics = value_metrics(model)
        return train(
            samples, job.pq, value_metrics=metrics, anchors=job.anchors, seed=s.seed,
            report=lambda stage, done, total: progress(done, total) if stage == "train codebooks" else None,
        )  # fmt: skip
