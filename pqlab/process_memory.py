"""What this process takes of a device's memory, now and at its highest since it was last asked.

On CUDA these are torch's own statistics (bytes of live tensors); beside them the whole device's memory in use by NVML,
where the package nvidia-ml-py is there. On a CPU it is the resident set (RSS): pages that were reserved and never
written do not count, since the system has not given them out yet. Before a sample the C library's heap hands its free
pages back; otherwise what a prompt's activations have left behind would hide the cache.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from .memory_peak import Peak, memory_peak

_STATM = Path("/proc/self/statm")


class Sample(NamedTuple):
    """Bytes: now, the highest since the last sample, and of the whole GPU (None where nobody says)."""

    now: int
    peak: int
    device: int | None


class ProcessMemory:
    """A context that watches a device; `sample()` reads it, in bytes above those at the beginning.

    Where the system has no peak that can be reset (not Linux, or no right to), the peak is what a sample finds.

    Args:
        device: "cpu" or a CUDA device.

    Raises:
        ImportError: on a CPU, the system has no /proc and psutil is not installed.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._start = 0
        self._blocks = ExitStack()
        self._block: Peak | None = None
        self._nvml = _nvml_reader(self.device) if self.cuda else None

    @property
    def what(self) -> str:
        """What `Sample.now` counts."""
        return "bytes of live tensors (torch.cuda.memory_allocated)" if self.cuda else "resident set size (RSS)"

    def __enter__(self) -> ProcessMemory:
        release(self.device)
        self._start = self._read()
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self._blocks.close()

    def sample(self) -> Sample:
        """Read, and begin a new peak."""
        assert self._block is not None, "sample() works inside of the context"
        self._blocks.close()
        peak = self._block.peak
        if not self.cuda:
            _trim_heap()
        now = self._read()
        self._begin()
        device = self._nvml() if self._nvml is not None else None
        return Sample(now - self._start, max(now, peak or 0) - self._start, device)

    def _begin(self) -> None:
        self._block = self._blocks.enter_context(memory_peak(self.device))

    def _read(self) -> int:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        return resident_bytes()


def resident_bytes() -> int:
    """Resident set size of this process. Raises ImportError where neither /proc nor psutil is there."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import psutil
    except ImportError as error:
        raise ImportError("this system has no /proc; pip install psutil to measure memory") from error
    return psutil.Process().memory_info().rss


def release(device: str | torch.device) -> None:
    """Give back what nobody uses: garbage, torch's cached blocks, and free pages of the C library's heap."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    _trim_heap()


def _trim_heap() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: its free pages stay where they are
        pass


def _nvml_reader(device: torch.device) -> Callable[[], int] | None:
    """A function that reads the GPU's memory in use; None without nvidia-ml-py or a GPU that it can find."""
    try:
        import pynvml

        pynvml.nvmlInit()
        index = device.index if device.index is not None else torch.cuda.current_device()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception:  # NVML is an extra: whatever it lacks, torch's statistics are there
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
