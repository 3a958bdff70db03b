"""What a stage measures of a cache in time: a generation, and with `--breakdown` where a decode step's time goes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..benchmarks.breakdown import breakdown
from ..benchmarks.generation import time_generation
from ..evaluation.longbench.answers import MakeCache
from ..model_runs import attention, cudnn_attention_off
from ..quantization import attention_geometry
from ..quantization.geometry import num_layers
from ..transformers_api import cache_argument
from .job import EXACT, PAGED, Job

_KINDS = {EXACT: "exact", PAGED: "paged"}


def timed(job: Job, name: str, make_cache: MakeCache) -> dict[str, Any]:
    """A stage's "generation", and its "breakdown" if it is asked for.

    Generations of all stages run without cuDNN attention: those of caches that grow would be times of building plans.
    The record says so ("cudnn_attention").
    """
    with cudnn_attention_off():
        generation = time_generation(job.loaded[0], job.prompts, make_cache, job.settings.new_tokens)
    found = {"generation": generation.record()}
    return found | ({"breakdown": step_parts(job, name, make_cache)} if job.settings.breakdown else {})


def step_parts(job: Job, name: str, make_cache: MakeCache) -> dict[str, Any]:
    """`breakdown` as JSON types: the parts of a step of one row behind the prompt, and what it says about the step.

    The exact and the paged cache are filled with random tokens, and measured in a CUDA graph on a GPU. A cache of
    another kind, or of a model that also has other layers than full attention, is filled by running the prompt.
    """
    model, s = job.loaded[0], job.settings
    kind = _KINDS.get(name)
    if kind is None or len(attention_geometry(model)) != num_layers(model):
        kind = lambda: _filled(job, make_cache)  # noqa: E731
    books = {} if name == EXACT else {"codebooks": job.codebooks[0]}
    frame = breakdown(model, kind, s.context, config=s.cache, **books)
    return {"parts": frame.to_dict("records"), **frame.attrs}


@torch.inference_mode()
def _filled(job: Job, make_cache: MakeCache) -> Cache:
    model, ids = job.loaded[0], job.prompts[:1]
    cache, name = make_cache(ids.shape[1] + 4 * job.settings.page_size)
    with attention(model, name):
        model(ids.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    return cache
