"""Anchors: keys turned back to the position of the first token of their span, before they are coded.

A rotary embedding turns a key by its position, so that the keys of one head lie on circles, and a codebook spends its
centroids on where along the text a token stood. Turned back by its own position a key would be free of that, but then
every key would have to be turned again before it could be asked (`evaluation/before_rotary.py`). Here the keys of
`span` consecutive tokens are turned back by the same angles, those of the span's first token: of what the embedding
does, only 0 to span - 1 steps remain, in which all but the fastest pairs hardly move. A score does not change when
query and key are turned alike, so the query is asked once a span instead of once a step::

    q . k  =  (R^-1 q) . (R^-1 k),      R: the rotation by the position of the span's first token

Token positions are those behind the sinks (code indexes), so padding and sinks do not matter, and the first span, with
position 0, is as it was. What the codes lose by spans of 64 to 2048 tokens: `evaluation/LOG.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import reference
from ..kernels.reference import MIN_SPAN

SPAN = 256
"""Tokens that share an anchor where nothing else is asked for."""

_MOST = 1 << 20
_ROWS = 8


@dataclass(frozen=True, eq=False)
class Anchors:
    """How the keys of a layer are turned back.

    Args:
        span: tokens that share an anchor, a power of two, at least 64.
        frequencies: float32 [d/2], radians a position by which the rotary embedding turns each pair (i, i + d/2).
    """

    span: int
    frequencies: Tensor
    _made: list[Tensor] = field(default_factory=list, repr=False)  # the largest table so far: layers share it

    def __post_init__(self) -> None:
        check_span(self.span)
        if self.frequencies.dim() != 1 or self.frequencies.dtype != torch.float32:
            got = f"{self.frequencies.dtype} {list(self.frequencies.shape)}"
            raise ValueError(f"frequencies must be float32 [d/2], got {got}")

    def turns(self, count: int) -> Tensor:
        """Cosines and sines of the anchors of spans 0 to count - 1 at least, float32 [R, 2, d/2] with R >= count.

        The table grows by `_ROWS`, and is the same tensor until it does. (Not by doubling: a step asks for every row.)
        """
        if not self._made or len(self._made[0]) < count:
            rows = -(-count // _ROWS) * _ROWS
            positions = torch.arange(rows, dtype=torch.float64, device=self.frequencies.device) * self.span
            angles = positions[:, None] * self.frequencies.double()
            self._made[:] = [torch.stack([angles.cos(), angles.sin()], 1).float()]
        return self._made[0]

    def back(self, x: Tensor, index: Tensor, most: int | None = None) -> Tensor:
        """Keys turned back to their anchors, in x's dtype.

        Args:
            x: [..., n, d] in head space.
            index: code indexes of the tokens, integers [..., n] that are broadcast to x; below 0 (sinks) as 0.
            most: an index that none is above, if known: then a GPU is not waited for.
        """
        return reference.turn_back(x, self._of(index, most))

    def forth(self, x: Tensor, index: Tensor, most: int | None = None) -> Tensor:
        """Inverse of `back`."""
        cos, sin = self._of(index, most).unbind(-2)
        return reference.turn_back(x, torch.stack([cos, -sin], -2))

    def _of(self, index: Tensor, most: int | None) -> Tensor:
        if most is None:
            most = int(index.max()) if index.numel() else 0
        number = index.clamp_min(0).div(self.span, rounding_mode="floor")
        return self.turns(max(0, most) // self.span + 1)[number.to(self.frequencies.device)]

    def to(self, device: torch.device | str) -> Anchors:
        return replace(self, frequencies=self.frequencies.to(device), _made=[])


def check_span(span: int) -> None:
    """Raise `ConfigError` unless so many tokens can share an anchor."""
    if not isinstance(span, int) or isinstance(span, bool):
        raise ConfigError(f"span = {span!r} is not a whole number of tokens; give {SPAN}, or 0 for none")
    if not MIN_SPAN <= span <= _MOST or span & (span - 1):
        near = min(_MOST, max(MIN_SPAN, 1 << max(0, span - 1).bit_length()))
        raise ConfigError(
            f"span = {span} is not a power of two from {MIN_SPAN} to {_MOST} tokens; the nearest good value is {near}"
        )
