"""`bench model`: every case of a tiny shape runs and ends in a record, prefill too."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pqlab import CacheConfig, Codebooks, PQConfig, cli, kernels
from pqlab.benchmarks import model_bench
from pqlab.benchmarks.decode_steps import refusals_unsaid
from pqlab.benchmarks.model_bench import bench_model, stretched
from pqlab.benchmarks.random_models import random_model
from pqlab.evaluation.plan import Plan
from pqlab.evaluation.predicted_kl import COLUMNS


def records(capsys, *options: str) -> dict[str, dict]:
    assert (
        cli.main(["bench", "model", "--shape", "tiny", "--context", "200", "--device", "cpu", "--json", *options]) == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dtype"] == "float32" and found["versions"]["torch"]
    return {r["case"]: r for r in found["records"]}


def test_every_case_of_a_step_has_a_time(capsys):
    kernels.wait()
    found = records(capsys, "--no-compiled")
    assert set(found) == {
        "none", "exact flash", "exact math", "paged", "paged, anchors", "paged, no maps", "exact eager", "paged eager",
    }  # fmt: skip
    for case, r in found.items():
        assert r["milliseconds"] and r["milliseconds"] > 0, (case, r["note"])


def test_a_row_is_printed_when_it_is_measured(monkeypatch, capsys):
    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_bench, "filled_dynamic", cut_off)  # of the last rows but one
    with pytest.raises(KeyboardInterrupt):
        records(capsys, "--no-compiled")
    shown = [line[:26].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == ["none", "exact flash", "exact math", "paged", "paged, anchors", "paged, no maps"]


def test_only_refusals_of_attention_kernels_are_unsaid():
    def refused() -> list[str]:
        x = torch.zeros(1, 1, 4, 16)
        with pytest.raises(RuntimeError, match="No available kernel"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return [str(warning.message).split(" (")[0] for warning in caught]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loud = refused()
        caught.clear()
        with refusals_unsaid():
            quiet = refused()
    assert len(loud) > 2 and loud[0].startswith("Flash attention kernel not used because")
    assert quiet == ["something else"]


def test_without_cudnn_is_one_step_long():
    step = model_bench._without_cudnn(torch.backends.cuda.cudnn_sdp_enabled)
    assert not step() and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
def test_rows_of_a_gpu():
    kernels.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = {row.case: row for row in bench_model("tiny", 200, compiled=False)}
    assert not [warning for warning in caught if "sdp_utils" in str(warning.message)], "refusals are rows"
    assert {"exact flash", "exact cudnn", "exact eager", "exact eager, no cuDNN", "paged eager"} <= set(rows)
    assert rows["exact eager, no cuDNN"].milliseconds > 0, rows["exact eager, no cuDNN"].note


def test_a_plan_is_a_case(tmp_path, capsys):
    model = random_model("tiny", 64, torch.float32, "cpu")  # two layers of heads of 16
    sides = {0: (PQConfig(M=16), PQConfig(M=8)), 1: (PQConfig(M=4), PQConfig(M=4, nbits=4))}
    books = Codebooks.random(model.config, pq=sides)
    choices = pd.DataFrame([(0, "k", 16, 8, 8, 10, 0.1)], columns=COLUMNS)
    for exact, name in ((False, "mixed"), (True, "exact")):
        some = replace(books, layers={0: books.layers[0]}, exact={1: (2, 16)}) if exact else books
        Plan(some, CacheConfig(), choices, {"kl": 0.1}).save(tmp_path / f"{name}.safetensors")
    plan = Plan.load(tmp_path / "mixed.safetensors")
    found = stretched(plan, random_model("smollm2", 64, torch.float32, "cpu"))
    assert list(found) == list(range(30)) and found[14] == (PQConfig(M=64), PQConfig(M=32))
    assert found[15] == (PQConfig(M=16), PQConfig(M=16, nbits=4))
    row = records(capsys, "--no-compiled", "--no-eager", "--plan", str(tmp_path / "mixed.safetensors"))["plan mixed"]
    assert row["milliseconds"] > 0 and row["note"] == f"{plan.bits:.4g} bits an element"
    typed = ["bench", "model", "--shape", "tiny", "--device", "cpu", "--plan", str(tmp_path / "exact.safetensors")]
    assert cli.main(typed) == 2
    assert "the plan leaves layers [1] exact" in capsys.readouterr().err


def test_time_to_the_first_token(capsys):
    found = records(capsys, "--prefill")
    assert set(found) == {"prefill exact", "prefill paged", "prefill paged static"}
    exact = found["prefill exact"]["milliseconds"]
    over = found["prefill paged"]["milliseconds"] / exact - 1
    assert found["prefill paged"]["note"].startswith(f"{over:+.1%} beside exact")
