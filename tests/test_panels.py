"""Panels: state in and out, errors where a person sees them, one figure changed in place, files that need nobody."""

from __future__ import annotations

import itertools
import json
import re
import threading

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import traitlets
from conftest import make_tiny_model
from tiny_trace import tiny_cache_and_trace

from pqlab import CacheConfig, Codebooks, PagedPQCache, PQConfig
from pqlab.cost import ModelShape
from pqlab.errors import ConfigError, in_runs
from pqlab.panels import Panel, controls, decode_stepper, memory_layout, page_allocation, page_settings
from pqlab.panels.latest import Latest
from pqlab.panels.view import FigureView, changes, plain
from pqlab.transformers_api import cache_argument


class Wave(Panel):
    """A panel as a user would write it."""

    title = "Wave"
    sweep = "bits"

    bits = traitlets.Int(4).tag(state=True)
    shape = traitlets.Enum(["sin", "cos"], "sin").tag(state=True)
    draws = 0

    def controls(self):
        return [
            controls.number(self, "bits", "bits", low=1, high=9, step=2),
            controls.choice(self, "shape", "shape", ["sin", "cos"]),
        ]

    def draw(self) -> go.Figure:
        self.draws += 1
        if self.bits > 16:
            raise ConfigError(f"bits = {self.bits} is too much")
        frame = self.frame()
        return go.Figure([go.Scatter(x=frame.x, y=frame.y)], layout={"title": {"text": f"{self.bits} bits"}})

    def frame(self) -> pd.DataFrame:
        x = np.linspace(-3, 3, 20)
        return pd.DataFrame({"x": x, "y": np.round(getattr(np, self.shape)(x) * 2**self.bits) / 2**self.bits})

    def sweep_values(self):
        return {"bits": [1, 3, 5]}


@pytest.fixture
def wave():
    panel = Wave()
    yield panel
    panel.close()


@pytest.fixture
def tiny(tiny_tokenizer):
    return tiny_cache_and_trace(tiny_tokenizer)


def frames_of(path) -> list[dict]:
    """The positions of the slider of a file that `to_html` wrote."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r"\{frames, templates\} = (\{.*\});\n", text).group(1).replace("<\\/", "</"))["frames"]


def assert_file_is_panel(panel: Panel, sweep: str, path) -> None:
    """Every position of the slider shows what the panel does when its control is set so."""
    before = panel.state
    frames = frames_of(panel.to_html(path, sweep=sweep))
    assert panel.state == before
    values = list(panel.sweep_values()[sweep])
    assert [frame["label"] for frame in frames] == [str(value) for value in values]
    for value, frame in zip(values, frames, strict=True):
        panel.state = before
        panel.set(**{sweep: value})
        assert panel.error is None
        assert {"data": frame["data"], "layout": frame["layout"]} == plain(panel.figure), value
        shown = {name: panel.in_force(name) for name in panel.state if name != sweep}
        assert frame["settings"] == "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in shown.items())
    panel.state = before


def find(panel: Panel, css_class: str) -> widgets.Widget:
    """The control of a panel with a CSS class, as the browser tests find it too."""
    found = [w for w in _tree(panel.widget) if css_class in getattr(w, "_dom_classes", ())]
    assert len(found) == 1, f"{css_class}: {found}"
    return found[0]


def _tree(widget: widgets.Widget) -> list[widgets.Widget]:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in _tree(child))]


# -- state --------------------------------------------------------------------------------------------------------


def test_state_is_read_and_set_as_values(wave):
    wave.widget  # noqa: B018  built
    before = wave.draws
    assert wave.state == {"bits": 4, "shape": "sin"}
    wave.state = {"bits": 7, "shape": "cos"}
    assert wave.state == {"bits": 7, "shape": "cos"} and wave.figure.layout.title.text == "7 bits"
    assert wave.draws == before + 1, "several settings at once are one redraw"
    json.dumps(wave.state)


def test_unknown_state_is_refused(wave):
    with pytest.raises(TypeError, match="no state volume; it has bits, shape"):
        wave.state = {"volume": 3}
    with pytest.raises(TypeError, match="Wave has no state volume"):
        Wave(volume=3)


def test_state_is_set_whole_or_not_at_all(wave):
    with pytest.raises(traitlets.TraitError):
        wave.state = {"bits": 6, "shape": "tan"}
    assert wave.state == {"bits": 4, "shape": "sin"}
    wave.observe(lambda change: 1 / (change.new - 6), "bits")
    with pytest.raises(ZeroDivisionError):
        wave.state = {"shape": "cos", "bits": 6}
    assert wave.state == {"bits": 4, "shape": "sin"}, "nor when an observer fails"


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (page_settings, {"model": "Llama-2-7B", "M": 32, "context": 5000}),
        (page_settings, {"model": "Gemma-3-270M", "page_size": 32}),
        (memory_layout, {"page_size": 128, "slot": 100, "num_subspaces": 96, "subspace": 70, "head": 2}),
        (lambda: page_allocation("a few words " * 50), {"scenario": "requests", "event": 37, "page_size": 32}),
    ],
)
def test_a_state_is_what_was_set_and_makes_another_panel_the_same(make, changed):
    panel, other = make(), make()
    for one in (panel, other):
        assert one.widget is not None
    panel.state = changed
    assert changed.items() <= panel.state.items() and panel.error is None
    other.state = panel.state
    assert other.state == panel.state and plain(other.figure) == plain(panel.figure)
    for one in (panel, other):
        one.close()


# -- controls -----------------------------------------------------------------------------------------------------


def test_controls_set_the_state_and_follow_it(wave):
    slider, entry = find(wave, "pqlab-bits"), find(wave, "pqlab-bits-entry")
    slider.value = 7
    assert wave.bits == entry.value == 7 and wave.figure.layout.title.text == "7 bits"
    entry.value = 3
    assert wave.bits == slider.value == 3
    find(wave, "pqlab-shape").value = "cos"
    assert wave.shape == "cos"
    wave.shape = "sin"
    assert find(wave, "pqlab-shape").value == "sin"


def test_a_number_beside_the_slider_may_be_off_its_grid(wave):
    """The slider shows the nearest it can; the state keeps what was typed."""
    find(wave, "pqlab-bits-entry").value = 12
    assert (wave.bits, find(wave, "pqlab-bits").value) == (12, 9)
    find(wave, "pqlab-bits-entry").value = 6
    assert (wave.bits, find(wave, "pqlab-bits").value) == (6, 5)


def test_number_over_values_shows_the_nearest():
    panel = page_settings()
    panel.context = 5000
    assert find(panel, "pqlab-context").value == 4096 and find(panel, "pqlab-context-entry").value == 5000
    find(panel, "pqlab-context").value = 8192
    assert panel.context == 8192
    panel.close()


# -- errors -------------------------------------------------------------------------------------------------------


def test_an_error_is_shown_and_nothing_is_changed(wave):
    entry, slider = find(wave, "pqlab-bits-entry"), find(wave, "pqlab-bits")
    entry.value = 99
    assert isinstance(wave.error, ConfigError)
    assert 'role="status"' in wave.status and "⚠ bits = 99 is too much" in wave.status
    assert wave.figure.layout.title.text == "4 bits" and wave.state == {"bits": 4, "shape": "sin"}
    assert (entry.value, slider.value) == (4, 5), "controls show what is in force; 5 is the nearest on the grid"
    find(wave, "pqlab-bits-entry").value = 2
    assert wave.error is None and "too much" not in wave.status
    assert wave.figure.layout.title.text == "2 bits"


def test_a_state_that_cannot_be_drawn_at_first_is_no_dead_end():
    panel = Wave(bits=50)
    panel.widget  # noqa: B018  built
    assert isinstance(panel.error, ConfigError) and "too much" in panel.status
    panel.bits = 3
    assert panel.error is None and panel.figure.layout.title.text == "3 bits"
    assert panel.view._figure["data"][0]["type"] == "scatter"
    panel.close()


@pytest.mark.parametrize("built", [False, True])
def test_a_bad_value_changes_nothing_however_it_is_set(wave, built):
    if built:
        wave.widget  # noqa: B018
    wave.set(shape="cos", bits=99)
    assert "99 is too much" in wave.status and wave.state == {"bits": 4, "shape": "sin"}
    assert wave.frame().y.iloc[0] == np.round(np.sin(-3) * 16) / 16, "the table is that of the figure"
    wave.set(shape="cos")
    assert wave.error is None and wave.state == {"bits": 4, "shape": "cos"}
    wave.bits = 77
    assert "77 is too much" in wave.status and wave.state == {"bits": 4, "shape": "cos"}
    wave.state = {"bits": 66, "shape": "sin"}
    assert "66 is too much" in wave.status and wave.state == {"bits": 4, "shape": "cos"}


def test_a_refused_entry_is_sent_back_to_the_browser(wave, monkeypatch):
    entry, sent = find(wave, "pqlab-bits-entry"), []
    monkeypatch.setattr(entry, "_send", lambda message, buffers=None: sent.append(message))
    entry.set_state({"value": 99})
    assert [message["state"]["value"] for message in sent if message["method"] == "update"] == [4]


def test_a_change_that_brings_another_along_is_refused_whole():
    class Linked(Wave):
        @traitlets.observe("shape")
        def _follow_shape(self, _):
            self.bits = 90 if self.shape == "cos" else 2

    panel = Linked()
    panel.widget  # noqa: B018  built
    panel.shape = "cos"
    assert "bits = 90 is too much" in panel.status and panel.error is not None
    assert panel.state == {"bits": 4, "shape": "sin"} and panel.figure.layout.title.text == "4 bits"
    panel.close()


def test_what_was_asked_for_wins_over_what_would_fit():
    """Alone, another page size moves a slot that is outside of it; a slot that was asked for is refused in words."""
    panel = memory_layout(page_size=64, slot=60)
    panel.set(page_size=32, slot=40)
    assert "slot = 40 is out of range (0 to 31)" in panel.status and (panel.page_size, panel.slot) == (64, 60)
    panel.set(page_size=32)
    assert (panel.page_size, panel.slot) == (32, 31) and panel.error is None
    panel.close()


def test_errors_are_escaped(wave):
    with wave.guarded():
        raise ValueError("<img src=x>")
    assert "<img" not in wave.status and "&lt;img" in wave.status


def test_errors_of_buttons_are_shown(wave):
    def fail() -> None:
        raise RuntimeError("no such thing")

    button = controls.button(wave, "go", fail)
    button.click()
    assert "⚠ no such thing" in wave.status


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("that is too much"), "that is too much"), (KeyError("bits"), "KeyError: &#x27;bits&#x27;")]
    + [(StopIteration(), "StopIteration: ")],
)
def test_an_error_is_said_in_its_words_alone_where_it_has_some(wave, error, said):
    with wave.guarded():
        raise error
    assert f"⚠ {said}<" in wave.status and wave.error is error


# -- one figure, changed in place ---------------------------------------------------------------------------------


def test_only_what_changed_is_sent(wave, monkeypatch):
    sent = []
    view = wave.view
    monkeypatch.setattr(view, "send", lambda message, buffers=None: sent.append(message))
    wave.bits = 1
    wave.bits = 1
    assert len(sent) == 1 and sent[0]["kind"] == "patch"
    assert set(sent[0]["traces"]["0"]) == {"y"} and sent[0]["layout"] == {"title": {"text": "1 bits"}}
    assert wave.view is view, "one view for the panel's life"
    assert view._figure == plain(wave.figure), "a page that opens later gets the whole present figure"


def test_patch_turns_one_figure_into_the_other():
    one, other = (plain(Wave(bits=bits, shape=shape).draw()) for bits, shape in ((2, "sin"), (6, "cos")))
    other["layout"]["height"] = 300
    other["data"][0].pop("x")
    patch = changes(one, other)
    for target, found in ((one["data"][0], patch["traces"]["0"]), (one["layout"], patch["layout"])):
        target.update(found)
        for key in [key for key, value in target.items() if value is None]:
            del target[key]
    assert one == other


def test_other_traces_are_sent_whole():
    bars = plain(go.Figure(go.Bar(x=[1], y=[2])))
    assert changes(bars, plain(go.Figure(go.Scatter(x=[1], y=[2])))) is None
    assert changes(bars, bars) == {"traces": {}, "layout": {}}


def test_plotlyjs_comes_with_the_first_figure_and_when_asked_for(monkeypatch):
    sent = []
    monkeypatch.setattr(FigureView, "send", lambda self, message, buffers=None: sent.append((message, buffers)))
    monkeypatch.setattr(FigureView, "_sent", False)
    panels = Wave(), Wave()
    views = [panel.view for panel in panels]
    assert len(sent) == 1, "a busy kernel could not answer a page that asks: the first figure brings it along"
    views[1]._answer(None, {"kind": "plotly.js"}, [])
    assert len(sent) == 2
    for message, (code,) in sent:
        assert message == {"kind": "plotly.js"} and b"plotly.js v" in code[:100]
    for panel in panels:
        panel.close()


def test_clicks_reach_the_panel(wave, monkeypatch):
    points = []
    monkeypatch.setattr(wave, "click", points.append)
    wave.view._answer(None, {"kind": "click", "point": {"trace": 0, "x": 1.5}}, [])
    assert points == [{"trace": 0, "x": 1.5}]


# -- work in the background ---------------------------------------------------------------------------------------


def test_latest_wins():
    latest, begun, go_on, ran, shown = Latest(), threading.Event(), threading.Event(), [], []

    def work(number: int):
        def run() -> int:
            ran.append(number)
            begun.set()
            assert go_on.wait(10)
            return number

        return run

    latest.submit(work(0), lambda result, error: shown.append(result))
    assert begun.wait(10)
    for number in range(1, 6):
        latest.submit(work(number), lambda result, error: shown.append(result))
    go_on.set()
    assert latest.wait(10)
    assert ran == [0, 5], "requests that did not begin are replaced"
    assert shown == [5], "only the newest result is shown"


def test_background_work_is_marked_and_its_errors_are_shown(wave):
    go_on, shown = threading.Event(), []
    wave.background(lambda: go_on.wait(10) and "done", shown.append, busy="measuring")
    assert "measuring" in wave.status and "pqlab-busy" in wave.status
    go_on.set()
    assert wave.wait(10) and shown == ["done"] and "measuring" not in wave.status

    def fail() -> None:
        raise MemoryError("no room")

    wave.background(fail, shown.append, busy="measuring")
    assert wave.wait(10) and "⚠ no room" in wave.status and shown == ["done"]


def test_results_arrive_in_the_event_loop_of_a_kernel(wave):
    import asyncio

    async def cell() -> list[threading.Thread]:
        where = []
        wave.background(lambda: 1, lambda result: where.append(threading.current_thread()), busy="working")
        for _ in range(200):
            if where:
                break
            await asyncio.sleep(0.02)
        return where

    assert asyncio.run(cell()) == [threading.current_thread()]


# -- life ---------------------------------------------------------------------------------------------------------


def test_close_removes_every_widget_and_may_be_repeated():
    panel = Wave()
    everything = _tree(panel.widget)
    assert len(everything) > 6
    panel.close()
    panel.close()
    assert all(widget.comm is None for widget in everything)
    panel.bits = 5  # nothing listens any more
    assert panel.error is None


def test_display_is_a_widget_or_static_html(wave, monkeypatch):
    bundle = wave._repr_mimebundle_(include=None, exclude=None)
    assert "application/vnd.jupyter.widget-view+json" in (bundle[0] if isinstance(bundle, tuple) else bundle)
    monkeypatch.setenv("PQLAB_PANELS", "static")
    monkeypatch.setattr(Panel, "_static", False)
    static = [wave._repr_mimebundle_() for _ in range(2)]
    assert all(set(shown) == {"text/plain", "text/html"} and "Plotly.react" in shown["text/html"] for shown in static)
    brought = ["plotly.js v" in shown["text/html"] for shown in static]
    assert brought == [True, False], "one copy of plotly.js in a page"


def test_html_file_is_self_contained_and_leaves_the_panel_alone(wave, tmp_path):
    path = wave.to_html(tmp_path / "wave.html")
    text = path.read_text(encoding="utf-8")
    assert "plotly.js v" in text and not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    data = json.loads(re.search(r"\{frames, templates\} = (\{.*\});\n", text).group(1).replace("<\\/", "</"))
    assert [frame["label"] for frame in data["frames"]] == ["1", "3", "4", "5"], "the present value is among them"
    assert [frame["layout"]["title"]["text"] for frame in data["frames"]][2] == "4 bits"
    assert set(data["templates"]) == {"light", "dark"}
    assert "<table" in data["frames"][0]["table"]
    assert wave.state == {"bits": 4, "shape": "sin"}
    assert "<output>" not in wave.to_html(tmp_path / "still.html", sweep="").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "sweep", "there"),
    [
        (Wave, "volume", "bits"),
        (Wave, "shape", "bits"),
        (page_settings, "num_sinks", "page_size, residual_length, context"),
        (memory_layout, "page", "slot, subspace, head"),
    ],
)
def test_a_sweep_without_values_names_those_that_have_some(make, sweep, there, tmp_path):
    panel = make()
    message = f"sweep = '{sweep}' has no values in {type(panel).__name__}; set one of {there}"
    with pytest.raises(ValueError, match=message):
        panel.to_html(tmp_path / "panel.html", sweep=sweep)
    panel.close()


@pytest.mark.parametrize(("wrong", "sweep"), [({"page_size": 40}, "context"), ({"M": 48}, "model")])
def test_a_sweep_that_fails_leaves_the_panel_alone(wrong, sweep, tmp_path):
    panel = page_settings(ModelShape(4, 6, 3, 96, "mine"), **wrong)
    assert panel.widget is not None
    before, status = panel.state, panel.status
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
        panel.to_html(tmp_path / "panel.html", sweep=sweep)
    assert panel.state == before and panel.status == status
    assert find(panel, f"pqlab-{sweep}").value == before[sweep]
    panel.close()


# -- page settings ------------------------------------------------------------------------------------------------


def test_settings_panel_moves_with_the_page_size():
    panel = page_settings(size_pool=False, max_pages=200)
    before = panel.frame().set_index("quantity").value["capacity of the pool"]
    find(panel, "pqlab-page_size").value = 128
    after = panel.frame().set_index("quantity").value["capacity of the pool"]
    assert (before, after) == (200 * 64, 200 * 128) and panel.error is None
    assert f"{after:,.0f} tokens" in find(panel, "pqlab-numbers").value
    panel.close()


def test_settings_panel_says_what_is_out_of_range_and_why():
    panel = page_settings()
    ranges = find(panel, "pqlab-ranges")
    assert "✗" not in ranges.value
    find(panel, "pqlab-nbits-entry").value = 3
    assert "3 is outside the report&#x27;s range (4 to 8); the nearest good value is 4" in ranges.value
    assert panel.error is None, "the library can do it, the report does not"
    find(panel, "pqlab-page_size-entry").value = 100
    assert isinstance(panel.error, ConfigError)
    assert "100 is out of range (16 to 512, a multiple of 16); the nearest good value is 96" in panel.status
    assert panel.page_size == find(panel, "pqlab-page_size-entry").value == 64
    panel.close()


def headline(panel: Panel) -> str:
    return panel.figure.layout.title.text.replace("<b>", "").replace("</b>", "")


@pytest.mark.parametrize("context", [1, 100, 400, 8192])
def test_settings_panel_says_larger_where_it_is_larger(context):
    panel = page_settings(context=context)
    times = panel.cost.stored_bytes / panel.cost.baseline_bytes
    said, word = re.search(r"([\d.,]+)× (smaller|larger) than exact", headline(panel)).groups()
    assert word == ("larger" if times > 1 else "smaller") and (times > 1) == (context < 400)
    assert float(said.replace(",", "")) == pytest.approx(max(times, 1 / times), rel=5e-3) and float(said) >= 1
    bits = re.search(r"coded, (\S+) with", headline(panel)).group(1)
    assert float(bits.replace(",", "")) == pytest.approx(panel.cost.bits_per_element, rel=5e-3)
    assert not re.search(r"\de[+-]\d", headline(panel) + " ".join(panel.frame().shown)), "plain digits"
    panel.set(context=1, residual_length=10**6)
    assert panel.error is None and not re.search(r"\de[+-]\d", " ".join(panel.frame().shown))
    panel.close()


def test_settings_panel_says_in_words_that_the_pool_is_too_small():
    panel = page_settings(size_pool=False, max_pages=100)
    assert panel.widget is not None
    assert "pqlab-warning" in panel.status and panel.error is None
    said = "PQC001: context × batch takes 125 pages, and the pool has 100. Raise max pages to 125"
    assert said in panel.status
    find(panel, "pqlab-page_size-entry").value = 100
    assert "100 is out of range" in panel.status and "PQC001" not in panel.status
    find(panel, "pqlab-page_size-entry").value = 32
    assert "takes 251 pages" in panel.status and panel.error is None, "the warning is back after an error"
    most = int(re.search(r"context to at most ([\d,]+)", panel.status).group(1).replace(",", ""))
    panel.context = most + 1
    assert "PQC001" in panel.status
    panel.context = most
    assert panel.cost.pages_missing == 0 and "PQC001" not in panel.status and "⚠" not in panel.status
    panel.close()


def test_max_pages_are_in_force_once_they_are_set():
    panel = page_settings()
    sized, slider = find(panel, "pqlab-size_pool"), find(panel, "pqlab-max_pages")
    assert panel.size_pool and sized.value and panel.cost.max_pages == 125
    slider.value = 2000
    assert not panel.size_pool and not sized.value and panel.cost.max_pages == 2000
    sized.value = True
    assert panel.size_pool and panel.max_pages == slider.value == 2000 and panel.cost.max_pages == 125
    find(panel, "pqlab-max_pages-entry").value = 0
    assert panel.error is not None and (panel.size_pool, panel.max_pages) == (True, 2000), "refused as a whole"
    find(panel, "pqlab-max_pages-entry").value = 130
    assert not panel.size_pool and panel.cost.max_pages == 130 and panel.error is None
    panel.state = {"max_pages": 500, "size_pool": True}
    assert panel.size_pool and panel.max_pages == 500, "what was asked for wins"
    panel.close()
    assert page_settings(max_pages=500).cost.max_pages == 500
    assert page_settings(**panel.state).state == panel.state
    wide = page_settings(max_pages=500, size_pool=True)
    assert wide.size_pool and wide.max_pages == 500


def test_presets_set_everything_they_name():
    panel = page_settings(preset="scenario:batch", model="Llama-3.1-8B")
    assert panel.preset == "scenario:batch"
    assert (panel.page_size, panel.residual_length, panel.max_pages, panel.M, panel.size_pool) == (
        32,
        64,
        1000,
        32,
        False,
    )
    assert find(panel, "pqlab-preset").value == "scenario:batch"
    panel.page_size = 64
    assert panel.preset == "" and find(panel, "pqlab-preset").value == ""
    find(panel, "pqlab-preset").value = "memory:16-32GB"
    assert panel.page_size == 64 and panel.preset == "memory:16-32GB", "equal presets: the chosen one is named"
    panel.close()


def test_M_is_half_the_head_size_until_one_is_chosen():
    panel = page_settings(ModelShape(4, 6, 3, 96, "mine"))
    entry, left = find(panel, "pqlab-M-entry"), find(panel, "pqlab-M-default")
    assert panel.model == "mine" and panel.M is None and panel.cost.token_bits == 4
    assert (entry.value, left.value) == (48, True), "own shapes come first"
    panel.model = "Llama-3.1-8B"
    assert (entry.value, find(panel, "pqlab-M").value, panel.in_force("M")) == (64, 64, 64)
    entry.value = 32
    assert (panel.M, left.value, panel.cost.token_bits) == (32, False, 2)
    for model in ("SmolLM2-135M", "Llama-3.1-8B"):  # d/2 is 32 and 64
        panel.model = model
        assert panel.M == entry.value == 32, "an M that was chosen stays, also where it is d/2"
    left.value = True
    assert panel.M is None and entry.value == 64 and panel.cost.token_bits == 4
    left.value = False
    assert panel.M == 64
    with pytest.raises(traitlets.TraitError, match="there are mine"):
        panel.model = "GPT-9"
    panel.close()


def test_every_step_of_the_slider_of_M_divides_the_head_size():
    """Arrow keys go from one to the next: none of them may be refused."""
    panel = page_settings(ModelShape(4, 6, 3, 96, "mine"))
    slider = find(panel, "pqlab-M")
    for model, good in (("mine", (16, 24, 32, 48, 96)), ("SmolLM2-135M", (16, 32, 64)), ("mine", (16, 24, 32, 48, 96))):
        panel.set(model=model, M=None)
        assert slider.options == good and slider.value == panel.in_force("M") and panel.M is None
        for m in good:
            slider.value = m
            assert panel.M == m and panel.error is None
    find(panel, "pqlab-M-entry").value = 50
    assert "M = 50 does not divide the head size 96; the nearest M that does is 48" in panel.status
    assert panel.M == slider.value == 96
    panel.set(model="SmolLM2-135M")
    assert panel.error is not None and panel.model == "mine" and slider.options == good, "96 is no M of heads of 64"
    panel.close()


def test_presets_leave_M_to_the_model_where_the_report_does():
    panel = page_settings(preset="scenario:memory-saving")
    chooser = find(panel, "pqlab-preset")
    for model in ("Llama-3.1-8B", "SmolLM2-135M"):
        panel.model = model
        assert panel.preset == chooser.value == "scenario:memory-saving" and panel.cost.token_bits == 4
    panel.M = 32
    assert panel.preset == chooser.value == "scenario:memory-saving", "it is the preset's M of this model"
    chooser.value = ""  # "your own" is what settings are, not what they become
    assert chooser.value == "scenario:memory-saving"
    panel.M = 16
    assert panel.preset == chooser.value == ""
    panel.model = "Llama-3.1-8B"
    with pytest.raises(ConfigError, match="M = 64 does not divide the head size 96"):
        page_settings(ModelShape(4, 6, 3, 96, "mine"), preset="scenario:long-documents")
    panel.close()


@pytest.mark.parametrize("sweep", ["model", "M", "page_size"])
def test_settings_file_is_the_panel(sweep, tmp_path):
    panel = page_settings(context=4096)
    assert_file_is_panel(panel, sweep, tmp_path / "settings.html")
    panel.close()


# -- memory layout ------------------------------------------------------------------------------------------------


def test_layout_panel_says_that_codes_are_random():
    panel = memory_layout(pattern="token")
    assert "random codes" in panel.figure.layout.title.text
    panel.state = {"page_size": 32, "slot": 20}
    assert find(panel, "pqlab-slot").max == 31
    panel.page_size = 16
    assert panel.slot == 15, "a slot stays inside the page"
    panel.head = 2
    panel.num_heads = 2
    assert panel.head == find(panel, "pqlab-head").max == 1 and panel.error is None
    panel.set(page_size=0)
    assert "page_size must be a positive multiple of 16" in panel.status and panel.page_size == 16
    panel.close()


def test_layout_panel_begins_with_the_read_of_decode():
    panel = memory_layout()
    assert "(decode)" in find(panel, "pqlab-pattern").options[0][0] and find(panel, "pqlab-pattern").value == "tile"
    share = panel.frame().set_index("order")
    assert (share.wanted_bytes == 16 * 32).all(), "16 tokens of 32 subspaces"
    panel.close()


@pytest.mark.parametrize("pattern", ["tile", "token", "subspace"])
def test_layout_panel_disables_the_control_that_the_read_does_not_use(pattern, tmp_path):
    """The one that is left, which is also the slider of a file, shows something else at every step."""
    panel = memory_layout(num_subspaces=4, page_size=48)
    find(panel, "pqlab-pattern").value = pattern
    acts = {name: not find(panel, f"pqlab-{name}").disabled for name in ("slot", "subspace")}
    assert acts == {name: not find(panel, f"pqlab-{name}-entry").disabled for name in acts}
    assert acts == {name: name == panel.sweep for name in acts}
    before, (other,) = plain(panel.figure), (name for name in acts if not acts[name])
    panel.set(**{other: 2})
    assert plain(panel.figure) == before and panel.error is None
    slider = find(panel, f"pqlab-{panel.sweep}")
    pictures = []
    for value in range(slider.min, slider.max + 1, slider.step):
        slider.value = value
        assert getattr(panel, panel.sweep) == slider.value == value and panel.error is None
        pictures.append(json.dumps(plain(panel.figure)))
    assert len(set(pictures)) == len(pictures) == {"tile": 3, "token": 48, "subspace": 4}[pattern]
    shown = [frame["label"] for frame in frames_of(panel.to_html(tmp_path / "layout.html"))]
    assert shown == [str(value) for value in range(0, slider.max + 1, slider.step)]
    panel.close()


def test_layout_panel_shows_codes_of_a_cache(tiny):
    cache, _ = tiny
    panel = memory_layout(cache, side="V", head=2)
    stored = cache.quantized_layers[0].codes(0)[1]
    assert np.array_equal(panel.codes, stored[2, :16].numpy())
    assert panel.figure.layout.title.text == f"codes of the cache: layer 0, V, page {cache.table.pages(0)[0]}, head 2"
    find(panel, "pqlab-page-entry").value = 777
    assert "page = 777 is out of range (0 to 59)" in panel.status
    panel.close()


SHAPES_OF_PLAN = {(0, "K"): (16, 8), (0, "V"): (8, 4), (1, "K"): (32, 8), (1, "V"): (16, 8)}
"""(layer, side) -> (M, nbits)"""


@pytest.fixture(scope="module")
def planned():
    """A cache whose layers and sides have codebooks of their own, as those of a plan do."""
    model = make_tiny_model("llama", head_dim=32)
    spec = {layer: tuple(PQConfig(*SHAPES_OF_PLAN[layer, side]) for side in "KV") for layer in (0, 1)}
    settings = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=9)
    cache = PagedPQCache(model, Codebooks.random(model, pq=spec), settings)
    model.set_attn_implementation("pqlab")
    ids = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(0))
    model(ids, **cache_argument(model, cache))
    return cache


def shows_its_page(panel: Panel, cache: PagedPQCache) -> bool:
    """Whether every byte of the tiled picture lies where the pool has it, with the code that the cache has there."""
    side = "KV".index(panel.side)
    layout = cache.pool.layout.layers[panel.layer][side]
    codes = cache.page_codes(panel.layer, side, panel.page, panel.head).numpy()
    drawn = next(trace for trace in panel.figure.data if trace.name == "tiled (pqlab)")
    rows = np.asarray(drawn.customdata).reshape(-1, 6)[: layout.head_bytes]
    lies = {}  # the first code of every byte
    for slot, m in itertools.product(range(layout.page_size), range(layout.num_subspaces)):
        byte, bit = layout.address(slot, panel.head, m)
        lies[byte] = min(lies.get(byte, (8,)), (bit, slot, panel.head, m))
    places = [lies[int(byte)][1:] for byte in rows[:, 0]]
    return (
        rows[0, 0] == panel.head * layout.head_bytes
        and [(slot, head, m) for slot, head, m in rows[:, 1:4].tolist()] == places
        and rows[:, 4].tolist() == [codes[slot, m] for slot, _, m in places]
    )


def test_layout_panel_follows_the_codebooks_of_a_plan(planned):
    panel = memory_layout(planned, subspace=12, head=1)
    assert panel.widget is not None
    for layer, side in [(1, "K"), (0, "V"), (1, "V"), (0, "K"), (1, "K")]:
        panel.set(layer=layer, side=side)
        assert (panel.layer, panel.side, panel.error) == (layer, side, None)
        assert (panel.num_subspaces, panel.nbits) == SHAPES_OF_PLAN[layer, side]
        assert panel.codes.shape == (16, panel.num_subspaces) and shows_its_page(panel, planned)
        assert find(panel, "pqlab-subspace").max == panel.num_subspaces - 1
    assert panel.subspace == 7, "it stays inside the fewest that were seen"
    panel.side = "V"
    panel.layer = 0
    assert panel.num_subspaces == 8 and panel.error is None and shows_its_page(panel, planned)
    other = memory_layout(planned, layer=1, subspace=5)
    other.state = panel.state
    assert other.state == panel.state and shows_its_page(other, planned)
    for one in (panel, other):
        one.close()


@pytest.mark.parametrize(("layer", "side"), SHAPES_OF_PLAN)
def test_layout_panel_begins_with_the_shape_of_its_page(planned, layer, side):
    m, nbits = SHAPES_OF_PLAN[layer, side]
    panel = memory_layout(planned, layer=layer, side=side, head=2, subspace=m - 1, slot=15, num_subspaces=m)
    wanted = {"page_size": 16, "num_subspaces": m, "nbits": nbits, "head": 2, "subspace": m - 1, "slot": 15}
    assert wanted.items() <= panel.state.items() and shows_its_page(panel, planned)
    panel.close()


def test_layout_panel_refuses_another_shape_than_the_caches(planned):
    panel = memory_layout(planned)
    for wrong, message in (
        ({"num_subspaces": 32}, "num_subspaces = 32, but layer 0, K of the cache has 16; choose by layer and side"),
        ({"layer": 1, "num_subspaces": 16}, "num_subspaces = 16, but layer 1, K of the cache has 32"),
        ({"layer": 1, "nbits": 7}, "nbits = 7, but layer 1, K of the cache has 8"),
        ({"page_size": 32, "layer": 5}, "layer 5 is not quantized in this cache; quantized are 0, 1"),
    ):
        panel.set(**wrong)
        assert message in panel.status
        assert (panel.layer, panel.num_subspaces, panel.nbits) == (0, 16, 8) and shows_its_page(panel, planned)
        with pytest.raises(traitlets.TraitError, match=message):
            memory_layout(planned, **wrong)
    panel.close()


@pytest.mark.parametrize("sweep", ["layer", "side", "head"])
def test_layout_file_is_the_panel(planned, sweep, tmp_path):
    panel = memory_layout(planned, layer=1, subspace=30)
    assert_file_is_panel(panel, sweep, tmp_path / "layout.html")
    panel.close()


def test_layout_panel_measures_on_a_button(monkeypatch):
    from pqlab.benchmarks import layout_bench

    monkeypatch.setattr(
        layout_bench.measure_orders,
        "__kwdefaults__",
        {
            **layout_bench.measure_orders.__kwdefaults__,
            "num_bytes": 2**18,
            "repeats": 1,
        },
    )  # a smaller pool, as a user could ask for
    panel = memory_layout()
    assert panel.frame().gb_per_s.isna().all()
    button = next(w for w in _tree(panel.widget) if isinstance(w, widgets.Button))
    button.click()
    assert "measuring" in panel.status
    assert panel.wait(30) and panel.error is None
    assert (panel.frame().gb_per_s > 0).all() and panel.measured.device.iloc[0] in panel.status
    panel.pattern = "token"
    assert panel.measured is None, "a measurement belongs to its pattern"
    panel.close()


# -- decode stepper -----------------------------------------------------------------------------------------------


def test_stepper_steps_by_slider_button_and_click(tiny):
    _, trace = tiny
    panel = decode_stepper(trace, layer=1)
    find(panel, "pqlab-step").value = 9
    assert "step 9 of 40" in panel.figure.layout.annotations[0].text
    find(panel, "pqlab-step-on").click()
    find(panel, "pqlab-step-on").click()
    find(panel, "pqlab-step-back").click()
    assert panel.step == 10
    panel.view._answer(None, {"kind": "click", "point": {"trace": 0, "x": 33, "y": 0.1}}, [])
    assert panel.step == 33
    errors = next(i for i, found in enumerate(panel.figure.data) if found.name == "errors")
    panel.view._answer(None, {"kind": "click", "point": {"trace": errors, "x": 5, "y": "0"}}, [])
    assert (panel.layer, panel.head) == (0, 5) and panel.error is None
    assert trace.steps.token[33] in find(panel, "pqlab-text").value
    panel.close()


def test_stepper_text_and_pages_follow_the_step(tiny):
    _, trace = tiny
    panel = decode_stepper(trace)
    pages = find(panel, "pqlab-pages")
    panel.step = 1
    few = pages.value.count("<tr>")
    panel.step = 40
    assert pages.value.count("<tr>") > few
    assert panel.frame().token_id.tolist() and panel.error is None
    for bad in (99, -1):
        panel.step = bad
        assert f"step = {bad} is out of range (0 to 40)" in panel.status and panel.step == 40
    panel.close()


def test_stepper_says_which_layers_were_captured(tiny):
    _, trace = tiny
    panel = decode_stepper(trace)
    find(panel, "pqlab-layer-entry").value = 30
    assert "⚠ layer 30 was not captured; captured are 0, 1<" in panel.status
    assert panel.layer in trace.layers and panel.error is not None
    panel.close()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [(range(30), "0 to 29"), ([0, 1], "0, 1"), ([0, 1, 2, 5, 8, 9], "0 to 2, 5, 8, 9"), ([7], "7"), ([], "")],
)
def test_numbers_are_said_in_runs(numbers, said):
    assert in_runs(numbers) == said


def test_stepper_opens_a_file(tiny, tmp_path):
    _, trace = tiny
    panel = decode_stepper(trace.save(tmp_path / "trace.safetensors"), step=5, kind="end to end")
    assert "step 5 of 40" in panel.figure.layout.annotations[0].text
    text = panel.to_html(tmp_path / "stepper.html", sweep="head").read_text(encoding="utf-8")
    assert "page 0: codes" in text, "the text goes into the file too"
    panel.close()
