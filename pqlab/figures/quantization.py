"""What codebooks look like: centroids among samples, what they lose in which head, and one vector on its way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .sheet import Sheet
from .theme import AMOUNTS, BLUE, GREY, ORANGE, SKY, Theme, sequence_mark

_SAMPLES = 1500  # points of a plot


def subspaces_figure(
    samples: np.ndarray,
    mapped: np.ndarray,
    centroids: np.ndarray,
    subspaces: Sequence[int],
    theme: Theme | None = "light",
) -> go.Figure:
    """Samples of one head in a few 2-d subspaces, before the map and behind it with the centroids they are given.

    Args:
        samples, mapped: [n, d] of one head, in head space and in code space.
        centroids: [M, C, 2] of that head.
        subspaces: which of the M to draw, one a column.

    Raises ValueError when subspaces do not have two dimensions.
    """
    if centroids.shape[-1] != 2:
        raise ValueError(f"subspaces of {centroids.shape[-1]} dimensions cannot be drawn; choose M = d / 2")
    count = len(subspaces)
    sheet = Sheet(widths=[1] * count, heights=[1, 1], gap_x=0.06, gap_y=0.16)
    thinned = slice(None, None, max(1, len(samples) // _SAMPLES))
    for column, m in enumerate(subspaces):
        pair = slice(2 * m, 2 * m + 2)
        before, behind = samples[thinned, pair], mapped[thinned, pair]
        plot = sheet.plot(0, column, f"dimensions {2 * m}, {2 * m + 1} as the model has them")
        _points(sheet, plot, before, "samples", column == 0)
        plot = sheet.plot(1, column, f"subspace {m} behind the map")
        _points(sheet, plot, behind, "samples", False)
        sheet.add(
            plot,
            "scatter",
            x=centroids[m, :, 0],
            y=centroids[m, :, 1],
            mode="markers",
            marker={"color": ORANGE, "size": 5, "symbol": "x-thin", "line": {"width": 1.5, "color": ORANGE}},
            name="centroids",
            legendgroup="centroids",
            showlegend=column == 0,
            hovertemplate="code %{pointNumber}: (%{x:.3g}, %{y:.3g})<extra></extra>",
        )
    return sheet.figure(theme, min_width=220 * count, height=638, margin={"t": 58, "b": 80, "l": 50, "r": 20})


def _points(sheet: Sheet, plot: dict[str, str], points: np.ndarray, name: str, legend: bool) -> None:
    sheet.add(
        plot,
        "scatter",
        x=points[:, 0],
        y=points[:, 1],
        mode="markers",
        marker={"color": SKY, "size": 3, "opacity": 0.5},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hoverinfo="skip",
    )


def distortion_figure(table: pd.DataFrame, space: str = "code_space", theme: Theme | None = "light") -> go.Figure:
    """Which heads lose most: a heat map for K and one for V, layers across, heads down.

    Args:
        table: `evaluation.distortion.distortions`.
        space: its column to draw, "code_space" or "head_space".
    """
    sheet = Sheet(heights=[1, 1], gap_y=0.24)
    highest = float(table[space].max())
    for row, side in enumerate(sorted(table.side.unique())):
        grid = table[table.side == side].pivot(index="head", columns="layer", values=space)
        plot = sheet.plot(
            row,
            0,
            f"{side.upper()}: share of the variance that codes lose",
            x={"title": {"text": "layer"}, "showgrid": False, "type": "category"},
            y={"title": {"text": "kv head"}, "type": "category", "showgrid": False},
        )
        sheet.add(
            plot,
            "heatmap",
            z=grid.to_numpy(),
            x=[str(layer) for layer in grid.columns],
            y=[str(head) for head in grid.index],
            zmin=0,
            zmax=highest,
            colorscale=AMOUNTS,
            showscale=row == 0,
            colorbar={"tickformat": ".1%", "len": 1},
            xgap=1,
            ygap=1,
            hovertemplate=f"layer %{{x}}, {side.upper()}, head %{{y}}: %{{z:.2%}}<extra></extra>",
            name=side.upper(),
        )
    return sheet.figure(theme, min_width=620, height=398, margin={"t": 58, "b": 60, "l": 60, "r": 20})


def rate_figure(table: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Bits an element against the share of the variance that is lost, a line a setting.

    Args:
        table: setting, bits, lost (0 to 1).
    """
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        "left and low keeps more of the variance",
        x={"title": {"text": "bits per element"}, "rangemode": "tozero"},
        y={"title": {"text": "share of the variance lost"}, "type": "log", "dtick": 1, "tickformat": ".3~%"},
    )
    for index, (setting, part) in enumerate(table.sort_values("bits").groupby("setting", sort=False)):
        sheet.add(
            plot,
            "scatter",
            x=part.bits,
            y=part.lost,
            mode="lines+markers",
            marker={"symbol": sequence_mark(index), "size": 9},
            name=setting,
            hovertemplate=f"{setting}: %{{x:g}} bits, %{{y:.2%}} lost<extra></extra>",
        )
    return sheet.figure(theme, min_width=620, height=418, margin={"t": 58, "b": 90, "l": 70, "r": 20})


def vector_figure(steps: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """One vector on its way: as it is, mapped, as codes say, and brought back.

    Args:
        steps: `evaluation.distortion.one_vector`.
    """
    sheet = Sheet(heights=[1, 1], gap_y=0.22)
    plot = sheet.plot(0, 0, "code space: mapped, and the centroids its codes name", x={"title": {"text": "dimension"}})
    text = [f"subspace {s}, code {c}" for s, c in zip(steps.subspace, steps.code, strict=True)]
    _bars(sheet, plot, steps.dimension, steps.mapped, "mapped", BLUE, "circle", text)
    _bars(sheet, plot, steps.dimension, steps.centroid, "centroids", ORANGE, "x", text)
    plot = sheet.plot(1, 0, "head space: the vector, and what comes back", x={"title": {"text": "dimension"}})
    _bars(sheet, plot, steps.dimension, steps.x, "vector", BLUE, "circle", None)
    _bars(sheet, plot, steps.dimension, steps.decoded, "decoded", ORANGE, "x", None)
    sheet.add(plot, "bar", x=steps.dimension, y=steps.error, marker={"color": GREY}, name="error")
    return sheet.figure(theme, min_width=620, height=538, margin={"t": 58, "b": 90, "l": 60, "r": 20})


def _bars(
    sheet: Sheet, plot: dict[str, str], x, y, name: str, colour: str, symbol: str, text: list[str] | None
) -> None:
    sheet.add(
        plot,
        "scatter",
        x=x,
        y=y,
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 6},
        name=name,
        text=text,
        hovertemplate=f"{name} %{{x}}: %{{y:.3g}}<br>%{{text}}<extra></extra>"
        if text
        else f"{name} %{{x}}: %{{y:.3g}}<extra></extra>",
    )
