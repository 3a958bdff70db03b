"""Stage "evaluation": the PQ cache, paged or contiguous, beside the exact one."""

from __future__ import annotations

from typing import Any

from ..evaluation.evaluate import plain_records
from ..evaluation.fidelity import compare, summarize
from ..evaluation.methods import Setting, from_codebooks
from .job import EXACT, Job
from .timing import timed


def run(job: Job) -> dict[str, Any]:
    """Perplexity and KL of the text, or scores of LongBench's tasks, then time and memory of a generation.

    Perplexity and KL are of the decode path (`teacher_forced`): every position sees codes, sinks and window as
    generation would. Paged and contiguous caches hold the same tokens in the same form, so these figures are of both.
    """
    model, tokenizer = job.loaded
    books, name = job.codebooks
    method = from_codebooks(job.pq_name, books, Setting(model, tokenizer, job.settings.cache))
    found: dict[str, Any] = {"cache": job.pq_name, "codebooks": name, "token_bits": method.token_bits}
    found["span"] = books.span
    if job.settings.tasks:
        found["longbench"] = job.answers({EXACT: job.exact_cache(), job.pq_name: job.pq_cache()})
    elif not job.found.random:
        frame = compare(model, job.windows, {job.pq_name: method.quantize}, job.settings.cache, progress=True)
        (summary,) = plain_records(summarize(frame))
        found |= {key: value for key, value in summary.items() if key != "method"}
    return found | timed(job, job.pq_name, job.pq_cache())
