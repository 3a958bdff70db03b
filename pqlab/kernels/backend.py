"""What a backend is, and the settings that force or forbid one.

A setting is "auto", the name of a backend to force ("cpu"), or a name with a minus to forbid it ("-cuda"); several
are joined by commas. It comes from the environment variable PQLAB_BACKEND and can be changed by `use_backend`.

Behind the backends lies one more level, "exact": exact attention over the dequantized cache. It is what runs under any
attention but "pqlab"; "exact" forces it under that one, too, and "-exact" has the cache refuse instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from . import reference

NAMES = ("cuda", "cpu", "reference")
EXACT = "exact"
"""The level behind the backends; storing tokens still takes a backend, chosen automatically."""


@dataclass
class BuildStatus:
    """How far the compiled part of a backend is, for reports.

    state is "none" (nothing to build), "off" (not wanted), "building", "ready" or "failed"; `seconds` is the time of
    the build, or of loading it from the cache (`cached`); `error` holds the compiler's output; `instead` says what
    happens without it.
    """

    state: str = "none"
    detail: str = ""
    seconds: float = 0.0
    cached: bool = False
    path: str = ""
    flags: list[str] = field(default_factory=list)
    error: str = ""
    instead: str = "plain torch runs instead"


class StepShape(NamedTuple):
    """What a layer's decode step is compiled for; `group`: query heads of a kv head."""

    head_dim: int
    k_m: int
    k_nbits: int
    v_m: int
    v_nbits: int
    group: int
    dtype: torch.dtype
    anchored: bool = False


class Backend:
    """One implementation of the operations of `kernels.ops`. Subclass it, then `dispatch.register_backend(instance)`.

    Attributes:
        name: one of NAMES.
        remedy: what a user does when this backend is demanded and cannot run.
        fuses_step: its `step_` is one kernel, not `append_` and `decode`.
    """

    name: str
    remedy: str = ""
    fuses_step: bool = False

    def status(self) -> BuildStatus:
        return BuildStatus()

    def builds(self) -> dict[str, BuildStatus]:
        """Everything that is built for it, by name: itself, and what it can do without."""
        return {self.name: self.status()}

    def unable(self, op: str, args: tuple[Any, ...]) -> str | None:
        """Why this call cannot run here, or None when it can. The text is a constant per cause: it is counted.

        Called before every operation with the operation's positional arguments, so it has to be cheap.
        """
        return None

    def refuses(self, device: torch.device, step: StepShape) -> str | None:
        """Why such steps of one token would not run here, or None; what has to be built for them is waited for."""
        return None

    def again(self, op: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """After a call with all checks: a function that does the same for arguments like these, without the checks.

        It is asked when the pages and the window are the same objects, and has to find out about everything else that
        would make it read or write foreign memory. It returns None where it does not know, and may then have stored the
        step's tokens. None: every call is to be checked.
        """
        return None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until what is being built is ready or has failed; False when the time ran out."""
        return True

    def decode(self, *args: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def encode(self, x: Tensor, books: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_pages_(self, *args: Any) -> None:
        raise NotImplementedError

    def cell_sums(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Plain torch, which a GPU runs well; a backend with a kernel overrides it."""
        return reference.cell_sums(*args)

    def append_(self, *args: Any) -> None:
        """Plain torch around this backend's own encode; a backend with a fused kernel overrides it."""
        reference.append_(*args, encode_pages_=self.encode_pages_)

    def step_(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Both operations of a step, one after the other, with the maps in plain torch around them."""
        append, decode, home = in_code_space(args)
        self.append_(*append)
        out, lse = self.decode(*decode)
        return (out if home is None else reference.apply_map(out, home)), lse


def in_code_space(step: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], Tensor | None]:
    """The arguments of `append_` and of `decode` that make the step of these arguments, with k, v and q turned and
    mapped; and the map of the output, if any."""
    args, (k_forward, k_backward, v_forward, v_backward, k_scale, k_shift, turns, span) = list(step[:17]), step[17:]
    if span:
        index = (args[9].sum(1) - args[0].shape[2]).clamp_min(0)  # code index of the new token
        number = (index // span).clamp_max(turns.shape[0] - 1)
        args[6] = reference.turn_back(args[6], turns[number][:, None, None])
        args[15] = reference.turn_back(args[15], turns[:, None, None, None])
    if k_forward is not None:
        args[6] = reference.apply_map(args[6], k_forward, k_scale, k_shift)
        args[15] = reference.apply_map(args[15], k_backward.mT, None if k_scale is None else 1 / k_scale)
    offsets = None
    if span and k_shift is not None:
        offsets = -args[16] * reference.times_heads(args[15], k_shift)
    if v_forward is not None:
        args[7] = reference.apply_map(args[7], v_forward)
    step = (*args, *(None,) * 7, span)
    return append_part(step), (*decode_part(step)[:-1], offsets), v_backward


def append_part(step: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `append_` in those of `step_`."""
    return step[:15]


def decode_part(step: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `decode` in those of `step_`."""
    (sink_k, sink_v, window_k, window_v, k_pages, v_pages, _, _, page_table, _, after, k_books, v_books,
     k_nbits, v_nbits, q, scale) = step[:17]  # fmt: skip
    return (q, k_pages, v_pages, page_table, after, k_books, v_books, sink_k, sink_v, window_k, window_v,
            k_nbits, v_nbits, scale, step[24], None)  # fmt: skip


def version(x: Tensor) -> int:
    """Counts changes in place; a tensor of inference mode does not, and is taken not to change."""
    return -1 if x.is_inference() else x._version


class ReferenceBackend(Backend):
    """Plain torch: any device, any dtype, always there."""

    name = "reference"
    decode = staticmethod(reference.decode)
    encode = staticmethod(reference.encode)
    encode_pages_ = staticmethod(reference.encode_pages_)


@dataclass(frozen=True)
class Setting:
    """A parsed setting: the backend to force, if any, those that are forbidden, and whether "exact" is forced."""

    text: str = "auto"
    forced: str | None = None
    forbidden: frozenset[str] = frozenset()
    exact: bool = False

    @staticmethod
    def parse(text: str) -> Setting:
        """Raises `ConfigError` for an unknown name, for two forced ones, and when the reference is forbidden."""
        words = [word.strip().lower() for word in text.split(",") if word.strip() not in ("", "auto")]
        forbidden = frozenset(word[1:] for word in words if word.startswith("-"))
        forced = [word for word in words if not word.startswith("-")]
        unknown = [word for word in (*forced, *forbidden) if word not in (*NAMES, EXACT)]
        if unknown or len(forced) > 1 or "reference" in forbidden or forbidden.intersection(forced):
            raise ConfigError(
                f'backend = {text!r} is not a setting; use "auto", one of {", ".join((*NAMES, EXACT))} to '
                'force it, or "-cuda", "-cpu" and "-exact" to forbid them'
            )
        exact = forced == [EXACT]
        return Setting(",".join(words) or "auto", forced[0] if forced and not exact else None, forbidden, exact)


_current = Setting.parse(os.environ.get("PQLAB_BACKEND", "auto"))


def current_setting() -> Setting:
    return _current


class use_backend:  # noqa: N801 (reads like torch.no_grad)
    """Force or forbid backends from here on, or inside a `with` block; the setting is the process's.

    >>> use_backend("reference")          # everything in plain torch
    >>> with use_backend("-cuda"): ...    # anything but CUDA
    """

    def __init__(self, setting: str = "auto") -> None:
        global _current
        self._before = _current
        _current = Setting.parse(setting)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = self._before
