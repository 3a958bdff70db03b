"""Stage "baseline": the exact cache of transformers (`DynamicCache`, sdpa)."""

from __future__ import annotations

from math import exp
from typing import Any

import torch

from ..evaluation.fidelity import CHUNK, last_hidden
from ..model_runs import attention
from .job import EXACT, Job
from .timing import timed


def run(job: Job) -> dict[str, Any]:
    """Perplexity of the text or scores of LongBench's tasks, then time and memory of a generation."""
    found: dict[str, Any] = {"cache": EXACT}
    if job.settings.tasks:
        found["longbench"] = job.answers({EXACT: job.exact_cache()})
    elif not job.found.random:
        with attention(job.loaded[0], "sdpa"):
            found |= exact_perplexity(job.loaded[0], job.windows)
    return found | timed(job, EXACT, job.exact_cache())


@torch.inference_mode()
def exact_perplexity(model, windows: list[torch.Tensor], prompt: int = 1) -> dict[str, Any]:
    """Perplexity without a quantized cache, over the same positions as `fidelity.compare` counts.

    Args:
        windows: int64 [1, n] token ids, independent sequences. prompt: tokens of each that are not counted.
    """
    head, total, count = model.get_output_embeddings(), 0.0, 0
    for ids in windows:
        ids = ids.to(model.device)
        hidden = last_hidden(model, ids, None)
        for first in range(prompt, ids.shape[1] - 1, CHUNK):
            rows = slice(first, min(first + CHUNK, ids.shape[1] - 1))
            target = ids[0, rows.start + 1 : rows.stop + 1]
            total += float(torch.nn.functional.cross_entropy(head(hidden[rows]).float(), target, reduction="sum"))
            count += len(target)
    return {"perplexity": exp(total / count), "positions": count}
