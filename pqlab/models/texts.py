"""Public-domain novels that travel with the package, and texts of one's own."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A shipped text; `num_chars` is its length in characters."""

    name: str
    title: str
    author: str
    num_chars: int


_SHIPPED = {
    text.name: text
    for text in (
        Text("pride", "Pride and Prejudice", "Jane Austen", 684_584),
        Text("emma", "Emma", "Jane Austen", 882_851),
        Text("moby-dick", "Moby Dick; or, The Whale", "Herman Melville", 1_213_025),
    )
}


def texts() -> dict[str, Text]:
    """The shipped texts by name."""
    return dict(_SHIPPED)


def load_text(name: str | Path = "pride") -> str:
    """A shipped text by its name (see `texts`), or a UTF-8 text file by its path (.xz files are unpacked).

    Raises:
        FileNotFoundError: neither a shipped text nor a file.
    """
    if name in _SHIPPED:
        packed = files("pqlab").joinpath("data", f"{name}.txt.xz").read_bytes()
        return lzma.decompress(packed).decode("utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; the shipped texts are {', '.join(_SHIPPED)}")
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes()).decode("utf-8")
    return path.read_text(encoding="utf-8")
