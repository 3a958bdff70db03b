"""Keys of one layer, fitted to their sequences: what is coded spreads no wider than what the codebooks were made for.

Each row has a scale and a shift for every kv head and dimension of code space, taken from its first tokens at the
moment when they are first coded. Until then, and for what spreads as the calibration did, scale is 1 and shift 0::

    stored    y * scale + shift           codes, sinks and window alike
    asked     q / scale                   the shift adds one number to all scores of a query, which a softmax ignores

It costs no bits: two numbers a dimension and sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization import PQCodec
from .sequences import plain_state

FIT_TOKENS = 64
"""First tokens behind the sinks that a scale is taken from, a page at most: those that are coded first. 32 and 512 gave
the same (`evaluation/LOG.md`)."""

Rows = int | slice
ALL_ROWS = slice(None)


def fit_tokens(page_size: int) -> int:
    """Tokens that a fit looks at: a first flush is a page at least."""
    return min(FIT_TOKENS, page_size)


class KeyFit:
    """Scale and shift, float32 [B, H, d], of the rows of a layer.

    Args:
        codec: of the layer's keys; it `can_fit`.
        batch: B.
    """

    def __init__(self, codec: PQCodec, batch: int, device: torch.device) -> None:
        self.codec = codec
        self.scale = torch.ones(batch, codec.num_heads, codec.head_dim, device=device)
        self.shift = torch.zeros_like(self.scale)

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + self.shift.nbytes

    def take(self, row: int, y: Tensor) -> None:
        """Fit a row to its first tokens, y [H, n, d] in code space as the codec makes it."""
        self.scale[row], self.shift[row] = self.codec.fit(y)

    def apply(self, y: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        """Code space to what is stored: [..., H, n, d] of some rows, in y's dtype."""
        return (y * self.scale[rows].unsqueeze(-2) + self.shift[rows].unsqueeze(-2)).to(y.dtype)

    def undo(self, stored: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        """Inverse of `apply`."""
        return ((stored - self.shift[rows].unsqueeze(-2)) / self.scale[rows].unsqueeze(-2)).to(stored.dtype)

    def ask(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries for what is stored, and what the shift adds to their scores.

        Args:
            query: [B, Hq, S, d] in code space (`map_query`), or with more dimensions in front.

        Returns:
            query's shape in query's dtype, and float32 without the last dimension.
        """
        groups = query.shape[-3] // self.scale.shape[1]
        scale, shift = (x.repeat_interleave(groups, 1)[:, :, None] for x in (self.scale, self.shift))
        asked = query / scale
        return asked.to(query.dtype), (asked.float() * shift).sum(-1)

    @plain_state
    def select(self, rows: Tensor) -> None:
        """Row i becomes the old row rows[i]."""
        self.scale, self.shift = self.scale.index_select(0, rows), self.shift.index_select(0, rows)

    def reset(self) -> None:
        """Forget what was fitted; the tensors keep their addresses."""
        self.scale.fill_(1)
        self.shift.zero_()
