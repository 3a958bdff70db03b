"""One cheap cell of every committed table of accuracy, measured again."""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd
import pytest

from pqlab import CacheConfig, load_text
from pqlab.evaluation.evaluate import evaluate
from pqlab.evaluation.key_values import key_values
from pqlab.evaluation.passkey import passkey
from pqlab.results.provenance import text_record

RESULTS = files("pqlab").joinpath("results")


def committed(name: str) -> dict:
    return json.loads(RESULTS.joinpath(f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["eval-smollm2", "eval-smollm2-4096"])
def test_kivi_at_the_first_positions(name, default_model, all_threads):
    """The first window's positions 0 to 511: causal, so 513 tokens are enough."""
    record = committed(name)
    assert text_record(record["text"]["name"]) == record["text"]
    (row,) = (row for row in record["methods"] if row["method"] == "kivi-4")
    cell = row["by_position"][0]
    assert (cell["start"], cell["stop"]) == (0, 512)
    again = evaluate(
        *default_model,
        ["kivi-4"],
        text=record["text"]["name"],
        windows=1,
        length=513,
        skip=record["skip"],
        prompt=record["prompt"],
        config=CacheConfig(**record["cache"]),
    ).frame
    assert len(again) * record["windows"] == cell["positions"]
    assert again.kl.mean() == pytest.approx(cell["kl_by_window"][0], rel=0.02)


@pytest.mark.parametrize("name", ["eval-smollm2", "eval-smollm2-4096"])
def test_means_are_those_of_the_windows(name):
    record = committed(name)
    rows = [row for row in record["methods"] if row["kl"]]
    assert rows
    for row in rows:
        windows = pd.Series(row["kl_by_window"])
        assert len(windows) == record["windows"] and windows.mean() == pytest.approx(row["kl"], rel=1e-4)
        assert windows.sem() == pytest.approx(row["kl_error"], rel=1e-3)


@pytest.mark.parametrize(("name", "task"), [("passkey-smollm2", passkey), ("kv-smollm2", key_values)])
def test_the_exact_cache_in_the_shortest_text(name, task, default_model, all_threads):
    """What is drawn first: of pass keys those of the first depth, of pairs those of the first text."""
    record = committed(name)
    assert text_record(record["text"]["name"]) == record["text"]
    cells = pd.DataFrame(record["records"])
    cells = cells[(cells.length == cells.length.min()) & (cells.method == "exact")]
    first = cells[cells.depth == cells.depth.min()] if task is passkey else cells[cells.trial == 0]
    options = {"lengths": [int(first.length.iloc[0])], "depths": list(first.depth.unique())}
    again = task(*default_model, load_text(record["text"]["name"]), {}, trials=first.trial.nunique(), **options)
    assert list(again.key) == list(first.key) and list(again.found) == list(first.found)
    assert again.logp.tolist() == pytest.approx(first.logp.tolist(), abs=0.01)
