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
    frames, at = _frames(panel, sweep) if sweep else ([_frame(panel, "")], 0)
    return html_file.fragment(panel.title, frames, slider=sweep, at=at, plotlyjs=plotlyjs)


def _frames(panel: Panel, sweep: str) -> tuple[list[dict[str, Any]], int]:
    """What the panel shows when its control is set to each value, and where the present one is among them."""
    there = panel.sweep_values()
    if sweep not in there:
        names = ", ".join(there) or 'sweep="", for no slider'
        raise ValueError(f"sweep = {sweep!r} has no values in {type(panel).__name__}; set one of {names}")
    before, present = panel.state, panel.in_force(sweep)
    values = list(there[sweep])
    if present not in values:
        values = sorted([*values, present])
    frames = []
    with panel.paused():
        try:
            for value in values:
                panel.state = before  # one value may change other settings: the next does not begin with those
                panel.state = {sweep: value}
                frames.append(_frame(panel, sweep))
        finally:
            panel.state = before
    return frames, values.index(present)


def _frame(panel: Panel, sweep: str) -> dict[str, Any]:
    settings = {name: panel.in_force(name) for name in panel.state_names()}
    label = str(settings.pop(sweep, ""))
    return html_file.frame_of(panel.draw(), panel.frame(), text=panel.text(), label=label, settings=settings)
