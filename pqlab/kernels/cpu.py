"""The C++ backend for CPU tensors: hands pointers and sizes to `csrc/cpu` through ctypes.

The kernels know nothing of torch. So they build in seconds, without torch's headers, and one source fits every torch
version; handing over the arguments costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import Backend, BuildStatus
from .build import Extension
from .checks import BOOK_DTYPES

SOURCES = Path(__file__).parent / "csrc" / "cpu"

_FLOAT = torch.empty(0, dtype=torch.float32)  # new_empty is quicker than torch.empty
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DECODE_ARGS = struct.Struct("=13Q17qd")  # struct pq_decode_args of csrc/cpu/api.h: 8 bytes a field
_ENCODE_ARGS = struct.Struct("=4Q11q")  # struct pq_encode_args
_FLUSH = 4  # pq_result: stored, and some row flushes now
_APPEND_ARGS = struct.Struct("=8Q5q")  # struct pq_append_args
_PLACES = {"decode": (0, 11), "encode": (0, 2), "encode_pages_": (1, 5), "append_": (6, 13)}
"""Where the arguments of an operation hold its vectors, and where its (one or two) nbits begin."""
_IDENTITY = "the identity codec (nbits 32) runs on the reference only"


class CpuBackend(Backend):
    name = "cpu"
    remedy = "Install a C++ compiler and ninja; pqlab.backend_report() shows what the build said."

    def __init__(self) -> None:
        self._library: Any = None
        sources = sorted(SOURCES.glob("*.cpp"))
        self.extension = Extension("pqlab_cpu", sources, self._load, cflags=compile_flags(), ldflags=link_flags())

    def _load(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for function in (library.pq_decode, library.pq_encode, library.pq_append):
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        library.pq_isa.restype = ctypes.c_char_p
        self._library = library

    @property
    def isa(self) -> str:
        """Vector instructions the library was compiled for: "avx512", "avx2" or "generic"; "" before it is loaded."""
        return self._library.pq_isa().decode() if self._library is not None else ""

    def status(self) -> BuildStatus:
        return self.extension.status

    def wait(self, timeout: float | None = None) -> bool:
        return self.extension.wait(timeout)

    def unable(self, op: str, args: tuple[Any, ...]) -> str | None:
        if self._library is None:
            return self.extension.status.detail
        vectors, first_nbits = _PLACES[op]
        if args[vectors].dtype not in _DTYPES:
            return f"{args[vectors].dtype} runs on the reference only"
        return _IDENTITY if 32 in args[first_nbits : first_nbits + 2] else None

    def decode(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor,
        k_books: Tensor, v_books: Tensor, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor,
        k_nbits: int, v_nbits: int, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, query_heads, steps, head_dim = q.shape
        max_pages, heads, tiles, k_m, _ = k_pages.shape
        tensors = (q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v)
        tensors = [t if t.is_contiguous() and t.is_cpu else _plain(t) for t in tensors]
        out = torch.empty_like(tensors[0])
        lse = _FLOAT.new_empty((batch, query_heads, steps))
        code = self._library.pq_decode(
            _DECODE_ARGS.pack(
                *[t.data_ptr() for t in tensors], out.data_ptr(), lse.data_ptr(),
                batch, query_heads, heads, steps, head_dim, tiles, page_table.shape[1], max_pages,
                k_m, k_nbits, v_pages.shape[3], v_nbits, sink_k.shape[2], window_k.shape[2], _DTYPES[q.dtype],
                _DTYPES[k_books.dtype], _DTYPES[v_books.dtype], scale,
            )
        )  # fmt: skip
        if code:
            _fail("decode", code, f"lengths {lengths.tolist()}, {page_table.shape[1]} pages a row of {max_pages}")
        return out, lse

    def encode(self, x: Tensor, books: Tensor) -> Tensor:
        groups, n, head_dim = x.shape
        _, m, num_centroids, _ = books.shape
        codes = torch.empty((groups, n, m), dtype=torch.uint8)
        x, books = _plain(x), _plain(books if books.dtype in BOOK_DTYPES else books.float())
        code = self._library.pq_encode(
            _ENCODE_ARGS.pack(
                x.data_ptr(), books.data_ptr(), codes.data_ptr(), 0,
                groups, n, head_dim, m, num_centroids, _DTYPES[x.dtype], _DTYPES[books.dtype], 0, 0, 8, 0,
            )
        )  # fmt: skip
        if code:
            _fail("encode", code, "")
        return codes

    def encode_pages_(
        self, pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int
    ) -> None:
        groups, n, head_dim = x.shape
        max_pages, _, tiles, m, _ = pages.shape
        _in_place("encode_pages_", pages=pages)
        x, books, page_ids = _plain(x), _plain(books), _plain(page_ids.to(torch.int64))
        code = self._library.pq_encode(
            _ENCODE_ARGS.pack(
                x.data_ptr(), books.data_ptr(), pages.data_ptr(), page_ids.data_ptr(),
                groups, n, head_dim, m, 1 << nbits, _DTYPES[x.dtype], _DTYPES[books.dtype], first_slot, tiles, nbits,
                max_pages,
            )
        )  # fmt: skip
        if code:
            _fail("encode_pages_", code, f"page_ids {page_ids.tolist()} of {max_pages} pages")

    def append_(
        self, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor, k_pages: Tensor, v_pages: Tensor,
        k: Tensor, v: Tensor, page_table: Tensor, before: Tensor, after: Tensor, k_books: Tensor, v_books: Tensor,
        k_nbits: int, v_nbits: int,
    ) -> None:  # fmt: skip
        _in_place("append_", sink_k=sink_k, sink_v=sink_v, window_k=window_k, window_v=window_v)
        batch, heads, slots, head_dim = window_k.shape
        k, v, before, after = _plain(k), _plain(v), _plain(before), _plain(after)
        written = (sink_k, sink_v, window_k, window_v, k, v, before, after)
        code = self._library.pq_append(
            _APPEND_ARGS.pack(
                *[t.data_ptr() for t in written],
                batch, heads, sink_k.shape[2], slots, head_dim * k.element_size(),
            )
        )  # fmt: skip
        if code == _FLUSH:
            old, new, flush = before.tolist(), after.tolist(), reference.flush_
            flush(window_k, k_pages, page_table, old, new, k_books, k_nbits, self.encode_pages_)
            flush(window_v, v_pages, page_table, old, new, v_books, v_nbits, self.encode_pages_)
        elif code:
            _fail("append_", code, f"before {before.tolist()}, {sink_k.shape[2]} sinks, {slots} window slots")


def _in_place(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not (x.is_contiguous() and x.is_cpu):
            raise ValueError(f"pqlab.{op}: {name} is written in place and must be contiguous on the CPU")


def _plain(x: Tensor) -> Tensor:
    """Contiguous, a copy only where a caller passes strides; its address is about to be read by the CPU."""
    if not x.is_cpu:
        raise ValueError(f"all tensors of a call must be on the CPU, one is on {x.device}")
    return x if x.is_contiguous() else x.contiguous()


def _fail(op: str, code: int, what: str) -> None:
    if code == 3:
        raise MemoryError(f"pqlab.{op}: no memory for the kernel's scratch space")
    cause = {1: "a page id lies outside the pool", 2: "lengths exceed what sinks, pages or window can hold"}[code]
    raise ValueError(f"pqlab.{op}: {cause}: {what}")


def compile_flags() -> list[str]:
    """For C++ that runs on this machine."""
    if sys.platform == "win32":
        return ["/O2", "/std:c++17"]
    native = "-march=native" if _machine_is_x86() else "-mcpu=native"
    flags = ["-O3", native, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    # Only compiled with OpenMP, not linked: the symbols are then found in the libgomp that torch has loaded, and there
    # is one pool of threads, which torch.set_num_threads governs. A second libgomp would fight it for the cores.
    return [*flags, "-fopenmp"] if torch.backends.openmp.is_available() and sys.platform != "darwin" else flags


def link_flags() -> list[str]:
    return ["-Wl,--no-as-needed"] if sys.platform.startswith("linux") else []  # keep torch's libraries, and so libgomp


def _machine_is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
