"""How fast: speed-up by context, time beside that of reading the bytes, whole models, byte orders, parts of a step."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from ..memory import MIB
from .layout import SHOWN
from .sheet import Sheet
from .theme import (
    BLUE,
    EXACT,
    GREEN,
    GREY,
    ORANGE,
    PAGED,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Theme,
    sequence_colour,
    sequence_mark,
)

_DASHES = ("solid", "dash", "dot", "dashdot")
PART_COLOURS = {
    "mlp": GREY, "projection": "#B0B0B0", "lm head": "#CCCCCC", "norms": "#6E6E6E", "rotary": "#565656",
    "embedding": "#444444", "attention": BLUE, "codes": ORANGE, "exact tokens": YELLOW, "maps": VERMILLION,
    "store": SKY, "flush": GREEN, "bookkeeping": PURPLE, "rest": "#E4E4E4",
}  # fmt: skip
"""Greys are the model's own work; colours are attention and the cache."""
_CACHES = {
    "exact": (EXACT, "square", "solid"), "exact, no cuDNN": (EXACT, "square-open", "dash"),
    "paged": (PAGED, "diamond", "solid"),
}  # fmt: skip
"""Rows of `benchmarks.baseline_vs_paged` -> colour, mark, dash."""
_ONE_TWO_FIVE = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
"""Ticks of a logarithmic axis that may span less than a power of ten."""
_LEGEND = {"yref": "container", "y": 0.01, "yanchor": "bottom"}  # shares of the plot's height would reach its axis


def speedup_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """How many times faster than the fastest exact attention, by context, a line a shape; above 1 is faster.

    Args:
        frame: from `results.shipped.decode_frame`; batches of unequal rows are single points.
    """
    contexts = sorted(frame.context.unique())
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        "one layer, one new token: speed-up over the fastest exact attention",
        x=_contexts(contexts),
        y={"title": {"text": "times faster"}, "rangemode": "tozero"},
    )
    for i, ((shape, bits, batch), part) in enumerate(frame.groupby(["shape", "bits", "batch"], sort=False)):
        text = [f"{us:,.0f} µs; {name} {exact:,.0f} µs" for us, name, exact in
                zip(part.microseconds, part.exact, part.exact_microseconds, strict=True)]  # fmt: skip
        sheet.add(
            plot,
            "scatter",
            x=part.context,
            y=part.speedup,
            text=text,
            mode="lines+markers",
            line={"color": sequence_colour(i), "dash": _DASHES[i % len(_DASHES)]},
            marker={"symbol": sequence_mark(i), "size": 8},
            name=_name(shape, bits, batch, bool(part.ragged.any())),
            hovertemplate="%{x:,} tokens: %{y:.2f}x<br>%{text}<extra>%{fullData.name}</extra>",
        )
    _line(sheet, plot, [contexts[0], contexts[-1]], [1, 1], "as fast as exact")
    below = 70 + 20 * -(-len(sheet.data) // 2)  # two names a line, as long as they are
    margin = {"t": 58, "b": below, "l": 60, "r": 20}
    return sheet.figure(theme, min_width=620, height=370 + below, margin=margin, legend=_LEGEND)


def roofline_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Microseconds by context beside the time in which the codes can just be read, a plot a shape (batch 1).

    Args:
        frame: from `results.shipped.decode_frame`.
    """
    frame = frame[frame.batch == 1]
    groups = [(name, part) for name, part in frame.groupby(["shape", "bits"], sort=False) if len(part) > 1]
    rows, between = -(-len(groups) // 2), 90  # two in a row; pixels from one row to the next
    inner = 270 * rows + between * (rows - 1)
    sheet = Sheet([1] * min(2, len(groups)), [1] * rows, gap_x=0.08, gap_y=between / inner)
    for index, ((shape, bits), part) in enumerate(groups):
        plot = sheet.plot(
            index // 2,
            index % 2,
            _name(shape, bits, 1, False),
            x=_contexts(sorted(part.context)),
            y={"type": "log", "tickvals": _ONE_TWO_FIVE, "title": {"text": "µs"} if index % 2 == 0 else {}},
        )
        common = {"x": part.context, "showlegend": index == 0}
        for name, values, colour, mark in (
            ("fastest exact attention", part.exact_microseconds, EXACT, "square"),
            ("pqlab", part.microseconds, PAGED, "diamond"),
        ):
            sheet.add(
                plot,
                "scatter",
                **common,
                y=values,
                mode="lines+markers",
                line={"color": colour},
                marker={"symbol": mark, "size": 8},
                name=name,
                legendgroup=name,
                hovertemplate=f"%{{x:,}} tokens: %{{y:,.1f}} µs<extra>{name}</extra>",
            )
        sheet.add(
            plot,
            "scatter",
            **common,
            y=part.read_microseconds,
            text=[f"{share:.0%}" if share == share else "" for share in part.share],
            mode="lines+text",
            textposition="bottom center",
            line={"color": GREY, "dash": "dot"},
            name="only reading the codes (%: pqlab's share of that rate)",
            legendgroup="read",
            hovertemplate="%{x:,} tokens: %{y:,.1f} µs<extra>only reading</extra>",
        )
    margin = {"t": 58, "b": 110, "l": 60, "r": 20}
    return sheet.figure(theme, min_width=640, height=inner + 168, margin=margin, legend=_LEGEND)


def model_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Milliseconds a token of whole models: what attention and cache take, on top of everything else.

    Args:
        frame: from `results.shipped.model_frame`.
    """
    frame = frame[frame.case != "none"]
    groups = list(frame.groupby(["shape", "context"], sort=False))
    rows = [groups[i : i + 2] for i in range(0, len(groups), 2)]  # two in a row: names are long
    bars = [max(len(part) for _, part in row) for row in rows]
    inner = 24 * sum(bars) + 110 * (len(rows) - 1)
    sheet = Sheet([1] * len(rows[0]), bars, gap_x=0.27, gap_y=110 / inner)
    for index, ((shape, context), part) in enumerate(groups):
        part = part.iloc[::-1]
        names = [f"{case}, {how}" for case, how in zip(part.case, part.how, strict=True)]
        plot = sheet.plot(
            index // 2,
            index % 2,
            f"{shape}, {context:,} tokens",
            x={"title": {"text": "ms a token"}},
            y={"type": "category"},
        )
        rest = part.rest_milliseconds.fillna(0)
        over = part.milliseconds - rest
        common = {"y": names, "orientation": "h", "showlegend": index == 0}
        sheet.add(
            plot,
            "bar",
            **common,
            x=rest,
            marker={"color": GREY, "opacity": 0.5},
            name="everything else",
            legendgroup="rest",
            hovertemplate="%{x:.2f} ms<extra>everything else</extra>",
        )
        sheet.add(
            plot,
            "bar",
            **common,
            x=over,
            marker={"color": [EXACT if case.startswith("exact") else PAGED for case in part.case]},
            text=[f"{ms:.1f}" for ms in part.milliseconds],
            textposition="outside",
            cliponaxis=False,
            name="attention and cache: exact blue, paged orange (eager: not separated)",
            legendgroup="over",
            hovertemplate="%{x:.2f} ms<extra>attention and cache</extra>",
        )
    margin = {"t": 58, "b": 90, "l": 150, "r": 40}
    return sheet.figure(theme, min_width=760, barmode="stack", height=inner + 148, margin=margin, legend=_LEGEND)


def baseline_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Time to the first token, time per token, and memory by context: the exact cache beside the paged one.

    Args:
        frame: from `benchmarks.baseline_vs_paged.baseline_vs_paged`.
    """
    plots = (
        ("first_token_seconds", 1.0, "time to the first token, s"),
        ("token_ms", 1.0, "time per token, ms"),
        ("cache_bytes", MIB, "cache, MiB"),
        ("peak_bytes", MIB, "peak above the start, MiB"),
    )
    contexts = sorted(frame.context.unique())
    sheet = Sheet([1] * len(plots), gap_x=0.07)
    for column, (name, unit, title) in enumerate(plots):
        plot = sheet.plot(0, column, title, x=_contexts(contexts), y={"rangemode": "tozero"})
        for cache, (colour, mark, dash) in _CACHES.items():
            rows = frame[frame.cache == cache]
            if rows.empty:
                continue
            sheet.add(
                plot,
                "scatter",
                x=rows.context,
                y=rows[name] / unit,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": mark, "size": 8},
                name=cache,
                legendgroup=cache,
                showlegend=column == 0,
                hovertemplate="%{x:,} tokens: %{y:,.2f}<extra>%{fullData.name}</extra>",
            )
    return sheet.figure(theme, min_width=1000, height=398, margin={"t": 58, "b": 90, "l": 50, "r": 20})


def breakdown_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """The parts of a decode step as stacked bars, a bar a kind of cache and context; greys are the model's own work.

    Args:
        frame: kind, context, part, milliseconds, share, as `benchmarks.breakdown_bench.breakdowns` returns them.
    """
    bars = frame[["context", "kind"]].drop_duplicates()
    names = [f"{kind}<br>{context:,}" for context, kind in bars.itertuples(index=False)]
    sheet = Sheet()
    plot = sheet.plot(0, 0, x={"type": "category"}, y={"title": {"text": "ms a token"}})
    for part, colour in PART_COLOURS.items():
        if not (frame.part == part).any():
            continue
        rows = bars.merge(frame[frame.part == part], how="left").fillna({"milliseconds": 0.0, "share": 0.0})
        sheet.add(
            plot,
            "bar",
            x=names,
            y=rows.milliseconds,
            marker={"color": colour},
            text=[part if share > 0.04 else "" for share in rows.share],
            textposition="inside",
            insidetextanchor="middle",
            customdata=rows.share,
            name=part,
            hovertemplate=f"{part}: %{{y:.2f}} ms, %{{customdata:.1%}}<extra>%{{x}}</extra>",
        )
    margin = {"t": 20, "b": 60, "l": 60, "r": 140}
    legend = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "traceorder": "reversed"}
    return sheet.figure(theme, min_width=620, barmode="stack", height=520, margin=margin, legend=legend)


def orders_figure(frame: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Share of the read rate by byte order and page size, and that of the real decode operation.

    Args:
        frame: records of `bench layout`: what, order, case, page_size, microseconds, gb_per_s, share.
    """
    sheet = Sheet([1, 1], gap_x=0.1)
    sums, decodes = frame[frame.what == "sum over codes"], frame[frame.what == "decode"]
    for column, (rows, by, title) in enumerate(
        [(sums, "order", "the same sum over codes in each byte order"), (decodes, "case", "pqlab's decode operation")]
    ):
        sizes = sorted(rows.page_size.unique())
        plot = sheet.plot(
            0,
            column,
            title,
            x={"title": {"text": "page size, tokens"}, "type": "category", "categoryarray": [str(s) for s in sizes]},
            y={"title": {"text": "share of the rate of just reading"}, "tickformat": ".0%", "rangemode": "tozero"},
        )
        for i, (name, part) in enumerate(rows.groupby(by, sort=False)):
            sheet.add(
                plot,
                "scatter",
                x=part.page_size.astype(str),
                y=part.share,
                mode="lines+markers",
                line={"color": sequence_colour(i + 4 * column), "dash": _DASHES[i % len(_DASHES)]},
                marker={"symbol": sequence_mark(i), "size": 9},
                customdata=part[["microseconds", "gb_per_s"]],
                name=SHOWN.get(str(name), str(name).replace("_", "-")),
                hovertemplate="page %{x}: %{customdata[0]:,.0f} µs, %{customdata[1]:,.1f} GB/s, %{y:.1%}"
                "<extra>%{fullData.name}</extra>",
            )
    return sheet.figure(theme, min_width=760, height=438, margin={"t": 58, "b": 120, "l": 70, "r": 20})


def _contexts(contexts: Sequence[int]) -> dict:
    labels = [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in contexts]
    return {"type": "log", "title": {"text": "tokens"}, "tickvals": list(contexts), "ticktext": labels}


def _name(shape: str, bits: float, batch: int, ragged: bool) -> str:
    rows = f", batch {batch}" if batch > 1 else ""
    return f"{shape}, {bits:g} bit{rows}{', unequal rows' if ragged else ''}"


def _line(sheet: Sheet, plot: dict[str, str], x: Sequence[float], y: Sequence[float], name: str) -> None:
    style = {"color": GREY, "dash": "dot"}
    sheet.add(plot, "scatter", x=x, y=y, mode="lines", line=style, name=name, hoverinfo="skip")
