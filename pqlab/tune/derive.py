"""The report's tables "parameters by context" and "by GPU memory", derived again, with what differs and why.

By context: of all page sizes and residuals, the one that takes the fewest bytes at the row's longest context and is,
where it was measured, not farther from the exact cache than the report's setting and not slower beyond the error of
the measurement. What was not measured is held to as many exact tokens as the report keeps. By memory: as many pages as
fit beside the model's weights. Bytes are those of `pqlab.cost`; KL and time come from this machine (`evidence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pandas as pd

from ..config import CacheConfig, PQConfig
from ..cost import SHARE_OF_DEFAULT, CacheCost, max_pages_for
from ..errors import ConfigError
from ..memory import readable_bytes
from ..presets import PRESETS
from ..shapes import ModelShape
from .space import PAGE_SIZES, Setting
from .workload import Workload

RESIDUALS = (32, 64, 128, 256, 512)
CONTEXTS = {"context:<8K": 8192, "context:8K-32K": 32768, "context:>32K": 131072}
"""Longest context of every row; the last has none, and takes what models of today have."""

MEMORIES = {"memory:<16GB": 16, "memory:16-32GB": 32, "memory:32-64GB": 64, "memory:>64GB": 80}
"""GiB at the upper end of every row; the last one's is the report's A100."""

PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7B": 6_738_415_616,
    "LongChat-7B-32K": 6_738_415_616,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
"""Weights of the shapes, as their makers count them."""

_SAME_TIME = 0.02
"""Times closer than this share are the same, whatever their error."""


def evidence(
    workload: Workload, page_sizes: Sequence[int] = PAGE_SIZES, residuals: Sequence[int] = RESIDUALS
) -> pd.DataFrame:
    """What this machine measures: KL of every page size and residual, and the time of every page size.

    Returns:
        DataFrame: page_size, residual_length, kl (nats), milliseconds, milliseconds_error (a token; the page sizes took
        turns, at the default residual).
    """
    d = workload._shape.head_dim
    m = PQConfig().num_subspaces(d)
    timed = [Setting(page, CacheConfig().residual_length, m, 8) for page in page_sizes]
    found = workload.in_turns(timed).set_index("setting")
    rows = []
    for page, residual in product(page_sizes, residuals):
        time = found.loc[str(Setting(page, CacheConfig().residual_length, m, 8))]
        kl = workload.kl(Setting(page, residual, m, 8))
        rows.append((page, residual, kl, time.milliseconds, time.milliseconds_error))
    columns = ["page_size", "residual_length", "kl", "milliseconds", "milliseconds_error"]
    return pd.DataFrame(rows, columns=columns)


def by_context(shape: ModelShape, measured: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table by context.

    Args:
        shape: whose bytes are counted, at the report's 8 bits a code and M of half the head size.
        measured: `evidence`; None derives from bytes alone.

    Returns:
        DataFrame, a row a case: case, tokens, report and ours ("page / residual / pages"), report_bytes and ours_bytes
        (of one sequence, free pages not counted), and why they differ.
    """
    rows = []
    for name, context in CONTEXTS.items():
        theirs = PRESETS[name].cache
        candidates = [
            CacheConfig(page, residual)
            for page, residual in product(PAGE_SIZES, RESIDUALS)
            if _as_good(page, residual, theirs, measured)
        ]
        costs = {c: CacheCost(shape, PQConfig(), c, context) for c in candidates}
        ours = min(candidates, key=lambda c: (costs[c].stored_bytes, c.page_size))
        their_cost = CacheCost(shape, PQConfig(), theirs, context)
        pages = max_pages_for(context, 1, ours)
        rows.append(
            {
                "case": PRESETS[name].about,
                "tokens": context,
                "report": _shown(theirs.page_size, theirs.residual_length, theirs.max_pages),
                "ours": _shown(ours.page_size, ours.residual_length, pages),
                "report_bytes": their_cost.stored_bytes,
                "ours_bytes": costs[ours].stored_bytes,
                "why": _why_context(theirs, ours, their_cost, costs[ours], measured),
            }
        )
    return pd.DataFrame(rows)


def by_memory(shape: ModelShape, parameters: int | None = None, page_size: int | None = None) -> pd.DataFrame:
    """The table by GPU memory: fp16 weights, then codebooks, then pages into what `pqlab` gives a pool by itself.

    Args:
        parameters: of the model; None takes those of a known shape.
        page_size: ours, for every row; None takes the report's, so that only the counts differ.

    Returns:
        DataFrame, a row a case: case, gib, report and ours ("page / pages"), report_tokens and ours_tokens (coded
        tokens that the pool holds), report_bytes (of its pool), free_bytes (beside weights and codebooks), why.

    Raises:
        ConfigError: the shape's parameters are not known.
    """
    parameters = parameters or PARAMETERS.get(shape.name)
    if parameters is None:
        raise ConfigError(f"the parameters of {shape.name} are not known; set parameters (--parameters 7e9)")
    rows = []
    for name, gib in MEMORIES.items():
        theirs = PRESETS[name].cache
        page = page_size or theirs.page_size
        cost = CacheCost(shape, PQConfig(), CacheConfig(page), shape.max_context or 32768)
        their_cost = CacheCost(shape, PQConfig(), theirs, shape.max_context or 32768)
        free = gib * 2**30 - 2 * parameters - cost.constant_bytes
        pages = max(0, int(SHARE_OF_DEFAULT * free) // cost.layout.page_bytes)
        rows.append(
            {
                "case": PRESETS[name].about,
                "gib": gib,
                "report": f"{theirs.page_size} / {theirs.max_pages}",
                "ours": f"{page} / {pages}",
                "report_tokens": their_cost.capacity,
                "ours_tokens": page * pages,
                "report_bytes": their_cost.pool_bytes,
                "free_bytes": free,
                "why": _why_memory(their_cost, free, pages * page),
            }
        )
    return pd.DataFrame(rows)


def _as_good(page: int, residual: int, theirs: CacheConfig, measured: pd.DataFrame | None) -> bool:
    ours, reports = _measured(page, residual, measured), _measured(theirs.page_size, theirs.residual_length, measured)
    if ours is None or reports is None:
        return residual >= theirs.residual_length
    slack = max(_SAME_TIME * reports.milliseconds, 2 * (ours.milliseconds_error + reports.milliseconds_error))
    return ours.kl <= reports.kl and ours.milliseconds <= reports.milliseconds + slack


def _measured(page: int, residual: int, measured: pd.DataFrame | None) -> pd.Series | None:
    if measured is None:
        return None
    found = measured[(measured.page_size == page) & (measured.residual_length == residual)]
    return found.iloc[0] if len(found) else None


def _why_context(
    theirs: CacheConfig, ours: CacheConfig, their_cost: CacheCost, cost: CacheCost, measured: pd.DataFrame | None
) -> str:
    said = []
    if (ours.page_size, ours.residual_length) == (theirs.page_size, theirs.residual_length):
        said.append("page and residual are the report's")
    else:
        saved = their_cost.stored_bytes - cost.stored_bytes
        buffers = f"exact buffers of {ours.window_length} tokens instead of {theirs.window_length}"
        said.append(f"{buffers}: {readable_bytes(abs(saved))} {'less' if saved >= 0 else 'more'} a sequence")
        pair = (_measured(c.page_size, c.residual_length, measured) for c in (theirs, ours))
        reports, own = pair
        if reports is not None and own is not None:
            said.append(f"KL {own.kl:.5f} instead of {reports.kl:.5f}")
            said.append(f"{own.milliseconds:.2f} +- {own.milliseconds_error:.2f} ms a token instead of "
                        f"{reports.milliseconds:.2f} +- {reports.milliseconds_error:.2f}")  # fmt: skip
        else:
            said.append(f"R {ours.residual_length} keeps at least the report's exact tokens (not measured)")
    assert theirs.max_pages is not None
    sequences = theirs.max_pages / max(1, max_pages_for(their_cost.context, 1, theirs))
    said.append(f"the report's pool holds {their_cost.capacity:,} coded tokens, {sequences:.2g} such sequences")
    return "; ".join(said)


def _why_memory(their_cost: CacheCost, free: int, tokens: int) -> str:
    if free <= 0:
        return "the weights alone do not fit"
    share = their_cost.pool_bytes / free
    if share > 1:
        return f"the report's pool is {share:.1f} times what is free: PQC004"
    room = f"the report's pool takes {share:.0%} of the {readable_bytes(free)} beside weights and codebooks"
    more = tokens / their_cost.capacity
    return f"{room}; {SHARE_OF_DEFAULT:.0%} of it hold {more:.1f} times as many tokens"


def _shown(page: int, residual: int, pages: int | None) -> str:
    return f"{page} / {residual} / {pages}"
