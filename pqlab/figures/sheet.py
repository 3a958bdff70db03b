"""A figure of several plots on a grid, assembled as plain dicts and checked by plotly once, at the end.

`make_subplots` with its updates takes a few hundred milliseconds a figure; a figure that follows a slider has about
fifty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .theme import FONT_SIZE, GREY, Theme, template


class Sheet:
    """A grid of plots; row 0 is the top.

    Args:
        widths, heights: shares of the columns and rows.
        gap_x, gap_y: gaps between them, as shares of the whole width and height.
    """

    def __init__(
        self, widths: Sequence[float] = (1,), heights: Sequence[float] = (1,), gap_x: float = 0.08, gap_y: float = 0.12
    ) -> None:
        self._columns = _spans(widths, gap_x)
        self._rows = [(1 - high, 1 - low) for low, high in _spans(heights, gap_y)]  # plotly counts from the bottom
        self._axes: dict[str, Any] = {}
        self._count = 0
        self.data: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    def plot(
        self,
        row: int,
        column: int,
        title: str = "",
        *,
        columns: int = 1,
        x: dict[str, Any] | None = None,
        y: dict[str, Any] | None = None,
    ) -> dict[str, str]:
        """A plot in a cell (or over `columns` cells); `x` and `y` are its axes' properties.

        Returns:
            what a trace needs to lie in it, for `add`.
        """
        self._count += 1
        number = "" if self._count == 1 else str(self._count)
        left, right = self._columns[column][0], self._columns[column + columns - 1][1]
        bottom, top = self._rows[row]
        self._axes[f"xaxis{number}"] = {"domain": [left, right], "anchor": f"y{number}", **(x or {})}
        self._axes[f"yaxis{number}"] = {"domain": [bottom, top], "anchor": f"x{number}", **(y or {})}
        if title:
            self.note(title, x=left, y=top, xanchor="left", yanchor="bottom", yshift=4)
        return {"xaxis": f"x{number}", "yaxis": f"y{number}"}

    def add(self, plot: dict[str, str], kind: str, **properties: Any) -> None:
        """A trace of type `kind` in a plot."""
        self.data.append({"type": kind, **plot, **properties})

    def front(self, plot: dict[str, str], x: Any, y: Any) -> None:
        """The dotted line through points of which none is beaten in both: it falls in steps from left to right."""
        line = {"color": GREY, "dash": "dot", "shape": "hv"}
        self.add(plot, "scatter", x=x, y=y, mode="lines", line=line, name="not beaten in both", hoverinfo="skip")

    def note(self, text: str, **properties: Any) -> None:
        """Text beside the plots; x and y are shares of the sheet."""
        font = {"size": FONT_SIZE}
        place = {"xref": "paper", "yref": "paper", "showarrow": False, "font": font, "align": "left"}
        self.notes.append({"text": text, **place, **properties})

    def figure(self, theme: Theme | None = "light", *, min_width: int = 0, **layout: Any) -> go.Figure:
        """The finished figure.

        Args:
            theme: the figure's look, background included; None leaves the template to the caller.
            min_width: pixels below which a panel scrolls the figure instead of squeezing it.
            layout: properties of the layout.
        """
        whole = {"annotations": self.notes, "meta": {"min_width": min_width}, **self._axes, **layout}
        figure = go.Figure({"data": self.data, "layout": whole})
        if theme is not None:
            figure.layout.template = template(theme, opaque=True)
        return figure


def _spans(shares: Sequence[float], gap: float) -> list[tuple[float, float]]:
    room = 1 - gap * (len(shares) - 1)
    spans, start = [], 0.0
    for share in shares:
        end = start + room * share / sum(shares)
        spans.append((max(0.0, start), min(1.0, end)))
        start = end + gap
    return spans
