"""Calls of the CPU kernel like an earlier one, through C++ that knows torch: `cpu_again` in a tenth of the time.

Its library is built after the kernels and apart from them (csrc/cpu_caller says why). Without it `cpu_again` does the
same from Python, which costs 25 to 40 us a call: a fifth of attention over a thousand tokens of a small model.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .build import Extension

if TYPE_CHECKING:
    from .cpu import Held

log = logging.getLogger("pqlab")

_CSRC = Path(__file__).parent / "csrc"
INSTEAD = "the CPU kernels are called from Python, which is slower for short contexts and the same otherwise"


class Caller:
    """Args: `changed`, called when the library is there: functions that were asked for before are without it."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._module: Any = None
        self._changed = changed
        self._said = False
        self.extension = Extension(
            "pqlab_cpu_caller", [_CSRC / "cpu_caller" / "caller.cpp"], self._load,
            headers=[_CSRC / "cpu" / "api.h"], cflags=["-O2"], instead=INSTEAD,
        )  # fmt: skip

    def _load(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("pqlab_cpu_caller", str(path))
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sample = torch.empty(1)
        module.set_up(sample, sample._cdata)
        self._module = module
        self._changed()

    def repeat(
        self, held: Held, kernel: Any, op: str, args: tuple[Any, ...], dtype_code: int
    ) -> Callable[..., Any] | None:
        """As `cpu_again.repeat`, of the checked arguments of a call; None where the library is not there.

        Args:
            kernel: `pq_decode` of a ctypes library.
        """
        if self._module is None:
            self._say_why()
            return None
        address = ctypes.cast(kernel, ctypes.c_void_p).value
        return self._module.repeat(op, args, held, held.versions, address, held.packed, dtype_code)

    def _say_why(self) -> None:
        status = self.extension.status
        if not self._said and status.state in ("failed", "off"):
            self._said = True
            log.warning("%s; %s", INSTEAD, status.detail)
