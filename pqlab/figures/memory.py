"""Memory over the time of a generation: what each cache holds, and what the process takes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from ..memory import MIB
from .sheet import Sheet
from .theme import EXACT, PAGED, Theme

_COLOURS = {"exact": EXACT, "paged pq": PAGED}
_LINES = (("used", "dot", "tokens"), ("reserved", "solid", "held"))
"""Column, dash, and what it is called: what the tokens occupy, and what the cache has allocated."""


def memory_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Two plots over the tokens of the sequence: bytes of the caches, and bytes of the process with its peaks.

    Args:
        frame: `benchmarks.memory_timeline.memory_timeline`, or its file: cache, step, tokens, used, reserved, process,
            peak (bytes).
    """
    decode = frame[frame.step >= 0]
    sheet = Sheet(widths=[1, 1], gap_x=0.1)
    axes = {"x": {"title": {"text": "tokens"}}, "y": {"title": {"text": "MiB"}, "rangemode": "tozero"}}
    held = sheet.plot(0, 0, "the caches: held, and occupied by tokens (dotted)", **axes)
    taken = sheet.plot(0, 1, "the process, above its start: now, and peaks (dotted)", **axes)
    for name, part in decode.groupby("cache", sort=False):
        colour = _COLOURS.get(str(name))
        begin = frame[(frame.cache == name) & (frame.step == -1)]
        for column, dash, what in _LINES:
            _line(sheet, held, part, column, colour, dash, f"{name}, {what}")
        if len(begin):
            at_start = float(begin.reserved.iloc[0]) / MIB
            sheet.add(
                held,
                "scatter",
                x=[part.tokens.iloc[0]],
                y=[at_start],
                mode="markers",
                marker={"color": colour, "symbol": "diamond", "size": 11},
                name=f"{name}, before the first token",
                hovertemplate=f"{name}: %{{y:.1f}} MiB reserved before the first token<extra></extra>",
                cliponaxis=False,
            )
        steps = part[part.step > 0]  # the prompt's own peak is of activations
        _line(sheet, taken, steps, "process", colour, "solid", f"{name}, process")
        _line(sheet, taken, steps, "peak", colour, "dot", f"{name}, peak")
        if len(steps):
            last = steps.iloc[-1]
            sheet.add(
                taken,
                "scatter",
                x=[last.tokens],
                y=[last.process / MIB],
                mode="markers+text",
                text=[f"{last.process / MIB:,.0f}"],
                textposition="top left",
                marker={"color": colour, "size": 8, "symbol": "circle" if name == "exact" else "diamond"},
                showlegend=False,
                hoverinfo="skip",
                cliponaxis=False,
            )
    return sheet.figure(theme, min_width=760, height=458, margin={"t": 58, "b": 120, "l": 60, "r": 30})


def _line(sheet: Sheet, plot: dict[str, str], part: pd.DataFrame, column: str, colour, dash: str, name: str) -> None:
    sheet.add(
        plot,
        "scatter",
        x=part.tokens,
        y=part[column] / MIB,
        mode="lines",
        line={"color": colour, "dash": dash, "width": 1.5 if dash == "dot" else 2.5},
        name=name,
        hovertemplate=f"{name}: %{{y:.1f}} MiB at %{{x:,}} tokens<extra></extra>",
    )
