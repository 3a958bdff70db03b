"""Fused operations: `ops` (what the cache calls), `dispatch` (which backend runs), `reference` (plain torch), `build`
(JIT), `csrc` (C++ and CUDA).

`start()` runs once when pqlab is imported; it loads the compiled kernels or starts building them beside the import.
"""

from __future__ import annotations

import importlib
import time

import torch

from . import dispatch, ops
from .backend import BuildStatus, current_setting, use_backend
from .report import BackendReport, backend_report

__all__ = [
    "BackendReport", "BuildStatus", "backend_report", "current_setting", "dispatch", "ops", "start", "use_backend",
    "wait",
]  # fmt: skip

_started = False


def start() -> None:
    """Register the backends of this machine and start their builds (PQLAB_BUILD); never raises for a build."""
    global _started
    if _started:
        return
    _started = True
    from .cpu import CpuBackend

    cpu = CpuBackend()
    dispatch.register_backend(cpu)
    cpu.extension.start()
    if not torch.cuda.is_available():
        dispatch.register_absence("cuda", "torch sees no CUDA device")
        return
    try:
        module = importlib.import_module(f"{__name__}.cuda")
        dispatch.register_backend(module.backend(cpu.caller))
    except Exception as error:  # a broken CUDA set-up must not take the package away; the report tells
        dispatch.register_absence("cuda", f"{type(error).__name__}: {error}")


def wait(timeout: float | None = None) -> bool:
    """Block until every kernel build has ended, well or badly; False when `timeout` seconds ran out first."""
    end = None if timeout is None else time.monotonic() + timeout
    left = [backend for backend in dispatch.backends().values() if not backend.wait(_until(end))]
    return not left


def _until(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())
