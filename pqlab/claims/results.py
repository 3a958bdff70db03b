"""Committed measurements: JSON files, found by what is in them and not by their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import ConfigError

REPORTS_GPU = "A100"
"""The report measured on an A100 80 GB."""


@dataclass(frozen=True)
class Source:
    """Where a figure comes from: file name, device, date, commit, and the note with the command that made it."""

    file: str
    device: str
    date: str
    commit: str
    note: str = ""


class Results:
    """The measurements in a folder; the package's own by default.

    Raises:
        ConfigError: no such folder, or a file that is no JSON object.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(str(files("pqlab") / "results")) if folder is None else Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"there is no folder {self.folder}; give one with the JSON files of measurements")

    @cached_property
    def files(self) -> dict[str, Mapping[str, Any]]:
        """Every file's content by its name."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is no JSON ({error}); measure again or take it away") from error
            if not isinstance(content, dict):
                raise ConfigError(f"{path} is no JSON object; measure again or take it away")
            found[path.name] = content
        return found

    def records(self, kind: str, /, **wanted: Any) -> list[tuple[Mapping[str, Any], Source]]:
        """Records of one benchmark ("decode", "model", "memory") or command ("eval") whose fields have these values.

        Measured on the report's GPU first, then the newest first, of one day the last by name.
        """
        found = []
        for name, content in self.files.items():
            if kind not in (content.get("benchmark"), content.get("command")):
                continue
            source = _source(name, content)
            for record in content.get("records") or content.get("methods") or []:
                if all(record.get(key, content.get(key)) == value for key, value in wanted.items()):
                    found.append((record, source))
        found.sort(key=lambda pair: (pair[1].date, pair[1].file), reverse=True)
        return sorted(found, key=lambda pair: REPORTS_GPU not in pair[1].device)

    def on_gpu(self, kind: str, /, **wanted: Any) -> Iterator[tuple[Mapping[str, Any], Source]]:
        """`records` of the one best GPU result that has any: figures of two machines are never mixed."""
        found = [pair for pair in self.records(kind, **wanted) if pair[1].device.startswith("NVIDIA")]
        return (pair for pair in found if pair[1] == found[0][1])


def _source(name: str, content: Mapping[str, Any]) -> Source:
    device = str(content.get("device") or f"cpu {content.get('cpu', '')}".strip())
    date, commit, note = (str(content.get(key, "")) for key in ("date", "commit", "note"))
    return Source(name, device, date, commit, note)
