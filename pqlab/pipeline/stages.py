"""The stages by name, what each needs, and what to type when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from . import baseline, evaluation, sampling, training
from .job import Job

STAGES: MappingProxyType[str, Callable[[Job], dict[str, Any]]] = MappingProxyType(
    {
        "baseline": baseline.run,
        "sampling": sampling.run,
        "training": training.run,
        "evaluation": evaluation.run,
    }
)
"""What a stage does, and what it found as JSON types; in the order of the report."""


def check_order(names: tuple[str, ...]) -> None:
    """Raise `ConfigError` for an unknown stage, one that is named twice, or one that reads what a later one writes."""
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"there is no stage {name}; the stages are {' '.join(STAGES)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"a stage is named twice; type -p {' '.join(dict.fromkeys(names))}")
    chain = [name for name in names if name != "baseline"]
    if chain != sorted(chain, key=list(STAGES).index):
        ordered = " ".join(sorted(names, key=list(STAGES).index))
        raise ConfigError(f"training reads what sampling writes, evaluation what training writes; type -p {ordered}")


def check_inputs(job: Job) -> None:
    """Raise `ConfigError` when a stage's input neither exists nor is made by an earlier stage of the run."""
    names = job.settings.stages
    no_samples = "sampling" not in names and not job.samples_file.is_file()
    if "training" in names and no_samples and (job.force or not job.codebooks_file.is_file()):
        raise ConfigError(
            f"training reads sampled keys and values, and there is no {job.samples_file.name} in {job.folder}: "
            f"type -p {_with(names, 'sampling')}"
        )
    given = job.settings.codebooks
    if given is not None and not given.is_file():
        raise ConfigError(f"there is no codebooks file {given}")
    if given is not None and "training" in names:
        raise ConfigError("--codebooks is evaluated instead of trained ones; leave it out, or training out of -p")
    needs = "evaluation" in names and "training" not in names and given is None and not job.found.random
    if needs and not job.codebooks_file.is_file():
        more = ("training",) if job.samples_file.is_file() else ("sampling", "training")
        raise ConfigError(
            f"evaluation of the {job.pq_name} cache reads trained codebooks, and there is no {job.codebooks_file.name} "
            f"in {job.folder}: type -p {_with(names, *more)}, or --codebooks FILE"
        )


def _with(names: tuple[str, ...], *more: str) -> str:
    return " ".join(sorted({*names, *more}, key=list(STAGES).index))
