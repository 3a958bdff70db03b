"""Figures as one HTML file: plotly.js inlined, the figure, its table, and a slider where there are several.

Nothing is computed in the file, and nothing is loaded. It follows the light or dark preference of the browser.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from .theme import THEMES, template

if TYPE_CHECKING:
    import pandas as pd

Plain = dict[str, Any]

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
    root.querySelector(".settings").innerHTML = frame.settings;
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


def plain(figure: go.Figure) -> Plain:
    """A figure as JSON values {"data", "layout"}, arrays packed as plotly packs them; without its template."""
    whole = figure.to_plotly_json()
    layout = {key: value for key, value in whole["layout"].items() if key != "template"}
    return json.loads(json.dumps({"data": whole["data"], "layout": layout}, cls=PlotlyJSONEncoder))


def frame_of(
    figure: go.Figure,
    table: pd.DataFrame | None = None,
    *,
    text: str = "",
    label: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Plain:
    """One position of the slider.

    Args:
        table: under the figure.
        text: HTML that stands above it.
        label: what the slider says.
        settings: a list of names and values under the table.
    """
    listed = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in (settings or {}).items()
    )
    rows = "" if table is None else table.to_html(index=False, border=0, float_format=lambda number: f"{number:.4g}")
    return {"label": label, "text": text, "table": rows, "settings": listed, **plain(figure)}


def fragment(
    title: str,
    frames: Sequence[Plain],
    *,
    slider: str = "",
    at: int = 0,
    plotlyjs: bool = True,
) -> str:
    """Frames as a piece of HTML, for a page of its own.

    Args:
        frames: what `frame_of` gives; several need a slider.
        slider: its name; "" for a single frame.
        at: the frame that is shown first.
        plotlyjs: False where an earlier piece of the page brings plotly.js.
    """
    name = f"pqlab-{uuid4().hex[:12]}"
    data = {"frames": list(frames), "templates": {theme: template(theme).to_plotly_json() for theme in THEMES}}
    moves = (
        f"<p><label>{html.escape(slider)} <input type='range' min='0' max='{len(frames) - 1}' value='{at}'> "
        "<output></output></label></p>"
        if slider
        else ""
    )
    library = f"<script>{get_plotlyjs()}</script>" if plotlyjs else ""
    script = _SCRIPT.replace("ID", json.dumps(name)).replace("DATA", _safe(json.dumps(data)))
    return (
        f"<style>{_STYLE}</style>{library}"
        f'<div class="pqlab" id="{name}"><h3>{html.escape(title)}</h3>{moves}'
        f'<div class="text"></div><div class="plot"></div>'
        f'<details><summary>Table</summary><div class="table"></div></details>'
        f'<details><summary>Settings</summary><dl class="settings"></dl></details></div><script>{script}</script>'
    )


def write_page(path: str | os.PathLike[str], title: str, body: str) -> Path:
    """A whole HTML file around a `fragment`; its path."""
    path = Path(path)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_PAGE_STYLE}</style></head>'
        f"<body>{body}</body></html>",
        encoding="utf-8",
    )
    return path


def write_figure(
    figure: go.Figure,
    path: str | os.PathLike[str],
    title: str,
    table: pd.DataFrame | None = None,
    *,
    text: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """One figure and its table as a file that opens without a network; its path."""
    return write_page(path, title, fragment(title, [frame_of(figure, table, text=text, settings=settings)]))


def _safe(text: str) -> str:
    return text.replace("</", "<\\/")  # a string in the data must not end the script
