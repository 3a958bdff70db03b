"""The most memory that a piece of work held: torch's count on a GPU, the resident set of the process on a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Bytes; None where the system does not say.

    Attributes:
        before: held when the block began. peak: the most that was held inside it, filled when it ends.
        what: how it was counted.
    """

    before: int | None
    peak: int | None = None
    what: str = ""


@contextmanager
def memory_peak(device: torch.device) -> Iterator[Peak]:
    """Memory of the block inside: `torch.cuda.max_memory_allocated`, or Linux' VmHWM of the process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = Peak(torch.cuda.memory_allocated(device), what="torch's allocations on the GPU")
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    can_reset = _reset_high_water()
    found = Peak(_status("VmRSS"), what="resident memory of the process")
    yield found
    found.peak = _status("VmHWM") if can_reset else None  # without a reset it would be the peak since the start


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None
