"""Figures show the data they are given, keep their traces, and can be read in both themes."""

from __future__ import annotations

import html
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from tiny_trace import PROMPT, tiny_cache_and_trace

from pqlab.benchmarks.layout_bench import measure_orders
from pqlab.config import CacheConfig, PQConfig, check_report_ranges
from pqlab.cost import SHAPES, CacheCost
from pqlab.figures import theme
from pqlab.figures.accuracy import divergence_figure, pareto_figure, plan_figure
from pqlab.figures.decode import decode_figure
from pqlab.figures.decode_data import error_grid, next_tokens
from pqlab.figures.labels import label_places
from pqlab.figures.layout import SHOWN, layout_figure
from pqlab.figures.settings import context_frame, cost_frame, range_frame, settings_figure
from pqlab.figures.sheet import Sheet
from pqlab.figures.text import text_html
from pqlab.paging.access import LOADS, compare_orders, random_codes

SMOL = SHAPES["SmolLM2-135M"]


@pytest.fixture(scope="module")
def trace(tiny_tokenizer):
    return tiny_cache_and_trace(tiny_tokenizer)[1]


def _kinds(figure: go.Figure) -> list[str]:
    return [trace.type for trace in figure.data]


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("name", "page"), [("light", "#ffffff"), ("dark", "#111111")])
def test_theme_can_be_read_on_its_page(name, page):
    """WCAG: 4.5 for text, 3 for graphics; panels and files are transparent so that the page's own colour shows."""
    layout = theme.template(name).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert _contrast(layout.font.color, page) > 10
    assert _contrast(layout.xaxis.tickfont.color, page) > 4.5
    assert _contrast(layout.hoverlabel.font.color, layout.hoverlabel.bgcolor) > 7
    for colour in (theme.EXACT, theme.PAGED, *theme.REGIONS.values(), theme.GOOD, theme.BAD):
        assert _contrast(colour, page) > 1.9, f"{colour} cannot be seen on {page}"


def test_unknown_theme_is_refused():
    with pytest.raises(ValueError, match='"light" or "dark"'):
        theme.template("sepia")


def test_a_theme_is_the_template_alone():
    """Panels and files change themes by it."""
    cost = CacheCost(SMOL, PQConfig(), CacheConfig(), 4096)
    light, dark = (settings_figure(cost, theme=name).to_plotly_json() for name in ("light", "dark"))
    assert light["layout"].pop("template") != dark["layout"].pop("template")
    assert repr(light) == repr(dark)


def test_sheet_places_plots_on_a_grid():
    sheet = Sheet([2, 1], [1, 3], gap_x=0.1, gap_y=0.2)
    top, wide = sheet.plot(0, 1, "top right"), sheet.plot(1, 0, columns=2)
    sheet.add(top, "scatter", x=[1], y=[2])
    sheet.add(wide, "bar", x=[1], y=[2])
    figure = sheet.figure("dark", height=300)
    layout = figure.layout
    assert layout.xaxis.domain == pytest.approx((0.7, 1)) and layout.xaxis2.domain == (0, 1)
    assert layout.yaxis.domain == pytest.approx((0.8, 1)) and layout.yaxis2.domain == pytest.approx((0, 0.6))
    assert (figure.data[0].xaxis, figure.data[1].yaxis) == ("x", "y2")
    assert layout.annotations[0].text == "top right" and layout.height == 300
    assert layout.template.layout.font.color == theme.template("dark").layout.font.color


# -- page settings ------------------------------------------------------------------------------------------------


def test_memory_bars_are_the_parts_of_the_cost():
    cost = CacheCost(SMOL, PQConfig(), CacheConfig(max_pages=300), 8192, batch=2)
    figure = settings_figure(cost)
    assert "memory of all sequences, MiB" in [note.text for note in figure.layout.annotations]
    bars = {bar.name: bar.x[1] for bar in figure.data[1 : 1 + len(cost.parts())]}
    for part in cost.parts():
        assert bars[part["part"]] * 2**20 == pytest.approx(part["bytes"])
    assert figure.data[0].x[0] * 2**20 == pytest.approx(cost.baseline_bytes)
    assert f"{cost.compression:.2f}×" in figure.layout.title.text


def test_missing_pages_are_said():
    enough = settings_figure(CacheCost(SMOL, PQConfig(), CacheConfig(max_pages=200), 8192))
    short = settings_figure(CacheCost(SMOL, PQConfig(), CacheConfig(max_pages=100), 8192))
    said = [any("PQC001" in note.text for note in figure.layout.annotations) for figure in (enough, short)]
    assert said == [False, True]
    missing = {bar.name: list(bar.x) for bar in short.data if bar.type == "bar"}["missing"]
    assert missing == [0, 25 * 64]
    assert _kinds(enough) == _kinds(short), "a panel changes the figure in place"


def test_cost_table_and_ranges():
    cost = CacheCost(SMOL, PQConfig(M=32), CacheConfig(), 8192)
    shown = cost_frame(cost).set_index("quantity").shown
    assert shown["bits per element of a coded token"] == "4 bits"
    params = {"page_size": 64, "extended_residual": 16, "max_pages": None, "M": 48, "nbits": 8}
    table = range_frame(params, check_report_ranges(head_dim=64, **params)).set_index("setting").verdict
    assert table["page_size"] == table["max_pages"] == "✓"
    assert table["extended_residual"].startswith("✗ 16 is outside the report's range (32 to 1024)")
    assert "does not divide the head size 64" in table["M"]


def test_bits_fall_with_the_context_towards_the_codes_alone():
    cost = CacheCost(SMOL, PQConfig(), CacheConfig(), 8192)
    curve = context_frame(cost)
    assert curve.bits_per_element.is_monotonic_decreasing
    assert cost.token_bits < curve.bits_per_element.iloc[-1] < cost.token_bits * 1.05
    assert curve.set_index("context").bits_per_element[8192] == cost.bits_per_element


# -- memory layout ------------------------------------------------------------------------------------------------


def _layout_figure(nbits: int = 8, pattern: str = "subspace", measured=None, colour_by: str = "code") -> go.Figure:
    accesses = compare_orders(32, 2, 12, nbits, pattern, LOADS["warp"], head=1, slot=9, subspace=5)
    codes = random_codes(32, 12, nbits, head=1)
    return layout_figure(accesses, codes, head=1, colour_by=colour_by, measured=measured)


def test_every_byte_of_the_page_is_drawn_with_its_code():
    figure = _layout_figure()
    codes = random_codes(32, 12, 8, head=1)
    for name, picture in zip(SHOWN.values(), (figure.data[0], figure.data[2], figure.data[4]), strict=True):
        assert picture.name == name
        table = np.asarray(picture.customdata).reshape(-1, 6)
        assert table[:, 0].tolist() == list(range(32 * 12, 2 * 32 * 12)), "addresses within the page, head 1"
        assert np.array_equal(np.asarray(picture.z).ravel(), codes[table[:, 1], table[:, 3]])
        wanted = np.asarray(figure.data[list(figure.data).index(picture) + 1].z).ravel() == 2
        assert set(table[wanted, 3]) == {5}, "only the subspace that was asked for is marked as wanted"


def test_layout_figure_keeps_its_traces_and_says_what_was_not_measured():
    measured = measure_orders("subspace", num_bytes=2**18, repeats=1)
    figures = [_layout_figure(), _layout_figure(5, "token"), _layout_figure(measured=measured, colour_by="token")]
    assert all(_kinds(figure) == _kinds(figures[0]) for figure in figures)
    titles = [figure.layout.xaxis6.title.text for figure in figures]
    assert "not measured" in titles[0] and measured.device.iloc[0] in titles[2]
    speeds = measured.set_index("order").gb_per_s
    assert list(figures[2].data[-1].x) == [*(speeds[order] for order in SHOWN), speeds["contiguous"]]


# -- decode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["isolated", "end to end"])
def test_decode_figure_shows_the_trace(trace, kind):
    step, layer, head = 25, 1, 4
    figure = decode_figure(trace, step, layer=layer, head=head, kind=kind)
    named = {trace_.name: trace_ for trace_ in figure.data if trace_.name}
    weights = trace.attention(step, layer, head, kind)
    for run, name in (("exact", "standard exact"), ("paged", "paged PQ")):
        lines = [t for t in figure.data if t.name == name and t.type == "scatter"]
        np.testing.assert_allclose(lines[0].y, weights[run].clip(lower=1e-6))
    errors = trace.output_error(step)
    own = errors[(errors.kind == kind) & (errors.layer == layer) & (errors["head"] == head)].error.item()
    assert named["errors"].z[layer][head] == pytest.approx(own, rel=1e-5)
    assert any(f"{own:.1%} here" in note.text for note in figure.layout.annotations)
    assert any(f"{trace.steps.kl[step]:.4f}" in note.text for note in figure.layout.annotations)
    assert list(figure.data[0].y) == trace.steps.kl.tolist()


def test_decode_figure_keeps_its_traces(trace):
    figures = [decode_figure(trace, step, scale=scale) for step, scale in ((0, "log"), (1, "linear"), (40, "log"))]
    assert all(_kinds(figure) == _kinds(figures[0]) for figure in figures)


def test_decode_figure_without_capture(trace):
    from dataclasses import replace

    bare = replace(trace, layers=[], tensors={})
    figure = decode_figure(bare, 3)
    assert _kinds(figure) == _kinds(decode_figure(trace, 3))
    assert any("not captured" in note.text for note in figure.layout.annotations)


def test_tokens_are_text_in_every_hover_box(trace):
    from dataclasses import replace

    steps = trace.steps.assign(token="<b>", next_token="<i>", exact_token="a&b")
    figure = decode_figure(replace(trace, steps=steps, tokens=["<b>"] * len(trace.tokens)), 3)
    boxes = [np.asarray(shown.customdata, object).ravel() for shown in figure.data if shown.customdata is not None]
    said = [text for box in boxes for text in box if isinstance(text, str)]
    assert {"&lt;b&gt;", "&lt;i&gt;", "a&amp;b"} <= set(said)
    assert not any("<" in text for text in said)


def test_strip_follows_pages_and_window(trace):
    for step in (1, 20, 40):
        sinks, coded, window = trace.lengths(step)
        strip = next(t for t in decode_figure(trace, step).data if t.type == "heatmap")
        region = np.asarray(strip.z)[0]
        assert (region == 0).sum() == sinks and (region == 3).sum() == window
        assert ((region == 1) | (region == 2)).sum() == coded
        assert np.isnan(region).sum() == len(trace.tokens) - sinks - coded - window
        if coded:
            assert strip.text[0][sinks] == f"page {trace.tables[step, 0]}, slot 0"


def test_next_tokens_pair_both_runs(trace):
    best = next_tokens(trace, 12)
    top = trace.topk(12)
    for run in ("exact", "paged"):
        expected = top[top.run == run].set_index("token_id").probability
        assert best.dropna(subset=[run]).set_index("token_id")[run].sort_index().equals(expected.sort_index())
    assert best[["exact", "paged"]].max(axis=1).is_monotonic_decreasing


def test_error_grid_is_output_error(trace):
    grid = error_grid(trace, "isolated")
    assert grid.shape == (trace.num_steps, 2, 6)
    errors = trace.output_error(7)
    row = errors[(errors.kind == "isolated") & (errors.layer == 1)].sort_values("head")
    np.testing.assert_allclose(grid[7, 1], row.error, rtol=1e-6)


def test_text_is_escaped_and_says_its_pages(trace):
    said = text_html(trace, 0, num_tokens=500)
    assert html.unescape(re.sub("<[^>]*>", "", said)).startswith(PROMPT), "markup of the text is text"
    late = text_html(trace, 40, num_tokens=500)
    for page in (page for page in trace.tables[40].tolist() if page >= 0):
        assert f'title="page {page}: codes"' in late
    assert "tokens before" in text_html(trace, 40, num_tokens=10) and "tokens before" not in late


@pytest.mark.parametrize("theme_name", ["light", "dark"])
def test_pareto_draws_every_method_and_joins_those_not_beaten(theme_name):
    rows = [("exact", 16, 0.0), ("a", 2, 0.1), ("b", 4, 0.2), ("c", 4, 0.01), ("d", 4.02, 0.0101), ("e", 5, 0.02)]
    table = pd.DataFrame(rows, columns=["method", "token_bits", "kl"])
    figure = pareto_figure(table, ["c"], theme_name)
    line, own, others = figure.data
    assert list(line.x) == [2, 4] and list(line.y) == [0.1, 0.01]
    assert list(own.text) == ["c"] and list(others.text) == ["a", "b", "d", "e"]
    places = dict(zip(others.text, others.textposition, strict=True)) | {"c": own.textposition[0]}
    assert places["a"] == "top right" and places["c"] != places["d"], "c and d lie on each other"
    _, own, anchored, others = pareto_figure(table, ["c", "d"], theme_name, anchored=["d"]).data
    assert list(own.text) == ["c"] and list(anchored.text) == [""] and list(anchored.customdata) == ["d"]
    assert anchored.marker.symbol != own.marker.symbol and list(others.text) == ["a", "b", "e"]


def test_labels_keep_off_each_other_and_off_points():
    assert label_places([0, 100], [0, 0], ["one", "two"]) == ["top right"] * 2
    assert label_places([0, 30], [0, 10], ["a long name", "b"])[0] != "top right", "there is a point"
    near = label_places([0, 0, 0], [0, 5, 10], ["first", "second", "third"])
    assert len(set(near)) == 3
    assert label_places([], [], []) == []


def test_a_plain_figure_brings_its_background_for_a_page_of_the_other_theme():
    for name in theme.THEMES:
        look = Sheet().figure(name).layout.template.layout
        assert _contrast(look.font.color, look.paper_bgcolor) > 10


def test_plan_shows_what_was_chosen_and_what_is_left():
    rows = [(i, side, 2 + 2 * (i == 1), 10.0 ** -(i + 2)) for i in range(3) for side in "kv"]
    figure = plan_figure(pd.DataFrame(rows, columns=["layer", "side", "bits", "kl"]))
    grid, k, v = figure.data
    assert list(grid.y) == ["K", "V"] and np.array(grid.z).tolist() == [[2, 4, 2], [2, 4, 2]]
    assert list(k.y) == list(v.y) == [0.01, 0.001, 0.0001]


def test_divergence_marks_the_worst_positions_with_their_text():
    frame = pd.DataFrame({"method": "m", "window": 0, "position": range(200), "kl": [0.0] * 50 + [0.01] * 150})
    frame["agree"] = True
    frame.loc[120, ["kl", "agree"]] = 2.0, False
    figure = divergence_figure(frame, {0: [f"<w{i}>&lt;\n" for i in range(200)]})
    line, worst = figure.data
    assert min(line.x) == 50 and list(worst.x) == [120] and list(worst.marker.symbol) == ["x"]
    assert worst.text[0].endswith("&lt;w119&gt;&amp;lt;⏎&lt;w120&gt;&amp;lt;⏎”"), "as in the text, entities too"
    with pytest.raises(ValueError, match="choose one"):
        divergence_figure(pd.concat([frame, frame.assign(window=1)]))
