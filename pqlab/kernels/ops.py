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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelMissingError, PQCacheError
from . import checks
from .backend import Backend, ReferenceBackend, Setting, append_part, current_setting, decode_part

log = logging.getLogger("pqlab")

OPS = ("decode", "encode", "encode_pages_", "append_", "step_")
LEVELS = {"cuda": ("cuda", "reference"), "cpu": ("cpu", "reference")}
"""Backends by device type, best first; any other device has the reference."""

FIRST_CHOICE = "first choice"
_STEP_ARGS = 21  # of step_, maps included

_backends: dict[str, Backend] = {"reference": ReferenceBackend()}
_absent: dict[str, str] = {}  # backend -> why it was never registered
_runs: Counter[tuple[str, str, str]] = Counter()  # (op, backend, reason) -> calls
_last: dict[str, tuple[str, str]] = {}  # op -> (backend, reason) of the latest call
_failed: dict[tuple[str, str], str] = {}  # (op, backend) -> what it raised when it ran; not tried again


class _Known(NamedTuple):
    """How a call ran: what checks and choice come to again for the same lasting tensors under the same setting."""

    setting: Setting
    again: Callable[..., Any]  # of `Backend.again`
    key: tuple[str, str, str]  # of `_runs`
    last: tuple[str, str]


_MOST_KNOWN = 4096
_known: dict[tuple[Any, ...], _Known] = {}
"""By operation, identity of pages and window, and nbits. `again` itself knows whether the rest is as it was."""


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
        k_books, v_books: float32 or float16 [H, M, C, dm].
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
    args = (
        q, k_pages, v_pages, page_table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v,
        k_nbits, v_nbits, scale,
    )  # fmt: skip
    if type(q) is not Tensor or _is_traced():
        return torch.ops.pqlab.decode.default(*args)
    like = ("decode", id(k_pages), id(window_k), k_nbits, v_nbits)
    return _again(like, args) or _first("decode", like, checks.decode, q, args)


def encode(x: Tensor, books: Tensor) -> Tensor:
    """Index of the nearest centroid of every subvector (squared distance, ties to the lowest index).

    Args:
        x: [G, n, d]; books: float32 or float16 [G, M, C, dm] with M * dm = d and C <= 256; G is any grouping.

    Returns:
        uint8 [G, n, M].
    """
    return torch.ops.pqlab.encode.default(x, books)


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
) -> tuple[Tensor, Tensor]:
    """One layer of a decode step: `append_`, then `decode` with the lengths `after`.

    One operation, so that a backend can let the first prepare the second, and half the calls for Python. With maps
    (`quantization.codec`) k, v, q and the result are in the head space, and what is stored is in code space: k and v
    go in as x @ forward[h], q asks as q @ backward[h]^T of the keys, and out @ backward[h] of the values comes out.

    Args:
        k_forward, v_forward: [H, d, d], float16, float32 or int8 in units of 1/127; None is no map.
        k_backward, v_backward: float16 or float32 [H, d, d], the inverses; of a side both or neither.

    Returns:
        out [B, Hq, S, d] and lse [B, Hq, S] of `decode`.
    """
    args = (
        sink_k, sink_v, window_k, window_v, k_pages, v_pages, k, v, page_table, before, after, k_books, v_books,
        k_nbits, v_nbits, q, scale, k_forward, k_backward, v_forward, v_backward,
    )  # fmt: skip
    if type(q) is not Tensor or _is_traced():
        return torch.ops.pqlab.step_.default(*args)
    like = ("step_", id(k_pages), id(window_k), k_nbits, v_nbits)
    return _again(like, args) or _first("step_", like, checks.step, k, args)


def register_backend(backend: Backend) -> None:
    """Put a backend in the place of its name; what one of that name failed at before is tried again."""
    _backends[backend.name] = backend
    _known.clear()
    for key in [key for key in _failed if key[1] == backend.name]:
        del _failed[key]


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
    """Count a run that did not go through the operations here: attention over the dequantized cache."""
    if (op, backend, reason) not in _runs:
        log.warning("%s runs on the %s backend; %s", op, backend, reason)
    _runs[(op, backend, reason)] += 1
    _last[op] = (backend, reason)


def last(op: str) -> tuple[str, str] | None:
    """Backend and reason of the latest call, also of what `record` counted; None before the first."""
    return _last.get(op)


def chosen(op: str, device_type: str) -> tuple[str, str]:
    """Backend and reason that an ordinary call on this device would get now, without its arguments."""
    backend, reason = _choose(op, device_type, None)
    return backend.name, reason


_is_traced = torch.compiler.is_dynamo_compiling
"""Else an ordinary tensor needs nothing of torch's dispatcher, which takes 15 us for a dozen tensors."""


# -- choice ----------------------------------------------------------------------------------------------------------


def _refusal(name: str, op: str, device_type: str, args: tuple[Any, ...] | None) -> str | None:
    if name != "reference" and name not in LEVELS.get(device_type, ()):
        return f"{name} kernels do not take {device_type} tensors"
    backend = _backends.get(name)
    if backend is None:
        return _absent.get(name, f"there is no {name} backend")
    if (op, name) in _failed:
        return _failed[op, name]
    if args is not None:
        parts = (("append_", append_part(args)), ("decode", decode_part(args))) if op == "step_" else ((op, args),)
        return next(filter(None, (backend.unable(*part) for part in parts)), None)
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
    try:
        return getattr(backend, op)(*args)
    except (RuntimeError, MemoryError) as error:
        if not _may_fall_back(backend.name, error):
            raise
        _failed[op, backend.name] = f"it failed when it ran ({type(error).__name__}: {' '.join(str(error).split())})"
        _known.clear()
        return _run(op, device_type, args)


def _again(like: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Results of a call like an earlier one, without its checks; None when there was none, or this one is different."""
    known = _known.get(like)
    if known is None or known.setting is not current_setting():
        return None
    try:
        results = known.again(*args)
    except (RuntimeError, MemoryError):
        return None  # it will fail again where another backend can be chosen
    if results is not None:
        _runs[known.key] += 1
        _last[like[0]] = known.last
    return results


def _first(op: str, like: tuple[Any, ...], check: Callable[..., None], x: Tensor, args: tuple[Any, ...]) -> Any:
    """A call with all checks; what the backend knows to do without them is kept for the next one."""
    check(*args)
    results = _run(op, x.device.type, args)
    again = _backends[_last[op][0]].again(op, args)
    if again is not None:
        if len(_known) >= _MOST_KNOWN:  # of tensors that are gone
            _known.clear()
        _known[like] = _Known(current_setting(), again, (op, *_last[op]), _last[op])
    return results


def _may_fall_back(name: str, error: Exception) -> bool:
    """Whether the next level may run what this backend has begun. Every operation writes what it is given to places
    that it is given, so that running it again is the same. A forced backend is to be heard of; a GPU without memory
    has none for the next level; and a graph that is being captured has lost its capture."""
    if name == "reference" or current_setting().forced or isinstance(error, (torch.OutOfMemoryError, PQCacheError)):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


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
_library.define(
    "step_(Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) window_k, Tensor(d!) window_v, Tensor(e!) k_pages, "
    "Tensor(f!) v_pages, Tensor k, Tensor v, Tensor page_table, Tensor before, Tensor after, Tensor k_books, "
    "Tensor v_books, int k_nbits, int v_nbits, Tensor q, float scale, Tensor? k_forward=None, "
    "Tensor? k_backward=None, Tensor? v_forward=None, Tensor? v_backward=None) -> (Tensor out, Tensor lse)"
)


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    checks.decode(*args)
    return _run("decode", args[0].device.type, args)


def _encode(*args: Any) -> Tensor:
    checks.encode(*args)
    return _run("encode", args[0].device.type, args)


def _encode_pages(*args: Any) -> None:
    checks.encode_pages(*args)
    _run("encode_pages_", args[0].device.type, args)


def _append(*args: Any) -> None:
    checks.append(*args)
    _run("append_", args[6].device.type, args)


def _step(*args: Any) -> tuple[Tensor, Tensor]:
    args = (*args, *(None,) * (_STEP_ARGS - len(args)))  # the dispatcher leaves out what is the default
    checks.step(*args)
    return _run("step_", args[6].device.type, args)


# Plain `impl` costs 4 us a call where torch.library.custom_op costs several times that.
_library.impl("decode", _decode, "CompositeExplicitAutograd")
_library.impl("encode", _encode, "CompositeExplicitAutograd")
_library.impl("encode_pages_", _encode_pages, "CompositeExplicitAutograd")
_library.impl("append_", _append, "CompositeExplicitAutograd")
_library.impl("step_", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("pqlab::decode", lib=_library)
def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    checks.decode(*args)
    return _decode_results(args[0])


def _decode_results(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("pqlab::encode", lib=_library)
def _encode_fake(x: Tensor, books: Tensor) -> Tensor:
    checks.encode(x, books)
    return x.new_empty((x.shape[0], x.shape[1], books.shape[1]), dtype=torch.uint8)


@torch.library.register_fake("pqlab::encode_pages_", lib=_library)
def _encode_pages_fake(*args: Any) -> None:
    checks.encode_pages(*args)


@torch.library.register_fake("pqlab::append_", lib=_library)
def _append_fake(*args: Any) -> None:
    checks.append(*args)


@torch.library.register_fake("pqlab::step_", lib=_library)
def _step_fake(*args: Any) -> tuple[Tensor, Tensor]:
    checks.step(*args, *(None,) * (_STEP_ARGS - len(args)))
    return _decode_results(args[15])
