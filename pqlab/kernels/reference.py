"""Plain torch of every fused operation: slow, short, and what the kernels are tested against.

Sums are in float32 (float64 when the query is float64), whatever the dtype of the inputs. Layouts are those of
`paging.layout`; the operations are described in `kernels.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..paging.layout import TILE, read_pages, write_pages

IDENTITY_NBITS = 32
"""The identity codec: a code is the bit pattern of a float32, M is the head size, and no codebook is read."""

_CHUNK_BYTES = 64 << 20  # of the largest temporary
_MANY = 256  # vectors a head

MIN_SPAN = 64
"""The fewest code indexes that may share an anchor: kernels take a query for each of them."""


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_books: Tensor,
    v_books: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    k_nbits: int,
    v_nbits: int,
    scale: float,
    span: int = 0,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over sinks, coded tokens and window; see `kernels.ops.decode`. Codes are dequantized first."""
    asked = q if span else q[None]
    more = asked.new_zeros(asked.shape[:-1], dtype=torch.float32) if offsets is None else offsets
    q = asked[0]
    batch, _, _, head_dim = q.shape
    page_size = k_pages.shape[2] * TILE
    sinks, coded, window = lengths.long().unbind(1)  # each [B]
    offset = torch.arange(sink_k.shape[2], device=q.device)
    out, lse = attend_dense(q, sink_k, sink_v, offset < sinks[:, None], scale, keep_precision=True)
    lse = _moved(lse, more[0])

    slots = window_k.shape[2]
    if slots:
        age = (torch.arange(slots, device=q.device) - coded[:, None]) % slots  # 0 is the oldest window token
        valid = age < window[:, None]
        for j in range(slots // span + 2 if span else 1):  # spans that a window may reach into
            if span:
                number = coded // span + j
                place = number.clamp_max(len(asked) - 1), torch.arange(batch, device=q.device)
                queries, moved = asked[place], more[place]
                of_span = valid & ((coded[:, None] + age) // span == number[:, None])
            else:
                queries, moved, of_span = q, more[0], valid
            found, its_lse = attend_dense(queries, window_k, window_v, of_span, scale, keep_precision=True)
            out, lse = merge(out, lse, found, _moved(its_lse, moved))

    num_pages = page_table.shape[1]
    if q.device.type == "cpu" and batch:  # reading the lengths costs nothing here, on a GPU it would stop the stream
        num_pages = min(num_pages, -(-int(coded.max()) // page_size))
    heads = k_pages.shape[1]
    page_floats = batch * heads * page_size * head_dim
    step = span or max(1, _CHUNK_BYTES // (4 * max(1, page_floats))) * page_size  # tokens at a time
    for begin in range(0, num_pages * page_size, step):
        number = min(begin // span, len(asked) - 1) if span else 0
        end = min(begin + step, num_pages * page_size)
        first = begin // page_size  # pages need not begin where spans do
        ids = page_table[:, first : -(-end // page_size)].clamp_min(0)
        part = slice(begin - first * page_size, end - first * page_size)
        k = dequantize(read_pages(k_pages, ids, k_nbits), k_books)[:, :, part]
        v = dequantize(read_pages(v_pages, ids, v_nbits), v_books)[:, :, part]
        valid = torch.arange(begin, end, device=q.device) < coded[:, None]
        found, its_lse = attend_dense(asked[number], k, v, valid, scale, keep_precision=True)
        out, lse = merge(out, lse, found, _moved(its_lse, more[number]))
    return out.to(q.dtype), lse


def _moved(lse: Tensor, offsets: Tensor) -> Tensor:
    """What lse becomes where all scores of a query are moved alike; nothing to see stays so, whatever is added."""
    return torch.where(lse == float("-inf"), lse, lse + offsets)


def dequantize(codes: Tensor, books: Tensor) -> Tensor:
    """float32 [..., H, n, d] of codes [..., H, n, M]; books [H, M, C, dm] (not read for int32 identity codes)."""
    if codes.dtype == torch.int32:
        return codes.contiguous().view(torch.float32)
    heads, m, _, _ = books.shape
    head = torch.arange(heads, device=codes.device)[:, None, None]
    subspace = torch.arange(m, device=codes.device)
    found = books[head, subspace, codes.long()].flatten(-2)  # [..., H, n, M, dm] -> [..., H, n, d]
    return found.float() if books.dtype == torch.float16 else found


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, *, keep_precision: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention over exact keys, with the log-sum-exp that `merge` needs.

    Args:
        q: [B, Hq, S, d]; k, v: [B, H, n, d], where H divides Hq.
        valid: bool [B, n], or [B, S, n] for a mask per query; None means all. What is invalid is never read
            into a sum, so it may hold anything (NaN too) where a whole key is invalid.
        scale: factor of the scores.
        keep_precision: return `out` in the precision of the sums instead of q's dtype.

    Returns:
        out [B, Hq, S, d] and lse [B, Hq, S] (natural logarithm). A query with no valid key: out 0, lse -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, query_heads, steps, head_dim = q.shape
    heads, n = k.shape[1], k.shape[2]
    group = query_heads // heads
    k, v = k.to(dtype), v.to(dtype)
    grouped = q.to(dtype).reshape(batch, heads, group * steps, head_dim)
    scores = grouped @ k.mT * scale  # [B, H, group * S, n]
    if valid is not None:
        per_query = valid if valid.dim() == 3 else valid[:, None]  # [B, S or 1, n]
        used = per_query.any(1)
        v = v.masked_fill(~used[:, None, :, None], 0)
        scores = scores.view(batch, heads, group, steps, n)
        scores = scores.masked_fill(~per_query[:, None, None], float("-inf")).view(batch, heads, group * steps, n)
    if n:
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0)
    else:
        top = scores.new_zeros(*scores.shape[:-1], 1)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1)
    lse = (total.log() + top).view(batch, query_heads, steps)
    out = out.view(batch, query_heads, steps, head_dim)
    return (out if keep_precision else out.to(q.dtype)), lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

    out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b), lse = log(e^lse_a + e^lse_b); out [..., d],
    lse [...]. Both sides empty (-inf): out 0, lse -inf. `out` has out_a's dtype.
    """
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == float("-inf"), 0)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    norm = total.masked_fill(total == 0, 1)
    out = (weight_a / norm)[..., None] * out_a + (weight_b / norm)[..., None] * out_b
    return out.to(out_a.dtype), total.log() + top


def turn_back(x: Tensor, turns: Tensor) -> Tensor:
    """Vectors turned back by angles as a rotary embedding turns them, its pairs being (i, i + d/2); in x's dtype.

    Args:
        x: [..., d]; turns: float32 [..., 2, d/2], cosines and sines, whose leading dimensions are broadcast to x's.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = x.to(dtype).chunk(2, -1)
    cos, sin = turns.unbind(-2)
    return torch.cat((low * cos + high * sin, high * cos - low * sin), -1).to(x.dtype)


def apply_map(x: Tensor, matrix: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """x [..., g*H, n, d] times matrix [H, d, d], in x's dtype; the g query heads of a group follow each other.

    The matrix is float16, float32, or int8 in units of 1/127. Sums are float32 (float64 for x of float64); of many
    vectors of 16 bits on a GPU they are made by its tensor cores, in which eight bits lose nothing.

    Args:
        scale, shift: float32 [..., H, d]; what the product is multiplied with, and what is added then, if anything.
    """
    heads, d, _ = matrix.shape
    if x.dim() < 3 or x.shape[-3] % heads or x.shape[-1] != d:
        raise ValueError(f"expected [..., a multiple of {heads} heads, n, {d}], got {list(x.shape)}")
    y = _product(x, matrix)
    if scale is not None:
        y = y.unflatten(-3, (heads, -1)) * scale[..., None, None, :]  # [..., H, g, n, d]
        y = (y if shift is None else y + shift[..., None, None, :]).flatten(-4, -3)
    return y.to(x.dtype)


def times_heads(x: Tensor, vectors: Tensor) -> Tensor:
    """float32 [..., g*H, n]: products of x [..., g*H, n, d] with the vector of each kv head, [..., H, d]."""
    heads = vectors.shape[-2]
    by_head = x.float().unflatten(-3, (heads, -1)) * vectors[..., None, None, :]
    return by_head.sum(-1).flatten(-3, -2)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """The product of `apply_map`, in the dtype of its sums, or in x's where they come so."""
    heads, d, _ = matrix.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_cuda and x.shape[-2] >= _MANY and x.dtype in (torch.float16, torch.bfloat16):
        if matrix.dtype == torch.int8:
            rows = x.unflatten(-3, (heads, -1)).movedim(-4, 0)
            flat = rows.reshape(heads, -1, d)
            flat = torch.baddbmm(flat.new_empty(()), flat, matrix.to(x.dtype), beta=0, alpha=1 / 127)
            return flat.view(rows.shape).movedim(0, -4).flatten(-4, -3)
        if matrix.dtype == x.dtype:
            dtype = x.dtype
    y = x.to(dtype)
    if matrix.dtype == torch.int8:
        y = y / 127  # at decode x has fewer elements to divide than the matrix
    matrix = matrix.to(dtype)
    if math.prod(x.shape[:-3]) == 1:  # one sequence: no dimension has to be moved
        return torch.bmm(y.reshape(heads, -1, d), matrix).view(x.shape)
    rows = y.unflatten(-3, (heads, -1)).movedim(-4, 0)  # [H, ..., g, n, d]: a broadcast would copy the matrices instead
    out = torch.bmm(rows.reshape(heads, -1, d), matrix).view(rows.shape)
    return out.movedim(0, -4).flatten(-4, -3)


def encode(x: Tensor, books: Tensor) -> Tensor:
    """Nearest centroid of every subvector by squared distance; see `kernels.ops.encode`.

    The differences are squared and summed as they are: |c|^2 - 2xc would save time but loses the small distances
    to rounding, and a vector that is a centroid must find itself.
    """
    groups, n, _ = x.shape
    _, m, num_centroids, dm = books.shape
    codes = torch.empty(groups, n, m, dtype=torch.uint8, device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = books.to(dtype)[:, None].unbind(-1)  # dm times [G, 1, M, C]
    step = max(1, _CHUNK_BYTES // (8 * max(1, groups * m * num_centroids)))
    for first in range(0, n, step):
        part = x[:, first : first + step].to(dtype).unflatten(-1, (m, dm)).unbind(-1)  # dm times [G, step, M]
        distance = (part[0][..., None] - columns[0]).square_()
        for values, column in zip(part[1:], columns[1:], strict=True):
            distance += (values[..., None] - column).square_()
        codes[:, first : first + step] = distance.argmin(-1)
    return codes


def cell_sums(x: Tensor, weights: Tensor, codes: Tensor, num_centroids: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, weighted vectors and weighted squares summed over cells in float64; see `kernels.ops.cell_sums`."""
    groups, _, head_dim = x.shape
    m = codes.shape[2]
    cell = codes.movedim(-1, 1).long()  # [G, M, n]
    weight = weights.double()[:, None].expand(-1, m, -1)
    columns = x.unflatten(-1, (m, -1)).permute(0, 2, 3, 1).double()  # [G, M, dm, n]

    def summed(values: Tensor) -> Tensor:
        sums = columns.new_zeros(groups, m, head_dim // m, num_centroids)
        return sums.scatter_add_(-1, cell[:, :, None].expand_as(values), values).mT.contiguous()

    count = columns.new_zeros(groups, m, num_centroids).scatter_add_(-1, cell, weight)
    weighted = columns * weight[:, :, None]
    return count, summed(weighted), summed(weighted.mul_(columns))


def append_(
    sink_k: Tensor,
    sink_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    before: Tensor,
    after: Tensor,
    k_books: Tensor,
    v_books: Tensor,
    k_nbits: int,
    v_nbits: int,
    encode_pages_: Callable[..., None] | None = None,
) -> None:
    """Store one new token a row and flush what leaves the window; see `kernels.ops.append_`."""
    num_sinks, slots = sink_k.shape[2], window_k.shape[2]
    rows_before, rows_after = before.tolist(), after.tolist()
    for row, (old, new) in enumerate(zip(rows_before, rows_after, strict=True)):
        token = sum(old)
        if sum(new) == token:
            continue
        place = token if token < num_sinks else (token - num_sinks) % slots
        into = (sink_k, sink_v) if token < num_sinks else (window_k, window_v)
        for target, x in zip(into, (k, v), strict=True):
            target[row, :, place] = x[row, :, 0]
    flush_(window_k, k_pages, page_table, rows_before, rows_after, k_books, k_nbits, encode_pages_)
    flush_(window_v, v_pages, page_table, rows_before, rows_after, v_books, v_nbits, encode_pages_)


def flush_(
    window: Tensor,
    pages: Tensor,
    page_table: Tensor,
    before: list[list[int]],
    after: list[list[int]],
    books: Tensor,
    nbits: int,
    encode_pages_: Callable[..., None] | None = None,
) -> None:
    """One side of the flush in `append_`: ring tokens [before.coded, after.coded) of each row become codes."""
    slots, page_size = window.shape[2], pages.shape[2] * TILE
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        first, end = old[1], new[1]
        if end > first:
            ring = torch.arange(first, end, device=window.device) % slots
            ids = page_table[row, first // page_size : -(-end // page_size)]
            x = window[row].index_select(1, ring)
            (encode_pages_ or globals()["encode_pages_"])(pages, x, books, ids, first % page_size, nbits)


def encode_pages_(pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int) -> None:
    """Encode x [H, n, d] and write the codes into consecutive slots of pages; see `kernels.ops.encode_pages_`."""
    if nbits == IDENTITY_NBITS:
        codes = x.float().contiguous().view(torch.int32)
    else:
        codes = encode(x, books)
    write_pages(pages, codes, page_ids, first_slot, nbits)
