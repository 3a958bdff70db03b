"""One cheap cell of every committed table of accuracy, measured again."""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd
import pytest

from pqlab import CacheConfig, load_text
from pqlab.evaluation.evaluate import evaluate
from pqlab.evaluation.passkey import passkey
from pqlab.results.provenance import text_record

RESULTS = files("pqlab").joinpath("results")


def committed(name: str) -> dict:
    return json.loads(RESULTS.joinpath(f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["eval-smollm2", "eval-smollm2-4096"])
def test_kivi_at_the_first_positions(name, default_model, all_threads):
    """Positions 0 to 511: causal, so the first 513 tokens of each window are enough."""
    record = committed(name)
    assert text_record(record["text"]["name"]) == record["text"]
    (row,) = (row for row in record["methods"] if row["method"] == "kivi-4")
    cell = row["by_position"][0]
    assert (cell["start"], cell["stop"]) == (0, 512)
    frames = [
        evaluate(
            *default_model,
            ["kivi-4"],
            text=record["text"]["name"],
            windows=1,
            length=513,
            skip=record["skip"] + i * record["stride"],
            prompt=record["prompt"],
            config=CacheConfig(**record["cache"]),
        ).frame
        for i in range(record["windows"])
    ]
    again = pd.concat(frames)
    assert len(again) == cell["positions"] and again.agree.mean() == pytest.approx(cell["agreement"], abs=0.003)
    assert again.kl.mean() == pytest.approx(cell["kl"], rel=0.02)


@pytest.mark.parametrize("name", ["eval-smollm2-6x2048", "eval-smollm2-4096"])
def test_means_are_those_of_the_windows(name):
    record = committed(name)
    rows = [row for row in record["methods"] if row["kl"]]
    assert rows
    for row in rows:
        windows = pd.Series(row["kl_by_window"])
        assert len(windows) == record["windows"] and windows.mean() == pytest.approx(row["kl"], rel=1e-4)
        assert windows.sem() == pytest.approx(row["kl_error"], rel=1e-3)


@pytest.mark.parametrize(("name", "task"), [("passkey-smollm2", passkey)])
def test_the_exact_cache_in_the_shortest_text(name, task, default_model, all_threads):
    record = committed(name)
    assert text_record(record["text"]["name"]) == record["text"]
    cells = pd.DataFrame(record["records"])
    shortest = cells[(cells.length == cells.length.min()) & (cells.method == "exact") & (cells.trial == 0)]
    options = {"lengths": [int(shortest.length.iloc[0])], "depths": list(shortest.depth)}
    again = task(*default_model, load_text(record["text"]["name"]), {}, **options)
    assert list(again.key) == list(shortest.key) and list(again.found) == list(shortest.found)
    assert again.logp.tolist() == pytest.approx(shortest.logp.tolist(), abs=0.01)
