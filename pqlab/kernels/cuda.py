"""The CUDA backend: hands pointers and sizes to the kernels of `csrc/cuda` through ctypes.

Every configuration that is met is compiled for itself, once, and cached (`build.Extension`); until it is there, and for
what has no kernel, the reference runs, which the report shows. A call allocates its results (and room for the encoding
of a long prompt), copies nothing and never waits for the GPU, so that CUDA graphs can hold it. Workspaces and prepared
codebooks are made at the first call with them: warm up before capturing, as graphs ask for anyway.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..paging.layout import TILE
from . import reference
from .backend import Backend, BuildStatus, StepShape, append_part, decode_part, in_code_space, version
from .build import Extension, wait_for_all
from .caller import Alive, Caller, Launch
from .cuda_config import Configuration, DecodeConfig, EncodeConfig, compile_flags, vectors_per_block
from .cuda_memory import PreparedBooks, Workspaces, check
from .cuda_params import APPEND_AT, Held, Maps, append_params, asked_parts, decode_at, decode_params, encode_params

_BOOKS_AT = {"decode": (5, 6), "encode": (1,), "encode_pages_": (2,), "append_": (11, 12)}  # of the arguments
_MAX_STEPS = 16  # query vectors a kv head: above, reading the codes once for four of them does not pay
_MAX_TOKENS = 65000 * 32  # of a row: the kernel shares a row's chunks in 32-bit arithmetic


def backend(caller: Caller) -> CudaBackend:
    """The backend of this process; raises when torch sees no device."""
    torch.cuda.get_device_properties(0)
    return CudaBackend(caller)


class _Kernel:
    """One compiled configuration: its library once it is built, and what `unable` says until then."""

    def __init__(self, config: Configuration) -> None:
        self.library: Any = None
        self.reason = config.unsupported()
        self.extension: Extension | None = None
        if self.reason is None:
            self.extension = Extension(
                config.name, [config.source], self._load, cuda_cflags=compile_flags(config), with_cuda=True
            )
            self.extension.start()

    def _load(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name in ("pqlab_decode", "pqlab_prepare_books", "pqlab_encode", "pqlab_append"):
            function = getattr(library, name, None)
            if function is not None:
                function.restype = ctypes.c_char_p
        if hasattr(library, "pqlab_encode"):
            library.pqlab_encode_room.restype = ctypes.c_int64
        if hasattr(library, "pqlab_decode"):
            info = (ctypes.c_int * 6)()
            library.pqlab_decode_info(info)
            library.vectors, _, _, library.book_bytes, library.part_floats, library.tickets = info
        self.library = library

    def unable(self) -> str | None:
        if self.library is not None:
            return None
        return self.reason if self.extension is None else self.extension.status.detail


class CudaBackend(Backend):
    """Args: `caller`, what repeats calls; without it, every call is checked and packed."""

    name = "cuda"
    remedy = "Install nvcc (CUDA toolkit) and ninja; pqlab.backend_report() shows what the build said."

    def __init__(self, caller: Caller | None = None) -> None:
        self._caller = caller
        self._kernels: dict[Configuration, _Kernel] = {}
        self._devices: dict[int, tuple[int, int, int]] = {}  # compute capability, shared memory, multiprocessors
        self._books, self._workspaces = PreparedBooks(), Workspaces()

    # -- builds ----------------------------------------------------------------------------------------------------

    def status(self) -> BuildStatus:
        """Of the newest build: "none" before the first call, since a configuration is built when it is met."""
        built = [k.extension.status for k in self._kernels.values() if k.extension is not None]
        for state in ("building", "failed"):
            for status in built:
                if status.state == state:
                    return status
        return built[-1] if built else BuildStatus("none", "configurations are built when they are met")

    def wait(self, timeout: float | None = None) -> bool:
        kernels = list(self._kernels.values())  # another thread may meet one more
        return wait_for_all([k.extension for k in kernels if k.extension is not None], timeout)

    def kernel(self, config: Configuration) -> _Kernel:
        """The kernel of a configuration, or of what fits in its place; its build starts when it is first asked for."""
        if config not in self._kernels:
            self._kernels[config] = _Kernel(config.fitting())
        return self._kernels[config]

    def _device(self, x: Tensor) -> tuple[int, int, int]:
        index = x.device.index
        if index not in self._devices:
            p = torch.cuda.get_device_properties(index)
            memory = getattr(p, "shared_memory_per_block_optin", 0)
            self._devices[index] = (10 * p.major + p.minor, memory, p.multi_processor_count)
        return self._devices[index]

    def _decode_kernel(self, args: tuple[Any, ...]) -> _Kernel:
        q, k_pages, v_pages, k_nbits, v_nbits = args[0], args[1], args[2], args[11], args[12]
        arch, memory, _ = self._device(q)
        query_heads, steps, head_dim = q.shape[-3:]  # for every span, or before that
        vectors, anchored = vectors_per_block(query_heads // k_pages.shape[1], steps), args[14] > 0
        k_m, v_m = k_pages.shape[3], v_pages.shape[3]
        return self.kernel(DecodeConfig(head_dim, k_m, k_nbits, v_m, v_nbits, q.dtype, vectors, arch, memory, anchored))

    def _encode_kernel(self, x: Tensor, m: int, nbits: int) -> _Kernel:
        return self.kernel(EncodeConfig(x.shape[-1] // m, nbits, x.dtype, self._device(x)[0]))

    def unable(self, op: str, args: tuple[Any, ...]) -> str | None:
        if op == "cell_sums":  # has no kernel to be built
            return None
        if any(args[i].dtype != torch.float32 for i in _BOOKS_AT[op]):
            return "codebooks that are not float32 (PQCodec.to makes them so)"
        if op == "decode":
            q, k_pages, table, scale = args[0], args[1], args[3], args[13]
            if q.shape[-3] // k_pages.shape[1] * q.shape[-2] > _MAX_STEPS:
                return f"more than {_MAX_STEPS} query vectors a kv head"
            if table.shape[1] * k_pages.shape[2] * TILE > _MAX_TOKENS:
                return "page tables of more than two million tokens a row"
            if not scale > 0 or not (k_pages.is_contiguous() and args[2].is_contiguous()):
                return "a scale that is not positive, or pages that are not dense"
            return self._decode_kernel(args).unable()
        if op == "encode":
            x, books = args
            if books.shape[2] not in (16, 256):
                return "codebooks that are not of 16 or 256 centroids"
            return self._encode_kernel(x, books.shape[1], books.shape[2].bit_length() - 1).unable()
        if op == "encode_pages_":
            pages, x, _, _, _, nbits = args
            if not pages.is_contiguous():
                return "pages that are not dense"
            return self._encode_kernel(x, pages.shape[3], nbits).unable()
        sides = ((args[4], args[6], args[13]), (args[5], args[7], args[14]))
        if not all(args[i].is_contiguous() for i in range(6)):
            return "buffers that are not dense"
        reasons = [self._encode_kernel(x, p.shape[3], n).unable() for p, x, n in sides]  # both builds start
        return next(filter(None, reasons), None)

    def refuses(self, device: torch.device, step: StepShape) -> str | None:
        arch, memory, _ = self._device(torch.empty(0, device=device))
        d, k_m, k_nbits, v_m, v_nbits, group, dtype, anchored = step
        vectors = vectors_per_block(group, 1)
        wanted: list[Configuration] = [
            DecodeConfig(d, k_m, k_nbits, v_m, v_nbits, dtype, vectors, arch, memory, anchored),
            *(EncodeConfig(d // m, nbits, dtype, arch) for m, nbits in ((k_m, k_nbits), (v_m, v_nbits))),
        ]
        found = [self.kernel(config) for config in wanted]
        for kernel in found:
            if kernel.extension is not None:
                kernel.extension.wait()
        return next(filter(None, (kernel.unable() for kernel in found)), None)

    # -- operations ------------------------------------------------------------------------------------------------

    def step_(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Append sets decode's tickets to zero: in a graph that saves a kernel a layer."""
        maps, fit, anchors = args[17:21], args[21:23], args[23:]
        if any(x is not None and x.dtype == torch.float32 for x in maps):  # kept so only where float16 overflows
            append, decode, home = in_code_space(args)
            self.append_(*append)
            out, lse = self.decode(*decode)
            return (out if home is None else reference.apply_map(out, home)), lse
        k_forward, k_backward, v_forward, v_backward = (None if x is None else x.contiguous() for x in maps)
        call, q = decode_part(args), args[15]
        held = self._hold_step(call, k_backward, v_backward, fit[1], anchors[0])
        todo = Maps(k_forward, v_forward, k_backward, _dense_rows(q), held.mapped_q, *fit, *anchors, held.offsets)
        self.append_(*append_part(args), tickets=held.tickets, maps=todo)
        return self.decode(*call, held=held)

    def decode(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor,
        k_books: Tensor, v_books: Tensor, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor,
        k_nbits: int, v_nbits: int, scale: float, span: int = 0, offsets: Tensor | None = None,
        held: Held | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`held`: what the call needs beside its arguments, if the caller has it."""
        args = (q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v,
                k_nbits, v_nbits, scale, span, offsets)  # fmt: skip
        library = self._decode_kernel(args).library
        stream = torch.cuda.current_stream(q.device).cuda_stream
        held = held or self._hold(args, len(q) if span else 1)
        if not held.mapped_q:
            q = _dense_rows(q)
        out = torch.empty(q.shape[-4:], dtype=q.dtype, device=q.device)
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=q.device)
        dense = _dense((q, *args[1:]))
        params = decode_params(dense, held, out.data_ptr(), lse.data_ptr())
        with torch.cuda.device(q.device):
            check("decode", library.pqlab_decode(params, ctypes.c_void_p(stream)))
        return out, lse

    def encode(self, x: Tensor, books: Tensor) -> Tensor:
        groups, n, _ = x.shape
        _, m, num_centroids, _ = books.shape
        codes = torch.empty((groups, n, m), dtype=torch.uint8, device=x.device)
        self._encode(x, books, codes, None, 0, 1, num_centroids.bit_length() - 1)
        return codes

    def encode_pages_(
        self, pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int
    ) -> None:
        ids = page_ids.to(device=x.device, dtype=torch.int32).contiguous()
        self._encode(x, books, pages, ids, first_slot, pages.shape[2], nbits)

    def _encode(
        self, x: Tensor, books: Tensor, codes: Tensor, ids: Tensor | None, first_slot: int, tiles: int, nbits: int
    ) -> None:
        x, books = _dense_rows(x), books.contiguous()
        library = self._encode_kernel(x, books.shape[1], nbits).library
        params = encode_params(x, books, codes, ids, first_slot, tiles)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        with torch.cuda.device(x.device):
            room = torch.empty(library.pqlab_encode_room(params), dtype=torch.uint8, device=x.device)
            message = library.pqlab_encode(params, ctypes.c_void_p(room.data_ptr()), ctypes.c_void_p(stream))
            check("encode", message)

    def append_(
        self, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor, k_pages: Tensor, v_pages: Tensor,
        k: Tensor, v: Tensor, page_table: Tensor, before: Tensor, after: Tensor, k_books: Tensor, v_books: Tensor,
        k_nbits: int, v_nbits: int, tickets: Tensor | None = None, maps: Maps | None = None,
    ) -> None:  # fmt: skip
        dense = (sink_k, sink_v, window_k, window_v, k_pages, v_pages, _dense_last(k), _dense_last(v),
                 _dense_last(page_table), *(x.contiguous() for x in (before, after, k_books, v_books)),
                 k_nbits, v_nbits)  # fmt: skip
        stream = torch.cuda.current_stream(k.device).cuda_stream
        for (m, nbits), params in append_params(dense, tickets, maps):
            library = self._encode_kernel(k, m, nbits).library
            with torch.cuda.device(k.device):
                check("append_", library.pqlab_append(params, ctypes.c_void_p(stream)))

    def again(self, op: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The launches of this call through `caller`, with the same workspace on the same stream; None for a call that
        needed copies of its tensors or is part of a graph."""
        if self._caller is None or op not in ("decode", "step_") or not self._caller.is_there():
            return None
        stores = op == "step_"
        call, maps, fit, anchors = args, (), (), ()
        if stores:
            call, maps, fit, anchors = decode_part(args), args[17:21], args[21:23], args[23:]
        elif args[14]:  # the caller knows queries of one span only
            return None
        q, page_table, lengths, k_books, v_books = call[0], *call[3:7]
        lasting = (*call[1:3], *call[5:11], *(x for x in (*maps, *fit, *anchors[:1]) if x is not None))
        changing = (q, page_table, lengths, *((args[6], args[7], args[9]) if stores else ()))
        if not all(x.is_contiguous() for x in (*lasting, *changing)) or not all(map(operator.is_, _dense(call), call)):
            return None
        with torch.cuda.device(q.device):
            if torch.cuda.is_current_stream_capturing():
                return None
        if any(x is not None and x.dtype == torch.float32 for x in maps):  # they go through torch
            return None
        launches = []
        if stores:
            k_forward, k_backward, v_forward, v_backward = maps
            held = self._hold_step(call, k_backward, v_backward, fit[1], anchors[0])
            todo = Maps(k_forward, v_forward, k_backward, q, held.mapped_q, *fit, *anchors, held.offsets)
            packed = append_params(append_part(args), held.tickets, todo)
            for ((m, nbits), params), at in zip(packed, APPEND_AT, strict=False):  # one launch or two
                launches.append(Launch(_address(self._encode_kernel(q, m, nbits).library.pqlab_append), params, at))
        else:
            held = self._hold(call, 1)
        library = self._decode_kernel(call).library
        launches.append(Launch(_address(library.pqlab_decode), decode_params(call, held, 0, 0), decode_at(held)))
        stream = torch.cuda.current_stream(q.device).cuda_stream, _address(library.pqlab_is_capturing)
        versions = version(k_books), version(v_books)
        return self._caller.repeat(Alive(lasting, held), versions, op, args, tuple(launches), stream)

    def _hold_step(
        self, call: tuple[Any, ...], k_backward: Tensor | None, v_backward: Tensor | None, k_shift: Tensor | None,
        turns: Tensor | None,
    ) -> Held:  # fmt: skip
        """`_hold` of the decode that follows an append."""
        spans = 1 if turns is None else len(turns)
        held = self._hold(call, spans, zero_tickets=False, maps=True)._replace(home=v_backward)
        if k_backward is None:
            held = held._replace(mapped_q=0)
        return held if turns is not None and k_shift is not None else held._replace(offsets=0)

    def _hold(self, args: tuple[Any, ...], spans: int, zero_tickets: bool = True, maps: bool = False) -> Held:
        """What a call of decode needs beside its arguments; `spans`: for which there are queries."""
        q, k_pages, k_books, v_books = args[0], args[1], args[5], args[6]
        library = self._decode_kernel(args).library
        batch, query_heads, steps, _ = q.shape[-4:]
        heads = k_pages.shape[1]
        blocks = -(-query_heads // heads * steps // library.vectors)
        splits = max(1, self._device(q)[2] // (heads * blocks))
        stream = torch.cuda.current_stream(q.device).cuda_stream
        books = self._books.of(library, k_books, v_books, stream)
        floats = heads * blocks * (splits + batch) * library.part_floats
        each = q.numel() * q.element_size() if maps else 0  # of queries for a span and of results in code space
        count = batch * heads * blocks * library.tickets
        vectors = spans * batch * query_heads * steps * asked_parts(q.shape[-1]) if maps else 0
        room = floats + (spans + 1) * each // 4 + vectors
        partial, tickets = self._workspaces.of(q, room, count, stream, zero_tickets)
        held = Held(books, partial, tickets, splits, spans=spans)
        if not maps:
            return held
        asked = partial.data_ptr() + 4 * floats
        unmapped = asked + spans * each
        return held._replace(mapped_q=asked, unmapped=unmapped, offsets=unmapped + each)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _dense(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of decode as its kernel reads them; q may also be what append has mapped."""
    q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v, *rest = args
    return (q, k_pages, v_pages, _dense_last(page_table), lengths.contiguous(), k_books, v_books,
            *_alike(sink_k, sink_v), *_alike(window_k, window_v), *rest)  # fmt: skip


def _dense_rows(x: Tensor) -> Tensor:
    """Last dimension dense and pairs of elements aligned; a copy only where a caller passes something else."""
    aligned = x.data_ptr() % (2 * x.element_size()) == 0 and all(s % 2 == 0 for s in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the same strides."""
    k, v = _dense_rows(k), _dense_rows(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())
