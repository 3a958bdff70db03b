"""Do the arguments of an operation fit each other? What does not would make a kernel read foreign memory.

The test that runs before every call compares the shapes in one expression; only when it fails are they looked at one
by one to find the sentence for the error.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..paging.layout import TILE
from .backend import append_part, decode_part
from .reference import MIN_SPAN

BOOK_DTYPES = (torch.float32, torch.float16)
"""Of centroids and maps; what is computed with them is float32 either way."""


def decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor,
    k_books: Tensor, v_books: Tensor, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor,
    k_nbits: int, v_nbits: int, scale: float, span: int, offsets: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError for what `ops.decode` cannot take."""
    if span:
        _check_span("decode", span)
        if q.dim() != 5 or not len(q):
            _fail("decode", f"with a span q must be [R, B, Hq, S, d], got {[*q.shape]}")
        if offsets is not None and not (
            offsets.dtype == torch.float32 and offsets.shape == q.shape[:-1] and offsets.is_contiguous()
        ):
            _fail("decode", f"offsets must be float32 {[*q.shape[:-1]]}, dense, got {offsets.dtype} {[*offsets.shape]}")
        q = q[0]
    elif offsets is not None:
        _fail("decode", "offsets are of spans: give one, or no offsets")
    batch, query_heads, _, head_dim = _dims(q, 4)
    max_pages, heads, tiles, _, _ = _dims(k_pages, 5)
    exact, dtype = (batch, heads, head_dim), q.dtype
    if (
        heads
        and query_heads % heads == 0
        and _pages_fit(k_pages, k_books, k_nbits, heads, head_dim)
        and _pages_fit(v_pages, v_books, v_nbits, heads, head_dim)
        and v_pages.shape[:3] == (max_pages, heads, tiles)
        and page_table.dtype == lengths.dtype == torch.int32
        and _dims(page_table, 2)[0] == batch
        and lengths.shape == (batch, 3)
        and _exact_fit(sink_k, sink_v, exact, dtype)
        and _exact_fit(window_k, window_v, exact, dtype)
    ):
        return
    if q.dim() != 4:
        _fail("decode", f"q must be [B, Hq, S, d], got {[*q.shape]}")
    if not heads or query_heads % heads:
        _fail("decode", f"{query_heads} query heads cannot be shared by {heads} kv heads")
    _explain_pages("decode", "k", k_pages, k_books, k_nbits, heads, head_dim)
    _explain_pages("decode", "v", v_pages, v_books, v_nbits, heads, head_dim)
    _explain_table("decode", page_table, batch)
    if lengths.dtype != torch.int32 or lengths.shape != (batch, 3):
        _fail("decode", f"lengths must be int32 [{batch}, 3], got {lengths.dtype} {[*lengths.shape]}")
    for name, k, v in (("sink", sink_k, sink_v), ("window", window_k, window_v)):
        if not _exact_fit(k, v, exact, dtype):
            want = f"{dtype} (as q is) [{batch}, {heads}, n, {head_dim}]"
            got = f"{k.dtype} {[*k.shape]} and {v.dtype} {[*v.shape]}"
            _fail("decode", f"{name}_k and {name}_v must be {want}, got {got}")
    _fail("decode", f"k pages {[*k_pages.shape]} and v pages {[*v_pages.shape]} differ in pages or tiles")


def encode(x: Tensor, books: Tensor) -> None:
    """Raises ValueError for what `ops.encode` cannot take."""
    groups, _, head_dim = _dims(x, 3)
    book_groups, m, num_centroids, dm = _dims(books, 4)
    if x.dim() != 3 or book_groups != groups or not 1 <= num_centroids <= 256:
        _fail("encode", f"x must be [G, n, d] and books [G, M, C <= 256, dm], got {[*x.shape]} and {[*books.shape]}")
    if m * dm != head_dim:
        _fail("encode", f"{m} subspaces of {dm} dimensions do not make d = {head_dim}")


def cell_sums(x: Tensor, weights: Tensor, codes: Tensor, num_centroids: int) -> None:
    """Raises ValueError for shapes that `ops.cell_sums` cannot take."""
    groups, n, head_dim = _dims(x, 3)
    code_groups, code_n, m = _dims(codes, 3)
    if x.dim() != 3 or codes.dtype != torch.uint8 or (code_groups, code_n) != (groups, n):
        got = f"{[*x.shape]} and {codes.dtype} {[*codes.shape]}"
        _fail("cell_sums", f"x must be [G, n, d] and codes uint8 [G, n, M], got {got}")
    if weights.dtype != torch.float32 or weights.shape != (groups, n):
        _fail("cell_sums", f"weights must be float32 {[groups, n]}, got {weights.dtype} {[*weights.shape]}")
    if m < 1 or head_dim < 1 or head_dim % m:
        _fail("cell_sums", f"{m} subspaces do not divide d = {head_dim}")
    if not 1 <= num_centroids <= 256:
        _fail("cell_sums", f"num_centroids must be 1 to 256, got {num_centroids}")


def cells_exist(codes: Tensor, num_centroids: int) -> None:
    """Raises ValueError for a code that names no centroid, on the CPU: asking a GPU would wait for it."""
    if codes.is_cpu and codes.numel() and num_centroids < 256 and int(codes.max()) >= num_centroids:
        _fail("cell_sums", f"code {int(codes.max())} names none of {num_centroids} centroids")


def encode_pages(pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int) -> None:
    """Raises ValueError for what `ops.encode_pages_` cannot take."""
    if x.dim() != 3:
        _fail("encode_pages_", f"x must be [H, n, d], got {[*x.shape]}")
    heads, n, head_dim = x.shape
    if not _pages_fit(pages, books, nbits, heads, head_dim):
        _explain_pages("encode_pages_", "the", pages, books, nbits, heads, head_dim)
    page_size = pages.shape[2] * TILE
    if page_ids.dim() != 1 or not 0 <= first_slot < page_size or first_slot + n > page_ids.numel() * page_size:
        pages_given = f"{page_ids.numel()} pages of {page_size}"
        _fail("encode_pages_", f"{n} tokens from slot {first_slot} do not fit into {pages_given}")


def append(
    sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor, k_pages: Tensor, v_pages: Tensor,
    k: Tensor, v: Tensor, page_table: Tensor, before: Tensor, after: Tensor, k_books: Tensor, v_books: Tensor,
    k_nbits: int, v_nbits: int,
) -> None:  # fmt: skip
    """Raises ValueError for what `ops.append_` cannot take."""
    batch, heads, _, head_dim = _dims(window_k, 4)
    exact, dtype = (batch, heads, head_dim), k.dtype
    if not _pages_fit(k_pages, k_books, k_nbits, heads, head_dim):
        _explain_pages("append_", "k", k_pages, k_books, k_nbits, heads, head_dim)
    if not _pages_fit(v_pages, v_books, v_nbits, heads, head_dim):
        _explain_pages("append_", "v", v_pages, v_books, v_nbits, heads, head_dim)
    if not k.shape == v.shape == (batch, heads, 1, head_dim):
        _fail("append_", f"k and v must be [{batch}, {heads}, 1, {head_dim}], got {[*k.shape]} and {[*v.shape]}")
    if not (_exact_fit(sink_k, sink_v, exact, dtype) and _exact_fit(window_k, window_v, exact, dtype)):
        got = ", ".join(f"{x.dtype} {[*x.shape]}" for x in (sink_k, sink_v, window_k, window_v))
        _fail("append_", f"sinks and window must be {dtype} (as k is) [{batch}, {heads}, n, {head_dim}], got {got}")
    if not (before.shape == after.shape == (batch, 3) and before.dtype == after.dtype == torch.int32):
        _fail("append_", f"before and after must be int32 [{batch}, 3], got {[*before.shape]} and {[*after.shape]}")
    _explain_table("append_", page_table, batch)


def step(*args: Any) -> None:
    """Raises ValueError for what `ops.step_` cannot take; args are all of its arguments."""
    append(*append_part(args))
    decode(*decode_part(args)[:-2], 0, None)
    batch, heads, _, head_dim = args[2].shape
    for side, forward, backward in (("k", *args[17:19]), ("v", *args[19:21])):
        if forward is None and backward is None:
            continue
        if forward is None or backward is None:
            _fail("step_", f"a map needs both directions: give {side}_forward and {side}_backward, or neither")
        shape = (heads, head_dim, head_dim)
        if forward.shape != shape or backward.shape != shape:
            got = f"{[*forward.shape]} and {[*backward.shape]}"
            _fail("step_", f"{side}_forward and {side}_backward must be {[*shape]}, got {got}")
        if forward.dtype not in (*BOOK_DTYPES, torch.int8) or backward.dtype not in BOOK_DTYPES:
            got = f"{forward.dtype} and {backward.dtype}"
            _fail("step_", f"maps must be float32 or float16 (or forward int8), {side}_forward and _backward are {got}")
    turns, span = args[23:]
    if span or turns is not None:
        _check_span("step_", span)
        if args[17] is None:
            _fail("step_", "turns are of keys in front of their map: give k_forward and k_backward, too")
        want = f"float32 [R, 2, {head_dim // 2}] on {args[6].device}, dense"
        if turns is None:
            _fail("step_", f"span = {span} needs turns, {want}")
        fits = turns.dtype == torch.float32 and turns.dim() == 3 and turns.shape[1:] == (2, head_dim // 2)
        if not (fits and len(turns) and turns.device == args[6].device and turns.is_contiguous()):
            _fail("step_", f"turns must be {want}, got {turns.dtype} {[*turns.shape]} on {turns.device}")
    k_scale, k_shift = args[21:23]
    if k_scale is None and k_shift is None:
        return
    if k_scale is None or k_shift is None:
        _fail("step_", "keys are fitted by two tensors: give k_scale and k_shift, or neither")
    if args[17] is None:
        _fail("step_", "k_scale and k_shift are of keys behind their map: give k_forward and k_backward, too")
    for name, x in (("k_scale", k_scale), ("k_shift", k_shift)):
        fits = x.dtype == torch.float32 and x.shape == (batch, heads, head_dim) and x.device == args[6].device
        if not (fits and x.is_contiguous()):
            want = f"float32 [{batch}, {heads}, {head_dim}] on {args[6].device}, dense"
            got = f"{x.dtype} {[*x.shape]} on {x.device} with strides {[*x.stride()]}"
            _fail("step_", f"{name} must be {want}, got {got}")


def _check_span(op: str, span: int) -> None:
    if span < MIN_SPAN or span & (span - 1):
        _fail(op, f"span must be a power of two, at least {MIN_SPAN}, got {span}")


def _dims(x: Tensor, count: int) -> tuple[int, ...]:
    """The shape, or zeros when it has another number of dimensions: they fit nothing."""
    shape = x.shape
    return shape if len(shape) == count else (0,) * count


def _pages_fit(pages: Tensor, books: Tensor, nbits: int, heads: int, head_dim: int) -> bool:
    _, page_heads, _, m, tile_bytes = _dims(pages, 5)
    if pages.dtype != torch.uint8 or page_heads != heads or tile_bytes != 2 * nbits or not m or head_dim % m:
        return False
    if nbits == 32:
        return m == head_dim
    fits = 1 <= nbits <= 8 and books.shape == (heads, m, 1 << nbits, head_dim // m)
    return fits and books.dtype in BOOK_DTYPES


def _exact_fit(k: Tensor, v: Tensor, batch_heads_dim: tuple[int, int, int], dtype: torch.dtype) -> bool:
    batch, heads, slots, head_dim = _dims(k, 4)
    return k.dtype == v.dtype == dtype and (batch, heads, head_dim) == batch_heads_dim and v.shape == k.shape


def _explain_pages(op: str, side: str, pages: Tensor, books: Tensor, nbits: int, heads: int, head_dim: int) -> None:
    """Raises for pages and books that do not fit; returns when they do."""
    if pages.dtype != torch.uint8 or pages.dim() != 5:
        _fail(op, f"{side} pages must be uint8 [max_pages, H, tiles, M, 2 * nbits], got {pages.dtype} {[*pages.shape]}")
    _, page_heads, _, m, tile_bytes = pages.shape
    if page_heads != heads or tile_bytes != 2 * nbits:
        _fail(op, f"{side} pages {[*pages.shape]} do not have {heads} heads and {2 * nbits} bytes a tile")
    if nbits == 32 and m != head_dim:
        _fail(op, f"the identity codec has one code per dimension, {head_dim}; {side} pages hold {m}")
    if not _pages_fit(pages, books, nbits, heads, head_dim):
        want = (
            f"float32 or float16 {[heads, m, 1 << nbits, head_dim // m]}"
            if 1 <= nbits <= 8 and m
            else "for nbits 1..8 or 32"
        )
        got = f"{books.dtype} {[*books.shape]} and nbits {nbits}"
        _fail(op, f"{side} books must be {want} for pages {[*pages.shape]} and d {head_dim}, got {got}")


def _explain_table(op: str, page_table: Tensor, batch: int) -> None:
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
        _fail(op, f"page_table must be int32 [{batch}, n], got {page_table.dtype} {[*page_table.shape]}")


def _fail(op: str, what: str) -> NoReturn:
    raise ValueError(f"pqlab.{op}: {what}")
