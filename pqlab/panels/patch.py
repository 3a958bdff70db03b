"""One FigureWidget, built once: `patch` changes it in place into what a pure figure function returned."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

Drawn = tuple[list[dict[str, Any]], dict[str, Any]]


def snapshot(figure: go.Figure) -> Drawn:
    """The traces and the layout of a figure as plain dicts, to be compared with the next one; not its template."""
    layout = figure.layout.to_plotly_json()
    layout.pop("template", None)  # the theme is the panel's affair
    return [trace.to_plotly_json() for trace in figure.data], layout


def patch(widget: go.FigureWidget, before: Drawn, figure: go.Figure) -> Drawn:
    """Send `widget` only what differs between the figure drawn `before` and `figure`, in one message.

    What the person did in the browser (zoom, hidden traces) stays where the figure did not change it. Returns the
    snapshot for the next call. The figure must have the same traces in the same order: `ValueError` if not.
    """
    after = snapshot(figure)
    kinds = [trace["type"] for trace in before[0]], [trace["type"] for trace in after[0]]
    if kinds[0] != kinds[1]:
        raise ValueError(f"a panel's figure keeps its traces; it had {kinds[0]} and now has {kinds[1]}")
    with widget.batch_update():
        for trace, old, new in zip(widget.data, before[0], after[0], strict=True):
            for key, value in _changes(old, new).items():
                trace[key] = value
        for key, value in _changes(before[1], after[1]).items():
            widget.layout[key] = value
    return after


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    gone = {key: None for key in old if key not in new}
    return gone | {key: value for key, value in new.items() if key not in old or not _same(old[key], value)}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
