"""The fused operations: what they compute, their schemas, and how a call gets to its backend (`dispatch`).

They live in `torch.ops.pqlab` and are defined from Python, so that they exist without any compiler. An ordinary call
goes past torch's dispatcher, and one like an earlier one past the checks, too.

Symbols: B sequences, Hq query heads, H kv heads (H divides Hq), S queries a head, d head size, M subspaces,
C = 2**nbits centroids, dm = d / M, W slots of the window. A row's tokens lie in this order::

    [0, sinks) exact | [sinks, sinks + coded) codes in pages | [sinks + coded, sinks + coded + window) exact ring

Behind the sinks tokens have code indexes, from 0 on. Keys may be anchored (`quantization.anchors`): those with code
indexes [r * span, (r + 1) * span) are then turned back by one position, and have a query of their own, number r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch import run, run_again, run_first

__all__ = ["OPS", "append_", "cell_sums", "decode", "encode", "encode_pages_", "step_"]

OPS = ("decode", "encode", "encode_pages_", "append_", "step_", "cell_sums")

_DECODE_ARGS, _STEP_ARGS = 16, 25

_is_traced = torch.compiler.is_dynamo_compiling
"""Else an ordinary tensor needs nothing of torch's dispatcher, which takes 15 us for a dozen tensors."""


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
    """Attention of new queries over everything a paged PQ cache holds, read from the codes.

    out = softmax(scale * q k^T) v over sinks, coded tokens and window of the query's row; there is no causal mask
    among stored tokens, and what lies outside a row's lengths is never read into a sum.

    Args:
        q: [B, Hq, S, d], float32, bfloat16 or float16; query heads h*g .. h*g+g-1 read kv head h (g = Hq / H).
        k_pages, v_pages: uint8 [max_pages, H, tiles, M, 2 * nbits], `PoolLayout.view`.
        page_table: int32 [B, n]; the u-th coded token lies in page `page_table[row, u // page_size]`.
        lengths: int32 [B, 3]: sinks, coded, window of each row, in tokens.
        k_books, v_books: float32 or float16 [H, M, C, dm].
        sink_k, sink_v: [B, H, num_sinks, d] in q's dtype.
        window_k, window_v: [B, H, W, d] in q's dtype, a ring: the token with code index u lies in slot u % W.
        k_nbits, v_nbits: 1 to 8, or 32 for the identity codec (books are not read).
        scale: factor of the scores, usually d ** -0.5.
        span: code indexes that share an anchor, a power of two, at least `MIN_SPAN`; 0 without anchors. With them q is
            [R, B, Hq, S, d]: the token with code index u is asked by q[u // span], sinks by q[0]. R * span reaches
            every row's last token.
        offsets: float32 [R, B, Hq, S], dense, only with a span: added to the scores, behind the factor, of the tokens
            that q[r] asks.

    Returns:
        out [B, Hq, S, d] in q's dtype and lse float32 [B, Hq, S], the natural logarithm of the sum of the
        exponentials (float64 for a float64 q). A row that stores nothing: out 0, lse -inf.

    Raises:
        ValueError: shapes that do not fit each other. KernelMissingError: a forced backend cannot run.
    """
    args = (
        q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v,
        k_nbits, v_nbits, scale, span, offsets,
    )  # fmt: skip
    if type(q) is not Tensor or _is_traced():
        return torch.ops.pqlab.decode.default(*args)
    like = ("decode", id(k_pages), id(window_k), k_nbits, v_nbits)
    return run_again(like, args) or run_first("decode", like, checks.decode, q, args)


def encode(x: Tensor, books: Tensor) -> Tensor:
    """Index of the nearest centroid of every subvector (squared distance, ties to the lowest index).

    Args:
        x: [G, n, d]; books: float32 or float16 [G, M, C, dm] with M * dm = d and C <= 256; G is any grouping.

    Returns:
        uint8 [G, n, M].
    """
    return torch.ops.pqlab.encode.default(x, books)


def cell_sums(x: Tensor, weights: Tensor, codes: Tensor, num_centroids: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a step of k-means needs of every cell, the weighted vectors of one code.

    Args:
        x: [G, n, d]; weights: float32 [G, n]; G is any grouping.
        codes: uint8 [G, n, M], all below num_centroids; M divides d.
        num_centroids: C, 1 to 256.

    Returns:
        float64 count [G, M, C], the sum of the weights, and total and squares [G, M, C, d/M], the weighted sums of
        the vectors and, axis by axis, of their squares. An empty cell has zeros.

    Raises:
        ValueError: shapes that do not fit each other, or (on the CPU) a code that names no centroid.
    """
    return torch.ops.pqlab.cell_sums.default(x, weights, codes, num_centroids)


def encode_pages_(pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int) -> None:
    """Encode tokens and write the codes into consecutive slots of pages, in place; other slots keep their codes.

    Args:
        pages: uint8 [max_pages, H, tiles, M, 2 * nbits], a view of the pool; mutated.
        x: [H, n, d]; books: float32 or float16 [H, M, C, dm].
        page_ids: integer [num_pages]: the tokens fill these pages in order, from `first_slot` of the first.
        nbits: 1 to 8, or 32 for the identity codec.
    """
    torch.ops.pqlab.encode_pages_.default(pages, x, books, page_ids, first_slot, nbits)


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
) -> None:
    """Store one new token a row, in place, and encode the oldest window tokens of rows that flush in this step.

    A token goes to its sink or to its slot of the ring; then codes [before.coded, after.coded) of the row are read
    from the ring and written to the pages. Tensors are those of `decode`.

    Args:
        k, v: [B, H, 1, d], the new token of each row, in the dtype of the buffers.
        before, after: int32 [B, 3]: sinks, coded, window of each row before and after; a row whose sum does not
            change brings no token (a pad).
    """
    op = torch.ops.pqlab.append_.default if type(k) is not Tensor or _is_traced() else _append
    op(
        sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
        k_nbits, v_nbits,
    )  # fmt: skip


def step_(
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
    q: Tensor,
    scale: float,
    k_forward: Tensor | None = None,
    k_backward: Tensor | None = None,
    v_forward: Tensor | None = None,
    v_backward: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_shift: Tensor | None = None,
    turns: Tensor | None = None,
    span: int = 0,
) -> tuple[Tensor, Tensor]:
    """One layer of a decode step: `append_`, then `decode` with the lengths `after`.

    One operation, so that a backend can let the first prepare the second, and half the calls for Python. With maps
    (`quantization.codec`) k, v, q and the result are in the head space, and what is stored is in code space: k and v
    go in as x @ forward[h], q asks as q @ backward[h]^T of the keys, and out @ backward[h] of the values comes out.

    Behind their map, keys may be fitted to the sequence. Row b then stores (k @ k_forward[h]) * k_scale[b, h] +
    k_shift[b, h] and asks (q @ k_backward[h]^T) / k_scale[b, h]. The shift adds the same number to all scores of a
    query: its lse grows by that, out stays.

    Anchored keys are turned back in front of their map, k and q by the same angles: row b stores k turned by turns[r],
    r being its code index // span (a sink as it is), and its queries are asked turned by every turns[r] in turn. What
    the shift adds is then another number for every span, and is taken from the scores again.

    Args:
        k_forward, v_forward: [H, d, d], float16, float32 or int8 in units of 1/127; None is no map.
        k_backward, v_backward: float16 or float32 [H, d, d], the inverses; of a side both or neither.
        k_scale, k_shift: float32 [B, H, d], dense, no scale 0; both or neither, and only with a map of the keys. They
            are read anew at every call: a caller changes them where they lie.
        turns: float32 [R, 2, d/2], dense: cosines and sines of the anchors' angles (`reference.turn_back`), turns[0] of
            none; with a map of the keys and a span, that of `decode`, only.

    Returns:
        out [B, Hq, S, d] and lse [B, Hq, S] of `decode`.

    Raises:
        ValueError: shapes that do not fit each other. KernelMissingError: a forced backend cannot run.
    """
    args = (
        sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
        k_nbits, v_nbits, q, scale, k_forward, k_backward, v_forward, v_backward, k_scale, k_shift, turns, span,
    )  # fmt: skip
    if type(q) is not Tensor or _is_traced():
        return torch.ops.pqlab.step_.default(*args)
    like = ("step_", id(k_pages), id(window_k), k_nbits, v_nbits)
    return run_again(like, args) or run_first("step_", like, checks.step, k, args)


# -- torch.library ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("pqlab", "DEF")  # must live as long as the process
_library.define(
    "decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, Tensor k_books, "
    "Tensor v_books, Tensor sink_k, Tensor sink_v, Tensor window_k, Tensor window_v, int k_nbits, int v_nbits, "
    "float scale, int span=0, Tensor? offsets=None) -> (Tensor out, Tensor lse)"
)
_library.define("encode(Tensor x, Tensor books) -> Tensor")
_library.define(
    "cell_sums(Tensor x, Tensor weights, Tensor codes, int num_centroids) "
    "-> (Tensor count, Tensor total, Tensor squares)"
)
_library.define(
    "encode_pages_(Tensor(a!) pages, Tensor x, Tensor books, Tensor page_ids, int first_slot, int nbits) -> ()"
)
_library.define(
    "append_(Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) window_k, Tensor(d!) window_v, Tensor(e!) k_pages, "
    "Tensor(f!) v_pages, Tensor k, Tensor v, Tensor page_table, Tensor before, Tensor after, Tensor k_books, "
    "Tensor v_books, int k_nbits, int v_nbits) -> ()"
)
_library.define(
    "step_(Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) window_k, Tensor(d!) window_v, Tensor(e!) k_pages, "
    "Tensor(f!) v_pages, Tensor k, Tensor v, Tensor page_table, Tensor before, Tensor after, Tensor k_books, "
    "Tensor v_books, int k_nbits, int v_nbits, Tensor q, float scale, Tensor? k_forward=None, "
    "Tensor? k_backward=None, Tensor? v_forward=None, Tensor? v_backward=None, Tensor? k_scale=None, "
    "Tensor? k_shift=None, Tensor? turns=None, int span=0) -> (Tensor out, Tensor lse)"
)


# The dispatcher leaves out what is the default.
def _whole_decode(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args, *(0, None)[len(args) - _DECODE_ARGS :]) if len(args) < _DECODE_ARGS else args


def _whole_step(args: tuple[Any, ...]) -> tuple[Any, ...]:
    missing = _STEP_ARGS - len(args)
    return (*args, *(None,) * (missing - 1), 0) if missing else args


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    args = _whole_decode(args)
    checks.decode(*args)
    return run("decode", args[0].device.type, args)


def _encode(*args: Any) -> Tensor:
    checks.encode(*args)
    return run("encode", args[0].device.type, args)


def _cell_sums(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    checks.cell_sums(*args)
    checks.cells_exist(*args[2:])
    return run("cell_sums", args[0].device.type, args)


def _encode_pages(*args: Any) -> None:
    checks.encode_pages(*args)
    run("encode_pages_", args[0].device.type, args)


def _append(*args: Any) -> None:
    checks.append(*args)
    run("append_", args[6].device.type, args)


def _step(*args: Any) -> tuple[Tensor, Tensor]:
    args = _whole_step(args)
    checks.step(*args)
    return run("step_", args[6].device.type, args)


# Plain `impl` costs 4 us a call where torch.library.custom_op costs several times that.
_library.impl("decode", _decode, "CompositeExplicitAutograd")
_library.impl("encode", _encode, "CompositeExplicitAutograd")
_library.impl("cell_sums", _cell_sums, "CompositeExplicitAutograd")
_library.impl("encode_pages_", _encode_pages, "CompositeExplicitAutograd")
_library.impl("append_", _append, "CompositeExplicitAutograd")
_library.impl("step_", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("pqlab::decode", lib=_library)
def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    checks.decode(*_whole_decode(args))
    return _decode_results(args[0])


def _decode_results(q: Tensor) -> tuple[Tensor, Tensor]:
    shape, lse_dtype = q.shape[-4:], torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(shape), q.new_empty(shape[:3], dtype=lse_dtype)


@torch.library.register_fake("pqlab::encode", lib=_library)
def _encode_fake(x: Tensor, books: Tensor) -> Tensor:
    checks.encode(x, books)
    return x.new_empty((x.shape[0], x.shape[1], books.shape[1]), dtype=torch.uint8)


@torch.library.register_fake("pqlab::cell_sums", lib=_library)
def _cell_sums_fake(x: Tensor, weights: Tensor, codes: Tensor, num_centroids: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.cell_sums(x, weights, codes, num_centroids)
    shape = (x.shape[0], codes.shape[2], num_centroids)
    count = x.new_empty(shape, dtype=torch.float64)
    return count, *(count.new_empty(*shape, x.shape[2] // shape[1]) for _ in "ts")


@torch.library.register_fake("pqlab::encode_pages_", lib=_library)
def _encode_pages_fake(*args: Any) -> None:
    checks.encode_pages(*args)


@torch.library.register_fake("pqlab::append_", lib=_library)
def _append_fake(*args: Any) -> None:
    checks.append(*args)


@torch.library.register_fake("pqlab::step_", lib=_library)
def _step_fake(*args: Any) -> tuple[Tensor, Tensor]:
    checks.step(*_whole_step(args))
    return _decode_results(args[15])
