"""What a result was measured with: versions, commit, texts, so that a committed number can be measured again."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..models import load_text
from ..models.texts import BETWEEN

PACKAGES = ("pqlab", "torch", "transformers", "numpy", "pandas", "optimum-quanto", "hqq")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, `more` among them; missing ones are left out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the commit that runs, "+changes" behind it when the package differs from it; "" outside of git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=package, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    package = Path(__file__).parents[1]
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+changes" if head and git("status", "--porcelain", "--", ".") else "")
    except FileNotFoundError:  # no git here
        return ""


def text_record(name: str, text: str | Sequence[str] | None = None) -> dict[str, str]:
    """A text's name (of a file, without its folder) and the sha256 of its characters in UTF-8.

    Args:
        text: its characters, where `load_text` does not know it; several texts are one with `BETWEEN` between them.
    """
    text = load_text(name) if text is None else text
    text = text if isinstance(text, str) else BETWEEN.join(text)
    return {"name": Path(name).name, "sha256": sha256(text.encode()).hexdigest()}


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    return sha256(Path(path).read_bytes()).hexdigest()


def today() -> str:
    return datetime.date.today().isoformat()


def device_name(device: str | torch.device = "cpu") -> str:
    """The processor's or the GPU's name as its maker calls it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
