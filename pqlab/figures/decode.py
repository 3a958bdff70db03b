"""One step of a traced decode: where the tokens lie, what a head attends to, what it costs, what comes next."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go

from .decode_data import error_grid, next_tokens
from .sheet import Sheet
from .theme import BAD, EXACT, GOOD, PAGED, REGIONS, Theme

if TYPE_CHECKING:
    import pandas as pd

    from ..trace import DecodeTrace

Scale = Literal["log", "linear"]
_FLOOR = 1e-6
_OTHER_PAGE = "#C98A00"
_STRIP = [REGIONS["sink"], REGIONS["code"], _OTHER_PAGE, REGIONS["window"]]
_NAMES = {"exact": ("standard exact", EXACT), "paged": ("paged PQ", PAGED)}


def decode_figure(
    trace: DecodeTrace,
    step: int,
    *,
    layer: int | None = None,
    head: int = 0,
    kind: str = "isolated",
    scale: Scale = "log",
    errors: np.ndarray | None = None,
    num_tokens: int = 8,
    theme: Theme | None = "light",
) -> go.Figure:
    """The step in the run's KL, the cache by token position, one head's attention, all heads' errors, next tokens.

    Args:
        trace: from `trace_decode`; without capture, attention and errors stay empty.
        layer, head: whose attention (a captured layer; a query head); default the first captured layer.
        kind: "isolated" or "end to end"; see `DecodeTrace.attention`.
        scale: of the attention weights.
        errors: `error_grid(trace, kind)`, when it is at hand.
        num_tokens: next tokens shown.

    Raises:
        IndexError: the trace has no such step.
    """
    lengths = trace.lengths(step)
    captured = bool(trace.layers)
    layer = trace.layers[0] if layer is None and captured else layer
    sheet = Sheet([1.25, 1], [0.15, 0.06, 0.36, 0.43], gap_x=0.24, gap_y=0.085)
    _draw_timeline(sheet, trace, step)
    _draw_cache(sheet, trace, step, lengths)
    _draw_attention(sheet, trace.attention(step, layer, head, kind) if captured else None, layer, head, kind, scale)
    if captured and errors is None:
        errors = error_grid(trace, kind)
    _draw_errors(sheet, trace, step, layer, head, kind, errors)
    _draw_next(sheet, trace, step, num_tokens)
    return sheet.figure(
        theme,
        min_width=620,
        height=950,
        margin={"t": 36, "b": 104, "l": 20, "r": 20},  # room for the legend: one that pushes the plot lags behind it
        legend={"yref": "container", "y": 0.012, "x": 0, "yanchor": "bottom"},
        barmode="group",
        bargap=0.2,
    )


def _draw_timeline(sheet: Sheet, trace: DecodeTrace, step: int) -> None:
    steps = trace.steps
    row = steps.iloc[step]
    flushes = trace.events[(trace.events.kind == "flush") & (trace.events.step > 0)].step.unique()
    highest = max(float(steps.kl.max()), 1e-6)
    plot = sheet.plot(
        0,
        0,
        f"step {step} of {trace.num_steps - 1}: KL(exact‖paged) <b>{row.kl:.4f}</b> nats, "
        + ("same likeliest token" if row.agree else f'<b style="color:{BAD}">another likeliest token</b>'),
        columns=2,
        x={"range": [-0.7, trace.num_steps - 0.3], "title": {"text": ""}},
        y={"title": {"text": "KL"}, "range": [0, highest * 1.25], "nticks": 4},
    )
    tokens = [_texts(column) for column in (steps.token, steps.next_token, steps.exact_token)]
    agree = ["same likeliest token" if same else "another likeliest token" for same in steps.agree]
    sheet.add(
        plot,
        "bar",
        x=steps.step,
        y=steps.kl,
        customdata=np.stack([*tokens, agree], axis=-1).tolist(),
        marker={
            "color": [GOOD if same else BAD for same in steps.agree],
            "opacity": [1.0 if i == step else 0.5 for i in range(len(steps))],
        },
        hovertemplate="step %{x}, fed “%{customdata[0]}”<br>KL %{y:.5f} nats, %{customdata[3]}<br>"
        "paged → “%{customdata[1]}”, exact → “%{customdata[2]}”<extra></extra>",
        showlegend=False,
    )
    sheet.add(
        plot,
        "scatter",
        x=flushes,
        y=[highest * 1.16] * len(flushes),
        mode="markers",
        marker={"symbol": "triangle-down", "size": 10, "color": REGIONS["code"]},
        hovertemplate="step %{x}: a page is flushed<extra></extra>",
        name="a page is flushed",
        showlegend=len(flushes) > 0,
    )
    other = steps[~steps.agree.astype(bool)]
    sheet.add(
        plot,
        "scatter",
        x=other.step,
        y=other.kl + 0.06 * highest,
        mode="markers",
        marker={"symbol": "x", "size": 7, "color": BAD},
        hoverinfo="skip",
        name="another likeliest token",
        showlegend=len(other) > 0,
    )


def _draw_cache(sheet: Sheet, trace: DecodeTrace, step: int, lengths: tuple[int, int, int]) -> None:
    sinks, coded, window = lengths
    size, total = trace.meta["page_size"], len(trace.tokens)
    pages = [page for page in trace.tables[step].tolist() if page >= 0]
    region = np.full(total, np.nan, np.float32)
    region[:sinks] = 0
    region[sinks : sinks + coded] = 1 + (np.arange(coded) // size) % 2
    region[sinks + coded : sinks + coded + window] = 3
    place = ["exact sink"] * sinks
    place += [f"page {pages[u // size]}, slot {u % size}" for u in range(coded)]
    ring = trace.meta["residual_length"] + size
    place += [f"exact window, ring slot {u % ring}" for u in range(coded, coded + window)]
    place += [""] * (total - len(place))
    new = trace.events[(trace.events.step == step) & (trace.events.kind == "flush") & (trace.events.step > 0)]
    flushed = "".join(f"; <b>page {event.page} flushed</b>" for event in new.itertuples())
    plot = sheet.plot(
        1,
        0,
        f"{sinks} sinks | {coded} coded, {len(pages)} pages of {size} | window {window} of {ring}{flushed}",
        columns=2,
        x={"range": [-0.5, total - 0.5], "showticklabels": False, "ticks": "", "showgrid": False},
        y={"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False, "range": [-0.5, 0.5]},
    )
    sheet.add(
        plot,
        "heatmap",
        z=region[None],
        text=[place],
        customdata=[_texts(trace.tokens)],
        hovertemplate="token %{x} “%{customdata}”<br>%{text}<extra></extra>",
        zmin=-0.5,
        zmax=3.5,
        colorscale=[pair for i, c in enumerate(_STRIP) for pair in ([i / 4, c], [(i + 1) / 4, c])],
        showscale=False,
    )
    shown = pages if len(pages) <= 48 else []
    sheet.add(
        plot,
        "scatter",
        x=[sinks + (i + 0.5) * size - 0.5 for i in range(len(shown))],
        y=[0] * len(shown),
        text=[str(page) for page in shown],
        mode="text",
        textfont={"color": "#14181d", "size": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _draw_attention(
    sheet: Sheet, weights: pd.DataFrame | None, layer: int | None, head: int, kind: str, scale: Scale
) -> None:
    title = "attention was not captured in this trace"
    if weights is not None:
        mass = weights.groupby("region")[["exact", "paged"]].sum().reindex(["sink", "code", "window"]).dropna()
        parts = ", ".join(f"{region} {row.exact:.0%} / {row.paged:.0%}" for region, row in mass.iterrows())
        title = f"attention of layer {layer}, head {head}, {kind}<br>exact / paged share: {parts}"
    y: dict[str, Any] = {"title": {"text": "weight"}, "type": scale}
    if scale == "log":
        ticks = [10.0**n for n in range(-6, 1)]
        y |= {"range": [np.log10(_FLOOR), 0.1], "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    else:
        y |= {"rangemode": "tozero"}
    plot = sheet.plot(
        2, 0, title, columns=2, x={"matches": "x2", "title": {"text": "token position"}, "showgrid": False}, y=y
    )
    for run, (name, colour) in _NAMES.items():
        values = {"x": [], "y": [], "customdata": []}
        if weights is not None:
            values = {
                "x": weights.position,
                "y": weights[run].clip(lower=_FLOOR),
                "customdata": np.stack([_texts(weights.token), weights.region], axis=-1).tolist(),
            }
        sheet.add(
            plot,
            "scatter",
            **values,
            mode="lines",
            line={"color": colour, "width": 2.4 if run == "exact" else 1.4, "shape": "hvh"},
            hovertemplate=f"token %{{x}} “%{{customdata[0]}}” (%{{customdata[1]}})<br>{name} %{{y:.3g}}<extra></extra>",
            name=name,
            legendgroup=run,
        )


def _draw_errors(
    sheet: Sheet, trace: DecodeTrace, step: int, layer: int | None, head: int, kind: str, errors: np.ndarray | None
) -> None:
    chosen = "" if errors is None else f": {errors[step, trace.layers.index(layer), head]:.1%} here"
    layers = [str(number) for number in trace.layers]
    plot = sheet.plot(
        3,
        0,
        f"output error, {kind}{chosen}",
        x={"title": {"text": "query head"}, "showgrid": False, "dtick": max(1, trace.num_heads // 12)},
        y={"title": {"text": "layer"}, "showgrid": False, "autorange": "reversed", "type": "category"},
    )
    highest = 1.0 if errors is None else float(np.quantile(errors, 0.99)) or 1.0
    sheet.add(
        plot,
        "heatmap",
        z=np.zeros((0, 0)) if errors is None else errors[step],
        y=layers,
        zmin=0,
        zmax=highest,
        hovertemplate="layer %{y}, head %{x}: |paged − exact| / |exact| = %{z:.2%}<extra></extra>",
        colorbar={"x": 0.425, "len": 0.36, "y": 0.165, "thickness": 10, "tickformat": ".0%", "title": {"text": ""}},
        name="errors",
    )
    mark = {"symbol": "square-open", "size": 13, "color": BAD, "line": {"width": 3}}
    sheet.add(
        plot,
        "scatter",
        x=[] if errors is None else [head],
        y=[] if errors is None else [str(layer)],
        mode="markers",
        marker=mark,
        hoverinfo="skip",
        showlegend=False,
    )


def _draw_next(sheet: Sheet, trace: DecodeTrace, step: int, num_tokens: int) -> None:
    best = next_tokens(trace, step).head(num_tokens)
    names = [f"{rank}: “{_visible(token)}”" for rank, token in enumerate(best.token, start=1)]
    plot = sheet.plot(
        3,
        1,
        "next token",
        x={"title": {"text": "probability"}, "rangemode": "tozero", "tickformat": ".0%", "nticks": 6},
        y={"autorange": "reversed", "tickvals": list(range(len(names))), "ticktext": names, "showgrid": False},
    )
    for run, (name, colour) in _NAMES.items():
        sheet.add(
            plot,
            "bar",
            x=best[run],
            y=list(range(len(names))),
            customdata=names,
            orientation="h",
            marker={"color": colour},
            name=name,
            legendgroup=run,
            showlegend=False,
            hovertemplate=f"{name}: %{{customdata}} %{{x:.2%}}<extra></extra>",
        )


def _texts(tokens: Iterable[str]) -> list[str]:
    """Tokens as they are read in a hover box, without markup."""
    return [html.escape(token, quote=False) for token in tokens]


def _visible(token: str) -> str:
    """A token that can be read in a line: spaces and line ends as signs, no markup."""
    return html.escape(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")[:20], quote=False)
