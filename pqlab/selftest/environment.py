"""The machine: what the doctor says of everything that a check or a cache needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..doctor import PROBES, Probe, examine
from .session import Check, Disagreement, Phase, Session

NEEDED = (
    "pqlab", "python", "system", "cpu", "memory", "torch", "libraries", "gpu", "compiler", "ninja", "nvcc",
    "host compiler", "caches", "packages",
    "cache memory",
)  # fmt: skip
"""Probes whose problems are failures here; browsers and notebook packages are not a cache's business."""


def checks(session: Session) -> Iterator[Check]:
    for name in NEEDED:
        yield name, _as_check(name, PROBES[name])


def _as_check(name: str, probe: Probe) -> Callable[[], str]:
    def check() -> str:
        finding = examine({name: probe})[name]
        if finding.problem:
            raise Disagreement(f"{finding.value}; {finding.problem}.", finding.remedy)
        return finding.value

    return check


PHASE = Phase("environment", "Environment", checks, "Run python -m pqlab doctor: it names what is missing.")
