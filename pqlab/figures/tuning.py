"""A search for settings: time against divergence, the front, the report's grid, what was chosen; and what page sizes
and residuals do by themselves."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from ..memory import MIB, readable_bytes
from .sheet import Sheet
from .theme import AMOUNTS, GREY, PAGED, VERMILLION, Theme, sequence_colour, sequence_mark

_LOWEST = 1e-7  # nats that a logarithmic axis still shows
_HEIGHTS = {"kl": lambda frame: frame.kl.clip(lower=_LOWEST), "bytes": lambda frame: frame.bytes / MIB}
_AXES = {
    "kl": {"title": {"text": "KL to exact, nats"}, "type": "log", "exponentformat": "power"},
    "bytes": {"title": {"text": "MiB of the cache"}, "rangemode": "tozero"},
}
_SAID = {"kl": ", KL %{y:.2g} nats", "bytes": ""}  # the text of a point tells its bytes


def tuning_figure(
    frame: pd.DataFrame, chosen: int | None = None, theme: Theme | None = "light", *, against: str = "kl"
) -> go.Figure:
    """Milliseconds a token against KL (or bytes), a point a setting; the line joins those that no other beats in both.

    Colour is the page size, a square a setting of the report's grid, a circle one that the sampler proposed.

    Args:
        frame: `Search.frame`: page_size, residual_length, M, nbits, policy, milliseconds, milliseconds_error, kl,
            bytes, grid, best, number; with `again` (`tune.choice.with_times`), what was not timed again is paler.
        chosen: number of the trial to mark.
        against: "kl", or "bytes" where no KL was measured.
    """
    sheet, heights = Sheet(), _HEIGHTS[against](frame)
    axis = _AXES[against]
    plot = sheet.plot(
        0,
        0,
        "left and low is better",
        x={"title": {"text": "ms a token"}},
        y=axis,
    )
    front = frame[frame.best].sort_values("milliseconds")
    sheet.front(plot, front.milliseconds, heights[front.index])
    sizes = sorted(frame.page_size.unique())
    for grid, name, symbol in ((True, "the report's grid", "square"), (False, "proposed by Optuna", "circle")):
        part = frame[frame.grid.astype(bool) == grid]
        sheet.add(
            plot,
            "scatter",
            x=part.milliseconds,
            y=heights[part.index],
            error_x={"type": "data", "array": part.milliseconds_error, "thickness": 1, "width": 2, "color": GREY},
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 11,
                "opacity": [1.0 if again else 0.4 for again in part.again] if "again" in part else 1.0,
                "color": [sizes.index(size) for size in part.page_size],
                "cmin": 0,
                "cmax": max(1, len(sizes) - 1),
                "colorscale": AMOUNTS,
                "showscale": grid,
                "colorbar": {
                    "title": {"text": "page size", "side": "right"},
                    "tickvals": list(range(len(sizes))),
                    "ticktext": [str(size) for size in sizes],
                    "thickness": 12,
                },
                "line": {"width": 1, "color": GREY},
            },
            text=[_said(row) for row in part.itertuples()],
            name=name,
            hovertemplate=f"%{{text}}<br>%{{x:.2f}} ms{_SAID[against]}<extra></extra>",
        )
    mark = frame[frame.number == chosen]
    if len(mark):
        sheet.add(
            plot,
            "scatter",
            x=mark.milliseconds,
            y=heights[mark.index],
            mode="markers+text",
            text=[f"page {row.page_size}, R {row.residual_length}" for row in mark.itertuples()],
            textposition="top center",
            marker={"symbol": "circle-open", "size": 20, "color": VERMILLION, "line": {"width": 2}},
            name="chosen",
            hoverinfo="skip",
            cliponaxis=False,
        )
    return sheet.figure(theme, min_width=620, height=538, margin={"t": 58, "b": 110, "l": 70, "r": 60})


def evidence_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Left, the divergence by exact newest tokens, a line a page size; right, the time of every page size.

    Args:
        frame: page_size, residual_length, kl (nats), milliseconds, milliseconds_error: `tune.derive.evidence`.
    """
    sheet = Sheet([3, 2], gap_x=0.12)
    residuals = sorted(frame.residual_length.unique())
    kl = sheet.plot(
        0,
        0,
        "KL to exact, nats",
        x={"title": {"text": "residual: newest tokens that stay exact"}, "type": "log", "tickvals": residuals},
        y={"rangemode": "tozero"},
    )
    for index, (page, part) in enumerate(frame.groupby("page_size")):
        sheet.add(
            kl,
            "scatter",
            x=part.residual_length,
            y=part.kl,
            mode="lines+markers",
            line={"color": sequence_colour(index)},
            marker={"symbol": sequence_mark(index), "size": 8},
            name=f"pages of {page}",
            hovertemplate=f"page {page}, R %{{x}}: KL %{{y:.5f}}<extra></extra>",
        )
    times = frame.drop_duplicates("page_size").sort_values("page_size")
    plot = sheet.plot(
        0,
        1,
        "milliseconds a token, at the default residual",
        x={"title": {"text": "page size"}, "type": "category"},
        y={"rangemode": "tozero"},
    )
    sheet.add(
        plot,
        "bar",
        x=times.page_size.astype(str),
        y=times.milliseconds,
        error_y={"type": "data", "array": times.milliseconds_error, "thickness": 1.5},
        marker={"color": PAGED},
        showlegend=False,
        hovertemplate="pages of %{x}: %{y:.2f} ms<extra></extra>",
    )
    return sheet.figure(theme, min_width=720, height=418, margin={"t": 58, "b": 110, "l": 60, "r": 20})


def _said(row) -> str:
    where = f"page {row.page_size}, R {row.residual_length}, M {row.M}, {row.nbits} bits, {row.policy}"
    return f"trial {row.number}: {where}; {readable_bytes(row.bytes)}"
