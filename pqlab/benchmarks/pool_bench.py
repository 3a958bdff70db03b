"""Does it cost the same to allocate and free a page in a small and in a large pool? (O(1), measured)

Every pool is first worn: a part of its pages is taken for good and the free ids are shuffled, so that a large pool
pays for its cache misses as it would in use. Then pages are taken and given back one at a time, in random order.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from statistics import median

from ..arguments import whole
from ..paging import POLICIES, PagePool

SIZES = (100, 10_000, 1_000_000)
BATCH = 25
"""Pages taken before they are given back; below half of the smallest pool."""


def measure_pool(
    sizes: Sequence[int] = SIZES,
    *,
    policies: Sequence[str] = ("lifo",),
    rounds: int = 2000,
    seed: int = 0,
) -> list[dict[str, float | int | str]]:
    """One record per (policy, size): max_pages, build_ms, and nanoseconds per page allocated and per page freed.

    The times are medians over `rounds` of 25 pages each, interpreter overhead of the calls included.
    """
    return [_measure(size, policy, rounds, random.Random(seed)) for policy in policies for size in sizes]


def _measure(size: int, policy: str, rounds: int, rng: random.Random) -> dict[str, float | int | str]:
    start = time.perf_counter_ns()
    pool = PagePool(size, policy=policy)
    built = time.perf_counter_ns() - start
    pages = pool.allocate(size)
    rng.shuffle(pages)
    pool.free(pages[: size // 2])
    clock = time.perf_counter_ns
    allocate_ns, free_ns = [], []
    for _ in range(rounds):
        start = clock()
        taken = [pool.allocate(1) for _ in range(BATCH)]
        allocate_ns.append((clock() - start) / BATCH)
        rng.shuffle(taken)
        start = clock()
        for page in taken:
            pool.free(page)
        free_ns.append((clock() - start) / BATCH)
    return {
        "policy": policy,
        "max_pages": size,
        "build_ms": round(built / 1e6, 3),
        "allocate_ns": round(median(allocate_ns), 1),
        "free_ns": round(median(free_ns), 1),
    }


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", type=whole(4 * BATCH), nargs="+", default=list(SIZES), metavar="PAGES", help="pages of the pools, "
        f"at least {4 * BATCH}")  # fmt: skip
    add("--policy", nargs="+", default=sorted(POLICIES), choices=sorted(POLICIES), help="page policies to time")
    add("--rounds", type=whole(), default=2000, metavar="COUNT", help=f"rounds of {BATCH} pages that are timed")
    add("--json", action="store_true", help="print one JSON line instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    records = measure_pool(args.sizes, policies=args.policy, rounds=args.rounds)
    if args.json:
        print(json.dumps({"benchmark": "pool", "records": records}))
        return 0
    print(f"{'policy':<8} {'pages':>10} {'build ms':>10} {'allocate ns':>12} {'free ns':>9}")
    for r in records:
        print(f"{r['policy']:<8} {r['max_pages']:>10,} {r['build_ms']:>10} {r['allocate_ns']:>12} {r['free_ns']:>9}")
    return 0
