"""Whether a cache fits into the memory that is free; if not, which setting to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from .finding import Finding, Probe

if TYPE_CHECKING:
    from ..cost import CacheCost

DEFAULT_SHAPE = "SmolLM2-135M"
"""The embedded model's."""


def cache_memory(shape: str = DEFAULT_SHAPE, context: int | None = None, batch: int = 1) -> Probe:
    """A probe for a cache of a model shape of `pqlab.shapes`; the model's weights come on top and are not counted.

    Args:
        shape: a name in `SHAPES`.
        context: tokens of a sequence; None is the model's own limit.
        batch: sequences.
    """

    def probe() -> Finding:
        import torch

        from ..config import CacheConfig, PQConfig
        from ..cost import CacheCost
        from ..memory import free_memory, readable_bytes
        from ..shapes import SHAPES

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = SHAPES[shape]
        cost = CacheCost(model, PQConfig(), CacheConfig(), context=context or model.max_context, batch=batch)
        needed, free = needed_bytes(cost), free_memory(device)
        what = f"{shape}, {batch} x {cost.context:,} tokens at {cost.token_bits:g} bits"
        value = f"a cache for {what} takes {readable_bytes(needed)} (exact: {readable_bytes(cost.baseline_bytes)})"
        if free is None:
            return Finding(f"{value}; free memory on {device} unknown")
        value = f"{value}; {readable_bytes(free)} free on {device}"
        if needed <= free:
            return Finding(value)
        ways = [f"{change} takes {readable_bytes(needed_bytes(lower))}" for change, lower in ways_to_fit(cost, free)]
        return Finding(
            value,
            f"{readable_bytes(needed - free)} are missing for {what} (PQC004)",
            f"Any of: {'; '.join(ways)}" if ways else "No setting alone makes it fit: take a smaller model or batch",
        )

    return probe


def needed_bytes(cost: CacheCost) -> int:
    """Pool, exact tokens, page table and codebooks."""
    return cost.reserved_bytes + cost.constant_bytes


def ways_to_fit(cost: CacheCost, free: int) -> Iterator[tuple[str, CacheCost]]:
    """For each setting the mildest value that makes the cache fit into `free` bytes, alone, and the cost with it."""
    m = cost.pq.num_subspaces(cost.shape.head_dim)
    ladders = (
        [("nbits=4", replace(cost, pq=replace(cost.pq, nbits=4)))],  # every kernel has 4 and 8 bits
        [(f"M={n}", replace(cost, pq=replace(cost.pq, M=n))) for n in (m // 2, m // 4) if n and m % n == 0],
        [(f"residual_length={r}", replace(cost, cache=replace(cost.cache, residual_length=r))) for r in (64, 32)],
        [(f"batch={n}", replace(cost, batch=n)) for n in range(cost.batch - 1, 0, -1)],
    )
    for ladder in ladders:
        yield from islice(((change, lower) for change, lower in ladder if needed_bytes(lower) <= free), 1)
    context = _largest_context(cost, free)
    if context:
        lower = replace(cost, context=context)
        yield f"context={context}", lower
        yield f"max_pages={lower.max_pages} (more tokens than that: PQC001)", lower


def _largest_context(cost: CacheCost, free: int) -> int:
    """Tokens a sequence may have at these settings; 0 when not even one fits."""
    low, high = 0, cost.context
    while low < high:  # what is needed never falls when the context grows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed_bytes(replace(cost, context=middle)) <= free else (low, middle - 1)
    return low
