"""One line that says what is being built: in a notebook a display that is updated, in a terminal a line on stderr."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any


class ProgressLine:
    """Shows `<what>: 7 s` once a second until `finish`; shows nothing where nobody looks (pipes, logs, scripts in CI).

    Create it in the thread that imports, so that a notebook puts it under the cell that did.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._done = threading.Event()
        self._lock = threading.Lock()  # the ticker must not write after the last word
        self._handle = _notebook_handle(f"{what} ...")
        self._terminal = self._handle is None and _is_terminal()
        if self._handle is not None or self._terminal:
            threading.Thread(target=self._tick, daemon=True, name="pqlab-progress").start()

    def finish(self, outcome: str) -> None:
        """Replace the line by its last form, e.g. "ready in 8.1 s"."""
        with self._lock:
            if not self._done.is_set():
                self._done.set()
                self._write(f"{self._what}: {outcome}", last=True)

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            with self._lock:
                if not self._done.is_set():
                    self._write(f"{self._what} ... {time.monotonic() - self._start:.0f} s")

    def _write(self, text: str, last: bool = False) -> None:
        try:
            if self._handle is not None:
                self._handle.update(_Text(text))
            elif self._terminal:
                sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
                sys.stderr.flush()
        except Exception:  # a closed stream or kernel must not end a build
            self._handle, self._terminal = None, False


class _Text:
    """Plain text for IPython's display (a str would be shown with quotes)."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _notebook_handle(text: str) -> Any | None:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):  # IPython in a terminal has no kernel
        return None
    return ipython.display.display(_Text(text), display_id=True)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None under pythonw, closed under some test runners
        return False
