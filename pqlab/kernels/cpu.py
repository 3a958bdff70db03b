"""The C++ backend for CPU tensors: hands pointers and sizes to `csrc/cpu` through ctypes.

The kernels know nothing of torch. So they build in seconds, without torch's headers, and one source fits every torch
version. Handing over the arguments costs a few microseconds warm and many times that between the layers of a model, so
that calls like an earlier one go through `caller`, or through `cpu_again` where that could not be built.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import Backend, BuildStatus, version
from .build import Extension, wait_for_all
from .caller import Caller, Launch
from .checks import BOOK_DTYPES
from .cpu_again import CALL, repeat

SOURCES = Path(__file__).parent / "csrc" / "cpu"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_STEP_AT = tuple(range(0, 64, 8))  # `caller.ADDRESSES` are the first fields of struct pq_decode_args, in their order
_DECODE_AT = (*_STEP_AT[:5], -1, -1, -1)
_DECODE_HELD = struct.Struct("=18Q18q")  # the second part of struct pq_decode_args of csrc/cpu/api.h, after `CALL`
_ENCODE_ARGS = struct.Struct("=4Q11q")  # struct pq_encode_args
_FLUSH = 4  # pq_result: stored, and some row flushes now
_KEYS, _VALUES, _SPAN_KEYS = range(3)  # pq_use
_VECTORS = (torch.float32, torch.bfloat16, torch.float16)
_NO_MAPS = (None,) * 7  # and neither fit nor turns
_APPEND_ARGS = struct.Struct("=8Q5q")  # struct pq_append_args
_CELL_SUMS_ARGS = struct.Struct("=6Q6q")  # struct pq_cell_sums_args
_PLACES = {"decode": (0, 11), "encode": (0, 2), "encode_pages_": (1, 5), "append_": (6, 13), "cell_sums": (0, 4)}
"""Where the arguments of an operation hold its vectors, and where its (one or two) nbits begin."""
_IDENTITY = "the identity codec (nbits 32) runs on the reference only"


@dataclass(eq=False, slots=True)
class Held:
    """What decode takes of the tensors that stay from call to call."""

    packed: bytes  # the second part of struct pq_decode_args
    addresses: tuple[int, ...]  # of those tensors, without those that are None
    versions: tuple[int, int]  # of the codebooks
    owners: tuple[Any, ...]  # of the memory that it points to, or weak references to them
    in_place: bool  # it points to the given sinks and windows, not to copies of them
    alive: bool = True  # all the tensors that it is of are


class CpuBackend(Backend):
    """Args: `machine`, what the compiler may use (`-march`); "native" is this machine's best."""

    name = "cpu"
    fuses_step = True
    remedy = "Install a C++ compiler and ninja; pqlab.backend_report() shows what the build said."

    def __init__(self, machine: str = "native") -> None:
        self._library: Any = None
        self._books: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}  # prepared codebooks, with the tensors they are of
        self._held: dict[tuple[int, ...], Held] = {}
        self._like_lse: dict[tuple[int, ...], Tensor] = {}
        sources = sorted(SOURCES.glob("*.cpp"))
        flags = compile_flags(machine)
        self.caller = Caller(self._forget_held)
        self.extension = Extension(
            "pqlab_cpu", sources, self._load, cflags=flags, ldflags=link_flags(), then=self.caller.extension.start
        )

    def _load(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for function in (library.pq_decode, library.pq_encode, library.pq_append, library.pq_cell_sums):
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        library.pq_isa.restype = ctypes.c_char_p
        library.pq_book_bytes.argtypes, library.pq_book_bytes.restype = [ctypes.c_int64] * 4, ctypes.c_int64
        library.pq_prepare_book.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 6
        library.pq_prepare_book.restype = None
        self._library = library

    def _forget_held(self) -> None:
        """Have every call checked once more: what repeats them has changed."""
        for held in tuple(self._held.values()):
            held.alive = False
        self._held.clear()

    @property
    def isa(self) -> str:
        """Vector instructions in the library: "avx512 vbmi", "avx2" or "generic"; "" before it is loaded."""
        return self._library.pq_isa().decode() if self._library is not None else ""

    def status(self) -> BuildStatus:
        return self.extension.status

    def builds(self) -> dict[str, BuildStatus]:
        return {self.name: self.status(), "caller": self.caller.extension.status}

    def wait(self, timeout: float | None = None) -> bool:
        return wait_for_all([self.extension, self.caller.extension], timeout)

    def unable(self, op: str, args: tuple[Any, ...]) -> str | None:
        if self._library is None:
            return self.extension.status.detail
        vectors, first_nbits = _PLACES[op]
        if args[vectors].dtype not in _VECTORS:
            return f"{args[vectors].dtype} runs on the reference only"
        return _IDENTITY if 32 in args[first_nbits : first_nbits + 2] else None

    def decode(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor,
        k_books: Tensor, v_books: Tensor, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor,
        k_nbits: int, v_nbits: int, scale: float, span: int = 0, offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        held = self._hold(
            (k_pages, v_pages, k_books, v_books, sink_k, sink_v, window_k, window_v, *_NO_MAPS, offsets), k_nbits,
            v_nbits, span, len(q) if span else 0,
        )  # fmt: skip
        out, lse, code = self._attend(held, scale, (_plain(q),), (_plain(page_table), _plain(lengths)))
        if code:
            _fail("decode", code, f"lengths {lengths.tolist()}, {page_table.shape[1]} pages a row of {len(k_pages)}")
        return out, lse

    def step_(
        self, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor, k_pages: Tensor, v_pages: Tensor,
        k: Tensor, v: Tensor, page_table: Tensor, before: Tensor, after: Tensor, k_books: Tensor, v_books: Tensor,
        k_nbits: int, v_nbits: int, q: Tensor, scale: float, *maps_and_span: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One call, maps included; two where a row flushes, with the encoding between them."""
        *maps, span = maps_and_span
        held = self._hold(
            (k_pages, v_pages, k_books, v_books, sink_k, sink_v, window_k, window_v, *maps, None), k_nbits, v_nbits,
            span, len(maps[-1]) if span else 0,
        )  # fmt: skip
        if not held.in_place:
            _in_place("step_", sink_k=sink_k, sink_v=sink_v, window_k=window_k, window_v=window_v)
        q, tables = _plain(q), (_plain(page_table), _plain(after))
        out, lse, code = self._attend(held, scale, (q, _plain(k), _plain(v)), (*tables, _plain(before)))
        if code == _FLUSH:
            self._flush(window_k, k_pages, page_table, before, after, k_books, k_nbits)
            self._flush(window_v, v_pages, page_table, before, after, v_books, v_nbits)
            out, lse, code = self._attend(held, scale, (q,), tables)
        if code:
            about = f"{page_table.shape[1]} pages a row of {len(k_pages)}, {window_k.shape[2]} window slots"
            _fail("step_", code, f"lengths {before.tolist()} to {after.tolist()}, {about}, {sink_k.shape[2]} sinks")
        return out, lse

    def _flush(
        self, window: Tensor, pages: Tensor, page_table: Tensor, before: Tensor, after: Tensor, books: Tensor,
        nbits: int,
    ) -> None:  # fmt: skip
        reference.flush_(window, pages, page_table, before.tolist(), after.tolist(), books, nbits, self.encode_pages_)

    def _attend(
        self, held: Held, scale: float, vectors: tuple[Tensor, ...], tables: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, int]:
        """(out, lse, result of the kernel) of contiguous tensors.

        Args:
            vectors: q; for a step also the new k and v.
            tables: page table and lengths; for a step also the lengths before.
        """
        q, page_table = vectors[0], tables[0]
        shape = q.shape[-4:-1]
        like = self._like_lse.get(shape)
        if like is None:
            like = self._like_lse[shape] = torch.empty(shape)
        one = q if q.dim() == 4 else q[0]  # of the spans' queries
        out, lse = torch.empty_like(one), torch.empty_like(like)  # the same call twice is the quickest
        new = (*[x.data_ptr() for x in vectors[1:]], *[x.data_ptr() for x in tables[2:]]) or (0, 0, 0)
        call = CALL.pack(
            q.data_ptr(), page_table.data_ptr(), tables[1].data_ptr(), out.data_ptr(), lse.data_ptr(), *new,
            *shape, page_table.shape[1], _DTYPES[q.dtype], scale,
        )  # fmt: skip
        return out, lse, self._library.pq_decode(call + held.packed)

    def _hold(self, tensors: tuple[Tensor | None, ...], k_nbits: int, v_nbits: int, span: int, num_spans: int) -> Held:
        """What decode takes of the tensors that stay from call to call, noted at the first one.

        The last eight are maps, the keys' scale and shift, turns and offsets. Between two calls a model streams all of
        its weights, and then every question to a tensor costs a microsecond.
        """
        key = (k_nbits, v_nbits, span, num_spans, *map(id, tensors))
        held = self._held.get(key)
        addresses = tuple(t.data_ptr() for t in tensors if t is not None)
        versions = version(tensors[2]), version(tensors[3])
        if held is not None and held.addresses == addresses and held.versions == versions:
            return held
        k_pages, v_pages, k_books, v_books, sink_k, _, window_k, _, *maps, _, _, _, _ = tensors
        _, heads, tiles, k_m, _ = k_pages.shape
        keys = _SPAN_KEYS if span else _KEYS
        images = self._prepared(k_books, k_nbits, keys), self._prepared(v_books, v_nbits, _VALUES)
        plain = [None if t is None else _plain(t) for t in tensors]
        packed = _DECODE_HELD.pack(
            *[0 if t is None else t.data_ptr() for t in (*plain, *images)], heads, k_books.shape[1] * k_books.shape[3],
            tiles, len(k_pages), k_m, k_nbits, v_pages.shape[3], v_nbits, sink_k.shape[2], window_k.shape[2],
            span, num_spans, *[0 if t is None else _DTYPES[t.dtype] for t in (k_books, v_books, *maps)],
        )  # fmt: skip
        in_place = all(x is y for x, y in zip(plain[4:8], tensors[4:8], strict=True))
        held = Held(packed, addresses, versions, (*plain, *images), in_place)
        if all(x is y for x, y in zip(plain, tensors, strict=True)):

            def forget(_: Any) -> None:
                held.alive, held.owners = False, ()
                if self._held.get(key) is held:
                    del self._held[key]

            self._held[key] = held
            held.owners = (*images, *[weakref.ref(t, forget) for t in tensors if t is not None])
        return held

    def again(self, op: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        if op == "decode":
            q, page_table, nbits, scale, at = args[0], args[3], args[11:13], args[13], _DECODE_AT
            new_shape, tensors, span, num_spans = None, (*args[1:3], *args[5:11], *_NO_MAPS, None), args[14], 0
            if span:  # a query for every span: chunks of a few tokens, which are seldom
                return None
        elif op == "step_":
            q, page_table, nbits, scale, at = args[15], args[8], args[13:15], args[16], _STEP_AT
            new_shape, tensors = args[6].shape, (*args[4:6], *args[11:13], *args[:4], *args[17:24], None)
            span, num_spans = args[24], len(args[23]) if args[24] else 0
        else:
            return None
        held = self._held.get((*nbits, span, num_spans, *map(id, tensors)))
        if held is None:
            return None
        kernel, dtype_code = self._library.pq_decode, _DTYPES[q.dtype]
        call = CALL.pack(*(0,) * 8, *q.shape[:3], page_table.shape[1], dtype_code, scale)
        launch = Launch(ctypes.cast(kernel, ctypes.c_void_p).value, call + held.packed, at)
        compiled = self.caller.repeat(held, held.versions, op, args, (launch,))
        return compiled or repeat(held, kernel, op, q, new_shape, dtype_code, span)

    def _prepared(self, books: Tensor, nbits: int, use: int) -> Tensor:
        """The books as the kernel reads them, made once for a tensor and use; empty when it reads them as they are."""
        key = (books.data_ptr(), use, books.shape, version(books))
        kept = self._books.get(key)
        if kept is not None and kept[0]() is books:
            return kept[1]
        heads, m, _, dm = books.shape
        dtype = _DTYPES[books.dtype]
        each = self._library.pq_book_bytes(m * dm, nbits, use, dtype)
        image = torch.empty(heads * each, dtype=torch.uint8)
        if each:
            plain = _plain(books.float())
            self._library.pq_prepare_book(plain.data_ptr(), image.data_ptr(), heads, m, nbits, dm, use, dtype)

        def stays(other: tuple[Any, ...]) -> bool:
            tensor = self._books[other][0]()
            return tensor is not None and (tensor is not books or other[1] != use)

        self._books = {other: kept for other, kept in self._books.items() if stays(other)}
        self._books[key] = (weakref.ref(books), image)
        return image

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

    def cell_sums(self, x: Tensor, weights: Tensor, codes: Tensor, num_centroids: int) -> tuple[Tensor, Tensor, Tensor]:
        groups, n, head_dim = x.shape
        m = codes.shape[2]
        count = torch.empty((groups, m, num_centroids), dtype=torch.float64)
        total, squares = (torch.empty((*count.shape, head_dim // m), dtype=torch.float64) for _ in "ts")
        x, weights, codes = _plain(x), _plain(weights), _plain(codes)
        code = self._library.pq_cell_sums(
            _CELL_SUMS_ARGS.pack(
                *[t.data_ptr() for t in (x, weights, codes, count, total, squares)],
                groups, n, head_dim, m, num_centroids, _DTYPES[x.dtype],
            )
        )  # fmt: skip
        if code:
            _fail("cell_sums", code, "")
        return count, total, squares

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
            self._flush(window_k, k_pages, page_table, before, after, k_books, k_nbits)
            self._flush(window_v, v_pages, page_table, before, after, v_books, v_nbits)
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


def compile_flags(machine: str = "native") -> list[str]:
    """For C++ that runs on this machine, or on a lesser one (`-march`)."""
    if sys.platform == "win32":
        return ["/O2", "/std:c++17"]
    target = f"-march={machine}" if _machine_is_x86() else f"-mcpu={machine}"
    flags = ["-O3", target, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    # Only compiled with OpenMP, not linked: the symbols are then found in the libgomp that torch has loaded, and there
    # is one pool of threads, which torch.set_num_threads governs. A second libgomp would fight it for the cores.
    return [*flags, "-fopenmp"] if torch.backends.openmp.is_available() and sys.platform != "darwin" else flags


def link_flags() -> list[str]:
    return ["-Wl,--no-as-needed"] if sys.platform.startswith("linux") else []  # keep torch's libraries, and so libgomp


def _machine_is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
