"""Texts to evaluate on and to calibrate on: the report's data sets, shipped novels, files, and text without meaning.

Hub data sets come through the `datasets` library, or from files in their format that lie here (`data`). Whatever
cannot be fetched is an error that says how to go on; no other text ever takes its place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from ..models import calibration_text, load_text, texts
from ..models.texts import check_apart, members, text_names
from ..quantization.defaults import CALIBRATION_TEXT

SYNTHETIC = "_synthetic"

MAX_CHARS = 4_000_000
"""Of a split that are read: calibration looks at no more, and windows are taken from the beginning."""


NOVEL = "--dataset pride is a novel that travels with pqlab"


class DatasetError(OSError):
    """A data set could not be read; the message says why, and what can be typed instead."""


@dataclass(frozen=True)
class HubText:
    """A text corpus on the Hugging Face hub.

    Args:
        repository: of the data set; config: its part, as `load_dataset` takes it; revision: of the repository.
        column: that holds the text; joiner: between rows. Both decide the perplexity: they are those of the usual
            protocol (Frantar et al. 2023, GPTQ: wikitext rows joined by blank lines, Penn Treebank's by spaces).
    """

    repository: str
    column: str
    joiner: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None


HUB: Mapping[str, HubText] = MappingProxyType(
    {
        "wikitext-2-raw-v1": HubText("Salesforce/wikitext", "text", "\n\n", "wikitext-2-raw-v1"),
        "wikitext-103-v1": HubText("Salesforce/wikitext", "text", "\n\n", "wikitext-103-v1"),
        # the repository itself is a script, which `datasets` no longer runs: this is the hub's own conversion of it
        "ptb_text_only": HubText(
            "ptb-text-only/ptb_text_only", "sentence", " ", revision="refs/convert/parquet",
            files={split: f"penn_treebank/{split}/*.parquet" for split in ("train", "test")},
        ),
    }
)  # fmt: skip
"""The report's corpora."""


@dataclass(frozen=True)
class Corpus:
    """Where an evaluation's texts come from; they are read when they are first asked for.

    Args:
        name: of the data set, or the path of a text file.
        data: folder that holds a hub data set's files; None asks the hub.
        calibration: text for training: a shipped one, a mix or a file; None takes the data set's own train split, or
            shipped texts that are not evaluated on.
        seed: of `_synthetic`.

    Raises:
        ConfigError: an unknown name, `data` for a text that needs none, or a calibration text that is evaluated on.
    """

    name: str
    data: Path | None = None
    calibration: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.data is not None and not self.from_hub:
            raise ConfigError(f"{self.name} is read from no data folder; leave --data out")
        if self.calibration:
            check_apart(self.name, self.calibration)
        if self.calibration and self.calibration not in text_names() and not _is_text(self.calibration):
            raise ConfigError(f"there is no text {self.calibration}; shipped are {', '.join(text_names())}")

    @property
    def means_something(self) -> bool:
        """False for words that were drawn at random: a perplexity on them says nothing of language."""
        return self.name != SYNTHETIC

    @property
    def from_hub(self) -> bool:
        """A data set that is read with the package datasets."""
        return self.name in HUB

    @cached_property
    def train_name(self) -> str:
        """Name of the calibration text."""
        if self.calibration:
            return self.calibration
        if self.from_hub or self.name == SYNTHETIC:
            return f"{self.name} train"
        return "pride" if self.name in members(CALIBRATION_TEXT) else CALIBRATION_TEXT

    @cached_property
    def test_text(self) -> str:
        """The text that is evaluated on. Raises `DatasetError` when it cannot be read."""
        if self.from_hub:
            return read_split(self.name, "test", self.data)
        return synthetic_text(self.seed) if self.name == SYNTHETIC else load_text(self.name)

    @cached_property
    def train_text(self) -> str | list[str]:
        """The text that codebooks are trained on, or those of a mix. Raises `DatasetError` when it cannot be read."""
        if self.calibration or not (self.from_hub or self.name == SYNTHETIC):
            return calibration_text(self.train_name)
        return read_split(self.name, "train", self.data) if self.from_hub else synthetic_text(self.seed + 1)


def names() -> list[str]:
    """Every text that has a name."""
    return [*texts(), *HUB, SYNTHETIC]


def check_name(name: str) -> None:
    """Raise `ConfigError` for what is neither a name nor a file."""
    if name in names() or _is_text(name):
        return
    close = get_close_matches(name, names(), n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise ConfigError(f'there is no data set or text file "{name}"; {hint}Names are {", ".join(names())}')


def read_split(name: str, split: str, data: Path | None = None) -> str:
    """The text of a split of one of `HUB`, at most `MAX_CHARS` characters.

    Args:
        split: "train" or "test".
        data: a folder with the data set's files (parquet, json, csv or text, the split in their names or folders), or
            a folder with such a folder of the configuration's name; None reads the hub.

    Raises:
        DatasetError: it cannot be read, or has no such column.
    """
    hub = HUB[name]
    kept, size = [], 0
    for row in _rows(name, hub, split, data):
        if hub.column not in row:
            raise DatasetError(f"{name} has columns {', '.join(row)}, none called {hub.column}")
        kept.append(row[hub.column])
        size += len(row[hub.column]) + len(hub.joiner)
        if size >= MAX_CHARS:
            break
    if not size:
        raise DatasetError(f"the {split} split of {name} is empty")
    return hub.joiner.join(kept)


def _rows(name: str, hub: HubText, split: str, data: Path | None) -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            f"{name} is read with the package datasets: pip install 'pqlab[data]'; without it, {NOVEL}"
        ) from error
    try:
        if data is not None:
            inside = data / hub.config if hub.config else data
            yield from load_dataset(str(inside if inside.is_dir() else data), split=split, streaming=True)
        else:
            more = {"revision": hub.revision, "data_files": dict(hub.files)} if hub.files else {}
            yield from load_dataset(hub.repository, hub.config, split=split, **more)
    except Exception as error:  # the library has no common error for what is missing, unreachable or malformed
        where = f"the folder {data}" if data is not None else f"the hub ({hub.repository})"
        raise DatasetError(
            f"{name} could not be read from {where}. --data FOLDER reads a copy; {NOVEL}. "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def synthetic_text(seed: int, words: int = 100_000) -> str:
    """Made-up words that come as often as words do (the n-th most frequent 1/n times), in sentences: no meaning."""
    letters = random.Random(0)  # one vocabulary for all seeds
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    vocabulary = ["".join(letters.choices(syllables, k=letters.randint(1, 4))) for _ in range(5000)]
    draw = random.Random(seed)
    chosen = draw.choices(vocabulary, weights=[1 / (n + 1) for n in range(len(vocabulary))], k=words)
    sentences, at = [], 0
    while at < words:
        length = draw.randint(4, 24)
        sentences.append(" ".join(chosen[at : at + length]).capitalize() + ".")
        at += length
    return " ".join(sentences)


def _is_text(name: str) -> bool:
    return name in texts() or Path(name).expanduser().is_file()
