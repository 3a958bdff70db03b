"""What a probe of the doctor finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Finding:
    """What one probe found. `problem` is empty when all is well; `remedy` says what to do about it."""

    value: str
    problem: str = ""
    remedy: str = ""
    details: dict[str, str] = field(default_factory=dict)


Probe = Callable[[], Finding]
