"""Views of a `DecodeTrace` in the shape that the decode figure draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from ..trace import DecodeTrace


def error_grid(trace: DecodeTrace, kind: str) -> np.ndarray:
    """float [steps, captured layers, query heads]: relative errors of the outputs (`DecodeTrace.output_error`)."""
    errors = trace.output_error()
    errors = errors[errors.kind == kind].sort_values(["step", "layer", "head"])
    return errors.error.to_numpy(dtype=np.float32).reshape(trace.num_steps, len(trace.layers), -1)


def next_tokens(trace: DecodeTrace, step: int) -> pd.DataFrame:
    """Next tokens after `step`, likeliest first: token_id, token, and their probability in the exact and the paged run.

    A probability is missing (NaN) where the token is not among the run's top ones.
    """
    top = trace.topk(step)
    wide = top.pivot(index="token_id", columns="run", values="probability").reindex(columns=["exact", "paged"])
    wide.insert(0, "token", top.drop_duplicates("token_id").set_index("token_id").token)
    likeliest = wide[["exact", "paged"]].max(axis=1)
    return wide.loc[likeliest.sort_values(ascending=False).index].reset_index().rename_axis(columns=None)
