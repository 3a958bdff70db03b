"""Errors that carry a code and the setting to change.

The codes PQC001 to PQC004 are those of the MILLION PagedPQCache report (appendix: error codes). Every message says
what happened, with the numbers, and what to set instead. What can be said without the numbers stands in the class
(`Explanation`): `python -m pqlab explain PQC001` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Explanation:
    """What a person wants to know of an error before there is one.

    Args:
        title: the error in three or four words.
        what: what has happened when it is raised, and in what state things are afterwards.
        why: what leads to it.
        remedy: what to set.
        settings: names of the settings that `remedy` speaks of; every message of this error names at least one.
        example: two lines of Python that set them, given `model` and `books`.
    """

    title: str
    what: str
    why: str
    remedy: str
    settings: tuple[str, ...]
    example: str


class PQCacheError(RuntimeError):
    """Base of all pqlab run-time errors; `code` is one of PQC001..PQC004 and `remedy` says what to change."""

    code = "PQC000"
    explanation: ClassVar[Explanation]

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"[{self.code}] {what} {remedy}")


class PageAllocationError(PQCacheError):
    """PQC001: the pool has too few free pages. Raised before anything was changed."""

    code = "PQC001"
    explanation = Explanation(
        title="page allocation failed",
        what="A sequence needed more pages than the pool has free. Nothing was changed: once pages are free, the same "
        "step can be run again.",
        why="A pool has max_pages pages for all of its sequences, each of page_size tokens. The text grew longer, or "
        "there are more sequences (a larger batch, beams, a second cache on the same pool), than it was made for.",
        remedy="Raise max_pages (--max_pages), or leave it out and say context and max_batch: the pool is then sized "
        "for them. To go on with the pool there is, give pages back with cache.reset(), or crop.",
        settings=("max_pages", "context", "max_batch", "crop"),
        example="config = pqlab.CacheConfig(max_pages=2000)\n"
        "cache = pqlab.PagedPQCache(model, books, config)  # or without max_pages: context=4096, max_batch=2",
    )


class KernelMissingError(PQCacheError):
    """PQC002: a kernel backend was demanded that cannot run here."""

    code = "PQC002"
    explanation = Explanation(
        title="kernel missing",
        what="A backend was forced (PQLAB_BACKEND, use_backend) that cannot run this operation, or the level that "
        "would run it was forbidden. Otherwise this error does not exist: the next level runs instead, and "
        "backend_report() says why.",
        why="There is no such device, the kernels could not be built (no compiler, no CUDA toolkit, no ninja), or no "
        "kernel is made for these sizes.",
        remedy='Set PQLAB_BACKEND to auto, or use_backend("auto"). To have the kernel after all: '
        "python -m pqlab doctor names the tool that is missing, and the next import builds again.",
        settings=("PQLAB_BACKEND", "use_backend"),
        example='pqlab.use_backend("auto")\npqlab.backend_report()  # what runs, and why nothing faster does',
    )


class ResidualOverflowError(PQCacheError):
    """PQC003: more tokens than a static cache has room for. Raised before anything was stored or counted."""

    code = "PQC003"
    explanation = Explanation(
        title="residual cache overflow",
        what="A prompt or a step brings more tokens than a static cache has room for. Nothing was stored or counted: "
        "the cache is as it was before. A compiled step, or one replayed from a CUDA graph, runs no Python that could "
        "raise this. There an assertion on the device fails after the step was counted, and the cache has to be reset: "
        "on a CPU torch raises a RuntimeError with this code in its text; on a GPU it prints the code, and every later "
        "CUDA call of the process fails.",
        why='mode="static" fixes the capacity when the cache is made, so that its shapes never change. (In eager mode '
        "a full window is flushed to pages, so it cannot overflow: raising residual_length, the report's "
        "--extended_residual, is not needed.)",
        remedy='Make the cache with a larger context, or set mode="eager".',
        settings=("context", "mode"),
        example='config = pqlab.CacheConfig(mode="static")\n'
        'cache = pqlab.PagedPQCache(model, books, config, context=4096)  # or mode="eager"',
    )


class OutOfMemoryError(PQCacheError):
    """PQC004: the pages do not fit into free memory. Raised before anything was allocated."""

    code = "PQC004"
    explanation = Explanation(
        title="out of memory",
        what="The page pool is larger than the memory that is free. It is checked, and raised, before anything is "
        "allocated.",
        why="All pages are taken at once: max_pages times the bytes of a page, which grow with page_size, M, nbits and "
        "the model's layers and kv heads. Without max_pages they follow context times max_batch.",
        remedy="Lower max_pages to what the message says would fit (or context, or max_batch), or take fewer bits: M "
        "halved or nbits=4 halve a page. The report's smallest setting is page_size 32, residual 64, 500 pages. "
        "python -m pqlab doctor --shape Llama-3.1-8B --context 32768 says what fits before a model is loaded.",
        settings=("max_pages", "context", "max_batch", "page_size", "M", "nbits"),
        example="config = pqlab.CacheConfig(page_size=32, residual_length=64, max_pages=500)\n"
        "cache = pqlab.PagedPQCache(model, books, config)",
    )


EXPLAINED: dict[str, type[PQCacheError]] = {
    error.code: error for error in (PageAllocationError, KernelMissingError, ResidualOverflowError, OutOfMemoryError)
}
"""Every error with a code."""


class UnsupportedModelError(ValueError):
    """The model (or its mask) needs something the cache does not do; the message names it. Raised before generation."""


class ConfigError(ValueError):
    """A setting is out of its range; the message names the value, the range and the nearest good value."""


def out_of_range(name: str, value: int, count: int) -> str:
    """What to say of a number that should be one of 0 to `count` - 1: "page = 14 is out of range (0 to 13)"."""
    there = f"0 to {count - 1}" if count else "there are none"
    return f"{name} = {value} is out of range ({there})"


def in_runs(numbers: Iterable[int]) -> str:
    """Ascending numbers in few words: "0 to 29", or "0, 2, 5 to 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
