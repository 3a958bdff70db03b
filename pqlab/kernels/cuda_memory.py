"""Memory that the CUDA backend keeps between calls: prepared codebooks and workspaces."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .backend import version


class PreparedBooks:
    """Both codebooks of a layer as the decode kernel keeps them in shared memory, made once for a pair of tensors."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Any, Any, Tensor]] = {}

    def of(self, library: Any, k_books: Tensor, v_books: Tensor, stream: int) -> Tensor:
        key = (id(library), k_books.data_ptr(), v_books.data_ptr(), version(k_books), version(v_books), k_books.shape)
        kept = self._kept.get(key)
        if kept is not None and kept[0]() is not None and kept[1]() is not None:
            return kept[2]
        heads = k_books.shape[0]
        capturing = torch.cuda.is_current_stream_capturing()  # a graph's memory is not ours to keep

        def make() -> Tensor:
            return torch.empty(heads * library.book_bytes, dtype=torch.uint8, device=k_books.device)

        image = make() if capturing else _outside_of_pools(make, k_books.device)
        k, v = k_books.contiguous(), v_books.contiguous()
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (k, v, image)]
        with torch.cuda.device(k.device):
            check("decode", library.pqlab_prepare_books(*pointers, heads, ctypes.c_void_p(stream)))
        if not capturing:
            self._kept = {k: kept for k, kept in self._kept.items() if kept[0]() is not None}
            self._kept[key] = (weakref.ref(k_books), weakref.ref(v_books), image)
        return image


class Workspaces:
    """Room for what blocks leave each other, and tickets, int32, zero before and after a call: one pair a stream."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._retired: list[tuple[Tensor, Tensor]] = []  # captured graphs may still write to them

    def of(self, q: Tensor, floats: int, tickets: int, stream: int, zero_tickets: bool) -> tuple[Tensor, Tensor]:
        """A graph gets its own for every call. Setting tickets to zero is a kernel there; `append_` can do it instead.

        Args:
            q: whose device the memory is on.
        """
        kept = self._kept.get((q.device.index, stream))
        if kept is not None and kept[0].numel() >= floats and kept[1].numel() >= tickets:
            return kept

        def make(zero: bool = True) -> tuple[Tensor, Tensor]:
            new = (torch.zeros if zero else torch.empty)(tickets, dtype=torch.int32, device=q.device)
            return torch.empty(floats, device=q.device), new

        if torch.cuda.is_current_stream_capturing():
            return make(zero_tickets)
        if kept is not None:
            self._retired.append(kept)
        room = self._kept[(q.device.index, stream)] = _outside_of_pools(make, q.device)
        return room


def check(op: str, message: bytes | None) -> None:
    """Raises RuntimeError for what a launcher said."""
    if message:
        raise RuntimeError(f"pqlab.{op} on CUDA: {message.decode()}")


def _outside_of_pools(make: Callable[[], Any], device: torch.device) -> Any:
    """What `make` allocates on the device, in memory that can be kept.

    A compiled model warms up in a memory pool of its graph, in which nothing may outlive the call. Such a pool takes
    the allocations of one thread, so another one makes them.
    """
    stream = torch.cuda.current_stream(device)

    def run() -> Any:
        with torch.cuda.stream(stream):  # that of the caller, so that neither has to wait for the other
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
