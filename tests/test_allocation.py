"""The page allocation panel and its figures: what is drawn is what the states say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("ipywidgets")

from pqlab.config import CacheConfig
from pqlab.figures.cells import ROWS, Cell, add_cells
from pqlab.figures.pages import allocation_figure, page_text, pages_figure
from pqlab.figures.sheet import Sheet
from pqlab.paging import PagePool, PageTable
from pqlab.paging.scenario import SCENARIOS, Event
from pqlab.paging.simulate import simulate, split_words
from pqlab.paging.state import pool_state
from pqlab.panels.allocation import PageAllocation, page_allocation

WORDS = split_words(
    'It is a truth universally acknowledged, that a <b>single</b> man & his "fortune" want a wife. ' * 40
)


@pytest.fixture(scope="module")
def steps():
    return simulate(SCENARIOS["story"](), CacheConfig(max_pages=64), words=WORDS)


@pytest.fixture
def panel():
    panel = PageAllocation(WORDS)
    yield panel
    panel.close()


def hovers(figure) -> list[str]:
    return [text for trace in figure.data if trace.type == "heatmap" and trace.customdata is not None
            for text in np.asarray(trace.customdata).ravel() if text]  # fmt: skip


def labels(figure) -> list[str]:
    return [text for trace in figure.data if trace.type == "scatter" for text in trace.text]


def test_a_cell_is_filled_from_below_and_striped_by_its_holders():
    sheet = Sheet()
    cells = [[Cell(), Cell((0,), 1.0), Cell((0, 2), 0.5)], [Cell((1,), 0.01), None]]
    add_cells(sheet, sheet.plot(0, 0), cells)
    rows = np.asarray(sheet.data[0]["z"])
    assert rows.shape == (2 * (ROWS + 1), 3)
    assert (rows[:ROWS, 0] == 0).all()  # free
    assert (rows[:ROWS, 1] == 2).all()  # the colour of sequence 0
    assert rows[:ROWS, 2].tolist() == [1, 1, 1, 1, 2, 4, 2, 4]  # empty above, both holders below
    assert rows[ROWS + 1 : -1, 0].tolist() == [1] * 7 + [3]  # a single token shows
    assert np.isnan(rows[ROWS]).all() and np.isnan(rows[ROWS + 1 :, 1:]).all()


def test_every_page_says_who_holds_it_how_full_it_is_and_what_it_reads(steps):
    step = steps[9]
    shown = hovers(pages_figure(step.pool, page_bytes=2048))
    for page in step.pool.pages:
        mine = [text for text in shown if text.startswith(f"<b>page {page.page}</b>")]
        if page.is_free:
            assert mine == [f"<b>page {page.page}</b>: free"]
            continue
        entries = sum(page.page in table for table in step.pool.tables)
        assert len(set(mine)) == 1 and len(mine) == 1 + entries  # in the pool and in every page table
        assert f"{page.tokens} of 64 slots filled" in mine[0] and "2.0 KiB" in mine[0]
        assert ("shared by" in mine[0]) == page.is_shared
        assert page_text(page.text)[0] in mine[0]


def test_shared_free_and_changed_pages_differ_without_colour(steps):
    shown = labels(pages_figure(steps[9].pool, changes=steps[9].changes))
    assert {"AC", "BD", "A", "B", "C", "D+", "D≠"} <= set(shown)
    assert sum(label.endswith("*") for label in shown) == sum(
        steps[9].pool.pages[page].is_shared for table in steps[9].pool.tables for page in table
    )
    freed = labels(pages_figure(steps[12].pool, changes=steps[12].changes))
    assert freed.count("−") == sum(change.kind == "free" for change in steps[12].changes) > 0


def test_bars_are_the_bytes_of_the_states(steps):
    for step in steps:
        figure = allocation_figure(step, page_bytes=640)
        bars = {trace.name: list(trace.x) for trace in figure.data if trace.type == "bar"}
        assert bars["used"] == [10 * step.pool.used, 10 * step.arena.used]
        assert bars["wasted (reserved, empty)"] == [10 * step.pool.wasted, 10 * step.arena.wasted]
        assert np.sum(list(bars.values()), axis=0).tolist() == [10 * step.pool.capacity] * 2
        assert len(figure.data) == 15  # always the same traces: a panel changes them in place
    assert "refused" in allocation_figure(steps[11], page_bytes=640).layout.title.text


def test_text_of_a_page_is_wrapped_escaped_and_cut():
    assert page_text("a <b>\n\nbold</b> & new\n") == ["<i>a &lt;b&gt; bold&lt;/b&gt; &amp; new</i>"]
    lines = page_text("word " * 1000)
    assert len(lines) == 10 and "more lines" in lines[-1] and all(len(line) < 80 for line in lines)
    assert page_text("") == []


@pytest.mark.parametrize("max_pages", [1, 16, 100, 2000])
def test_pools_of_any_size_are_drawn(max_pages):
    pool = PagePool(max_pages)
    table = PageTable(pool, 16, 3)
    table.extend([max_pages * 16 - 20 if max_pages > 2 else 5, 10 if max_pages > 2 else 0, 0])
    figure = pages_figure(pool_state(pool, table))
    cells = [text for text in hovers(figure) if text.startswith("<b>page")]
    assert len(cells) == max_pages + pool.num_used
    json.dumps(figure.to_plotly_json(), default=str)


def test_controls_move_the_state_and_the_figure(panel):
    assert panel.widget is not None
    before = panel.figure.layout.title.text
    panel.set(event=5)
    assert panel.error is None and panel.step.event == Event("grow", 0, 200)
    assert panel.figure.layout.title.text != before
    assert "A grows by 200 tokens" in panel.figure.layout.title.text
    used = panel.step.pool.pages_used
    panel.set(page_size=32)
    assert panel.step.pool.pages_used > used and panel.step.pool.page_size == 32
    panel.set(whole_pages=False)
    assert panel.step.sequences[0].window == 0
    panel.set(shape="Llama-3.1-8B")
    assert panel.page_bytes == 32 * 32 * 8 * 64 * 2
    assert "<td>A</td>" in panel._table.value


def test_the_event_fits_its_scenario(panel):
    assert panel.widget is not None
    panel.set(scenario="requests")
    panel.set(event=40)
    assert panel.event == 40 and panel.error is None
    panel.set(scenario="story", page_size=16)
    assert panel.event == 19 and panel.error is None
    panel.set(event=3)
    panel.set(scenario="beams")
    assert panel.event == 3


def test_what_is_wrong_is_said_and_the_figure_stays(panel):
    assert panel.widget is not None
    before = panel.figure.layout.title.text
    panel.set(page_size=20)
    assert "page_size = 20" in panel.status and "nearest good value is 16" in panel.status
    panel.set(page_size=64)
    assert panel.error is None
    panel.set(event=99)
    assert "event = 99 is out of range (0 to 19)" in panel.status
    assert panel.figure.layout.title.text == before
    panel.set(scenario="nonsense")
    assert "&#x27;nonsense&#x27; is unknown; there are story" in panel.status and panel.scenario == "story"


@pytest.mark.parametrize("wrong", [0, -5])
def test_a_contiguous_reservation_is_of_a_slot_at_least(panel, wrong):
    assert panel.widget is not None
    panel.set(reserve=wrong)
    assert f"reserve = {wrong} is out of range (at least 1); the nearest good value is 1" in panel.status
    assert panel.reserve == 2048 and panel.error is not None
    panel.set(reserve=1)
    assert panel.reserve == 1 and panel.error is None


def test_ones_own_events_and_tokens(tiny_tokenizer):
    panel = page_allocation("déjà vu " * 30, tiny_tokenizer, events=[Event("start", 0, 60)], whole_pages=False, event=1)
    assert panel.scenario == "yours" and panel.step.pool.num_tokens == (60,)
    assert panel.frame().columns.tolist() == ["page", "sequences", "first_token", "tokens", "fill", "bytes", "text"]
    assert panel.history()["paged_used"].tolist() == [0, 60]
    panel.close()


def test_it_plays(panel):
    import ipywidgets

    assert panel.widget is not None
    (player,) = [c for c in panel.widget.children[1].children if isinstance(c, ipywidgets.Play)]
    assert (player.value, player.max) == (9, 19)
    player.value = 10  # what the browser sends
    assert panel.event == 10
    panel.set(event=4)
    assert player.value == 4
    panel.set(scenario="requests")
    assert (player.value, player.max) == (4, 40)


def test_a_file_of_scenarios_shows_the_event_that_the_panel_would(panel, tmp_path):
    """One with fewer events shows its last; the next one begins again with the panel's own."""
    panel.state = {"scenario": "requests", "event": 37}
    text = panel.to_html(tmp_path / "pages.html", sweep="scenario").read_text(encoding="utf-8")
    shown = [int(event) for event in re.findall(r"<dt>event<.{1,2}dt><dd>(\d+)<", text)]
    assert shown == [min(37, len(make())) for make in SCENARIOS.values()]
    assert (panel.scenario, panel.event) == ("requests", 37)


def test_one_file_shows_every_event(panel, tmp_path):
    text = panel.to_html(tmp_path / "pages.html").read_text(encoding="utf-8")
    for event in panel.events:
        assert str(event)[:20] in text
    assert "PQC001" in text and 'src="http' not in text
