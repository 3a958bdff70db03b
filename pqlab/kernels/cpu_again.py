"""Calls of the CPU kernel like an earlier one, without the questions that were answered then.

Between two calls a model streams all of its weights, and what Python touches next comes from memory: a question to a
tensor then costs a microsecond instead of a tenth, and the whole of a checked call as much as attention over a thousand
tokens. What is asked here every time is what a caller changes from step to step, and where the rest lies. `caller`
asks the same in C++; this is for where that is not there.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cpu import Held

CALL = struct.Struct("=8Q5qd")
"""The first part of struct pq_decode_args (csrc/cpu/api.h), 8 bytes a field: what calls differ in."""

_address = Tensor.data_ptr
_seen: tuple[Any, ...] = (0,)  # rows, page table and lengths that were looked at last; all layers of a step share them


def repeat(
    held: Held,
    kernel: Callable[[bytes], int],
    op: str,
    q: Tensor,
    new_shape: torch.Size | None,
    dtype_code: int,
    span: int,
) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """`op` ("decode" or "step_") of that operation's arguments; it returns None where they are not like those that
    `held` and the rest are of, or the kernel wants more to be done.

    Args:
        held: of the tensors that stay from step to step.
        q, span: of the call that is to be repeated; new_shape: of its k and v.
    """
    shape, dtype, batch = q.shape, q.dtype, q.shape[0]
    rows, like_lse, address = shape[:3], torch.empty(shape[:3]), _address
    # a tensor of inference mode counts no versions
    counted = [i for i, version in enumerate(held.versions) if version >= 0]

    def run(vectors, tables, tensors, scale):
        for x in vectors:
            wanted = shape if x is vectors[0] else new_shape
            if not (x.shape == wanted and x.dtype is dtype and x.is_cpu and x.is_contiguous()):
                return None
        if not (held.alive and (*map(address, tensors),) == held.addresses):
            return None
        for i in counted:
            if tensors[2 + i]._version != held.versions[i]:
                return None
        known = batch == _seen[0] and len(tables) < len(_seen) and all(map(operator.is_, tables, _seen[1:]))
        if not (known or _fit(tables, batch)):
            return None
        out, lse = torch.empty_like(vectors[0]), torch.empty_like(like_lse)  # the same call twice is the quickest
        places = (*map(address, (vectors[0], *tables[:2], out, lse, *vectors[1:], *tables[2:])), 0, 0, 0)[:8]
        call = CALL.pack(*places, *rows, tables[0].shape[1], dtype_code, scale)
        return None if kernel(call + held.packed) else (out, lse)

    if op == "decode":

        def decode(
            q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v,
            k_nbits, v_nbits, scale, span, offsets,
        ):  # fmt: skip
            tensors = (k_pages, v_pages, k_books, v_books, sink_k, sink_v, window_k, window_v)
            return None if span else run((q,), (page_table, lengths), tensors, scale)

        return decode

    def step_(
        sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
        k_nbits, v_nbits, q, scale, *maps_and_span,
    ):  # fmt: skip
        *maps, now_span = maps_and_span
        if now_span != span:
            return None
        tensors = (k_pages, v_pages, k_books, v_books, sink_k, sink_v, window_k, window_v)
        return run((q, k, v), (page_table, after, before), tensors + tuple(filter(_given, maps)), scale)

    return step_


def _given(x: Any) -> bool:
    return x is not None


def _fit(tables: tuple[Tensor, ...], batch: int) -> bool:
    """Whether page table and lengths are what `ops` asks for."""
    global _seen
    for i, x in enumerate(tables):
        if not (x.dtype == torch.int32 and x.is_cpu and x.is_contiguous() and x.dim() == 2 and x.shape[0] == batch):
            return False
        if i and x.shape[1] != 3:
            return False
    _seen = (batch, *tables)
    return True
