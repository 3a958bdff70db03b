"""The pool, the page tables, and the same tokens in contiguous memory.

`pages_figure` draws any pool (a running cache's, too: `pqlab.paging.state.pool_state`); `allocation_figure` draws one
step of a simulation.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from ..memory import readable_bytes
from ..paging import PageEvent
from ..paging.simulate import Step
from ..paging.state import PageState, PoolState, sequence_name
from .cells import MIDDLE, Cell, add_cells, wrap
from .sheet import Sheet
from .theme import BLUE, FONT_SIZE, FREE, GREY, WASTED, Theme

_MARKS = {"allocate": "+", "share": "=", "copy": "≠", "free": "−"}
_LEGEND = (
    "A: held by A · AC, ×3 striped: shared · + new · = now shared · ≠ copied before writing · − freed · blank: free"
)
_HATCHED = {
    "color": WASTED,
    "line": {"color": GREY, "width": 1},
    "pattern": {"shape": "/", "fillmode": "overlay", "fgcolor": GREY, "fgopacity": 1, "size": 6, "solidity": 0.25},
}
_PLAIN = {"showgrid": False, "zeroline": False, "ticks": ""}
_TEXT_WIDTH, _TEXT_LINES = 64, 9


def pages_figure(
    state: PoolState,
    *,
    changes: Sequence[PageEvent] = (),
    page_bytes: int = 0,
    title: str = "",
    theme: Theme | None = "light",
) -> go.Figure:
    """The pool as a grid and the page table beside it. Hovering a page shows the text it holds.

    Args:
        changes: page events to mark.
        page_bytes: bytes of a page id over all layers (`PoolLayout.page_bytes`), for the hover text.
        theme: None leaves the template to the caller.
    """
    sheet = Sheet([1, 1], gap_x=0.12)
    _add_pool(sheet, 0, 0, state, changes, page_bytes)
    _add_table(sheet, 0, 1, state, page_bytes)
    return _finish(sheet, title, theme, height=440)


def allocation_figure(step: Step, *, page_bytes: int, title: str = "", theme: Theme | None = "light") -> go.Figure:
    """One step: paged and contiguous memory of the same size, the page table, and bytes reserved, used and wasted."""
    sheet = Sheet([1, 1], [0.55, 0.45], gap_x=0.13, gap_y=0.14)
    _add_pool(sheet, 0, 0, step.pool, step.changes, page_bytes)
    _add_arena(sheet, 0, 1, step)
    _add_table(sheet, 1, 0, step.pool, page_bytes)
    _add_bytes(sheet, 1, 1, step, page_bytes)
    return _finish(sheet, title or step_title(step), theme, height=740)


def step_title(step: Step) -> str:
    """What happened, in one or two lines of HTML."""
    if step.event is None:
        return "An empty pool"
    if step.error:
        return f"{step.event}: <b>refused</b><br><sub>{html.escape(step.error, quote=False)}</sub>"
    counts = {kind: sum(event.kind == kind for event in step.changes) for kind in _MARKS}
    words = {"allocate": "taken", "share": "shared", "copy": "copied", "free": "given back"}
    said = ", ".join(f"{_count(n, 'page')} {words[kind]}" for kind, n in counts.items() if n)
    return f"{step.event}<br><sub>{said or 'no page changes hands'}</sub>"


def _add_pool(
    sheet: Sheet, row: int, column: int, state: PoolState, changes: Sequence[PageEvent], page_bytes: int
) -> None:
    marks = {event.page: _MARKS[event.kind] for event in changes if event.kind in _MARKS}
    cells = [_page_cell(state, page, marks.get(page.page, ""), page_bytes) for page in state.pages]
    title = f"<b>Paged</b>: {state.pages_used} of {_count(state.max_pages, 'page')} of {state.page_size} tokens used"
    plot = _add_grid(sheet, row, column, title, cells)
    below = {"yref": f"{plot['yaxis']} domain", "y": 0, "yanchor": "top", "yshift": -2}
    sheet.note(_LEGEND, x=0, xanchor="left", font={"size": FONT_SIZE - 2}, **below)


def _add_arena(sheet: Sheet, row: int, column: int, step: Step) -> None:
    """The arena in cells of a page's slots, so that the two memories can be compared cell by cell."""
    size, pages = step.pool.page_size, step.pool.max_pages
    cells = [Cell(hover=f"slots {i * size:,} to {(i + 1) * size - 1:,}: free") for i in range(pages)]
    for region in step.arena.regions:
        name = sequence_name(region.seq)
        for i in range(region.start // size, (region.start + region.reserved) // size):
            used = min(size, max(0, region.start + region.used - i * size))
            said = f"{used} of {size} filled" if used else "reserved, holds nothing"
            text = f"<b>slots {i * size:,} to {(i + 1) * size - 1:,}</b>: reserved for {name}<br>{said}"
            cells[i] = Cell((region.seq,), used / size, name, text)
    refused = ", ".join(sequence_name(seq) for seq in step.arena.refused)
    title = f"<b>Contiguous</b>: {_count(len(step.arena.regions), 'region')} reserved"
    _add_grid(sheet, row, column, title + (f", no room for {refused}" if refused else ""), cells)


def _add_grid(sheet: Sheet, row: int, column: int, title: str, cells: Sequence[Cell]) -> dict[str, str]:
    width = grid_width(len(cells))
    grid = wrap(cells, width)
    firsts = range(0, len(grid), -(-len(grid) // 12))
    plot = sheet.plot(
        row,
        column,
        title,
        x=_columns(width),
        y=_lines(len(grid), [r + MIDDLE for r in firsts], [str(r * width) for r in firsts]),
    )
    add_cells(sheet, plot, grid, labels=width <= 32, size=11 if width <= 16 else 9)
    return plot


def _add_table(sheet: Sheet, row: int, column: int, state: PoolState, page_bytes: int) -> None:
    """Page ids of every sequence in token order, wrapped into lines."""
    rows = [(seq, pages) for seq, pages in enumerate(state.tables) if pages]
    width = next((w for w in (12, 16, 24, 32, 48, 64) if sum(-(-len(p) // w) for _, p in rows) <= 14), 128)
    grid: list[list[Cell]] = []
    names, places = [], []
    for seq, pages in rows:
        names.append(f"<b>{sequence_name(seq)}</b> {state.num_tokens[seq]:,}")
        places.append(len(grid) + MIDDLE)
        grid += wrap([_entry_cell(state, seq, i, page_bytes) for i in range(len(pages))], width)
    title = "<b>Page table</b>: page ids in token order, * shared"
    plot = sheet.plot(row, column, title, x=_columns(width), y=_lines(max(6, len(grid)), places, names))
    add_cells(sheet, plot, grid, labels=width <= 24, size={12: 11, 16: 9}.get(width, 8))


def _add_bytes(sheet: Sheet, row: int, column: int, step: Step, page_bytes: int) -> None:
    slot, capacity = page_bytes / step.pool.page_size, step.pool.capacity
    running = sum(sequence.alive for sequence in step.sequences)
    both = (step.pool, step.arena)
    names = [
        f"<b>{name}</b><br>holds {served} of {running}<br>used {readable_bytes(state.used * slot)}<br>"
        f"wasted {readable_bytes(state.wasted * slot)}"
        for name, served, state in zip(("paged", "contiguous"), (running, len(step.arena.regions)), both, strict=True)
    ]
    ticks = [i * capacity * slot / 4 for i in range(5)]
    saved = step.pool.shared_tokens * slot
    plot = sheet.plot(
        row,
        column,
        "<b>Bytes of codes</b>" + (f": sharing saves {readable_bytes(saved)}" if saved else ""),
        x={"range": [0, capacity * slot], "tickvals": ticks, "ticktext": [readable_bytes(tick) for tick in ticks]},
        y={"range": [1.5, -0.5], "tickvals": [0, 1], "ticktext": names, **_PLAIN},
    )
    parts = {
        "used": ([state.used for state in both], {"color": BLUE}),
        "wasted (reserved, empty)": ([state.wasted for state in both], _HATCHED),
        "free": ([capacity - state.reserved for state in both], {"color": FREE, "line": {"color": GREY, "width": 1}}),
    }
    for name, (slots, look) in parts.items():
        sheet.add(
            plot,
            "bar",
            orientation="h",
            x=[count * slot for count in slots],
            y=[0, 1],
            width=0.6,
            name=name,
            marker=look,
            customdata=[f"{readable_bytes(count * slot)}, {count / capacity:.0%} of the memory" for count in slots],
            hovertemplate=f"{name}: %{{customdata}}<extra></extra>",
        )


def _columns(width: int) -> dict[str, Any]:
    return {"visible": False, "range": [-0.55, width - 0.45]}


def _lines(count: int, places: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    return {"range": [count, -0.05], "tickvals": list(places), "ticktext": list(names), **_PLAIN}


def grid_width(pages: int) -> int:
    """Columns of a grid of pages: the power of two, from 16 to 128, that makes it about twice as wide as high."""
    return next((width for width in (16, 32, 64) if pages <= width * width / 2), 128)


def _page_cell(state: PoolState, page: PageState, mark: str, page_bytes: int) -> Cell:
    if page.is_free:
        return Cell(label=mark, hover=f"<b>page {page.page}</b>: free")
    names = [sequence_name(seq) for seq in page.holders]
    label = "".join(names) if len(names) < 3 else f"×{len(names)}"
    return Cell(page.holders, page.tokens / state.page_size, label + mark, _page_hover(state, page, page_bytes))


def _entry_cell(state: PoolState, seq: int, index: int, page_bytes: int) -> Cell:
    """A page as one sequence sees it: a sharer may have fewer tokens in it than another."""
    page = state.pages[state.tables[seq][index]]
    tokens = min(state.page_size, state.num_tokens[seq] - index * state.page_size)
    star = "*" if page.is_shared else ""
    return Cell((seq,), tokens / state.page_size, f"{page.page}{star}", _page_hover(state, page, page_bytes))


def _page_hover(state: PoolState, page: PageState, page_bytes: int) -> str:
    names = ", ".join(sequence_name(seq) for seq in page.holders)
    last = page.first_token + page.tokens - 1
    lines = [
        f"<b>page {page.page}</b>, {'shared by' if page.is_shared else 'held by'} {names}",
        f"tokens {page.first_token:,} to {last:,}, {page.tokens} of {state.page_size} slots filled",
    ]
    if page_bytes:
        lines.append(f"{readable_bytes(page_bytes)} over all layers, K and V")
    return "<br>".join(lines + page_text(page.text))


def page_text(text: str) -> list[str]:
    """The text of a page as lines of HTML for a hover box; long texts are cut, and say so."""
    lines = textwrap.wrap(" ".join(text.split()), _TEXT_WIDTH)
    if len(lines) > _TEXT_LINES:
        left = len(lines) - _TEXT_LINES
        lines = [*lines[:_TEXT_LINES], f"… and {left} more lines"]
    return [f"<i>{html.escape(line, quote=False)}</i>" for line in lines]


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _finish(sheet: Sheet, title: str, theme: Theme | None, height: int) -> go.Figure:
    return sheet.figure(
        theme,
        min_width=900,
        title={"text": title, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
        height=height,
        margin={"t": 88, "b": 76, "l": 70, "r": 36},
        legend={"x": 1, "xanchor": "right", "y": -0.07, "yanchor": "top", "traceorder": "normal"},
        barmode="stack",
    )
