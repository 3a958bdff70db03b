"""Calls like an earlier one, through C++ that knows torch: neither checked nor packed again.

Between two calls a model streams all of its weights, and a checked call from Python costs as much as attention over a
thousand tokens. This looks at the same things in a tenth of the time. Its library is built apart from the kernels
(csrc/caller says why). Without it CPU calls are repeated by `cpu_again`, and CUDA calls are checked each time.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import Extension

log = logging.getLogger("pqlab")

INSTEAD = "kernels are called from Python, which is slower for short contexts and the same otherwise"

ADDRESSES = ("q", "page_table", "lengths", "out", "lse", "k", "v", "before")
"""What differs from call to call: tensors of a step and its results (`lengths`: those after it)."""


class Launch(NamedTuple):
    """A function of C, and what it is given.

    `offsets` has for each of `ADDRESSES` where in the parameters it lies, in bytes, or -1. The function returns 0, or
    null where it takes a stream, too, unless something is wrong or left to do: then the call is made anew, checked.
    """

    function: int
    params: bytes
    offsets: tuple[int, ...]


def offsets(**places: int) -> tuple[int, ...]:
    """`Launch.offsets` by name."""
    return tuple(places.get(name, -1) for name in ADDRESSES)


class Alive:
    """Whether all of some tensors still are; keeps alive what calls with them need beside them.

    Attributes:
        alive: so that C++ can ask.
    """

    def __init__(self, tensors: Sequence[Tensor], needed: Any) -> None:
        self.alive = True
        self._needed = needed
        me = weakref.ref(self)

        def forget(_: Any) -> None:
            if (self_ := me()) is not None:
                self_.alive, self_._needed = False, None

        self._tensors = [weakref.ref(x, forget) for x in tensors]


class Caller:
    """Args: `changed`, called when the library is there: functions that were asked for before are without it."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._module: Any = None
        self._changed = changed
        self._said = False
        source = Path(__file__).parent / "csrc" / "caller" / "caller.cpp"
        self.extension = Extension("pqlab_caller", [source], self._load, cflags=["-O2"], instead=INSTEAD)

    def _load(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("pqlab_caller", str(path))
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sample = torch.empty(1)
        module.set_up(sample, sample._cdata)
        self._module = module
        self._changed()

    def is_there(self) -> bool:
        """Whether calls can be repeated; why not is said once."""
        status = self.extension.status
        if self._module is None and not self._said and status.state in ("failed", "off"):
            self._said = True
            log.warning("%s; %s", INSTEAD, status.detail)
        return self._module is not None

    def repeat(
        self,
        held: Any,
        versions: tuple[int, int],
        op: str,
        args: tuple[Any, ...],
        launches: tuple[Launch, ...],
        stream: tuple[int, int] | None = None,
    ) -> Callable[..., Any] | None:
        """A function of the operation's arguments that does what the launches do, or returns None where the arguments
        are not like those given here; None where the library is not there.

        Args:
            held: has `alive`: True as long as the tensors that stay from call to call are all there.
            versions: of the codebooks (`backend.version`).
            op: "decode" or "step_"; args: its arguments, checked.
            launches: in the order of their calls.
            stream: its handle, and the address of a function of C that says whether it is being captured.
        """
        if not self.is_there():
            return None
        return self._module.repeat(op, args, held, versions, launches, stream)
