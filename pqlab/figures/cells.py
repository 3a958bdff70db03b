"""Grids of cells that are filled from below, in the colours of their holders: pages, slots of an arena.

A cell is nine rows of one heatmap (eight of it, one gap), so that thousands of cells are one image. A cell with
several holders is striped in their colours; stripes and fill are also told by the cell's label and hover text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .sheet import Sheet
from .theme import FREE, SEQUENCES, WASTED

ROWS = 8
"""Steps of a cell's fill."""

_PITCH = ROWS + 1
MIDDLE = ROWS / 2 / _PITCH
"""Where the middle of a cell lies in its row."""

_FREE, _WASTED, _FIRST = 0, 1, 2
_ON_COLOUR = "#14181d"
_CLEAR = [[0.0, "rgba(0,0,0,0)"], [1.0, "rgba(0,0,0,0)"]]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        holders: sequences; none is a free cell.
        fill: 0 to 1.
        label: a few letters written into it.
        hover: HTML text.
    """

    holders: tuple[int, ...] = ()
    fill: float = 0.0
    label: str = ""
    hover: str = ""


def add_cells(
    sheet: Sheet, plot: dict[str, str], grid: Sequence[Sequence[Cell | None]], *, labels: bool = True, size: int = 11
) -> None:
    """Draw rows of cells (None leaves a place empty) into a plot: four traces, whatever the cells are.

    Cell (r, c) lies around x = c, y = r + 0.5 (its middle is `MIDDLE` below r); the y axis has to be reversed.
    """
    height, width = len(grid), max((len(cells) for cells in grid), default=0)
    colours = np.full((height * _PITCH, width), np.nan, dtype=np.float32)
    hover = np.full((height, width), "", dtype=object)
    present = np.full((height, width), np.nan, dtype=np.float32)
    texts: dict[bool, list[tuple[int, float, str]]] = {True: [], False: []}  # on colour or not: (x, y, label)
    for r, cells in enumerate(grid):
        for c, cell in enumerate(cells):
            if cell is None:
                continue
            colours[r * _PITCH : r * _PITCH + ROWS, c] = _column(cell)
            hover[r, c] = cell.hover
            present[r, c] = 0
            if labels and cell.label:
                on_colour, middle = _label_place(cell)
                texts[on_colour].append((c, r + middle, cell.label))
    sheet.add(
        plot, "heatmap", z=colours, x0=0, dx=1, y0=0.5 / _PITCH, dy=1 / _PITCH, zmin=-0.5,
        zmax=_FIRST + len(SEQUENCES) - 0.5, colorscale=_scale(), showscale=False, xgap=2, hoverinfo="skip",
    )  # fmt: skip
    for on_colour, found in texts.items():
        sheet.add(
            plot, "scatter", mode="text", x=[x for x, _, _ in found], y=[y for _, y, _ in found],
            text=[text for _, _, text in found], hoverinfo="skip", showlegend=False,
            textfont={"size": size, **({"color": _ON_COLOUR} if on_colour else {})},
        )  # fmt: skip
    sheet.add(
        plot, "heatmap", z=present, x0=0, dx=1, y0=MIDDLE, dy=1, colorscale=_CLEAR, showscale=False,
        customdata=hover, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def wrap(cells: Sequence[Cell], width: int) -> list[list[Cell]]:
    """Rows of `width` cells, the last one shorter; at least one row."""
    return [list(cells[i : i + width]) for i in range(0, max(1, len(cells)), width)]


def _filled(cell: Cell) -> int:
    return min(ROWS, int(np.ceil(cell.fill * ROWS))) if cell.holders else 0


def _label_place(cell: Cell) -> tuple[bool, float]:
    """Whether a label lies on colour, and how far below the cell's top: within the larger part, as no ink can be read
    on both."""
    filled = _filled(cell)
    if 2 * filled >= ROWS:
        return True, (ROWS - filled / 2) / _PITCH
    return False, (ROWS - filled) / 2 / _PITCH


def _column(cell: Cell) -> np.ndarray:
    """Colour numbers of a cell's rows, top first."""
    if not cell.holders:
        return np.full(ROWS, _FREE)
    filled = _filled(cell)
    stripes = [_FIRST + cell.holders[i % len(cell.holders)] % len(SEQUENCES) for i in range(filled)]
    return np.array([_WASTED] * (ROWS - filled) + stripes)


def _scale() -> list[list[float | str]]:
    """A colour scale of steps: one colour per number."""
    colours = [FREE, WASTED, *SEQUENCES]
    steps: list[list[float | str]] = []
    for i, colour in enumerate(colours):
        steps += [[i / len(colours), colour], [(i + 1) / len(colours), colour]]
    return steps
