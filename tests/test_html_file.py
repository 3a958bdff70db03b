"""A panel in a file: opened in a browser without any network, its slider moves and its table opens."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_lab import ARTIFACTS, find_chromium

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect


@pytest.mark.browser
def test_a_panel_in_a_file_needs_neither_server_nor_kernel(tmp_path: Path):
    from pqlab.panels import page_settings

    page_settings(model="Llama-3.1-8B").to_html(tmp_path / "settings.html")
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(offline=True, color_scheme="dark", viewport={"width": 1100, "height": 900})
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "settings.html").as_uri())
        expect(page.locator(".annotation-text", has_text="token slots, 125 pages each")).to_be_visible()
        page.locator("input[type=range]").focus()
        page.keyboard.press("End")
        expect(page.locator("output")).to_have_text("512")
        expect(page.locator(".annotation-text", has_text="token slots, 15 pages each")).to_be_visible()
        page.get_by_text("Table", exact=True).click()
        expect(page.locator("td", has_text="times smaller than exact")).to_be_visible()
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "file-dark.png")
        browser.close()
    assert [url for url in asked if not url.startswith("file:")] == []
