"""A panel as one HTML file: the figure for every value of one setting, a slider, the table (`figures.html_file`).

Each position of the slider holds the traces that the panel drew for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figures import html_file

if TYPE_CHECKING:
    from .base import Panel


def write_html(panel: Panel, path: Path, sweep: str) -> Path:
    """Write the file and return its path; see `Panel.to_html`."""
    return html_file.write_page(path, panel.title or type(panel).__name__, fragment(panel, sweep))


def fragment(panel: Panel, sweep: str, plotlyjs: bool = True) -> str:
    """The same as a piece of HTML, for a page of its own; `plotlyjs` False where an earlier piece brings plotly.js."""
    if sweep and sweep not in panel.state_names():
        raise ValueError(f"sweep = {sweep!r} is no state of {type(panel).__name__}: {', '.join(panel.state_names())}")
    frames, at = _frames(panel, sweep)
    settings = {key: value for key, value in panel.state.items() if key != sweep}
    return html_file.fragment(panel.title, frames, slider=sweep, at=at, settings=settings, plotlyjs=plotlyjs)


def _frames(panel: Panel, sweep: str) -> tuple[list[dict[str, Any]], int]:
    if not sweep:
        return [_frame(panel, "")], 0
    present = getattr(panel, sweep)
    values = list(panel.sweep_values(sweep))
    if present not in values:
        values = sorted([*values, present])
    frames = []
    with panel.paused():
        for value in values:
            setattr(panel, sweep, value)
            frames.append(_frame(panel, str(value)))
        setattr(panel, sweep, present)
    return frames, values.index(present)


def _frame(panel: Panel, label: str) -> dict[str, Any]:
    return html_file.frame_of(panel.draw(), panel.frame(), text=panel.text(), label=label)
