"""`results.jsonl`: one line for every stage that was finished, and what an interrupted run has left to do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

SCHEMA = 2
"""Counts up when a field of a record changes its meaning. 2: generations on a GPU run without cuDNN attention."""

NAME = "results.jsonl"


@dataclass(frozen=True)
class Results:
    """The records of an output folder, in the order in which they were written."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Every record. A last line that was never finished (its process was killed) is left out.

        Raises:
            ValueError: another line is no record; the file is not ours to repair.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        found = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is unfinished
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is no JSON ({error}); mend or move the file") from error
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, on disk when this returns. An unfinished last line is cut off first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(record) + "\n").encode()
        with open(self.path, "a+b") as file:
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def settings_key(settings: Mapping[str, Any], device: Mapping[str, Any]) -> str:
    """Short hash of all settings and of the device: runs of one key are the same experiment."""
    return sha256(json.dumps([SCHEMA, settings, device], sort_keys=True).encode()).hexdigest()[:12]


def unfinished(records: Sequence[Mapping[str, Any]], key: str, stages: Sequence[str]) -> list[Mapping[str, Any]]:
    """The records of the newest run of this key, when it did not come to its end; empty when there is none."""
    ours = [record for record in records if record.get("key") == key]
    done = [record for record in ours if record["run"] == ours[-1]["run"]]
    return done if len(done) < len(stages) else []
