"""Which settings of a search come into its last round, and which of them is taken.

Time is weighed against divergence, or against bytes where no divergence could be measured (random weights).

First timings lie minutes apart, and in minutes a machine's speed drifts by more than settings differ. So the settings
that may be the best are timed again, all of them in turns (`Workload.in_turns`), and one is taken by these times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import ConfigError
from .space import Setting

if TYPE_CHECKING:
    from .workload import Workload

FINALISTS = 8
"""Settings that are timed again, at most."""

_SURE = 2.0
"""Errors of both timings that lie between two settings of which one is surely the faster."""


def price(frame: pd.DataFrame) -> str:
    """The column that time is weighed against: "kl", or "bytes" where no KL was measured."""
    return "kl" if frame.kl.notna().all() else "bytes"


def not_beaten(frame: pd.DataFrame, sure: float = 0.0) -> pd.DataFrame:
    """Rows that no other row beats in time and price, the fastest first.

    Args:
        frame: milliseconds, milliseconds_error, and kl or bytes.
        sure: errors of both timings by which a row has to be faster to beat another.
    """
    time, error, paid = (frame[name].to_numpy(float) for name in ("milliseconds", "milliseconds_error", price(frame)))
    later = time[:, None] - time[None] - sure * (error[:, None] + error[None])  # of the row, behind that of the column
    worse = paid[:, None] - paid[None]
    beaten = (later >= 0) & (worse >= 0) & ((later > 0) | (worse > 0))
    return frame[~beaten.any(1)].sort_values("milliseconds")


def finalists(frame: pd.DataFrame, max_kl: float | None = None, count: int = FINALISTS) -> pd.DataFrame:
    """Rows that may be what `choose` would take if times were exact, the likeliest first.

    First those that are not surely beaten. The others follow for as far as `count` reaches: what else ran on the
    machine may have been in the way of one timing and not of another, and no error of a timing tells that.

    Args:
        max_kl, and what is raised: see `choose`.
        count: rows, at most.
    """
    found = _allowed(frame, max_kl)
    order = found.milliseconds if max_kl is not None else _score(found, not_beaten(found))
    ranked = found.loc[order.sort_values(kind="stable").index]
    near = ranked.index.isin(not_beaten(frame, _SURE).index)
    return pd.concat([ranked[near], ranked[~near]]).head(count)


def timed_again(workload: Workload, rows: pd.DataFrame, rounds: int = 5) -> tuple[pd.DataFrame, float | None]:
    """The rows with the times that their settings have in turns, the fastest first; and the exact cache's milliseconds,
    None where it cannot be timed alike."""
    names = [str(Setting.of_row(row)) for _, row in rows.iterrows()]
    again = workload.in_turns([Setting.of_row(row) for _, row in rows.iterrows()], rounds).set_index("setting")
    times = {name: again.loc[names, name].to_numpy() for name in ("milliseconds", "milliseconds_error")}
    exact = float(again.milliseconds["exact"]) if "exact" in again.index else None
    return rows.assign(**times).sort_values("milliseconds"), exact


def with_times(frame: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the times of the rows that were timed again, which `again` tells; `best` goes by them.

    Args:
        frame: `Search.frame`.
        timed: of `timed_again`.
    """
    found = frame.set_index("number")
    found.update(timed.set_index("number")[["milliseconds", "milliseconds_error"]])
    found["again"] = found.index.isin(timed.number)
    found["best"] = found.index.isin(not_beaten(found[found.again] if len(timed) else found).index)
    return found.reset_index()


def choose(frame: pd.DataFrame, max_kl: float | None = None, scale: pd.DataFrame | None = None) -> pd.Series:
    """The fastest row whose KL is at most `max_kl`; without a limit, the one nearest to the best of both.

    Nearest: time, and the logarithm of KL (or bytes), as shares of the ranges of what is not beaten; the smallest sum.

    Args:
        scale: rows whose ranges these are, where `frame` is only a part of them; None takes `frame`.

    Raises:
        ConfigError: no row reaches `max_kl`, or no KL was measured.
    """
    found = _allowed(not_beaten(frame), max_kl)
    if max_kl is not None:
        return found.iloc[0]
    return found.loc[_score(found, found if scale is None else not_beaten(scale)).idxmin()]


def _allowed(rows: pd.DataFrame, max_kl: float | None) -> pd.DataFrame:
    if max_kl is None:
        return rows
    if price(rows) != "kl":
        raise ConfigError("no KL is measured of random weights; leave out the limit of KL, or take real weights")
    good = rows[rows.kl <= max_kl]
    if not len(good):
        raise ConfigError(f"no setting reaches KL {max_kl:g}; the best is {rows.kl.min():.2g}: allow that, or more "
                          "memory, bits or trials")  # fmt: skip
    return good


def _score(rows: pd.DataFrame, scale: pd.DataFrame) -> pd.Series:
    """Of every row, smaller is better; only differences mean something."""
    paid = price(scale)
    of_each = (lambda frame: frame.milliseconds), (lambda frame: np.log(frame[paid].clip(lower=1e-9)))
    return sum(of(rows) / ((of(scale).max() - of(scale).min()) or 1.0) for of in of_each)
