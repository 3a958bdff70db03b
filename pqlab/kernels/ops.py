"""The fused operations: schemas, checks, and the choice of a backend. Nothing else chooses one.

They live in `torch.ops.pqlab` and are defined from Python, so that they exist without any compiler. Every call runs
on the first backend of its device's levels that can run it (CUDA tensors: cuda, reference; CPU tensors: cpu,
reference); which one ran and why is counted (`pqlab.backend_report()`), and a fallback is said once in the log.

Symbols: B sequences, Hq query heads, H kv heads (H divides Hq), S queries a head, d head size, M subspaces,
C = 2**nbits centroids, dm = d / M, W slots of the window. A row's tokens lie in this order::

    [0, sinks) exact | [sinks, sinks + coded) codes in pages | [sinks + coded, sinks + coded + window) exact ring
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelMissingError
from ..paging.layout import TILE
from .backend import Backend, ReferenceBackend, current_setting

log = logging.getLogger("pqlab")

OPS = ("decode", "encode", "encode_pages_", "append_")
LEVELS = {"cuda": ("cuda", "reference"), "cpu": ("cpu", "reference")}
"""Backends by device type, best first; any other device has the reference."""

FIRST_CHOICE = "first choice"

_backends: dict[str, Backend] = {"reference": ReferenceBackend()}
_absent: dict[str, str] = {}  # backend -> why it was never registered
_runs: Counter[tuple[str, str, str]] = Counter()  # (op, backend, reason) -> calls
_last: dict[str, tuple[str, str]] = {}  # op -> (backend, reason) of the latest call


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
) -> tuple[Tensor, Tensor]:
    """Attention of new queries over everything a paged PQ cache holds, read from the codes.

    out = softmax(scale * q k^T) v over sinks, coded tokens and window of the query's row; there is no causal mask
    among stored tokens, and what lies outside a row's lengths is never read into a sum.

    Args:
        q: [B, Hq, S, d], float32, bfloat16 or float16; query heads h*g .. h*g+g-1 read kv head h (g = Hq / H).
        k_pages, v_pages: uint8 [max_pages, H, tiles, M, 2 * nbits], `PoolLayout.view`.
        page_table: int32 [B, n]; the u-th coded token lies in page `page_table[row, u // page_size]`.
        lengths: int32 [B, 3]: sinks, coded, window of each row, in tokens.
        k_books, v_books: float32 [H, M, C, dm].
        sink_k, sink_v: [B, H, num_sinks, d] in q's dtype.
        window_k, window_v: [B, H, W, d] in q's dtype, a ring: the token with code index u lies in slot u % W.
        k_nbits, v_nbits: 1 to 8, or 32 for the identity codec (books are not read).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        out [B, Hq, S, d] in q's dtype and lse float32 [B, Hq, S], the natural logarithm of the sum of the
        exponentials (float64 for a float64 q). A row that stores nothing: out 0, lse -inf.

    Raises:
        ValueError: shapes that do not fit each other. KernelMissingError: a forced backend cannot run.
    """
    return torch.ops.pqlab.decode.default(
        q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v,
        k_nbits, v_nbits, scale,
    )  # fmt: skip


def encode(x: Tensor, books: Tensor) -> Tensor:
    """Index of the nearest centroid of every subvector (squared distance, ties to the lowest index).

    Args:
        x: [G, n, d]; books: float32 [G, M, C, dm] with M * dm = d and C <= 256. G is any grouping, e.g. kv heads.

    Returns:
        uint8 [G, n, M].
    """
    return torch.ops.pqlab.encode.default(x, books)


def encode_pages_(pages: Tensor, x: Tensor, books: Tensor, page_ids: Tensor, first_slot: int, nbits: int) -> None:
    """Encode tokens and write the codes into consecutive slots of pages, in place; other slots keep their codes.

    Args:
        pages: uint8 [max_pages, H, tiles, M, 2 * nbits], a view of the pool; mutated.
        x: [H, n, d]; books: float32 [H, M, C, dm].
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
    torch.ops.pqlab.append_.default(
        sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
        k_nbits, v_nbits,
    )  # fmt: skip


def register_backend(backend: Backend) -> None:
    _backends[backend.name] = backend


def register_absence(name: str, reason: str) -> None:
    """Say why a backend is not there, for reports and errors."""
    _absent[name] = reason


def backends() -> dict[str, Backend]:
    return dict(_backends)


def absences() -> dict[str, str]:
    return dict(_absent)


def runs() -> dict[tuple[str, str, str], int]:
    """Calls so far: (op, backend, reason) -> count."""
    return dict(_runs)


def record(op: str, backend: str, reason: str) -> None:
    """Count a run that did not go through the operations here (the cache's dequantizing fallback)."""
    _runs[(op, backend, reason)] += 1
    _last[op] = (backend, reason)


def chosen(op: str, device_type: str) -> tuple[str, str]:
    """Backend and reason that an ordinary call on this device would get now, without its arguments."""
    backend, reason = _choose(op, device_type, None)
    return backend.name, reason


# -- choice ----------------------------------------------------------------------------------------------------------


def _refusal(name: str, op: str, device_type: str, args: tuple[Any, ...] | None) -> str | None:
    if name != "reference" and name not in LEVELS.get(device_type, ()):
        return f"{name} kernels do not take {device_type} tensors"
    backend = _backends.get(name)
    if backend is None:
        return _absent.get(name, f"there is no {name} backend")
    if args is not None:
        return backend.unable(op, args)
    status = backend.status()
    return None if status.state in ("none", "ready") else status.detail


def _choose(op: str, device_type: str, args: tuple[Any, ...] | None) -> tuple[Backend, str]:
    setting = current_setting()
    if setting.forced:
        return _forced(setting.forced, op, device_type, args), "forced"
    reasons = ""
    for name in LEVELS.get(device_type, ("reference",)):
        why = "forbidden by the setting" if name in setting.forbidden else _refusal(name, op, device_type, args)
        if why is None:
            return _backends[name], reasons or FIRST_CHOICE
        reasons = f"{name}: {why}"
    raise AssertionError("the reference backend refuses nothing")


def _forced(name: str, op: str, device_type: str, args: tuple[Any, ...] | None) -> Backend:
    why = _refusal(name, op, device_type, args)
    if why is not None and name in _backends and args is not None and _backends[name].status().state == "building":
        _backends[name].wait()
        why = _refusal(name, op, device_type, args)
    if why is None:
        return _backends[name]
    remedy = _backends[name].remedy if name in _backends else ""
    raise KernelMissingError(
        f"the backend {name!r} is forced, but {op} cannot run on it: {why}.",
        f'{remedy} Or set PQLAB_BACKEND=auto (pqlab.use_backend("auto")).'.strip(),
    )


def _run(op: str, device_type: str, args: tuple[Any, ...]) -> Any:
    backend, reason = _choose(op, device_type, args)
    key = (op, backend.name, reason)
    if key not in _runs and reason not in (FIRST_CHOICE, "forced"):
        log.warning("%s runs on the %s backend; %s", op, backend.name, reason)
    _runs[key] += 1
    _last[op] = key[1:]
    return getattr(backend, op)(*args)


# -- checks: shapes that do not fit each other would read foreign memory ----------------------------------------------


def _fail(op: str, what: str) -> None:
    raise ValueError(f"pqlab.{op}: {what}")


def _check_pages(op: str, side: str, pages: Tensor, books: Tensor, nbits: int, heads: int, head_dim: int) -> None:
    if pages.dtype != torch.uint8 or pages.dim() != 5:
        _fail(op, f"{side} pages must be uint8 [max_pages, H, tiles, M, 2 * nbits], got {pages.dtype} {[*pages.shape]}")
    _, page_heads, _, m, tile_bytes = pages.shape
    if page_heads != heads or tile_bytes != 2 * nbits:
        _fail(op, f"{side} pages {[*pages.shape]} do not have {heads} heads and {2 * nbits} bytes a tile")
    if nbits == 32:
        if m != head_dim:
            _fail(op, f"the identity codec has one code per dimension, {head_dim}; {side} pages hold {m}")
    elif not 1 <= nbits <= 8 or books.shape != (heads, m, 1 << nbits, head_dim // m) or head_dim % m:
        want = [heads, m, 1 << nbits, head_dim // m] if 1 <= nbits <= 8 else "nbits 1..8 or 32"
        _fail(op, f"{side} books must be {want} for pages {[*pages.shape]}, d {head_dim}, got {[*books.shape]}")


def _check_decode(args: tuple[Any, ...]) -> None:
    q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v, *rest = args
    k_nbits, v_nbits, _ = rest
    if q.dim() != 4:
        _fail("decode", f"q must be [B, Hq, S, d], got {[*q.shape]}")
    batch, query_heads, _, head_dim = q.shape
    heads = k_pages.shape[1] if k_pages.dim() == 5 else 0
    if not heads or query_heads % heads:
        _fail("decode", f"{query_heads} query heads cannot be shared by {heads} kv heads")
    _check_pages("decode", "k", k_pages, k_books, k_nbits, heads, head_dim)
    _check_pages("decode", "v", v_pages, v_books, v_nbits, heads, head_dim)
    if k_pages.shape[2] != v_pages.shape[2] or k_pages.shape[0] != v_pages.shape[0]:
        _fail("decode", f"k pages {[*k_pages.shape]} and v pages {[*v_pages.shape]} differ in pages or tiles")
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
        _fail("decode", f"page_table must be int32 [{batch}, n], got {page_table.dtype} {[*page_table.shape]}")
    if lengths.dtype != torch.int32 or lengths.shape != (batch, 3):
        _fail("decode", f"lengths must be int32 [{batch}, 3], got {lengths.dtype} {[*lengths.shape]}")
    for name, k, v in (("sink", sink_k, sink_v), ("window", window_k, window_v)):
        if k.dim() != 4 or k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != head_dim:
            want = f"[{batch}, {heads}, n, {head_dim}]"
            _fail("decode", f"{name}_k and {name}_v must be {want}, got {[*k.shape]} and {[*v.shape]}")
        if k.dtype != q.dtype or v.dtype != q.dtype:
            _fail("decode", f"{name}_k and {name}_v must be {q.dtype} as q is, got {k.dtype} and {v.dtype}")


def _check_encode(x: Tensor, books: Tensor) -> None:
    if x.dim() != 3 or books.dim() != 4 or books.shape[0] != x.shape[0] or not 1 <= books.shape[2] <= 256:
        _fail("encode", f"x must be [G, n, d] and books [G, M, C <= 256, dm], got {[*x.shape]} and {[*books.shape]}")
    if books.shape[1] * books.shape[3] != x.shape[2]:
        _fail("encode", f"{books.shape[1]} subspaces of {books.shape[3]} dimensions do not make d = {x.shape[2]}")


def _check_encode_pages(args: tuple[Any, ...]) -> None:
    pages, x, books, page_ids, first_slot, nbits = args
    if x.dim() != 3:
        _fail("encode_pages_", f"x must be [H, n, d], got {[*x.shape]}")
    heads, n, head_dim = x.shape
    _check_pages("encode_pages_", "the", pages, books, nbits, heads, head_dim)
    page_size = pages.shape[2] * TILE
    if page_ids.dim() != 1 or not 0 <= first_slot < page_size or first_slot + n > page_ids.numel() * page_size:
        pages_given = f"{page_ids.numel()} pages of {page_size}"
        _fail("encode_pages_", f"{n} tokens from slot {first_slot} do not fit into {pages_given}")


def _check_append(args: tuple[Any, ...]) -> None:
    sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books, *nbits = (
        args
    )
    batch, heads, _, head_dim = window_k.shape
    _check_pages("append_", "k", k_pages, k_books, nbits[0], heads, head_dim)
    _check_pages("append_", "v", v_pages, v_books, nbits[1], heads, v.shape[-1])
    if k.shape != (batch, heads, 1, head_dim) or v.shape[:3] != (batch, heads, 1):
        _fail("append_", f"k and v must be [{batch}, {heads}, 1, d], got {[*k.shape]} and {[*v.shape]}")
    if any(x.dtype != k.dtype for x in (sink_k, sink_v, window_k, window_v, v)):
        _fail("append_", f"sinks and window must be {k.dtype} as k and v are")
    if before.shape != (batch, 3) or after.shape != (batch, 3) or {before.dtype, after.dtype} != {torch.int32}:
        _fail("append_", f"before and after must be int32 [{batch}, 3], got {[*before.shape]} and {[*after.shape]}")
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
        _fail("append_", f"page_table must be int32 [{batch}, n], got {page_table.dtype} {[*page_table.shape]}")


# -- torch.library ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("pqlab", "DEF")  # must live as long as the process
_library.define(
    "decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, Tensor k_books, "
    "Tensor v_books, Tensor sink_k, Tensor sink_v, Tensor window_k, Tensor window_v, int k_nbits, int v_nbits, "
    "float scale) -> (Tensor out, Tensor lse)"
)
_library.define("encode(Tensor x, Tensor books) -> Tensor")
_library.define(
    "encode_pages_(Tensor(a!) pages, Tensor x, Tensor books, Tensor page_ids, int first_slot, int nbits) -> ()"
)
_library.define(
    "append_(Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) window_k, Tensor(d!) window_v, Tensor(e!) k_pages, "
    "Tensor(f!) v_pages, Tensor k, Tensor v, Tensor page_table, Tensor before, Tensor after, Tensor k_books, "
    "Tensor v_books, int k_nbits, int v_nbits) -> ()"
)


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    _check_decode(args)
    return _run("decode", args[0].device.type, args)


def _encode(*args: Any) -> Tensor:
    _check_encode(*args)
    return _run("encode", args[0].device.type, args)


def _encode_pages(*args: Any) -> None:
    _check_encode_pages(args)
    _run("encode_pages_", args[0].device.type, args)


def _append(*args: Any) -> None:
    _check_append(args)
    _run("append_", args[6].device.type, args)


# Plain `impl` costs 4 us a call where torch.library.custom_op costs several times that.
_library.impl("decode", _decode, "CompositeExplicitAutograd")
_library.impl("encode", _encode, "CompositeExplicitAutograd")
_library.impl("encode_pages_", _encode_pages, "CompositeExplicitAutograd")
_library.impl("append_", _append, "CompositeExplicitAutograd")


@torch.library.register_fake("pqlab::decode", lib=_library)
def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _check_decode(args)
    q = args[0]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("pqlab::encode", lib=_library)
def _encode_fake(x: Tensor, books: Tensor) -> Tensor:
    _check_encode(x, books)
    return x.new_empty((x.shape[0], x.shape[1], books.shape[1]), dtype=torch.uint8)


@torch.library.register_fake("pqlab::encode_pages_", lib=_library)
def _encode_pages_fake(*args: Any) -> None:
    _check_encode_pages(args)


@torch.library.register_fake("pqlab::append_", lib=_library)
def _append_fake(*args: Any) -> None:
    _check_append(args)
