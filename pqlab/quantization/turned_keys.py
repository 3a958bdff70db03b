"""What anchors do to the keys of a head, as data: one rotary pair at a time, and all of it by span."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..kernels.reference import turn_back

VIEWS = ("as the model makes them", "turned back to anchors", "before the rotary embedding")
"""Of `turned_pair`: by how much keys are turned back."""

SPANS = (1, 16, 64, 256, 1024, 4096, 16384)


def turned(keys: Tensor, positions: Tensor, frequencies: Tensor, span: int) -> Tensor:
    """Keys turned back by the position of the first token of their span; 1 undoes the rotary embedding, 0 nothing.

    Unlike `Anchors.back` it takes any span: there is no kernel for most of them.

    Args:
        keys: [..., n, d] in head space, behind the rotary embedding; positions: int64 [n], what turned them.
        frequencies: [d/2], radians a position (`Rotary.frequencies`).
    """
    if not span:
        return keys.float()
    angles = (positions // span * span).double()[:, None] * frequencies.double()
    return turn_back(keys.float(), torch.stack([angles.cos(), angles.sin()], -2).float())


def turned_pair(keys: Tensor, positions: Tensor, frequencies: Tensor, pair: int, span: int) -> dict[str, np.ndarray]:
    """The two dimensions (pair, pair + d/2) of one head's keys, [n, 2] for each of `VIEWS`.

    Args:
        keys: [n, d]; the others are those of `turned`.
    """
    dims = [pair, pair + keys.shape[-1] // 2]
    by_view = zip(VIEWS, (0, span, 1), strict=True)
    return {view: turned(keys, positions, frequencies, one)[:, dims].numpy() for view, one in by_view}


def spread_by_span(keys: Tensor, positions: Tensor, frequencies: Tensor, spans: Sequence[int] = SPANS) -> pd.DataFrame:
    """How far one head's keys spread around their mean, for spans and for keys as they are.

    Args:
        keys: [n, d]; the others are those of `turned`.

    Returns:
        DataFrame: span (0: as they are), spread (sum of the variances of all dimensions), share (of that of keys as
        they are), slow (how many pairs turn by less than half a radian within the span).
    """
    rows = []
    for span in (*spans, 0):
        spread = float(turned(keys, positions, frequencies, span).var(0).sum())
        slow = int((frequencies * (span - 1) < 0.5).sum()) if span else 0
        rows.append((span, spread, slow))
    found = pd.DataFrame(rows, columns=["span", "spread", "slow"])
    found.insert(2, "share", found.spread / found.spread.iloc[-1])
    return found


def pair_that_gains_most(keys: Tensor, positions: Tensor, frequencies: Tensor, span: int) -> int:
    """The rotary pair whose variance anchors make smaller by most; the arguments are those of `turned`, keys [n, d]."""
    as_they_are, anchored = (turned(keys, positions, frequencies, one).var(0) for one in (0, span))
    return int((as_they_are - anchored).view(2, -1).sum(0).argmax())
