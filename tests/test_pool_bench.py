"""Allocate and free cost the same in every size of pool."""

from __future__ import annotations

import json

import pytest

from pqlab.benchmarks.pool_bench import SIZES, measure_pool
from pqlab.cli import main
from pqlab.paging import POLICIES


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_cost_does_not_grow_with_the_pool(policy):
    """100 to 1 000 000 pages is a factor of 10 000; anything that scans shows at once, noise stays below 5."""
    runs = [measure_pool(SIZES, policies=[policy], rounds=300) for _ in range(3)]
    for what in ("allocate_ns", "free_ns"):
        best = [min(run[i][what] for run in runs) for i in range(len(SIZES))]
        assert max(best) < 5 * min(best), (what, best)
    assert min(run[-1]["build_ms"] for run in runs) < 2000


def test_command_prints_one_json_line(capsys):
    assert main(["bench", "pool", "--json", "--rounds", "5", "--sizes", "100", "200", "--policy", "fifo"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    records = json.loads(lines[0])["records"]
    assert [r["max_pages"] for r in records] == [100, 200]
    assert all(r["allocate_ns"] > 0 and r["free_ns"] > 0 for r in records)


def test_every_benchmark_can_be_asked_for():
    import argparse

    from pqlab.benchmarks import bench

    parser = argparse.ArgumentParser()
    bench.configure(parser)
    assert bench.run(parser.parse_args(["pool", "--sizes", "100", "--rounds", "5", "--policy", "lifo"])) == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["nothing"])
