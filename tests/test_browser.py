"""A person's session: JupyterLab in Chromium runs `00_explore`, drags, steps, measures; nothing leaves the machine.

Screenshots of every panel, light and dark, wide and narrow, are kept in artifacts/.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser_lab import REPO, Lab, jupyterlab

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

NOTEBOOK = REPO / "notebooks/00_explore.ipynb"
PANELS = {  # name: (its title, how its cell begins)
    "settings": ("Page settings", "page_settings("),
    "allocation": ("Page allocation", "page_allocation("),
    "stepper": ("Decode stepper", "decode_stepper("),
    "layout": ("Memory layout", "memory_layout("),
}
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
SECONDS = 1000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The notebook after "run all"; the tests of this module go on with the same page, one after the other."""
    folder = tmp_path_factory.mktemp("lab")
    with jupyterlab(folder, [NOTEBOOK], height=1500) as lab:
        lab.open("00_explore.ipynb")
        begun = time.monotonic()
        lab.command("notebook:run-all-cells")
        lab.page.locator(".js-plotly-plot[data-draws]").first.wait_for(timeout=120 * SECONDS)
        print(f"first figure after {time.monotonic() - begun:.1f} s")
        lab.wait_until_idle(600)
        print(f"whole notebook after {time.monotonic() - begun:.1f} s")
        yield lab


def panel(lab: Lab, name: str) -> Any:
    """The panel, in view and drawn."""
    title, code = PANELS[name]
    lab.scroll_to_cell(next(i for i, source in enumerate(CELLS) if source.startswith(code)))
    found = lab.page.locator(".pqlab-panel").filter(has=lab.page.locator("b", has_text=re.compile(f"^{title}$")))
    found.locator(".js-plotly-plot[data-draws]").wait_for(timeout=60 * SECONDS)
    return found


def note(panel: Any, text: str | re.Pattern[str]) -> Any:
    """A title inside a figure."""
    return panel.locator(".annotation-text", has_text=text)


def test_notebook_ran_without_errors(lab: Lab):
    assert lab.errors() == []
    for name in PANELS:
        expect(panel(lab, name)).to_be_visible()
    assert lab.page.locator(".pqlab-error").count() == 0


def test_page_size_follows_the_keyboard(lab: Lab):
    settings = panel(lab, "settings")
    expect(note(settings, "token slots, 125 pages each")).to_be_visible()
    before = settings.locator(".barlayer").first.inner_html()
    settings.locator(".pqlab-page_size .noUi-handle").focus()
    lab.page.keyboard.press("ArrowRight")
    expect(settings.locator(".pqlab-page_size-entry input")).to_have_value("80", timeout=20 * SECONDS)
    expect(note(settings, "token slots, 100 pages each")).to_be_visible(timeout=20 * SECONDS)
    assert settings.locator(".barlayer").first.inner_html() != before, "the bars moved too"


def test_page_size_follows_the_mouse_while_it_is_held(lab: Lab):
    settings = panel(lab, "settings")
    handle = settings.locator(".pqlab-page_size .noUi-handle").bounding_box()
    track = settings.locator(".pqlab-page_size .noUi-base").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    lab.page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    lab.page.mouse.down()
    lab.page.mouse.move(track["x"] + track["width"] / 2, middle, steps=6)
    expect(note(settings, re.compile("token slots, 3[01] pages each"))).to_be_visible(timeout=20 * SECONDS)
    lab.page.mouse.move(track["x"] + 1, middle, steps=6)
    lab.page.mouse.up()
    expect(settings.locator(".pqlab-page_size-entry input")).to_have_value("16", timeout=20 * SECONDS)
    expect(note(settings, re.compile("token slots, 50[0-9] pages each"))).to_be_visible(timeout=20 * SECONDS)


def test_a_number_out_of_range_is_explained_and_taken_back(lab: Lab):
    settings = panel(lab, "settings")
    entry = settings.locator(".pqlab-page_size-entry input")
    before = entry.input_value()
    entry.fill("100")
    entry.press("Enter")
    expect(settings.locator(".pqlab-status")).to_contain_text("nearest good value is 96", timeout=20 * SECONDS)
    expect(entry).to_have_value(before, timeout=20 * SECONDS)
    entry.fill("64")
    entry.press("Enter")
    expect(settings.locator(".pqlab-status")).not_to_contain_text("ConfigError", timeout=20 * SECONDS)
    expect(note(settings, "token slots, 125 pages each")).to_be_visible()


def test_hovering_a_page_shows_its_text(lab: Lab):
    allocation = panel(lab, "allocation")
    box = allocation.locator(".nsewdrag").first.bounding_box()
    shown = allocation.locator(".hoverlayer .hovertext")
    for across in range(2, 40, 3):
        lab.page.mouse.move(box["x"] + box["width"] * across / 100, box["y"] + box["height"] * 0.12)
        lab.page.wait_for_timeout(150)
        if shown.count() and re.search(r"[a-z]{3,} [a-z]{2,}", shown.first.text_content() or ""):
            return
    pytest.fail("no page under the mouse showed a text")


def test_decode_is_stepped_played_dragged_and_clicked(lab: Lab):
    stepper = panel(lab, "stepper")
    title = note(stepper, re.compile(r"^step \d+ of 48"))
    expect(title).to_contain_text("step 1 of 48")
    text = stepper.locator(".pqlab-text").inner_text()
    stepper.locator(".pqlab-step-on").click()
    expect(title).to_contain_text("step 2 of 48", timeout=20 * SECONDS)
    assert stepper.locator(".pqlab-text").inner_text() != text, "the text went on by a token"

    stepper.locator(".pqlab-step .noUi-handle").focus()
    lab.page.keyboard.press("End")
    expect(title).to_contain_text("step 48 of 48", timeout=20 * SECONDS)

    bars = stepper.locator(".barlayer .point path")
    heights = bars.evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
    tall = max(range(5, 40), key=heights.__getitem__)  # one of a pixel would be missed
    bars.nth(tall).click(force=True)
    expect(title).to_contain_text(f"step {tall} of 48", timeout=20 * SECONDS)

    stepper.locator(".pqlab-step-play button").first.click()
    later = "|".join(str(step) for step in range(tall + 2, 49))
    expect(title).to_contain_text(re.compile(f"step ({later}) of 48"), timeout=30 * SECONDS)
    stepper.locator(".pqlab-step-play button").first.click()


def test_another_head_has_another_attention(lab: Lab):
    stepper = panel(lab, "stepper")
    before = stepper.locator(".scatterlayer path.js-line").first.get_attribute("d")
    entry = stepper.locator(".pqlab-head-entry input")
    entry.fill("7")
    entry.press("Enter")
    expect(note(stepper, re.compile("attention of layer 15, head 7, isolated"))).to_be_visible(timeout=20 * SECONDS)
    assert stepper.locator(".scatterlayer path.js-line").first.get_attribute("d") != before
    stepper.locator(".pqlab-kind select").select_option(index=1)
    expect(note(stepper, re.compile("head 7, end to end"))).to_be_visible(timeout=20 * SECONDS)


def test_bandwidth_is_measured_on_a_button(lab: Lab):
    layout = panel(lab, "layout")
    expect(layout.locator(".gtitle")).to_contain_text("codes of the cache: layer 0, K")
    layout.get_by_role("button", name="Measure").click()
    expect(layout.locator(".pqlab-status")).to_contain_text("measured on", timeout=120 * SECONDS)
    assert layout.locator(".barlayer .bartext", has_text=re.compile(r"^\d+\.\d\d$")).count() == 4


@pytest.mark.parametrize("width", [1400, 950])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_panel_follows_theme_and_width(lab: Lab, theme: str, width: int):
    lab.page.set_viewport_size({"width": width, "height": 1500})
    lab.theme(theme)
    for name in PANELS:
        shown = panel(lab, name)
        plot = shown.locator(".js-plotly-plot")
        expect(plot).to_have_attribute("data-theme", theme, timeout=30 * SECONDS)
        lab.page.wait_for_function(
            "p => Math.abs(p.querySelector('.main-svg').clientWidth - p.clientWidth) < 3",
            arg=plot.element_handle(),
            timeout=20 * SECONDS,
        )
        ink = plot.locator(".xtick text, .ytick text, .gtitle").first.evaluate("text => getComputedStyle(text).fill")
        light_text = sum(map(int, re.findall(r"\d+", ink)[:3])) > 3 * 128
        assert light_text == (theme == "dark"), f"{name}: text is {ink} on a {theme} page"
        size = "" if width == 1400 else "-narrow"
        assert lab.shoot(shown, f"{name}-{theme}{size}").stat().st_size > 20_000


def test_panels_come_back_when_the_page_is_loaded_again(lab: Lab):
    """A page without plotly.js asks the kernel for it, and gets the figure as it is now, not as it was first."""
    lab.page.set_viewport_size({"width": 1400, "height": 1500})
    stepper = panel(lab, "stepper")
    entry = stepper.locator(".pqlab-step-entry input")
    entry.fill("31")
    entry.press("Enter")
    expect(note(stepper, "step 31 of 48")).to_be_visible(timeout=20 * SECONDS)
    lab.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    lab.open(NOTEBOOK.name)
    again = panel(lab, "stepper")
    expect(note(again, "step 31 of 48")).to_be_visible(timeout=60 * SECONDS)
    again.locator(".pqlab-step-on").click()
    expect(note(again, "step 32 of 48")).to_be_visible(timeout=20 * SECONDS)


def test_nothing_left_the_machine_and_nothing_failed(lab: Lab):
    """Last of the session: everything above was watched."""
    assert lab.outside == []
    assert lab.faults == []
