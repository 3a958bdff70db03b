"""The C++ compiler that kernels are built with, and how torch's cpp_extension is told. Needs no torch: the doctor, too,
asks which compiler it is."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WINDOWS = sys.platform == "win32"


def compiler_command() -> list[str]:
    """The words of $CXX, which may hold a wrapper or options ("ccache g++"); c++ where it is empty or not set."""
    text = _changes.before("CXX") or ""
    try:
        words = shlex.split(text, posix=not _WINDOWS)
    except ValueError:  # an odd quote: no program is called so, which is what will be said of it
        words = [text]
    return words or ["cl" if _WINDOWS else "c++"]


@contextmanager
def build_environment(folder: Path, scripts: str) -> Iterator[None]:
    """$CXX and $PATH as cpp_extension takes them, as long as anything is being built in this process.

    It takes CXX for the name of one program, and puts a ccache that it finds before it: a command of several words
    becomes a script, and stays as it is. And it calls ninja by name, which is not on the PATH of a virtual environment
    that was not activated.

    Args:
        folder: for the script; programs and libraries there can be run.
        scripts: the folder where this Python's programs lie.
    """
    _changes.enter(folder, scripts)
    try:
        yield
    finally:
        _changes.leave()


class _Changes:
    """To the environment, which all threads share: the first build makes them, the last one takes them back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._builds = 0
        self._before: dict[str, str | None] = {}

    def before(self, name: str) -> str | None:
        """A variable as it is without the changes."""
        with self._lock:
            return self._before[name] if name in self._before else os.environ.get(name)

    def enter(self, folder: Path, scripts: str) -> None:
        with self._lock:
            changes = {} if self._builds else self._wanted(folder, scripts)
            self._builds += 1
            self._before |= {name: os.environ.get(name) for name in changes}
            os.environ.update(changes)

    def leave(self) -> None:
        with self._lock:
            self._builds -= 1
            for name, value in () if self._builds else self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if not self._builds:
                self._before = {}

    def _wanted(self, folder: Path, scripts: str) -> dict[str, str]:
        changes = {}
        if shutil.which("ninja") is None:
            changes["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", "")))
        command = compiler_command()
        if len(command) > 1 and not _WINDOWS:
            changes |= {"CXX": str(_script(folder, command)), "TORCH_NO_COMPILER_WRAPPER": "1"}
        elif "CXX" in os.environ:
            changes["CXX"] = command[0]
        return changes


_changes = _Changes()


def _script(folder: Path, command: list[str]) -> Path:
    """A program that calls the command; it stays there for the next build."""
    text = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
    path = folder / f"c++-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not path.exists():
        draft = folder / f".{path.name}-{os.getpid()}-{threading.get_ident()}"
        draft.write_text(text)
        draft.chmod(0o755)
        os.replace(draft, path)
    return path
