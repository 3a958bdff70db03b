"""The cache directory, and how a file or folder comes into it: whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "PQLAB_CACHE"


class CacheDirError(OSError):
    """The cache directory cannot be used; the message names it and the setting that moves it."""


def cache_dir() -> Path:
    """Where models, codebooks and kernels are kept: $PQLAB_CACHE, else the platform's user cache directory / pqlab.

    The directory need not exist yet.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser().resolve()
    from platformdirs import user_cache_path

    return user_cache_path("pqlab", appauthor=False)


def build_once(target: Path, build: Callable[[Path], None], what: str) -> Path:
    """Return `target`, built first if it is missing.

    `build(path)` makes a file or a folder at `path`, beside the target; only when it is complete does it get its name.
    An OS lock lets one process build while others wait for its result. The lock goes with its process, so whatever a
    killed build left lying there is nobody's, and the next build removes it.

    Args:
        target: the file or folder; found complete if it exists at all.
        build: makes it at the path it is given.
        what: its name in messages ("SmolLM2-135M-Instruct").

    Raises:
        CacheDirError: the directory cannot be written.
    """
    if target.exists():
        return target
    with _locked(target, what):
        if not target.exists():
            _build(target, build, what)
    return target


def build_again(target: Path, build: Callable[[Path], None], what: str, is_sound: Callable[[], bool]) -> Path:
    """Return `target`, a file that was found damaged, built anew; it lies there until the new one takes its place.

    Args:
        target, build, what: see `build_once`.
        is_sound: asked under the lock: another process may have built it anew since. Then it stays.
    """
    with _locked(target, what):
        if not (target.exists() and is_sound()):
            _build(target, build, what)
    return target


@contextmanager
def _locked(target: Path, what: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f"{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"pqlab: another process is preparing {what}; waiting for it", flush=True)
            lock.acquire()
    except OSError as error:
        raise _unusable(target.parent, what, error) from error
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], None], what: str) -> None:
    prefix = f"{target.name}.unfinished-"
    for stale in target.parent.glob(f"{prefix}*"):
        remove(stale)
    unfinished = target.parent / f"{prefix}{os.getpid()}{target.suffix}"
    try:
        build(unfinished)
        os.replace(unfinished, target)
    except PermissionError as error:
        raise _unusable(target.parent, what, error) from error
    finally:
        remove(unfinished)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unusable(folder: Path, what: str, error: OSError) -> CacheDirError:
    return CacheDirError(
        f"cannot keep {what} in {folder} ({error.strerror or error}); set {ENVIRONMENT} to a folder that can be written"
    )
