"""Stage "sampling": keys and values of the calibration text, kept in a file."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from ..quantization import CodebookError, Samples, collect_kv
from ..quantization.codebook_file import remove_drafts
from ..quantization.samples_file import load_samples, save_samples
from ..results.provenance import text_record
from .job import Job


def run(job: Job) -> dict[str, Any]:
    """Sample, unless the file is there already (and not forced)."""
    path = job.samples_file
    if path.is_file() and not job.force:
        return {"file": path.name, "kept": True, **kept_samples(job)[1]}
    model, tokenizer = job.loaded
    if "training" in job.settings.stages:
        _ = job.anchors  # raises before the long work
    text = job.corpus.train_text
    with tqdm(desc="sampling", unit="token") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        s = job.settings
        samples = collect_kv(model, tokenizer, text, num_tokens=s.samples, num_sinks=s.sinks, progress=progress)
    about = {
        "fingerprint": job.fingerprint,
        "text": text_record(job.corpus.train_name, text),
        "vectors": samples.num_samples,
    }
    remove_drafts(path)  # of a killed run: a run has its folder for itself
    save_samples(path, samples, about)
    return {"file": path.name, "kept": False, **about, "bytes": path.stat().st_size}


def kept_samples(job: Job) -> tuple[Samples, dict[str, Any]]:
    """The samples of the job's file and what they were taken from.

    Raises:
        CodebookError: the file is damaged, or its samples are of another model or another version of the text.
    """
    samples, about = load_samples(job.samples_file)
    wanted = {"model": job.fingerprint, "text": text_record(job.corpus.train_name, job.corpus.train_text)["sha256"]}
    for what, found in (("model", about["fingerprint"]), ("text", about["text"]["sha256"])):
        if found != wanted[what]:
            raise CodebookError(
                f"{job.samples_file.name} was sampled from another {what} of this name ({found[:40]}, not "
                f"{wanted[what][:40]}); run the sampling stage with --force, or choose another --out"
            )
    return samples, about
