"""The pool, the page tables, and the same tokens in contiguous memory.

`pages_figure` draws any pool (a running cache's, too: `pqlab.paging.state.pool_state`); `allocation_figure` draws one
step of a simulation.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..memory import readable_bytes
from ..paging import PageEvent
from ..paging.contiguous import ArenaState
from ..paging.simulate import Step
from ..paging.state import PageState, PoolState, sequence_name
from .cells import Cell, add_cells, wrap
from .theme import BLUE, FONT_SIZE, FREE, GREY, WASTED, template

_MARKS = {"allocate": "+", "share": "=", "copy": "≠", "free": "−"}
_LEGEND = (
    "A: held by A · AC, ×3 striped: shared · + new · = now shared · ≠ copied before writing · − freed · blank: free"
)
_HATCHED = {
    "color": WASTED,
    "line": {"color": GREY, "width": 1},
    "pattern": {"shape": "/", "fillmode": "overlay", "fgcolor": GREY, "fgopacity": 1, "size": 6, "solidity": 0.25},
}
_TEXT_WIDTH, _TEXT_LINES = 64, 9


def pages_figure(
    state: PoolState, *, changes: Sequence[PageEvent] = (), page_bytes: int = 0, title: str = ""
) -> go.Figure:
    """The pool as a grid and the page table beside it. Hovering a page shows the text it holds.

    Args:
        changes: page events to mark.
        page_bytes: bytes of a page id over all layers (`PoolLayout.page_bytes`), for the hover text.
    """
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.09, subplot_titles=[_pool_title(state), _table_title()])
    _add_pool(figure, state, changes, page_bytes, row=1, col=1)
    _add_table(figure, state, page_bytes, row=1, col=2)
    return _finish(figure, title, height=440)


def allocation_figure(step: Step, *, page_bytes: int, title: str = "") -> go.Figure:
    """One step: paged and contiguous memory of the same size, the page table, and bytes reserved, used and wasted."""
    figure = make_subplots(
        rows=2,
        cols=2,
        row_heights=[0.55, 0.45],
        vertical_spacing=0.12,
        horizontal_spacing=0.12,
        subplot_titles=[
            _pool_title(step.pool),
            _arena_title(step.arena),
            _table_title(),
            _bytes_title(step, page_bytes),
        ],
    )
    _add_pool(figure, step.pool, step.changes, page_bytes, row=1, col=1)
    _add_arena(figure, step, row=1, col=2)
    _add_table(figure, step.pool, page_bytes, row=2, col=1)
    _add_bytes(figure, step, page_bytes, row=2, col=2)
    return _finish(figure, title or step_title(step), height=740)


def step_title(step: Step) -> str:
    """What happened, in one or two lines of HTML."""
    if step.event is None:
        return "An empty pool"
    if step.error:
        return f"{step.event}: <b>refused</b><br><sub>{html.escape(step.error)}</sub>"
    counts = {kind: sum(event.kind == kind for event in step.changes) for kind in _MARKS}
    words = {"allocate": "taken", "share": "shared", "copy": "copied", "free": "given back"}
    said = ", ".join(f"{_count(n, 'page')} {words[kind]}" for kind, n in counts.items() if n)
    return f"{step.event}<br><sub>{said or 'no page changes hands'}</sub>"


def _add_pool(
    figure: go.Figure, state: PoolState, changes: Sequence[PageEvent], page_bytes: int, row: int, col: int
) -> None:
    marks = {event.page: _MARKS[event.kind] for event in changes if event.kind in _MARKS}
    cells = [_page_cell(state, page, marks.get(page.page, ""), page_bytes) for page in state.pages]
    width = grid_width(state.max_pages)
    _add_grid(figure, cells, width, row, col)


def _add_arena(figure: go.Figure, step: Step, row: int, col: int) -> None:
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
    _add_grid(figure, cells, grid_width(pages), row, col)


def _add_grid(figure: go.Figure, cells: Sequence[Cell], width: int, row: int, col: int) -> None:
    grid = wrap(cells, width)
    add_cells(figure, grid, row=row, col=col, labels=width <= 32, size=11 if width <= 16 else 9)
    every = -(-len(grid) // 12)
    firsts = list(range(0, len(grid), every))
    figure.update_xaxes(visible=False, range=[-0.55, width - 0.45], row=row, col=col)
    figure.update_yaxes(
        range=[len(grid), -0.05], tickvals=[r + 0.44 for r in firsts], ticktext=[str(r * width) for r in firsts],
        showgrid=False, zeroline=False, ticks="", row=row, col=col,
    )  # fmt: skip


def _add_table(figure: go.Figure, state: PoolState, page_bytes: int, row: int, col: int) -> None:
    """Page ids of every sequence in token order, wrapped into lines."""
    rows = [(seq, pages) for seq, pages in enumerate(state.tables) if pages]
    width = next((w for w in (12, 16, 24, 32, 48, 64) if sum(-(-len(p) // w) for _, p in rows) <= 14), 128)
    grid: list[list[Cell]] = []
    names, places = [], []
    for seq, pages in rows:
        names.append(f"<b>{sequence_name(seq)}</b> {state.num_tokens[seq]:,}")
        places.append(len(grid) + 0.44)
        grid += wrap([_entry_cell(state, seq, i, page_bytes) for i in range(len(pages))], width)
    add_cells(figure, grid, row=row, col=col, labels=width <= 24, size={12: 11, 16: 9}.get(width, 8))
    figure.update_xaxes(visible=False, range=[-0.55, width - 0.45], row=row, col=col)
    figure.update_yaxes(
        range=[max(6, len(grid)), -0.05], tickvals=places, ticktext=names, showgrid=False, zeroline=False, ticks="",
        row=row, col=col,
    )  # fmt: skip


def _add_bytes(figure: go.Figure, step: Step, page_bytes: int, row: int, col: int) -> None:
    slot, capacity = page_bytes / step.pool.page_size, step.pool.capacity
    running = sum(sequence.alive for sequence in step.sequences)
    both = (step.pool, step.arena)
    names = [
        f"<b>{name}</b><br>holds {served} of {running}<br>used {readable_bytes(state.used * slot)}<br>"
        f"wasted {readable_bytes(state.wasted * slot)}"
        for name, served, state in zip(("paged", "contiguous"), (running, len(step.arena.regions)), both, strict=True)
    ]
    parts = {
        "used": ([state.used for state in both], {"color": BLUE}),
        "wasted (reserved, empty)": ([state.wasted for state in both], _HATCHED),
        "free": ([capacity - state.reserved for state in both], {"color": FREE, "line": {"color": GREY, "width": 1}}),
    }
    for name, (slots, look) in parts.items():
        sizes = [readable_bytes(count * slot) for count in slots]
        figure.add_bar(
            x=[count * slot for count in slots],
            y=[0, 1],
            width=0.6,
            orientation="h",
            name=name,
            marker=look,
            customdata=[
                f"{size}, {count / capacity:.0%} of the memory" for size, count in zip(sizes, slots, strict=True)
            ],
            hovertemplate=f"{name}: %{{customdata}}<extra></extra>",
            row=row,
            col=col,
        )
    figure.update_layout(barmode="stack")
    ticks = [i * capacity * slot / 4 for i in range(5)]
    figure.update_xaxes(
        range=[0, capacity * slot], tickvals=ticks, ticktext=[readable_bytes(tick) for tick in ticks], row=row, col=col
    )
    figure.update_yaxes(
        range=[1.5, -0.5], tickvals=[0, 1], ticktext=names, ticks="", showgrid=False, zeroline=False, row=row, col=col
    )


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
    return [f"<i>{html.escape(line)}</i>" for line in lines]


def _pool_title(state: PoolState) -> str:
    return f"<b>Paged</b>: {state.pages_used} of {state.max_pages} pages of {state.page_size} tokens used"


def _arena_title(arena: ArenaState) -> str:
    refused = ", ".join(sequence_name(seq) for seq in arena.refused)
    return f"<b>Contiguous</b>: {_count(len(arena.regions), 'region')} reserved" + (
        f", no room for {refused}" if refused else ""
    )


def _table_title() -> str:
    return "<b>Page table</b>: page ids in token order, * shared"


def _bytes_title(step: Step, page_bytes: int) -> str:
    saved = step.pool.shared_tokens * page_bytes / step.pool.page_size
    return "<b>Bytes of codes</b>" + (f": sharing saves {readable_bytes(saved)}" if saved else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _finish(figure: go.Figure, title: str, height: int) -> go.Figure:
    figure.update_annotations(font_size=FONT_SIZE)
    figure.add_annotation(
        text=_LEGEND,
        xref="paper",
        yref="paper",
        x=0,
        y=figure.layout.yaxis.domain[0],
        xanchor="left",
        yanchor="top",
        yshift=-2,
        showarrow=False,
        font={"size": FONT_SIZE - 2},
    )
    figure.update_layout(
        template=template(),
        title={"text": title, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
        height=height,
        margin={"t": 100, "b": 76, "l": 70, "r": 36},
        legend={"x": 1, "xanchor": "right", "y": -0.07, "yanchor": "top", "traceorder": "normal"},
    )
    return figure
