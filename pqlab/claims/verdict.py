"""A claim, what was measured of it, and the word for how they stand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd

from .results import REPORTS_GPU, Results, Source

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measured:
    """What pqlab has of a claim.

    Args:
        value: the figure that is compared with the claim's `wanted`.
        shown: the figure for a person, with its conditions.
        source: where it was read; None for what follows from the layout of the cache alone.
        differs: what of the claim's conditions was otherwise ("another model"); the GPU is looked at by itself.
    """

    value: float
    shown: str
    source: Source | None
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One claim of the report.

    Args:
        name: what it is about.
        reported: the report's figure, as it gives it.
        wanted: the least (or most) value with which the claim holds.
        find: reads pqlab's figure from the results; None, or a KeyError for a missing field, when there is none.
        command: what measures it.
        better: whether a larger or a smaller figure is better.
        of_gpu: the claim is one about an A100.
    """

    name: str
    reported: str
    wanted: float
    find: Callable[[Results], Measured | None]
    command: str
    better: Literal["more", "less"] = "more"
    of_gpu: bool = True


@dataclass(frozen=True)
class Row:
    """A claim, judged; fields are plain data."""

    claim: str
    reported: str
    measured: str
    verdict: str
    value: float | None
    wanted: float
    device: str
    date: str
    commit: str
    file: str
    command: str


def judge(claim: Claim, results: Results) -> Row:
    """Hold a claim to the results; a missing file or field is a row that says so."""
    missing = ""
    try:
        found = claim.find(results)
    except KeyError as error:
        found, missing = None, f" (a result has no field {error.args[0]!r})"
    known = {"claim": claim.name, "reported": claim.reported, "wanted": claim.wanted, "command": claim.command}
    if found is None:
        empty = dict.fromkeys(("device", "date", "commit", "file"), "")
        return Row(measured="", verdict=NOT_MEASURED + missing, value=None, **known, **empty)
    holds = found.value >= claim.wanted if claim.better == "more" else found.value <= claim.wanted
    source = found.source or Source("", "computed from the layout", "", "")
    differs = list(found.differs)
    if claim.of_gpu and found.source is not None and REPORTS_GPU not in source.device:
        differs.insert(0, "other hardware")
    word = ("holds" if holds else "does not hold") + (f" ({', '.join(differs)})" if differs else "")
    return Row(
        measured=found.shown, verdict=word, value=found.value, device=source.device, date=source.date,
        commit=source.commit, file=source.file, **known,
    )  # fmt: skip


def table(claims: Iterable[Claim], results: Results) -> pd.DataFrame:
    """One row a claim: the fields of `Row`."""
    rows: list[dict[str, Any]] = [asdict(judge(claim, results)) for claim in claims]
    return pd.DataFrame(rows, columns=list(Row.__dataclass_fields__))
