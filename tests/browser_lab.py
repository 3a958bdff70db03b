"""JupyterLab on a folder of its own, driven by Chromium: the helper of the browser tests.

Nothing of the person's Jupyter set-up is read or written, and every request that leaves the machine is recorded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
ARTIFACTS = REPO / "artifacts"

_LOCAL = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:|devtools:")
_READY = """() => {
    const kernel = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel;
    return !!kernel && kernel.connectionStatus === "connected" && kernel.status === "idle";
}"""  # the page says "idle" before a kernel exists, so ask the kernel itself
_CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def find_chromium() -> str | None:
    """Path of a Chromium of this machine; None lets Playwright take its own."""
    named = os.environ.get("PQLAB_CHROMIUM")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    return named or next(filter(None, found), None)


@dataclass
class Lab:
    """An open JupyterLab page; `outside` lists requests that left the machine, `faults` what went wrong in the page."""

    page: Any
    base: str
    outside: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def open(self, notebook: str, timeout: float = 90) -> None:
        """Open a notebook of the folder and wait until its kernel is really there."""
        self.page.goto(f"{self.base}/lab/tree/{notebook}?reset")
        self.page.locator(".jp-NotebookPanel .jp-Notebook").wait_for(timeout=timeout * 1000)
        self.page.wait_for_function(_READY, timeout=timeout * 1000)

    def command(self, name: str, **arguments: Any) -> None:
        """Start a JupyterLab command and do not wait for it: waiting for run-all would block the page."""
        self.page.evaluate("([n, a]) => { void window.jupyterapp.commands.execute(n, a); }", [name, arguments])

    def wait_until_idle(self, timeout: float) -> None:
        """Wait until the kernel has worked off everything that was sent to it."""
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(_READY, timeout=timeout * 1000)

    def scroll_to_cell(self, index: int) -> None:
        """Bring a cell into view; JupyterLab renders those far away only when they come near."""
        self.page.evaluate(
            "i => { void window.jupyterapp.shell.currentWidget.content.scrollToItem(i, 'start'); }", index
        )
        self.page.wait_for_timeout(300)

    def theme(self, name: str) -> None:
        """Switch JupyterLab to its "light" or "dark" theme."""
        self.command("apputils:change-theme", theme=f"JupyterLab {name.capitalize()}")
        self.page.wait_for_function(
            f"() => document.body.dataset.jpThemeLight === '{str(name == 'light').lower()}'", timeout=20_000
        )

    def errors(self) -> list[str]:
        """Texts of the error outputs in the notebook."""
        return self.page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()

    def shoot(self, locator: Any, name: str) -> Path:
        """Screenshot of an element into artifacts/."""
        ARTIFACTS.mkdir(exist_ok=True)
        locator.scroll_into_view_if_needed()
        self.page.wait_for_timeout(400)  # plotly draws in the next frames
        path = ARTIFACTS / f"{name}.png"
        locator.screenshot(path=path)
        return path


@contextmanager
def jupyterlab(
    folder: Path, notebooks: Sequence[Path], width: int = 1400, height: int = 1000, env: dict[str, str] | None = None
) -> Iterator[Lab]:
    """Serve copies of `notebooks` from `folder` and open Chromium beside it; both are gone afterwards."""
    from playwright.sync_api import sync_playwright

    for notebook in notebooks:
        shutil.copy(notebook, folder)
    with _server(folder, env or {}) as base, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(_CHROMIUM_FLAGS))
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        lab = Lab(page, base)
        page.on("request", lambda r: None if _LOCAL.match(r.url) else lab.outside.append((r.resource_type, r.url)))
        page.on("pageerror", lambda error: lab.faults.append(f"page error: {error}"))
        page.on("console", lambda m: lab.faults.append(f"console: {m.text}") if m.type == "error" else None)
        try:
            yield lab
        finally:
            browser.close()


@contextmanager
def _server(folder: Path, env: dict[str, str]) -> Iterator[str]:
    own = folder / ".jupyter"
    news = own / "settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    port = _free_port()
    base = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="),
        *("--ServerApp.disable_check_xsrf=True", "--allow-root", f"--ServerApp.root_dir={folder}"),
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True",
    ]
    paths = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    calm = {
        "OMP_WAIT_POLICY": "PASSIVE"
    }  # kernel, server and browser share few cores: threads that spin stop the others
    isolated = {
        **calm,
        **os.environ,
        **{key: str(own / place) for key, place in places.items()},
        "PYTHONPATH": paths,
        **env,
    }
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=isolated, start_new_session=True)
    try:
        _wait_for(f"{base}/api/status", server, folder / "lab.log")
        yield base
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(15)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, timeout: float = 90) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start within {timeout} s:\n{log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
