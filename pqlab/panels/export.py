"""A panel as one HTML file: the figure for every value of one setting, a slider, the table, plotly.js inlined.

Nothing is computed in the file: each position of the slider holds the traces that the panel drew for it. The file
follows the light or dark preference of the browser that opens it.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from plotly.offline import get_plotlyjs

from ..figures.theme import THEMES, template
from .view import plain

if TYPE_CHECKING:
    from .base import Panel

_STYLE = """
.pqlab { font: 14px system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif; }
.pqlab input[type=range] { width: min(28em, 60vw); vertical-align: middle; }
.pqlab, .pqlab .table { overflow-x: auto; }
.pqlab table { border-collapse: collapse; font-size: 13px; }
.pqlab td, .pqlab th { padding: 2px 10px; border-bottom: 1px solid rgba(128,128,128,.35); text-align: right; }
.pqlab dl { display: grid; grid-template-columns: max-content auto; gap: 0 1em; font-size: 13px; }
.pqlab dd { margin: 0; }
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 1.2em auto; max-width: 1200px; padding: 0 1em; }
@media (prefers-color-scheme: light) { body { background: #fff; color: #24292f; } }
@media (prefers-color-scheme: dark) { body { background: #111418; color: #d7dae0; } }
"""

_SCRIPT = """
(() => {
  const root = document.getElementById(ID), {frames, templates} = DATA;
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const slider = root.querySelector("input"), said = root.querySelector("output");
  const show = () => {
    const frame = frames[slider ? +slider.value : 0];
    if (said) said.textContent = frame.label;
    root.querySelector(".text").innerHTML = frame.text;
    root.querySelector(".table").innerHTML = frame.table;
    const lab = document.body.dataset.jpThemeLight;
    const dark = lab !== undefined ? lab === "false" : media.matches;
    const layout = {uirevision: "kept", ...frame.layout, template: templates[dark ? "dark" : "light"]};
    root.querySelector(".plot").style.minWidth = `${layout.meta?.min_width ?? 0}px`;
    Plotly.react(root.querySelector(".plot"), frame.data, layout, {displaylogo: false, responsive: true});
  };
  if (slider) slider.addEventListener("input", show);
  media.addEventListener("change", show);
  show();
})();
"""


def write_html(panel: Panel, path: Path, sweep: str) -> Path:
    """Write the file and return its path; see `Panel.to_html`."""
    title = html.escape(panel.title or type(panel).__name__)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_PAGE_STYLE}</style></head>'
        f"<body>{fragment(panel, sweep)}</body></html>",
        encoding="utf-8",
    )
    return path


def fragment(panel: Panel, sweep: str, plotlyjs: bool = True) -> str:
    """The same as a piece of HTML, for a page of its own; `plotlyjs` False where an earlier piece brings plotly.js."""
    if sweep and sweep not in panel.state_names():
        raise ValueError(f"sweep = {sweep!r} is no state of {type(panel).__name__}: {', '.join(panel.state_names())}")
    name = f"pqlab-{uuid4().hex[:12]}"
    frames, at = _frames(panel, sweep)
    data = {"frames": frames, "templates": {theme: template(theme).to_plotly_json() for theme in THEMES}}
    slider = (
        f"<p><label>{html.escape(sweep)} <input type='range' min='0' max='{len(frames) - 1}' value='{at}'> "
        "<output></output></label></p>"
        if sweep
        else ""
    )
    settings = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in panel.state.items()
        if key != sweep
    )
    library = f"<script>{get_plotlyjs()}</script>" if plotlyjs else ""
    script = _SCRIPT.replace("ID", json.dumps(name)).replace("DATA", _safe(json.dumps(data)))
    return (
        f"<style>{_STYLE}</style>{library}"
        f'<div class="pqlab" id="{name}"><h3>{html.escape(panel.title)}</h3>{slider}'
        f'<div class="text"></div><div class="plot"></div>'
        f'<details><summary>Table</summary><div class="table"></div></details>'
        f"<details><summary>Settings</summary><dl>{settings}</dl></details></div><script>{script}</script>"
    )


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
    table = panel.frame().to_html(index=False, border=0, float_format=lambda number: f"{number:.4g}")
    return {"label": label, "text": panel.text(), "table": table, **plain(panel.draw())}


def _safe(text: str) -> str:
    return text.replace("</", "<\\/")  # a string in the data must not end the script
