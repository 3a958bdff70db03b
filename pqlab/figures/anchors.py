"""Keys among anchors: one rotary pair of a head as it is stored, and how far the head's keys spread by span."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .sheet import Sheet
from .theme import AMOUNTS, ORANGE, SKY, Theme

_POINTS = 1500  # of a plot


def anchors_figure(
    pairs: Mapping[str, np.ndarray],
    positions: np.ndarray,
    spreads: pd.DataFrame,
    span: int,
    theme: Theme | None = "light",
) -> go.Figure:
    """Above, a rotary pair of one head's keys in several views, coloured by position; beneath, spread against span.

    Args:
        pairs: view -> [n, 2]; positions: [n] of the tokens.
        spreads: `quantization.turned_keys.spread_by_span`; span: the one that is marked.
    """
    count = len(pairs)
    sheet = Sheet(widths=[1] * count, heights=[3, 2], gap_x=0.06, gap_y=0.22)
    thinned = slice(None, None, max(1, len(positions) // _POINTS))
    reach = 1.08 * max(float(np.abs(points).max()) for points in pairs.values())
    axis = {"range": [-reach, reach], "zeroline": True, "zerolinewidth": 1}
    for column, (view, points) in enumerate(pairs.items()):
        plot = sheet.plot(0, column, view, x=axis, y=axis)
        sheet.add(
            plot,
            "scatter",
            x=points[thinned, 0],
            y=points[thinned, 1],
            mode="markers",
            marker={
                "size": 4,
                "opacity": 0.7,
                "color": positions[thinned],
                "colorscale": AMOUNTS,
                "showscale": column == count - 1,
                "colorbar": {"title": {"text": "position"}, "len": 0.48, "y": 1, "yanchor": "top"},
            },
            customdata=positions[thinned],
            name=view,
            showlegend=False,
            hovertemplate="position %{customdata}: (%{x:.3g}, %{y:.3g})<extra></extra>",
        )
    names = ["as they are" if not one else f"{one}" for one in spreads.span]
    plot = sheet.plot(
        1,
        0,
        "how far all dimensions of the head spread (100 %: as they are)",
        columns=count,
        x={"type": "category", "title": {"text": "tokens that share an anchor"}, "showgrid": False},
        y={"tickformat": ".0%", "rangemode": "tozero"},
    )
    chosen = list(spreads.span).index(span) if span in set(spreads.span) else -1
    sheet.add(
        plot,
        "bar",
        x=names,
        y=spreads.share,
        marker={"color": [ORANGE if i == chosen else SKY for i in range(len(names))]},
        text=["chosen" if i == chosen else "" for i in range(len(names))],
        textposition="outside",
        customdata=spreads.slow,
        name="spread",
        showlegend=False,
        hovertemplate="%{x}: %{y:.1%}, %{customdata} pairs stand nearly still<extra></extra>",
    )
    return sheet.figure(theme, min_width=240 * count, height=620, margin={"t": 58, "b": 66, "l": 56, "r": 20})
