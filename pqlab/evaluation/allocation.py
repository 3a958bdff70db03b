"""Which side of which layer gets how many bits: the sum of the KLs of `predict_kl` against a mean of bits."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

Chosen = Mapping[tuple[int, str], int]
"""{(layer, side): bits per element}."""


def allocate(costs: pd.DataFrame, bits: float) -> dict[tuple[int, str], int]:
    """Bits of every (layer, side) such that their mean is at most `bits` and the sum of the KLs is small.

    Greedy on the lower convex hulls of the (size, KL) curves, which is optimal up to the last step taken.

    Args:
        costs: `predict_kl`: layer, side, bits, elements, kl.
    """
    chosen: dict[tuple[int, str], int] = {}
    steps = []  # (nats saved per bit, key, to, bits it costs)
    elements = {}
    for key, group in costs.sort_values("bits").groupby(["layer", "side"], sort=False):
        points = list(zip(group.bits, group.kl, strict=True))
        elements[key] = int(group.elements.iloc[0])
        at = points[0]
        chosen[key] = int(at[0])
        while True:
            better = [p for p in points if p[0] > at[0] and p[1] < at[1]]
            if not better:
                break
            to = max(better, key=lambda p, at=at: (at[1] - p[1]) / (p[0] - at[0]))
            price = (to[0] - at[0]) * elements[key]
            steps.append(((at[1] - to[1]) / price, key, int(to[0]), price))
            at = to
    left = bits * sum(elements.values()) - sum(chosen[key] * n for key, n in elements.items())
    closed = set()  # a side whose next step did not fit takes no later one: it would start from elsewhere
    for _, key, to, price in sorted(steps, key=lambda step: -step[0]):
        if key in closed or price > left + 1e-6:
            closed.add(key)
            continue
        chosen[key], left = to, left - price
    return chosen


def rows_of(costs: pd.DataFrame, chosen: Chosen) -> pd.DataFrame:
    """The rows of `costs` that were chosen."""
    return costs[[chosen[r.layer, r.side] == r.bits for r in costs.itertuples()]].reset_index(drop=True)


def worst_layers(costs: pd.DataFrame, count: int) -> list[int]:
    """Layers, in their order, that lose most by the largest choice of each side."""
    largest = costs[costs.bits == costs.bits.max()]
    return sorted(largest.groupby("layer").kl.sum().nlargest(count).index)
