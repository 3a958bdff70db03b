"""`pqlab.backend_report()`: which backend every operation gets here and got so far, and why."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import PQCacheError
from . import dispatch, ops
from .backend import NAMES, BuildStatus, current_setting


@dataclass(frozen=True)
class Choice:
    """What an operation gets now on one kind of device, and the calls it has had."""

    op: str
    device: str
    backend: str
    reason: str
    calls: dict[str, int] = field(default_factory=dict)  # "backend (reason)" -> count, on any device


@dataclass(frozen=True)
class BackendReport:
    """Prints as text, draws itself as tables in a notebook; `as_dict()` is plain data."""

    setting: str
    choices: tuple[Choice, ...]
    builds: dict[str, BuildStatus]

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "choices": [asdict(choice) for choice in self.choices],
            "builds": {name: asdict(status) for name, status in self.builds.items()},
        }

    def _choice_rows(self) -> list[tuple[str, ...]]:
        rows = []
        for c in self.choices:
            calls = ", ".join(f"{count} x {what}" for what, count in c.calls.items()) or "none yet"
            rows.append((c.op, c.device, c.backend, c.reason, calls))
        return rows

    def _build_rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name, s in self.builds.items():
            how = f"{s.detail}, {s.seconds:.3g} s" if s.state == "ready" else s.detail
            rows.append((name, s.state, how, s.path, " ".join(s.flags)))
        return rows

    def __repr__(self) -> str:
        parts = [f"backend setting: {self.setting}"]
        parts += _text_table(_CHOICE_HEAD, self._choice_rows())
        parts += ["", *_text_table(_BUILD_HEAD, self._build_rows())]
        for name, status in self.builds.items():
            if status.error:
                parts += ["", f"last error of {name}:", *(f"  {line}" for line in status.error.splitlines())]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<p>backend setting: <code>{html.escape(self.setting)}</code></p>"]
        parts.append(_html_table(_CHOICE_HEAD, self._choice_rows()))
        parts.append(_html_table(_BUILD_HEAD, self._build_rows()))
        for name, status in self.builds.items():
            if status.error:
                summary = f"<summary>last error of {html.escape(name)}</summary>"
                parts.append(f"<details>{summary}<pre>{html.escape(status.error)}</pre></details>")
        return "".join(parts)


_CHOICE_HEAD = ("operation", "device", "backend", "why", "calls so far")
_BUILD_HEAD = ("backend", "state", "build", "path", "flags")


def backend_report() -> BackendReport:
    """Per operation and device the backend that a call gets now and why, the calls so far, and every build."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = []
    for op in dict.fromkeys((*ops.OPS, *(o for o, _, _ in dispatch.runs()))):
        calls = {f"{name} ({why})": count for (o, name, why), count in dispatch.runs().items() if o == op}
        for device in devices if op in ops.OPS else ():
            try:
                backend, reason = dispatch.chosen(op, device)
            except PQCacheError as error:  # a forced backend that does not take this device
                backend, reason = "none", error.what
            choices.append(Choice(op, device, backend, reason, calls))
        if op not in ops.OPS:  # attention over the dequantized cache: what ran last, on whatever device
            backend, reason = dispatch.last(op) or ("none", "")
            choices.append(Choice(op, "any", backend, reason, calls))
    builds = {}
    for name in NAMES:
        if name in dispatch.backends():
            builds |= dispatch.backends()[name].builds()
        else:
            builds[name] = BuildStatus("absent", dispatch.absences().get(name, "not registered"))
    return BackendReport(current_setting().text, tuple(choices), builds)


Row = tuple[str, ...]


def _text_table(head: Row, rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]


def _html_table(head: Row, rows: list[Row]) -> str:
    def line(tag: str, row: Row) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    return f"<table><thead>{line('th', head)}</thead><tbody>{''.join(line('td', r) for r in rows)}</tbody></table>"
