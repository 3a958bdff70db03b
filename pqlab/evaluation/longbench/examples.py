"""LongBench's data: one file of JSON lines a task, from a folder, a zip archive of it, or the hub's archive."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..corpora import NOVEL, DatasetError
from .tasks import TASKS

REPOSITORY, ARCHIVE = "zai-org/LongBench", "data.zip"
"""Where the data is on the Hugging Face hub. Its loading script is not needed: the archive is what it unpacks."""

PROMPTS = "dataset2prompt.json"
"""LongBench's own prompts, {task: prompt}; where the data folder has this file, they are asked instead of ours."""


@dataclass(frozen=True)
class Example:
    """One question: what fills the prompt, the accepted answers, and for classification every class there is."""

    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def read_examples(task: str, data: Path | None = None, limit: int | None = None) -> list[Example]:
    """The examples of a task, the first `limit` of them.

    Args:
        data: a folder with `<task>.jsonl` (or a folder `data` with it), or a zip archive with such files; None fetches
            the hub's archive once.

    Raises:
        DatasetError: the data cannot be reached, or a line is not an example.
    """
    found = []
    for number, line in enumerate(islice(_lines(task, data), limit), 1):
        try:
            row = json.loads(line)
            answers, classes = tuple(row["answers"]), tuple(row.get("all_classes") or ())
            found.append(Example(row["context"], row["input"], answers, classes))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{task}.jsonl, line {number}: no LongBench example ({error!r}); a line is an object with context, "
                "input and answers"
            ) from error
    if not found:
        raise DatasetError(f"{task}.jsonl holds no example")
    return found


def prompts(data: Path | None) -> dict[str, str]:
    """The prompt of every task: ours, or those of a `PROMPTS` file in the data folder."""
    ours = {name: task.prompt for name, task in TASKS.items()}
    file = data / PROMPTS if data is not None else None
    if file is None or not file.is_file():
        return ours
    return ours | json.loads(file.read_text(encoding="utf-8"))


def _lines(task: str, data: Path | None) -> Iterator[str]:
    where = data if data is not None else _fetched()
    name = f"{task}.jsonl"
    if where.is_dir():
        places = [where / name, where / "data" / name]
        file = next((path for path in places if path.is_file()), None)
        if file is None and not (where / ARCHIVE).is_file():
            raise DatasetError(f"there is no {name} in {where}; LongBench's archive {ARCHIVE} holds one a task")
        if file is not None:
            with file.open(encoding="utf-8") as lines:
                yield from filter(str.strip, lines)
            return
        where = where / ARCHIVE
    try:
        with zipfile.ZipFile(where) as archive:
            member = next((entry for entry in archive.namelist() if Path(entry).name == name), None)
            if member is None:
                raise DatasetError(f"{where.name} holds no {name}")
            with archive.open(member) as file:
                yield from filter(str.strip, (line.decode("utf-8") for line in file))
    except (OSError, zipfile.BadZipFile) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{where} is neither a folder nor a zip archive of LongBench's files ({error})") from error


def _fetched() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except Exception as error:  # the client has no common error for what is unreachable, refused or missing
        raise DatasetError(
            f"LongBench could not be fetched from the hub ({REPOSITORY}). --data FOLDER reads a copy of its {ARCHIVE}; "
            f"{NOVEL}; python -m pqlab bench passkey probes long contexts without a download. "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
