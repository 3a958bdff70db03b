"""What settings cost: the parts of the memory beside exact fp16, the slots of a sequence, bits over the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from ..config import REPORT_RANGES, RangeProblem
from ..cost import CacheCost
from ..memory import readable_bytes
from .sheet import Sheet
from .theme import BAD, EXACT, FREE, GREEN, GREY, REGIONS, WASTED, YELLOW, Theme

if TYPE_CHECKING:
    import pandas as pd

_PART_COLOURS = {
    "codes": REGIONS["code"],
    "exact window": REGIONS["window"],
    "exact sinks": REGIONS["sink"],
    "key fits": GREY,
    "page table": YELLOW,
    "sliding layers": EXACT,
    "model constants": GREEN,
    "free pages": FREE,
}
CONTEXTS: tuple[int, ...] = tuple(2**n for n in range(7, 18))
"""Contexts of the curve, tokens."""


def cost_frame(cost: CacheCost) -> pd.DataFrame:
    """What the settings come to: quantity, value (as a number), shown (with its unit)."""
    import pandas as pd

    rows: list[tuple[str, float, str]] = [
        ("bits per element of a coded token", cost.token_bits, f"{cost.token_bits:g} bits"),
        (
            "bits per element, exact tokens included",
            cost.bits_per_element,
            f"{_plain_digits(cost.bits_per_element)} bits",
        ),
        ("exact fp16 cache", cost.baseline_bytes, readable_bytes(cost.baseline_bytes)),
        ("stored by the tokens", cost.stored_bytes, readable_bytes(cost.stored_bytes)),
        ("times smaller than exact", cost.compression, f"{_plain_digits(cost.compression)}×"),
        ("reserved, free pages included", cost.reserved_bytes, readable_bytes(cost.reserved_bytes)),
        ("model constants (codebooks)", cost.constant_bytes, readable_bytes(cost.constant_bytes)),
        ("pages: used", cost.pages_used, f"{cost.pages_used:,} of {cost.max_pages:,}"),
        ("pages: missing", cost.pages_missing, f"{cost.pages_missing:,}"),
        ("capacity of the pool", cost.capacity, f"{cost.capacity:,} tokens"),
        ("longest context of each sequence", cost.max_context, f"{cost.max_context:,} tokens"),
        ("wasted slots (reserved, empty)", cost.wasted_slots, f"{cost.wasted_slots:,} tokens"),
        ("free slots (for any sequence)", cost.free_slots, f"{cost.free_slots:,} tokens"),
    ]
    return pd.DataFrame(rows, columns=["quantity", "value", "shown"])


def range_frame(params: dict[str, int | None], problems: Sequence[RangeProblem]) -> pd.DataFrame:
    """The report's settings: setting, value, range of the report, and what is wrong ("✗ ...") or that nothing is."""
    import pandas as pd

    wrong = {problem.name: problem.message.split(" = ", 1)[-1] for problem in problems}
    rows = [
        (
            name,
            "as context and batch ask" if value is None else value,
            str(REPORT_RANGES[name]),
            f"✗ {wrong[name]}" if name in wrong else "✓",
        )
        for name, value in params.items()
    ]
    return pd.DataFrame(rows, columns=["setting", "value", "report's range", "verdict"])


def context_frame(cost: CacheCost, contexts: Iterable[int] = CONTEXTS) -> pd.DataFrame:
    """The same settings at other contexts: context, bits_per_element, stored_bytes, baseline_bytes, compression."""
    import pandas as pd

    costs = (replace(cost, context=context) for context in contexts)
    names = ("context", "bits_per_element", "stored_bytes", "baseline_bytes", "compression")
    return pd.DataFrame([{name: getattr(other, name) for name in names} for other in costs])


def settings_figure(cost: CacheCost, *, theme: Theme | None = "light") -> go.Figure:
    """Memory of paged PQ beside exact fp16; the slots of one sequence and of the pool; bits per element by context."""
    sheet = Sheet([1.15, 1], [0.42, 0.58], gap_x=0.13, gap_y=0.28)
    _draw_memory(sheet, cost)
    _draw_slots(sheet, cost)
    _draw_contexts(sheet, cost)
    bits = _plain_digits(cost.bits_per_element)
    title = (
        f"bits per element: <b>{cost.token_bits:g}</b> coded, {bits} with exact tokens<br>"
        f"{_beside_exact(cost.compression)} than exact fp16, model constants aside"
    )
    return sheet.figure(
        theme,
        min_width=560,
        title={"text": title, "y": 0.965, "yanchor": "top"},
        barmode="stack",
        height=556,
        margin={"t": 92, "b": 50, "l": 20, "r": 20},
        legend={"y": 0.64, "yanchor": "top", "x": 0, "traceorder": "normal"},
        bargap=0.3,
    )


def _plain_digits(value: float) -> str:
    """Three digits that count, without an exponent: 3170 is "3,170", 0.00505 is "0.00505"."""
    return f"{Decimal(f'{value:.3g}'):,f}"


def _beside_exact(compression: float) -> str:
    """How the cache is beside exact fp16: "3.2× smaller", or "larger", as in short contexts, for the window's sake."""
    if compression >= 1:
        return f"<b>{_plain_digits(compression)}×</b> smaller"
    return f"<b>{_plain_digits(1 / compression)}×</b> larger"


def _draw_memory(sheet: Sheet, cost: CacheCost) -> None:
    rows = ["exact fp16", "paged PQ"]
    unit = readable_bytes(cost.baseline_bytes).split()[1]
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    plot = sheet.plot(
        0, 0, f"memory of all sequences, {unit}", columns=2, x={"tickformat": ","}, y={"autorange": "reversed"}
    )
    parts = {str(part["part"]): (int(part["bytes"]), str(part["grows with"])) for part in cost.parts()}
    exact = readable_bytes(cost.baseline_bytes)
    sheet.add(
        plot,
        "bar",
        x=[cost.baseline_bytes / scale, None],
        y=rows,
        name="exact fp16",
        orientation="h",
        text=[exact, ""],
        marker={"color": GREY},
        hovertemplate=f"exact fp16: {exact}<extra></extra>",
        showlegend=False,
    )
    for name, colour in _PART_COLOURS.items():
        size, grows = parts[name]
        sheet.add(
            plot,
            "bar",
            x=[None, size / scale],
            y=rows,
            name=name,
            orientation="h",
            marker={"color": colour, "line": {"color": "rgba(128,128,128,0.6)", "width": 1 if size else 0}},
            hovertemplate=f"{name}: {readable_bytes(size)}<br>grows with {grows}<extra></extra>",
            showlegend=size > 0.005 * cost.baseline_bytes,
        )


def _draw_slots(sheet: Sheet, cost: CacheCost) -> None:
    sinks, coded, window = cost.lengths
    each = cost.pages_used // cost.batch
    lack = f'<b style="color:{BAD}">{cost.pages_missing:,} pages are missing (PQC001)</b>' if cost.pages_missing else ""
    rows = ["one sequence", "all, in pages"]
    used, free = cost.batch * coded, cost.free_slots
    missing = cost.pages_missing * cost.cache.page_size
    held = min(used, cost.capacity)
    parts = [
        ("sinks", [sinks, 0], REGIONS["sink"]),
        ("codes", [coded, held], REGIONS["code"]),
        ("window", [window, 0], REGIONS["window"]),
        ("wasted", [cost.wasted_slots / cost.batch, cost.pages_used * cost.cache.page_size - used], WASTED),
        ("free", [0, free], FREE),
        ("missing", [0, missing], BAD),
    ]
    longest = max(sum(values[row] for _, values, _ in parts) for row in range(len(rows)))
    plot = sheet.plot(
        1,
        0,
        lack or f"token slots, {each:,} pages each",
        x={},
        y={"autorange": "reversed"},
    )
    for name, values, colour in parts:
        said = [f"{value:,.0f}" if value > 0.06 * longest else "" for value in values]
        sheet.add(
            plot,
            "bar",
            x=values,
            y=rows,
            name=name,
            orientation="h",
            text=said,
            textposition="inside",
            insidetextanchor="middle",
            marker={"color": colour},
            hovertemplate=f"{name}: %{{x:,}} slots<extra>%{{y}}</extra>",
            showlegend=False,
        )


def _draw_contexts(sheet: Sheet, cost: CacheCost) -> None:
    curve = context_frame(cost, sorted({*CONTEXTS, cost.context}))
    plot = sheet.plot(
        1,
        1,
        "bits per element by context",
        x={
            "type": "log",
            "title": {"text": "tokens of each sequence"},
            "tickvals": CONTEXTS[::2],
            "ticktext": [f"{c // 1024}K" if c >= 1024 else str(c) for c in CONTEXTS[::2]],
        },
        y={"rangemode": "tozero", "title": {"text": "bits"}},
    )
    lines = [
        ("exact fp16", [8.0 * cost.exact_bytes] * len(curve), {"color": GREY, "dash": "dash"}),
        ("codes alone", [cost.token_bits] * len(curve), {"color": REGIONS["code"], "dash": "dot"}),
        ("paged PQ, all tokens", curve.bits_per_element, {"color": GREEN, "width": 3}),
    ]
    for name, bits, line in lines:
        hover = "%{x:,} tokens: %{y:,.3~r} bits"
        sheet.add(
            plot,
            "scatter",
            x=curve.context,
            y=bits,
            name=name,
            mode="lines",
            line=line,
            hovertemplate=hover,
            showlegend=False,
        )
    sheet.add(
        plot,
        "scatter",
        x=[cost.context],
        y=[cost.bits_per_element],
        mode="markers+text",
        text=[_plain_digits(cost.bits_per_element)],
        textposition="top center",
        marker={"size": 11, "color": GREEN, "symbol": "diamond"},
        name="these settings",
        hovertemplate="%{x:,} tokens: %{y:,.3~r} bits",
        showlegend=False,
    )
