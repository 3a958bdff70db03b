"""Latest wins: slow work in one background thread, where a newer request replaces one that has not begun."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

Done = Callable[[Any, BaseException | None], None]


class Latest:
    """Runs the newest of several requests; of those that come while one runs, only the last is run.

    `done(result, error)` is called for the newest request only, in the event loop of the caller where one runs (a
    kernel), else in `wait`, so that widgets are never touched from the background thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._request: tuple[int, Callable[[], Any], Done] | None = None
        self._result: tuple[Any, BaseException | None, Done] | None = None
        self._newest = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Run `work()` soon; an older request that is running is finished, but its result is dropped."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        with self._lock:
            self._newest += 1
            self._loop = loop
            self._request = (self._newest, work, done)
            self._result = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pqlab-panel", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until nothing is under way and deliver the result; False if `timeout` seconds were too short."""
        with self._lock:
            reached = self._lock.wait_for(lambda: self._thread is None, timeout)
        self._deliver()
        return reached

    def cancel(self) -> None:
        """Forget what waits and drop what runs; `done` is not called for it."""
        with self._lock:
            self._newest += 1
            self._request = self._result = None

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._request is None:
                    self._thread = None
                    self._lock.notify_all()
                    return
                number, work, done = self._request
                self._request = None
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:  # noqa: BLE001  handed to `done`, which shows it
                error = caught
            with self._lock:
                if number != self._newest:
                    continue
                self._result = (result, error, done)
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            delivered, self._result = self._result, None
        if delivered is not None:
            result, error, done = delivered
            done(result, error)
