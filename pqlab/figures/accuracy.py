"""How faithful: bits against divergence, a plan's choices, divergence along a text, and what is found in long ones."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .labels import label_places
from .sheet import Sheet
from .theme import AMOUNTS, BAD, EXACT, GREY, PAGED, SEQUENCES, Theme, sequence_colour, sequence_mark

_LOWEST = 1e-7  # nats that a logarithmic axis still shows


def pareto_figure(
    table: pd.DataFrame, own: Sequence[str] = (), theme: Theme | None = "light", *, anchored: Sequence[str] = ()
) -> go.Figure:
    """Token bits against KL, a point a method; the line joins those that no other beats in both.

    Args:
        table: rows with `method`, `token_bits` and `kl` (nats), as `Evaluation.table` gives them; `kl_error` is drawn
            where it is there. Rows without numbers and the exact cache are left out.
        own: methods to mark as pqlab's.
        anchored: those of them with anchored keys, which have a mark of their own and, as they stand beneath what has
            the same bits without anchors, their names only where the mouse is.
    """
    rows = table[table.kl > 0].sort_values(["token_bits", "kl"])
    front = rows.kl < rows.kl.shift().cummin().fillna(float("inf"))
    rows = rows.assign(shown=rows.method.where(~rows.method.isin(anchored), ""))
    rows = rows.assign(place=_places(rows, front))
    best = rows[front]
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        "left and low is better",
        x={"title": {"text": "token bits: codes, scales, zero points"}, "rangemode": "tozero"},
        y={"title": {"text": "KL to exact, nats"}, "type": "log", "dtick": 1, "exponentformat": "power"},
    )
    sheet.front(plot, best.token_bits, best.kl)
    turned = rows.method.isin(anchored)
    mine = rows.method.isin(own) & ~turned
    groups = [("pqlab", rows[mine], "diamond", PAGED), ("others", rows[~mine & ~turned], "circle", GREY)]
    if turned.any():
        groups.insert(1, ("pqlab, keys anchored", rows[turned], "diamond-open", PAGED))
    for name, part, symbol, colour in groups:
        sheet.add(
            plot,
            "scatter",
            x=part.token_bits,
            y=part.kl,
            error_y={"type": "data", "array": part["kl_error"].fillna(0)} if "kl_error" in part else {},
            text=part.shown,
            customdata=part.method,
            mode="markers+text",
            textposition=part.place,
            marker={"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2 * symbol.endswith("open")}},
            name=name,
            hovertemplate="%{customdata}<br>%{x:.3g} bits, KL %{y:.3g} nats<extra></extra>",
            cliponaxis=False,
        )
    return sheet.figure(theme, min_width=620, height=478, margin={"t": 58, "b": 90, "l": 70, "r": 110})


def _places(rows: pd.DataFrame, front: pd.Series) -> list[str]:
    """Where the names of the points go in a picture of some 820 by 270 pixels."""
    bits, kl = rows.token_bits.to_numpy(float), np.log10(rows.kl.to_numpy(float))
    x = 820 * bits / max(bits.max(initial=0), 1)
    y = 270 * (kl - kl.min(initial=0)) / max(np.ptp(np.append(kl, kl.min(initial=0))), 1)
    steps = np.stack([x, y], -1)[front.to_numpy()]
    return label_places(x.tolist(), y.tolist(), rows.shown.tolist(), steps.tolist())


def corpora_figure(table: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """Perplexity of every corpus, the exact cache beside the quantized one, with the change in per cent.

    Args:
        table: from `evaluation.corpora_table.corpora_table`; rows without numbers are named without a bar.
    """
    read = table.perplexity.notna()
    names = [name if found else f"{name}<br>(not read)" for name, found in zip(table.corpus, read, strict=True)]
    sheet = Sheet()
    plot = sheet.plot(0, 0, x={"type": "category"}, y={"title": {"text": "perplexity"}, "rangemode": "tozero"})
    changes = [f"{change:+.2%}" if change == change else "" for change in table.change]
    for name, values, colour, text in (
        ("exact", table.exact_perplexity, EXACT, None),
        ("quantized", table.perplexity, PAGED, changes),
    ):
        sheet.add(
            plot,
            "bar",
            x=names,
            y=values,
            text=text,
            textposition="outside",
            cliponaxis=False,
            marker={"color": colour},
            name=name,
            hovertemplate="%{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    return sheet.figure(theme, min_width=620, barmode="group", height=418, margin={"t": 58, "b": 90, "l": 60, "r": 20})


def plan_figure(choices: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """What a plan gave every layer and side, and what each of them still costs.

    Args:
        choices: layer, side, bits, kl (nats), as `Plan.choices`.
    """
    sheet = Sheet(heights=[0.32, 0.68], gap_y=0.16)
    layers = sorted(choices.layer.unique())
    grid = choices.pivot(index="side", columns="layer", values="bits")
    span = {"range": [layers[0] - 0.5, layers[-1] + 0.5], "dtick": max(1, len(layers) // 15)}
    plot = sheet.plot(
        0, 0, "bits per element", y={"type": "category", "showgrid": False}, x={"showgrid": False, **span}
    )
    sheet.add(
        plot,
        "heatmap",
        z=grid.to_numpy(),
        x=layers,
        y=[side.upper() for side in grid.index],
        text=[[f"{b:g}" for b in row] for row in grid.to_numpy()],
        texttemplate="%{text}",
        colorscale=AMOUNTS,
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="layer %{x}, %{y}: %{z:g} bits<extra></extra>",
        name="bits",
    )
    plot = sheet.plot(
        1,
        0,
        "divergence that is left, predicted, nats",
        x={"title": {"text": "layer"}, **span},
        y={"type": "log", "dtick": 1, "exponentformat": "power"},
    )
    for index, (side, part) in enumerate(choices.sort_values("layer").groupby("side")):
        sheet.add(
            plot,
            "scatter",
            x=part.layer,
            y=part.kl.clip(lower=_LOWEST),
            mode="lines+markers",
            line={"color": sequence_colour(index)},
            marker={"symbol": sequence_mark(index)},
            name=side.upper(),
            hovertemplate=f"layer %{{x}}, {side.upper()}: %{{y:.2g}} nats<extra></extra>",
        )
    return sheet.figure(theme, min_width=620, height=438, margin={"t": 58, "b": 80, "l": 60, "r": 20})


def positions_figure(ranges: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """KL by position in the context, a line a method: does an error grow with what is stored?

    Args:
        ranges: method, start, stop, kl, as `Evaluation.by_position` gives them; kl_error is drawn where it is there.
    """
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        "KL by position in the context, lower is better",
        x={"title": {"text": "position"}},
        y={"title": {"text": "KL to exact, nats"}, "type": "log", "dtick": 1, "exponentformat": "power"},
    )
    for index, (method, part) in enumerate(ranges.groupby("method", sort=False)):
        sheet.add(
            plot,
            "scatter",
            x=(part.start + part.stop) / 2,
            y=part.kl.clip(lower=_LOWEST),
            error_y={"type": "data", "array": part["kl_error"].fillna(0)} if "kl_error" in part else {},
            mode="lines+markers",
            line={"color": sequence_colour(index), "dash": "solid" if index < len(SEQUENCES) else "dash"},
            marker={"symbol": sequence_mark(index)},
            name=method,
            hovertemplate=f"{method} near %{{x}}: %{{y:.3g}} nats<extra></extra>",
        )
    return sheet.figure(theme, min_width=620, height=438, margin={"t": 58, "b": 100, "l": 70, "r": 20})


def retrieval_figure(cells: pd.DataFrame, theme: Theme | None = "light") -> go.Figure:
    """How often hidden numbers are found, a heat map a method, by depth and length.

    Args:
        cells: method, length, depth, found, as `passkey` and `key_values` give them.
    """
    methods = list(dict.fromkeys(cells.method))
    sheet = Sheet(widths=[1] * len(methods), gap_x=0.05)
    for column, method in enumerate(methods):
        grid = cells[cells.method == method].pivot_table(
            index="depth", columns="length", values="found", aggfunc="mean"
        )
        plot = sheet.plot(
            0,
            column,
            method,
            x={"title": {"text": "tokens"}, "type": "category", "showgrid": False},
            y={
                "title": {"text": "depth" if column == 0 else ""},
                "type": "category",
                "autorange": "reversed",
                "showgrid": False,
            },
        )
        sheet.add(
            plot,
            "heatmap",
            z=grid.to_numpy(dtype=float),
            x=[str(length) for length in grid.columns],
            y=[f"{depth:g}" for depth in grid.index],
            text=[[f"{share:.0%}" for share in row] for row in grid.to_numpy(dtype=float)],
            texttemplate="%{text}",
            zmin=0,
            zmax=1,
            colorscale=AMOUNTS,
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate=f"{method}: %{{x}} tokens, depth %{{y}}: found %{{z:.0%}}<extra></extra>",
            name=method,
        )
    return sheet.figure(theme, min_width=240 * len(methods), height=378, margin={"t": 58, "b": 70, "l": 60, "r": 20})


def divergence_figure(
    frame: pd.DataFrame, tokens: Mapping[int, Sequence[str]] | None = None, theme: Theme | None = "light"
) -> go.Figure:
    """KL of the positions of one window, a line a method, from the first stored page on.

    The worst positions are marked, with the tokens that they follow.

    Args:
        frame: method, window, position, kl, agree: `Evaluation.frame` or `fidelity.compare`, of one window.
        tokens: token texts by window, to name positions with.
    """
    windows = frame.window.unique()
    if len(windows) != 1:
        raise ValueError(f"the frame holds windows {list(windows)}; choose one: frame[frame.window == {windows[0]}]")
    names = (tokens or {}).get(int(windows[0]))
    frame = frame[frame.kl > 0]  # before the first page is full there is nothing to differ
    sheet = Sheet()
    plot = sheet.plot(
        0,
        0,
        f"window {windows[0]}",
        x={"title": {"text": "position"}},
        y={"title": {"text": "KL to exact, nats"}, "type": "log", "dtick": 1, "exponentformat": "power"},
    )
    for index, (method, part) in enumerate(frame.groupby("method", sort=False)):
        colour = sequence_colour(index)
        sheet.add(
            plot,
            "scatter",
            x=part.position,
            y=part.kl.rolling(32, min_periods=1).mean().clip(lower=_LOWEST),
            mode="lines",
            line={"color": colour},
            name=f"{method}, mean of 32",
            legendgroup=method,
        )
        worst = part.nlargest(max(1, len(part) // 100), "kl")
        worst = worst.sort_values("agree", ascending=False, kind="stable")  # the legend shows the first one's mark
        labels = [_label(names, position) for position in worst.position]
        sheet.add(
            plot,
            "scatter",
            x=worst.position,
            y=worst.kl,
            text=labels,
            mode="markers",
            marker={"color": colour, "symbol": ["circle" if a else "x" for a in worst.agree], "line": {"color": BAD}},
            name=f"{method}, worst 1 % (×: another likeliest token)",
            legendgroup=method,
            hovertemplate=f"{method}, %{{text}}: %{{y:.3g}} nats<extra></extra>",
        )
    return sheet.figure(theme, min_width=620, height=458, margin={"t": 58, "b": 120, "l": 70, "r": 20})


def _label(names: Sequence[str] | None, position: int) -> str:
    if names is None:
        return f"position {position}"
    before = "".join(names[max(0, position - 4) : position + 1])
    return f"after “…{html.escape(before, quote=False).replace(chr(10), '⏎')}”"
