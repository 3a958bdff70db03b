"""What a cache takes of a device's memory at its most: a real decode, watched.

The harness itself keeps every key and value twice, exact and as it comes back, so its own memory says nothing about a
cache. Methods for which there is a real one (`Method.cache`) are run with it once, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import kernels
from ..kernels.dispatch import FIRST_CHOICE
from ..model_runs import attention, counted
from ..process_memory import ProcessMemory
from ..transformers_api import cache_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

STEPS = 16
"""Tokens of a window that are decoded; those before them are the prompt."""

_WARM = 64  # tokens of a run before, which loads what every cache needs and begins builds of kernels


class Peak(NamedTuple):
    """Bytes above those of the model.

    Attributes:
        prompt: the most while the prompt is prefilled, its activations included.
        decode: the most while tokens are decoded.
        fallback: why another backend than the first choice ran, which needs other memory; "" if none did.
    """

    prompt: int
    decode: int
    fallback: str = ""


Run = tuple[Callable[[int], "Cache"], str]
"""What makes a cache for the tokens of a sequence, and the attention that it is run with."""


def cache_peaks(
    model: PreTrainedModel, ids: Tensor, runs: Mapping[str, Run], *, progress: bool = False
) -> tuple[dict[str, Peak], dict[str, Exception]]:
    """Take a window through a fresh cache of every run: all but the last `STEPS` tokens as the prompt, then these.

    What is made beside the cache (copies of codebooks) counts as the cache's. Memory is counted as `ProcessMemory`
    does: on a CPU the resident set of the process, on CUDA torch's allocations.

    Args:
        ids: int64 [1, n], n above `STEPS`.
        runs: by name.

    Returns:
        The peaks, and the errors of the runs that have none, by name.
    """
    ids = ids.to(model.device)
    peaks, errors = {}, {}
    for name, (make, used) in tqdm(runs.items(), desc="peak memory", unit="cache", disable=not progress):
        try:
            with attention(model, used):
                peaks[name] = _watched(model, ids, make)
        except Exception as error:  # one cache that fails leaves the others
            errors[name] = error
    return peaks, errors


def _watched(model, ids: Tensor, make: Callable[[int], Cache]) -> Peak:
    before = make(_WARM)  # lives on: backends free the copies of a dead cache as they make those of the next one
    _decode(model, ids[:, :_WARM], before, lambda: 0)
    kernels.wait()
    with counted() as ran, ProcessMemory(model.device) as memory:
        peak = _decode(model, ids, make(ids.shape[1]), lambda: memory.sample().peak)
    reasons = sorted({reason for _, _, reason in ran} - {FIRST_CHOICE, "forced"})
    return peak._replace(fallback="; ".join(reasons))


@torch.inference_mode()
def _decode(model, ids: Tensor, cache: Cache, peak: Callable[[], int]) -> Peak:
    given = {**cache_argument(model, cache), "use_cache": True, "logits_to_keep": 1}
    model(ids[:, :-STEPS], **given)
    at_prompt = peak()
    for token in ids[:, -STEPS:].split(1, 1):
        model(token, **given)
    return Peak(at_prompt, peak())
