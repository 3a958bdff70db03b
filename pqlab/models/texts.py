"""Texts to calibrate and to measure on: shipped ones, Python's own source code, and files."""

from __future__ import annotations

import lzma
import sysconfig
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True)
class Text:
    """A shipped text; `num_chars` is its length in characters."""

    name: str
    title: str
    author: str
    num_chars: int
    language: str = "English"


_SHIPPED = {
    text.name: text
    for text in (
        Text("pride", "Pride and Prejudice", "Jane Austen", 684_584),
        Text("emma", "Emma", "Jane Austen", 882_851),
        Text("moby-dick", "Moby Dick; or, The Whale", "Herman Melville", 1_213_025),
        Text("genesis-es", "Génesis", "Reina-Valera", 181_172, "Spanish"),
        Text("code", "Modules of pqlab", "the authors of pqlab", 306_657, "Python and C++"),
        Text("numbers", "Sentences with numbers", "drawn at random", 160_038),
        Text("sampled", "What a small model writes by itself", "SmolLM2-135M-Instruct", 202_624, "mostly English"),
    )
}

MIXES = {"mixed": ("emma", "code", "numbers", "sampled")}
"""Names of several texts together. What codebooks never saw they store badly: a novel has few digits, no code, one
language and one tone."""

BETWEEN = "\n\n"
"""Between texts that are made one: for hashes, and for who wants a mix as one string."""

STDLIB = "stdlib"
"""Source code: modules of the Python that runs, so the text is another one in every version of Python."""

_STDLIB_MODULES = (
    "argparse", "dataclasses", "tarfile", "typing", "inspect", "zipfile", "subprocess", "ipaddress", "pathlib", "heapq",
)  # fmt: skip


def texts() -> dict[str, Text]:
    """The shipped texts by name."""
    return dict(_SHIPPED)


def text_names() -> list[str]:
    """Every name that `load_text` takes."""
    return [*_SHIPPED, *MIXES, STDLIB]


def check_text(name: str | Path) -> None:
    """Raise `FileNotFoundError` for what is neither a text with a name nor a file."""
    path = Path(name).expanduser()
    if name not in text_names() and not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; the texts with a name are {', '.join(text_names())}")


def members(name: str | Path) -> tuple[str | Path, ...]:
    """The names of a mix's texts; any other name alone."""
    return MIXES.get(name, (name,))


def check_apart(measured: str | Path, calibration: str | Path) -> None:
    """Raise `ConfigError` for a text that is measured on and calibrated on."""
    if measured in members(calibration):
        raise ConfigError(
            f"calibration on {calibration} would flatter the result, since {measured} is evaluated on; "
            "choose another text"
        )


def calibration_text(name: str | Path) -> str | list[str]:
    """What `calibrate` takes: the text of this name, or the texts of a mix. Raises like `load_text`."""
    found = [load_text(one) for one in members(name)]
    return found if len(found) > 1 else found[0]


def load_text(name: str | Path = "pride") -> str:
    """A shipped text by its name (see `texts`), "stdlib", or a UTF-8 text file by its path (.xz files are unpacked).

    The texts of a mix ("mixed") come one behind the other, with `BETWEEN` between them.

    Raises:
        FileNotFoundError: neither a shipped text nor a file. ValueError: the file is no text in UTF-8.
    """
    check_text(name)
    if name in _SHIPPED:
        packed = files("pqlab").joinpath("data", f"{name}.txt.xz").read_bytes()
        return lzma.decompress(packed).decode("utf-8")
    if name in MIXES:
        return BETWEEN.join(map(load_text, members(name)))
    if name == STDLIB:
        return _stdlib()
    path = Path(name).expanduser()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); give a text file") from error


def _stdlib() -> str:
    """Modules of Python's standard library, one behind the other; those that are packages by now are left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [path for module in _STDLIB_MODULES if (path := folder / f"{module}.py").is_file()]
    if not found:
        raise FileNotFoundError(f"this Python has no source of its standard library in {folder}; give a file instead")
    return "\n\n".join(path.read_text(encoding="utf-8") for path in found)
