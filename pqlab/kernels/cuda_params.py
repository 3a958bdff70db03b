"""What the CUDA launchers are given: structs of pointers, strides and sizes, packed as csrc/cuda declares them.

Tensors come as the kernels read them (dense where they say so); whatever has to be copied for that was copied before.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caller import offsets

_DECODE = struct.Struct("<Q3qQQQi4xQQQQ3qQQ3qi4xQQQQQQ5iIif2IqQf3i")  # struct DecodeParams of csrc/cuda/pq_shape.cuh
_ENCODE = struct.Struct("<Q2qQQQ5i4x")  # struct EncodeParams of csrc/cuda/pq_encode.cuh
_APPEND_SIDE = struct.Struct("<QQQ2qQQQi4x")  # struct AppendSide of csrc/cuda/pq_append_shape.cuh
_APPEND = struct.Struct("<QQQ10iQQ3qQQQQQQ8i8f")  # struct AppendParams, after its two sides


def _place(packed: struct.Struct, before: str) -> int:
    """Offset of the field of a struct that comes after the fields `before`."""
    assert packed.format.startswith("<" + before)
    return struct.calcsize("<" + before)


_DECODE_AT = {
    "q": 0, "page_table": _place(_DECODE, "Q3qQQ"), "lengths": _place(_DECODE, "Q3qQQQi4x"),
    "out": _place(_DECODE, "Q3qQQQi4xQQQQ3qQQ3qi4x"), "lse": _place(_DECODE, "Q3qQQQi4xQQQQ3qQQ3qi4xQ"),
}  # fmt: skip
_SIDES, _TOKEN = 2 * _APPEND_SIDE.size, _place(_APPEND_SIDE, "QQ")
_APPEND_AT = {
    "page_table": _SIDES, "before": _SIDES + _place(_APPEND, "Q"), "lengths": _SIDES + _place(_APPEND, "QQ"),
    "q": _SIDES + _place(_APPEND, "QQQ10iQ"),
}  # fmt: skip
APPEND_AT = (
    offsets(k=_TOKEN, v=_TOKEN + _APPEND_SIDE.size, **_APPEND_AT),
    offsets(v=_TOKEN, **_APPEND_AT),
)
"""`Launch.offsets` of the launches that `append_params` gives, the second one being of values alone."""


class Held(NamedTuple):
    """What a call of decode needs beside its arguments."""

    books: Tensor  # both codebooks, prepared
    partial: Tensor  # parts of rows that several blocks share
    tickets: Tensor  # int32, zero before and after
    splits: int  # blocks that share the rows of a kv head and a group of query vectors
    mapped_q: int = 0  # where queries lie in code space, dense, if append_ has mapped them
    unmapped: int = 0  # room for results in code space
    home: Tensor | None = None  # the map of the results
    spans: int = 1  # for which there are queries
    offsets: int = 0  # where append_ leaves what is to be added to the scores of a span, if it does


class Maps(NamedTuple):
    """What append_ maps, beside the tokens that it stores."""

    k: Tensor | None
    v: Tensor | None
    query: Tensor | None  # transposed
    q: Tensor
    to: int
    k_scale: Tensor | None  # with their shift: what mapped keys are fitted by
    k_shift: Tensor | None
    turns: Tensor | None = None  # by which keys of a span, and queries for it, are turned back ahead of their maps
    span: int = 0  # in tokens
    offsets: int = 0  # `Held.offsets`


def asked_parts(head_dim: int) -> int:
    """Parts of which an offset that append_ leaves is the sum, as csrc/cuda/pq_asked.cuh has it."""
    return 1 if head_dim <= 64 else 2 if head_dim <= 128 else 4


def decode_params(args: tuple[Any, ...], held: Held, out: int, lse: int) -> bytes:
    """Args: `args`, those of `ops.decode`; out, lse: addresses for the results, dense."""
    (q, k_pages, v_pages, page_table, lengths, _, _, sink_k, sink_v, window_k, window_v, _, _, scale, span,
     offsets) = args  # fmt: skip
    batch, query_heads, steps, head_dim = q.shape[-4:]
    _, heads, tiles, _, _ = k_pages.shape
    asked, of_span = (q.data_ptr(), *q.stride()[-4:-1]), q.stride(0)
    if held.mapped_q:
        asked = (held.mapped_q, query_heads * steps * head_dim, steps * head_dim, head_dim)
        of_span = batch * asked[1]
    more, parts = ((held.offsets, 1.0), asked_parts(head_dim)) if held.offsets else ((_pointer(offsets), 1 / scale), 1)
    return _DECODE.pack(
        *asked, k_pages.data_ptr(), v_pages.data_ptr(),
        page_table.data_ptr(), page_table.stride(0), lengths.data_ptr(), held.books.data_ptr(),
        sink_k.data_ptr(), sink_v.data_ptr(), *sink_k.stride()[:3],
        window_k.data_ptr(), window_v.data_ptr(), *window_k.stride()[:3], max(1, window_k.shape[2]),
        out, lse, held.partial.data_ptr(), held.tickets.data_ptr(), _pointer(held.home), held.unmapped,
        batch, heads, query_heads // heads, steps, tiles, 0 if tiles == 1 else -(-(2**32) // tiles), held.splits,
        scale * math.log2(math.e), 0, 0, of_span, *more, held.spans, _log2(span), parts,
    )  # fmt: skip


def decode_at(held: Held) -> tuple[int, ...]:
    """`Launch.offsets` of `decode_params`; q that append has mapped always lies in the same place."""
    return offsets(**_DECODE_AT | ({"q": -1} if held.mapped_q else {}))


def append_params(
    args: tuple[Any, ...], tickets: Tensor | None, maps: Maps | None
) -> Iterator[tuple[tuple[int, int], bytes]]:
    """M and nbits of the kernel that each launch takes, and its parameters: one launch where both sides have the same.

    Args:
        args: those of `ops.append_`; tickets: to be set to zero.
    """
    (sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
     k_nbits, v_nbits) = args  # fmt: skip
    batch, heads, slots, head_dim = window_k.shape
    k_map, v_map, query_map, q, mapped_q, *fit, turns, span, more = maps or Maps(None, None, None, k, 0, None, None)
    asked = (q.data_ptr(), *q.stride()[:3], _pointer(query_map), mapped_q, *map(_pointer, (*fit, turns)), more,
             q.shape[1] // heads, q.shape[2], 1 if turns is None else len(turns), _log2(span))  # fmt: skip
    k_side, v_side = (
        _APPEND_SIDE.pack(sink.data_ptr(), window.data_ptr(), x.data_ptr(), *x.stride()[:2], books.data_ptr(),
                          pages.data_ptr(), _pointer(matrix), matrix is not None and matrix.dtype == torch.int8)
        for sink, window, x, books, pages, matrix in (
            (sink_k, window_k, k, k_books, k_pages, k_map), (sink_v, window_v, v, v_books, v_pages, v_map),
        )
    )  # fmt: skip
    of_k, of_v = (k_pages.shape[3], k_nbits), (v_pages.shape[3], v_nbits)
    together = of_k == of_v
    launches = [(of_k, k_side + v_side, True), (of_v, v_side + v_side, False)]
    for (m, nbits), sides, mapping in launches[: 2 - together]:
        yield (
            (m, nbits),
            sides
            + _APPEND.pack(
                page_table.data_ptr(), before.data_ptr(), after.data_ptr(), page_table.stride(0), 1 + together,
                batch, heads, head_dim, m, sink_k.shape[2], slots, k_pages.shape[2],
                0 if tickets is None else tickets.numel(), _pointer(tickets), *asked, mapping, *(0,) * 11,
            ),
        )  # fmt: skip


def encode_params(x: Tensor, books: Tensor, codes: Tensor, ids: Tensor | None, first_slot: int, tiles: int) -> bytes:
    """Args: as `CudaBackend._encode` has them."""
    groups, n, _ = x.shape
    return _ENCODE.pack(
        x.data_ptr(), *x.stride()[:2], books.data_ptr(), codes.data_ptr(), _pointer(ids), groups, n, books.shape[1],
        first_slot, tiles,
    )  # fmt: skip


def _log2(span: int) -> int:
    return max(span.bit_length() - 1, 0)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
