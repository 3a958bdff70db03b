"""Memory over a generation: what the caches hold is what the samples say, and a peak is not missed."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, ConfigError, PagedPQCache, cli
from pqlab.benchmarks.memory_timeline import EXACT, PAGED, memory_timeline, summary
from pqlab.memory import MIB
from pqlab.process_memory import ProcessMemory

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)


@pytest.fixture
def model(make_model):
    return make_model("llama")


def tokens(n: int) -> torch.Tensor:
    return torch.arange(n)[None] % 200


def test_what_the_caches_hold(model, books):
    frame = memory_timeline(model, books, tokens(150), prompt=60, config=SMALL, every=30)
    exact, paged = (frame[frame.cache == name].reset_index(drop=True) for name in (EXACT, PAGED))
    assert list(exact.step) == list(paged.step) == [-2, -1, 0, 30, 60, 90]
    assert list(exact.tokens) == list(paged.tokens) == [0, 0, 60, 90, 120, 150]
    token = 2 * 2 * 3 * 16 * 4  # layers, sides, heads, elements, bytes
    assert list(exact.used) == list(exact.reserved) == [token * n for n in exact.tokens]
    whole = PagedPQCache(model, books, SMALL, context=150)
    assert paged.reserved[1] >= whole.nbytes()["free_pages"] > 0 and paged.reserved[0] == 0, (
        "reserved before the first token"
    )
    assert paged.reserved.iloc[2:].nunique() == 1 or paged.reserved.iloc[2:].diff().max() < 64, "only the table grows"
    assert (paged.used <= paged.reserved).all() and paged.used.is_monotonic_increasing
    assert paged.used.iloc[-1] < exact.used.iloc[-1]
    assert (frame.peak >= frame.process).all() and exact.seconds.is_monotonic_increasing and exact.seconds.iloc[-1] > 0
    assert model.config._attn_implementation == "sdpa"
    found = summary(frame).set_index("cache")
    assert found.loc[EXACT, "used"] == token * 150 and found.loc[PAGED, "reserved_at_start"] == paged.reserved[1]


def test_steps_of_several_tokens_hold_the_same(model, books):
    one, many = (
        memory_timeline(model, books, tokens(100), prompt=52, config=SMALL, chunk=chunk, every=48 // chunk)
        for chunk in (1, 8)
    )
    columns = ["cache", "tokens", "used", "reserved"]
    pd.testing.assert_frame_equal(one[columns], many[columns])


def test_steps_build_no_cudnn_plans(model, books, cudnn_seen):
    seen = cudnn_seen(model)
    memory_timeline(model, books, tokens(110), prompt=100, config=SMALL)
    assert {flag for n, flag in seen if n == 100} == {True}
    assert [flag for n, flag in seen if n == 1].count(False) == 2 * 10, "of both caches; the others warm up"


@pytest.mark.parametrize(("settings", "says"), [({"prompt": 100}, "prompt = 100 of 100"), ({"prompt": 0}, "prompt = 0"),
                                                ({"prompt": 5, "every": 0}, "every = 0"),
                                                ({"prompt": 5, "chunk": 0}, "chunk = 0")])  # fmt: skip
def test_what_cannot_be_run(settings, says, model, books):
    with pytest.raises(ConfigError, match=says):
        memory_timeline(model, books, tokens(100), **settings)


def test_a_peak_between_two_samples_is_seen():
    with ProcessMemory("cpu") as memory:
        held = torch.ones(64 * MIB // 4)
        with_it = memory.sample()
        torch.ones(128 * MIB // 4).sum()  # written and gone
        after = memory.sample()
        del held
        gone = memory.sample()
    assert with_it.now > 60 * MIB and after.now > 60 * MIB
    assert after.peak > after.now + 100 * MIB
    assert gone.now < 20 * MIB and gone.device is None


@pytest.mark.gpu
def test_a_gpu_misses_no_peak():
    with ProcessMemory("cuda") as memory:
        torch.ones(128 * MIB // 4, device="cuda").sum()
        found = memory.sample()
    assert found.peak > 120 * MIB and found.now < 8 * MIB
    assert found.device is None or found.device > 0


def test_the_command(tmp_path, capsys):
    typed = ["bench", "memory", "--shape", "tiny", "--context", "120", "--steps", "40", "--page-size", "16",
             "--residual", "20", "--device", "cpu"]  # fmt: skip
    assert cli.main([*typed, "--json", "--csv", str(tmp_path / "m.csv"), "--html", str(tmp_path / "m.html")]) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    (record,) = result["records"]
    assert record["context"] == 120 and result["date"] and "--shape tiny --context 120" in result["note"]
    assert len(result["samples_mib"]["data"]) == len(pd.read_csv(tmp_path / "m.csv")) == 2 * (3 + 5)
    assert {row["cache"] for row in result["summary"]} == {EXACT, PAGED} and "resident set size" in said
    assert 'src="http' not in (tmp_path / "m.html").read_text()
    named = ["--context", "200", "--steps", "8", "--page-size", "16", "--residual", "20", "--device", "cpu", "--half"]
    assert cli.main(["bench", "memory", "-f", "debug-model", *named, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "--model debug-model --half --context 200" in result["note"] and "float16" in result["measured"]
    assert cli.main([*typed, "--steps", "120"]) == 2
    assert "--steps 120 is out of range; of --context 120 it can be 1 to 119" in capsys.readouterr().err


def test_the_figure_has_both_caches(model, books):
    from pqlab.figures.memory import memory_figure

    frame = memory_timeline(model, books, tokens(80), prompt=40, config=SMALL, every=20)
    figure = memory_figure(frame)
    names = {trace.name for trace in figure.data}
    assert {"exact, held", "paged pq, held", "paged pq, tokens", "exact, peak"} <= names
    held = next(trace for trace in figure.data if trace.name == "exact, held")
    assert max(held.y) == pytest.approx(frame[frame.cache == EXACT].reserved.max() / MIB)
