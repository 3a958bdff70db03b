"""A search for settings: time against divergence, the front, the report's grid, and what was chosen."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from ..memory import readable_bytes
from .sheet import Sheet
from .theme import AMOUNTS, GREY, VERMILLION, Theme

_LOWEST = 1e-7  # nats that a logarithmic axis still shows


def tuning_figure(frame: pd.DataFrame, chosen: int | None = None, theme: Theme | None = "light") -> go.Figure:
    """Milliseconds a token against KL, a point a setting; the line joins those that no other beats in both.

    Colour is the page size, a square a setting of the report's grid, a circle one that the sampler proposed.

    Args:
        frame: `Search.frame`: page_size, residual_length, M, nbits, policy, milliseconds, milliseconds_error, kl,
            bytes, grid, best, number.
        chosen: number of the trial to mark.
    """
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        "left and low is better",
        x={"title": {"text": "ms a token"}},
        y={"title": {"text": "KL to exact, nats"}, "type": "log", "exponentformat": "power"},
    )
    front = frame[frame.best].sort_values("milliseconds")
    sheet.front(plot, front.milliseconds, front.kl.clip(lower=_LOWEST))
    sizes = sorted(frame.page_size.unique())
    for grid, name, symbol in ((True, "the report's grid", "square"), (False, "proposed by Optuna", "circle")):
        part = frame[frame.grid.astype(bool) == grid]
        sheet.add(
            plot,
            "scatter",
            x=part.milliseconds,
            y=part.kl.clip(lower=_LOWEST),
            error_x={"type": "data", "array": part.milliseconds_error, "thickness": 1, "width": 2, "color": GREY},
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 11,
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
            hovertemplate="%{text}<br>%{x:.2f} ms, KL %{y:.2g} nats<extra></extra>",
        )
    mark = frame[frame.number == chosen]
    if len(mark):
        sheet.add(
            plot,
            "scatter",
            x=mark.milliseconds,
            y=mark.kl.clip(lower=_LOWEST),
            mode="markers+text",
            text=[f"page {row.page_size}, R {row.residual_length}" for row in mark.itertuples()],
            textposition="top center",
            marker={"symbol": "circle-open", "size": 20, "color": VERMILLION, "line": {"width": 2}},
            name="chosen",
            hoverinfo="skip",
            cliponaxis=False,
        )
    return sheet.figure(theme, min_width=620, height=520, margin={"t": 40, "b": 110, "l": 70, "r": 60})


def _said(row) -> str:
    where = f"page {row.page_size}, R {row.residual_length}, M {row.M}, {row.nbits} bits, {row.policy}"
    return f"trial {row.number}: {where}; {readable_bytes(row.bytes)}"
