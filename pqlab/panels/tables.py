"""Tables under a figure, in the colours of the page."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

if TYPE_CHECKING:
    import pandas as pd

_CELL = "padding: 1px 12px 1px 0; line-height: 1.45; text-align: left; vertical-align: top; white-space: nowrap"
BAD = "var(--jp-error-color1, #c62828)"


def table_widget(name: str) -> widgets.HTML:
    """An empty table, to be filled with `value = table_html(...)`; `name` is its CSS class."""
    table = widgets.HTML(layout=widgets.Layout(margin="0 2em 0.5em 0", max_width="100%", flex="0 1 auto"))
    table.add_class(f"pqlab-{name}")
    return table


def table_html(
    frame: pd.DataFrame, *, header: bool = True, colour: Callable[[str, Any], str | None] = lambda column, value: None
) -> str:
    """A DataFrame as an HTML table; `colour(column, value)` may give a cell another colour of text."""
    head = "".join(f'<th style="{_CELL}">{html.escape(str(column))}</th>' for column in frame.columns)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in frame.itertuples(index=False):
        cells = []
        for column, value in zip(frame.columns, row, strict=True):
            own = colour(str(column), value)
            style = f"{_CELL}; color: {own}; white-space: normal" if own else _CELL
            cells.append(f'<td style="{style}">{html.escape(_text(value))}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div style="overflow-x: auto"><table style="border-collapse: collapse">{"".join(lines)}</table></div>'


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
