"""The choice of a backend, and what was chosen. Nothing else chooses one.

Every call of an operation (`ops`) runs on the first backend of its device's levels that can run it (CUDA tensors: cuda,
reference; CPU tensors: cpu, reference); which one ran and why is counted (`pqlab.backend_report()`), and a fallback is
said once in the log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelMissingError, PQCacheError
from .backend import Backend, ReferenceBackend, Setting, StepShape, append_part, current_setting, decode_part

log = logging.getLogger("pqlab")

LEVELS = {"cuda": ("cuda", "reference"), "cpu": ("cpu", "reference")}
"""Backends by device type, best first; any other device has the reference."""

FIRST_CHOICE = "first choice"

_backends: dict[str, Backend] = {"reference": ReferenceBackend()}
_absent: dict[str, str] = {}  # backend -> why it was never registered
_runs: Counter[tuple[str, str, str]] = Counter()  # (op, backend, reason) -> calls, those of `_known` apart
_last: dict[str, tuple[str, str]] = {}  # op -> (backend, reason) of the latest call
_failed: dict[tuple[str, str], str] = {}  # (op, backend) -> what it raised when it ran; not tried again


@dataclass(slots=True)
class _Known:
    """How a call ran: what checks and choice come to again for the same lasting tensors under the same setting."""

    setting: Setting
    again: Callable[..., Any]  # of `Backend.again`
    key: tuple[str, str, str]  # of `_runs`
    last: tuple[str, str]
    calls: int = 0  # that `_runs` does not have yet: to look it up there takes as long as all else here


_MOST_KNOWN = 4096
_known: dict[tuple[Any, ...], _Known] = {}
"""By operation, identity of pages and window, and nbits. `again` itself knows whether the rest is as it was."""


def register_backend(backend: Backend) -> None:
    """Put a backend in the place of its name; what one of that name failed at before is tried again."""
    _backends[backend.name] = backend
    _forget_known()
    for key in [key for key in _failed if key[1] == backend.name]:
        del _failed[key]


def register_absence(name: str, reason: str) -> None:
    """Say why a backend is not there, for reports and errors."""
    _absent[name] = reason


def backends() -> dict[str, Backend]:
    return dict(_backends)


def absences() -> dict[str, str]:
    return dict(_absent)


def runs() -> dict[tuple[str, str, str], int]:
    """Calls so far: (op, backend, reason) -> count."""
    total = _runs.copy()
    for known in tuple(_known.values()):
        total[known.key] += known.calls
    return dict(total)


def record(op: str, backend: str, reason: str) -> None:
    """Count a run that did not go through the operations here: attention over the dequantized cache."""
    if (op, backend, reason) not in _runs:
        log.warning("%s runs on the %s backend; %s", op, backend, reason)
    _runs[(op, backend, reason)] += 1
    _last[op] = (backend, reason)


def last(op: str) -> tuple[str, str] | None:
    """Backend and reason of the latest call, also of what `record` counted; None before the first."""
    return _last.get(op)


def chosen(op: str, device_type: str) -> tuple[str, str]:
    """Backend and reason that an ordinary call on this device would get now, without its arguments."""
    backend, reason = _choose(op, device_type, None)
    return backend.name, reason


def uncapturable(device: torch.device, step: StepShape) -> str | None:
    """Why a layer's decode step cannot be part of a CUDA graph, or None: it can, or the device has no graphs.

    The reference reads lengths on the host. Kernels that have to be built are waited for, all of them at once.
    """
    if device.type != "cuda":
        return None
    setting = current_setting()
    if setting.forced not in (None, "cuda"):
        return f"{setting.forced} is forced"
    if "cuda" in setting.forbidden:
        return "cuda is forbidden by the setting"
    backend = _backends.get("cuda")
    return absences().get("cuda", "there is no cuda backend") if backend is None else backend.refuses(device, step)


def run(op: str, device_type: str, args: tuple[Any, ...]) -> Any:
    backend, reason = _choose(op, device_type, args)
    key = (op, backend.name, reason)
    if key not in _runs and reason not in (FIRST_CHOICE, "forced"):
        log.warning("%s runs on the %s backend; %s", op, backend.name, reason)
    _runs[key] += 1
    _last[op] = key[1:]
    try:
        return getattr(backend, op)(*args)
    except (RuntimeError, MemoryError) as error:
        if not _may_fall_back(backend.name, error):
            raise
        _failed[op, backend.name] = f"it failed when it ran ({type(error).__name__}: {' '.join(str(error).split())})"
        _forget_known()
        return run(op, device_type, args)


def run_again(like: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Results of a call like an earlier one, without its checks; None when there was none, or this one is different."""
    known = _known.get(like)
    if known is None or known.setting is not current_setting():
        return None
    try:
        results = known.again(*args)
    except (RuntimeError, MemoryError):
        return None  # it will fail again where another backend can be chosen
    if results is not None:
        known.calls += 1
        _last[like[0]] = known.last
    return results


def run_first(op: str, like: tuple[Any, ...], check: Callable[..., None], x: Tensor, args: tuple[Any, ...]) -> Any:
    """A call with all checks; what the backend knows to do without them is kept for the next one."""
    check(*args)
    results = run(op, x.device.type, args)
    again = _backends[_last[op][0]].again(op, args)
    if again is not None:
        if len(_known) >= _MOST_KNOWN:  # of tensors that are gone
            _forget_known()
        before = _known.get(like)
        _known[like] = _Known(current_setting(), again, (op, *_last[op]), _last[op])
        if before is not None:
            _runs[before.key] += before.calls
    return results


def _forget_known() -> None:
    for known in tuple(_known.values()):
        _runs[known.key] += known.calls
    _known.clear()


def _may_fall_back(name: str, error: Exception) -> bool:
    """Whether the next level may run what this backend has begun. Every operation writes what it is given to places
    that it is given, so that running it again is the same. A forced backend is to be heard of; a GPU without memory
    has none for the next level; and a graph that is being captured has lost its capture."""
    if name == "reference" or current_setting().forced or isinstance(error, (torch.OutOfMemoryError, PQCacheError)):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _refusal(name: str, op: str, device_type: str, args: tuple[Any, ...] | None) -> str | None:
    if name != "reference" and name not in LEVELS.get(device_type, ()):
        return f"{name} kernels do not take {device_type} tensors"
    backend = _backends.get(name)
    if backend is None:
        return _absent.get(name, f"there is no {name} backend")
    if (op, name) in _failed:
        return _failed[op, name]
    if args is not None:
        parts = (("append_", append_part(args)), ("decode", decode_part(args))) if op == "step_" else ((op, args),)
        reasons = [backend.unable(*part) for part in parts]  # all are asked: each starts the builds that it lacks
        return next(filter(None, reasons), None)
    status = backend.status()
    return None if status.state in ("none", "ready") else status.detail


def _choose(op: str, device_type: str, args: tuple[Any, ...] | None) -> tuple[Backend, str]:
    setting = current_setting()
    if setting.forced:
        return _forced(setting.forced, op, device_type, args), "forced"
    reasons = ""
    for name in LEVELS.get(device_type, ("reference",)):
        why = "forbidden by the setting" if name in setting.forbidden else _refusal(name, op, device_type, args)
        if why is None:
            return _backends[name], reasons or FIRST_CHOICE
        reasons = f"{name}: {why}"
    raise AssertionError("the reference backend refuses nothing")


def _forced(name: str, op: str, device_type: str, args: tuple[Any, ...] | None) -> Backend:
    why = _refusal(name, op, device_type, args)
    if why is not None and name in _backends and args is not None and _backends[name].status().state == "building":
        _backends[name].wait()
        why = _refusal(name, op, device_type, args)
    if why is None:
        return _backends[name]
    remedy = _backends[name].remedy if name in _backends else ""
    raise KernelMissingError(
        f"the backend {name!r} is forced, but {op} cannot run on it: {why}.",
        f'{remedy} Or set PQLAB_BACKEND=auto (pqlab.use_backend("auto")).'.strip(),
    )
