"""Where a Chromium is that the browser test can drive."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome for the browser test: $PQLAB_CHROMIUM, the PATH, then Playwright's own."""
    chosen = os.environ.get("PQLAB_CHROMIUM")
    if chosen:
        return chosen
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    return next(_playwright_browsers(), None)


def _playwright_browsers() -> Iterator[str]:
    """Chromium builds that `playwright install` has left in its folder, newest first."""
    home = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    folders = (
        [Path(home)] if home else [Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright"]
    )
    programs = ("chrome-linux*/chrome", "chrome-linux*/headless_shell", "chrome-mac*/*.app/Contents/MacOS/*")
    for folder in folders:
        builds = [path for path in folder.glob("chromium*-*") if path.name.rpartition("-")[2].isdigit()]
        for build in sorted(builds, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            for program in programs:
                yield from (str(path) for path in build.glob(program))
