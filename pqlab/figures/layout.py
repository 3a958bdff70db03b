"""The bytes of a page in three orders, what one load touches in each, and how fast each order was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go

from ..paging.access import Access, byte_owners
from .sheet import Sheet
from .theme import AMOUNTS, FONT_SIZE, GREEN, GREY, VERMILLION, Theme

if TYPE_CHECKING:
    import pandas as pd

ColourBy = Literal["token", "subspace", "code"]
COLOUR_BY: tuple[ColourBy, ...] = ("token", "subspace", "code")
SHOWN = {"row_major": "row-major", "transposed": "transposed", "tiled": "tiled (pqlab)"}
_SHAPES = {"row_major": "[token][subspace]", "transposed": "[subspace][token]", "tiled": "[tile][subspace][16 tokens]"}

_COLOUR_NAMES = {"token": "token slot", "subspace": "subspace", "code": "code"}
_MAX_ROWS = 128
_HOVER = (
    "byte %{customdata[0]} (%{customdata[0]:#x})<br>token slot %{customdata[1]}<br>head %{customdata[2]}<br>"
    "subspace %{customdata[3]}<br>code %{customdata[4]}<br>lane of the load %{customdata[5]}"
    "<extra>%{fullData.name}</extra>"
)


def layout_figure(
    accesses: Mapping[str, Access],
    codes: np.ndarray,
    *,
    head: int = 0,
    colour_by: ColourBy = "token",
    measured: pd.DataFrame | None = None,
    source: str = "",
    theme: Theme | None = "light",
) -> go.Figure:
    """One head of one page at byte level, row-major, transposed and tiled side by side.

    Args:
        accesses: what a load touches, by order (`paging.access.compare_orders`).
        codes: uint8 [page_size, M], the codes of that head.
        colour_by: what the colour of a byte says: its token, its subspace or its code.
        measured: from `benchmarks.layout_bench.measure_orders`; None says "not measured".
        source: where the codes come from; the title.
    """
    sheet = Sheet([1, 1, 1], [0.68, 0.32], gap_x=0.1, gap_y=0.22)
    found = [accesses[order] for order in SHOWN]
    load = found[0].load
    for column, access in enumerate(found):
        _draw_bytes(sheet, column, access, codes, head, colour_by)
    for name, colour in (("wanted", VERMILLION), ("fetched, not wanted", GREY)):
        mark = {"symbol": "square", "size": 11, "color": colour}
        sheet.add({}, "scatter", x=[None], y=[None], mode="markers", marker=mark, name=f"one load: {name}")
    names = list(SHOWN.values())
    shares = [f"{100 * a.share:.3g} % ({a.sectors_used}/{len(a.sectors)})" for a in found]
    axis = {"range": [0, 1.02], "tickformat": ".0%", "title": {"text": load.sector}}
    _draw_bars(sheet, 0, "wanted share of one load", names, [a.share for a in found], shares, axis)
    lanes = [f"{a.subspaces_per_lane} ({a.loads} load{'s' * (a.loads > 1)})" for a in found]
    axis = {"rangemode": "tozero", "title": {"text": "fewer: a lane keeps to one codebook"}}
    _draw_bars(sheet, 1, "subspaces in one lane", names, [a.subspaces_per_lane for a in found], lanes, axis)
    _draw_measured(sheet, measured, names)
    return sheet.figure(
        theme,
        min_width=860,
        title={"text": source, "font": {"size": FONT_SIZE + 1}, "y": 0.985, "yanchor": "top"},
        height=700,
        margin={"t": 76, "b": 50, "l": 60, "r": 20},
        legend={"y": 0.385, "yanchor": "top", "x": 0},
        bargap=0.3,
    )


def _draw_bytes(sheet: Sheet, column: int, access: Access, codes: np.ndarray, head: int, colour_by: ColourBy) -> None:
    layout = access.layout
    width = _row_width(layout.head_bytes, access.load.sector_bytes)
    start = head * layout.head_bytes
    slots, subspaces = byte_owners(layout, head).T
    code = codes[slots, subspaces]
    lanes, marks = access.lane_of(head), access.marks(head)
    address = start + np.arange(layout.head_bytes)
    table = np.stack([address, slots, np.full_like(slots, head), subspaces, code, lanes], axis=-1).astype(np.int32)
    colours = {"token": slots, "subspace": subspaces, "code": code}[colour_by]
    ends = {"token": layout.page_size, "subspace": layout.num_subspaces, "code": 2**layout.nbits}[colour_by]
    rows = start + np.arange(-(-layout.head_bytes // width)) * width
    ticks = np.arange(0, len(rows), max(1, -(-len(rows) // 8)))
    labels = [f"{rows[i]:#06x}" for i in ticks]
    plot = sheet.plot(
        0,
        column,
        f"<b>{SHOWN[layout.order]}</b><br>{_SHAPES[layout.order]}",
        x={
            "title": {"text": "byte in the row"},
            "tickvals": list(range(0, width + 1, width // 4)),
            "showgrid": False,
            "zeroline": False,
        },
        y={"autorange": "reversed", "tickvals": ticks, "ticktext": labels, "showgrid": False, "zeroline": False},
    )
    sheet.add(
        plot,
        "heatmap",
        z=_rows(colours.astype(np.float32), width, np.nan),
        zmin=0,
        zmax=max(1, ends - 1),
        customdata=_rows(table, width, -1),
        hovertemplate=_HOVER,
        colorscale=AMOUNTS,
        opacity=0.6,
        showscale=column == len(SHOWN) - 1,
        colorbar={"title": {"text": _COLOUR_NAMES[colour_by]}, "len": 0.6, "y": 0.72, "x": 1.01, "thickness": 12},
        name=SHOWN[layout.order],
    )
    sheet.add(
        plot,
        "heatmap",
        z=_rows(np.where(marks > 0, marks, np.nan).astype(np.float32), width, np.nan),
        zmin=1,
        zmax=2,
        colorscale=[[0, GREY], [0.5, GREY], [0.5, VERMILLION], [1, VERMILLION]],
        showscale=False,
        hoverinfo="skip",
    )


def _draw_bars(
    sheet: Sheet, column: int, title: str, names: list[str], values: list[float], text: list[str], x: dict[str, Any]
) -> None:
    colours = [GREY if name == "contiguous" else GREEN for name in names]
    sheet.add(
        sheet.plot(1, column, title, x=x, y={"autorange": "reversed"}),
        "bar",
        x=values,
        y=names,
        text=text,
        orientation="h",
        marker={"color": colours},
        textposition="auto",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
        showlegend=False,
    )


def _draw_measured(sheet: Sheet, measured: pd.DataFrame | None, names: list[str]) -> None:
    title = "measured GB/s of wanted bytes"
    if measured is None:
        axis = {"title": {"text": "not measured for this yet: press Measure"}, "range": [0, 1], "showticklabels": False}
        _draw_bars(sheet, 2, title, names, [0.0] * len(names), [""] * len(names), axis)
        return
    speeds = measured.set_index("order").gb_per_s
    rows = {**{SHOWN[order]: speeds[order] for order in SHOWN}, "contiguous": speeds["contiguous"]}
    axis = {"title": {"text": f"on {measured.device.iloc[0]}"}, "rangemode": "tozero", "showticklabels": True}
    _draw_bars(sheet, 2, title, list(rows), list(rows.values()), [f"{speed:.2f}" for speed in rows.values()], axis)


def _row_width(head_bytes: int, sector_bytes: int) -> int:
    """Bytes in a row of the picture: whole sectors, and few enough rows to be seen."""
    width = sector_bytes
    while head_bytes / width > _MAX_ROWS:
        width *= 2
    return width


def _rows(values: np.ndarray, width: int, filler: object) -> np.ndarray:
    """[head_bytes, ...] as [rows, width, ...], the last row filled up."""
    missing = -len(values) % width
    if missing:
        rest = np.full((missing, *values.shape[1:]), filler, dtype=values.dtype)
        values = np.concatenate([values, rest])
    return values.reshape(-1, width, *values.shape[1:])
