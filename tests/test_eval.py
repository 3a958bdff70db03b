"""The harness: its rows, its bytes, its errors."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, Codebooks, ConfigError, PagedPQCache, PQConfig, use_backend
from pqlab.cost import CacheCost
from pqlab.evaluation import eval_command, fidelity, methods, peak
from pqlab.evaluation.evaluate import evaluate
from pqlab.evaluation.methods import Setting
from pqlab.kernels import dispatch
from pqlab.memory import MIB
from pqlab.process_memory import ProcessMemory
from pqlab.quantization import Origin
from pqlab.results.provenance import device_name
from pqlab.shapes import ModelShape

SMALL = CacheConfig(page_size=32, residual_length=20, num_sinks=3)


@pytest.fixture
def tiny(make_model, tiny_tokenizer):
    return make_model("llama", head_dim=32), tiny_tokenizer


@pytest.mark.parametrize("maps", [False, True])
def test_bytes_are_those_of_the_cost_model(tiny, maps):
    model, tokenizer = tiny
    pq = PQConfig(M=16, nbits=6)
    books = Codebooks.random(model, pq=pq, maps=maps)
    method = methods.from_codebooks("pq", books, Setting(model, tokenizer, SMALL))
    for context in (40, 2048, 8192):
        cost = CacheCost(ModelShape.from_config(model), pq, SMALL, context, maps=maps)
        assert method.total_bytes(context) == cost.stored_bytes + cost.constant_bytes
    assert method.token_bits == cost.token_bits == 3 and method.exact_tokens == 23


def test_a_row_for_every_method_and_a_reason_where_there_are_no_numbers(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setitem(methods._MAKERS, "breaks late", lambda setting: _broken(setting))
    foreign = Codebooks.random(5, 1, 16)
    names = ["kivi-4", "breaks late", "per-token-2"]
    books = {"mine": Codebooks.random(model, pq=PQConfig(M=16, nbits=4)), "foreign": foreign}
    result = evaluate(model, tokenizer, names, codebooks=books, windows=2, length=150, config=SMALL)
    table = result.table().set_index("method")
    assert list(table.index) == ["exact", *names, "mine", "foreign"]
    assert table.token_bits.to_dict() == pytest.approx(
        {"exact": 16, "kivi-4": 5, "breaks late": 1, "per-token-2": 2.5, "mine": 2, "foreign": float("nan")},
        nan_ok=True,
    )
    assert table.note["breaks late"] == "RuntimeError: layer 1 has no storage today"
    assert "foreign made for 5 full-attention layers" in table.note["foreign"]
    assert table.kl[["breaks late", "foreign"]].isna().all()
    assert table.kl["exact"] == 0 and table.agreement["exact"] == 1
    assert table.perplexity["exact"] == table.exact_perplexity["mine"]
    assert 0 < table.kl["kivi-4"] < table.kl["per-token-2"] and table.kl_error["kivi-4"] > 0
    assert table.positions["kivi-4"] == 2 * 148
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert [row["method"] for row in record["methods"]] == list(table.index)
    assert record["methods"][2]["error"] == table.note["breaks late"] and record["methods"][2]["kl"] is None
    assert record["device"] == device_name()
    assert len(record["text"]["sha256"]) == 64 and record["versions"]["torch"] == torch.__version__
    assert model.config._attn_implementation == "sdpa"


def _broken(setting):
    def quantize(layer, k, v):
        if layer == 1:
            raise RuntimeError("layer 1 has no storage today")
        return k, v

    return methods.Method("breaks late", quantize, setting.config, 2 * 2 * 3 * 32, 2 * 2 * 3 * 32 * 32 // 8)


def test_ranges_of_positions_add_up_to_the_whole(tiny):
    model, tokenizer = tiny
    result = evaluate(model, tokenizer, ["kivi-2"], windows=2, length=150, config=SMALL)
    ranges = result.by_position(64)
    assert ranges[["start", "stop"]].values.tolist() == [[0, 64], [64, 128], [128, 149]]
    total = (ranges.kl * ranges.positions).sum() / ranges.positions.sum()
    assert total == pytest.approx(result.table().kl[1])
    assert ranges.coded.is_monotonic_increasing
    with pytest.raises(ValueError, match="at least 1"):
        result.by_position(0)


def test_errors_are_over_windows():
    frame = pd.DataFrame(
        {
            "method": "m", "window": [0, 0, 1, 1], "position": [1, 2, 1, 2], "coded": 0,
            "exact_nll": [1.0, 1.0, 2.0, 2.0], "nll": [1.1, 1.1, 2.3, 2.3], "kl": [0.0, 2.0, 3.0, 5.0], "agree": True,
        }
    )  # fmt: skip
    row = fidelity.summarize(frame).iloc[0]
    assert row.kl == 2.5 and row.kl_error == pytest.approx(1.5)  # means 1 and 4
    assert row.change == pytest.approx(2.718281828**0.2 - 1)
    assert row.change_error == pytest.approx(0.1 * (1 + row.change))
    assert pd.isna(fidelity.summarize(frame[frame.window == 0]).kl_error[0])


def test_differences_are_taken_window_by_window():
    """A window that is hard for both methods is no noise in their difference."""
    kl = {"a": [1.0, 9.0, 2.0], "b": [1.1, 9.1, 2.4], "c": [0.5, 9.5, 2.0]}
    frame = pd.DataFrame(
        [(m, w, x) for m, xs in kl.items() for w, x in enumerate(xs)], columns=["method", "window", "kl"]
    )
    table = fidelity.versus(frame, "b").set_index("method")
    assert list(table.index) == ["a", "c"] and table.windows.tolist() == [3, 3]
    assert table.difference["a"] == pytest.approx(-0.2) and table.difference_error["a"] == pytest.approx(0.1)
    assert table.better.tolist() == [3, 2] and table.ratio["a"] == pytest.approx(12 / 12.6)
    assert pd.isna(fidelity.versus(frame[frame.window == 0], "b").difference_error).all()
    with pytest.raises(ValueError, match='no numbers of "d"; there are some of a, b, c'):
        fidelity.versus(frame, "d")


def test_a_method_with_its_own_sinks_is_run_with_them(tiny):
    model, tokenizer = tiny
    config = CacheConfig(page_size=32, residual_length=20, num_sinks=0)
    ids = fidelity.text_windows(tokenizer, "It is a truth universally acknowledged. " * 9, 150, 1)
    quantize = methods.make("kivi-2", Setting(model, tokenizer, SMALL)).quantize
    frame = fidelity.compare(
        model, ids, {"with": quantize, "without": quantize}, SMALL, own_configs={"without": config}
    )
    first = frame[frame.coded > 0].groupby("method").position.min()
    assert first["with"] == first["without"] + 3
    alone = fidelity.compare(model, ids, {"without": quantize}, config)
    assert alone.kl.tolist() == frame[frame.method == "without"].kl.tolist()


def test_distributions_that_are_not_finite_are_an_error_not_a_gap(tiny):
    model, tokenizer = tiny
    ids = [torch.randint(0, 200, (1, 150))]
    with pytest.raises(ValueError, match="not finite"):
        fidelity.compare(model, ids, {"nan": lambda layer, k, v: (k * float("nan"), v)}, SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["kivi-5"]}, 'no method "kivi-5"; did you mean "kivi-.".* per-token-4'),
        ({"length": 50}, "length = 50 quantizes nothing.* at least 56"),
        ({"length": 5000}, "more than the model's 4096"),
        ({"length": 150, "prompt": 149}, "prompt to at most 148"),
        ({"windows": 0}, "windows = 0"),
        ({"prompt": 0}, "prompt = 0"),
        ({"skip": -1}, "skip = -1"),
        ({"names": ["pq-4"], "codebooks": {"pq-4": "x"}}, "give the codebooks another name"),
        (
            {"names": ["kivi-4", "pq-4"], "text": "emma"},
            "calibration on mixed would flatter the result, since emma is evaluated on",
        ),
    ],
)
def test_bad_settings_say_what_to_set(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(*tiny, **{"length": 150, "config": SMALL, **settings})


def test_the_least_length_quantizes_something(tiny):
    model, tokenizer = tiny
    result = evaluate(model, tokenizer, ["kivi-2"], windows=1, length=56, config=SMALL)
    assert result.frame.coded.max() == 32 and result.frame.kl.max() > 0
    with pytest.raises(ConfigError, match="at least 56"):
        evaluate(model, tokenizer, ["kivi-2"], windows=1, length=55, config=SMALL)


def test_names():
    assert methods.default_names()[0] == "pq-4"
    assert {"kivi-4", "per-token-4", "hf-quanto-4", "hf-hqq-4", "million-4"} < set(methods.default_names())
    assert {"fp8", "kivi-2", "per-token-2"} < set(methods.names()) - set(methods.default_names())
    with pytest.raises(ValueError, match="already"):
        methods.register("fp8")(lambda setting: None)


def test_command(tiny, monkeypatch, tmp_path, capsys):
    from pqlab.cli import main

    model, tokenizer = tiny
    monkeypatch.setattr(eval_command, "load", lambda args: (None, model, tokenizer))
    monkeypatch.setattr("pqlab.quantization.codebook.fingerprint", lambda model: "tiny")
    books = Codebooks.random(model, pq=PQConfig(M=16, nbits=4))
    Codebooks(books.layers, Origin(fingerprint="tiny", num_layers=2)).save(tmp_path / "small.safetensors")
    common = ["--windows", "1", "--length", "120", "--page-size", "32", "--residual", "20", "--sinks", "3"]
    out = tmp_path / "out.json"
    arguments = ["--methods", "kivi-4", "--codebooks", str(tmp_path / "small.safetensors"), "--json", "--out", str(out)]
    assert main(["eval", *common, *arguments, "--versus", "kivi-4"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.strip().splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [row["method"] for row in record["methods"]] == ["exact", "kivi-4", "small"]
    assert record["cache"] == {"page_size": 32, "residual_length": 20, "num_sinks": 3}
    assert list(record["codebooks"]) == ["small"] and str(tmp_path) not in json.dumps(record)
    assert main(["eval", *common, "--methods", "kivi-2", "--out", str(out), "--append"]) == 0
    together = json.loads(out.read_text())["methods"]
    assert [row["method"] for row in together] == ["exact", "kivi-4", "small", "kivi-2"]
    assert together[1:3] == record["methods"][1:] and not any("measured" in row for row in together)
    out.write_text(json.dumps({**json.loads(out.read_text()), "device": "another"}))
    assert main(["eval", *common, "--methods", "kivi-3", "--out", str(out), "--append"]) == 0
    found = json.loads(out.read_text())
    assert found["device"] == "another" and found["methods"][:4] == together
    assert found["methods"][4]["method"] == "kivi-3" and found["methods"][4]["measured"] == {"device": device_name()}
    together = found["methods"]
    assert main(["eval", *common, "--skip", "5", "--methods", "kivi-2", "--out", str(out), "--append"]) == 2
    assert "left as it is: the records differ in skip: 0 and 5" in capsys.readouterr().err
    assert json.loads(out.read_text())["methods"] == together
    assert "KL beside kivi-4" in printed
    small = record["methods"][2]
    assert small["kl_by_window"] == [pytest.approx(small["kl"])] and record["methods"][0]["kl_by_window"] == []
    assert "KL at positions" in printed and " nan" not in printed
    for bad, said in (
        (["--methods", "kivi-7"], "The methods are pq-4, "),
        (["--page-size", "20"], "page_size = 20 is out of range"),
        (["--append"], "give one with --out"),
        (["--versus", "kivi-4", "--methods", "kivi-2"], "measured: kivi-2"),
        (["--codebooks", __file__], "test_eval.py cannot be read as a safetensors file"),
        (["--length", "30"], "quantizes nothing"),
    ):
        assert main(["eval", *common, *bad]) == 2
        assert said in capsys.readouterr().err


def test_a_run_without_numbers_still_prints(tiny, capsys):
    model, tokenizer = tiny
    config = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
    result = evaluate(model, tokenizer, ["kivi-4"], windows=1, length=100, config=config)
    assert "page_size" in eval_command.render_table(result.table())
    assert eval_command.render_positions(result.by_position()) == "no method was measured"
    assert result.record()["methods"][1]["error"].startswith("ConfigError")


def test_peaks_are_those_of_real_caches(make_model, tiny_tokenizer, monkeypatch):
    """A token takes 24 KiB in float32: the exact cache and what its copies leave, and the paged one's window."""
    model = make_model("llama", head_dim=128, num_key_value_heads=6)
    books = {"mine": Codebooks.random(model, pq=PQConfig(M=32, nbits=4))}
    broken = methods.from_codebooks("broken", books["mine"], Setting(model, tiny_tokenizer, SMALL))
    monkeypatch.setitem(methods._MAKERS, "broken", lambda setting: replace(broken, cache=_no_cache))
    options = {"codebooks": books, "windows": 1, "length": 1200, "config": SMALL}
    result = evaluate(model, tiny_tokenizer, ["kivi-4", "broken"], **options)
    table = result.table().set_index("method")
    exact = 1200 * 2 * 2 * 6 * 128 * 4 / MIB
    assert 0.9 * exact < table.peak_mib["exact"] < 3 * exact
    assert 0 < table.peak_mib["mine"] < exact / 3 and table.peak_mib["mine"] <= table.prompt_peak_mib["mine"]
    assert table[["peak_mib", "prompt_peak_mib"]].loc[["kivi-4", "broken"]].isna().all(axis=None)
    assert table.note["broken"] == "no peak: OSError: no memory to look at" and table.kl["broken"] > 0
    rows = {row["method"]: row for row in result.record()["methods"]}
    assert rows["kivi-4"]["peak_mib"] is None
    assert rows["mine"]["peak_mib"] == pytest.approx(table.peak_mib["mine"], rel=1e-4)
    assert model.config._attn_implementation == "sdpa"


def _no_cache(context: int):
    raise OSError("no memory to look at")


def test_a_peak_begins_beside_the_run_before(make_model, monkeypatch):
    """Builds that the first tokens have begun are awaited, and its copies of codebooks cannot go while others come."""
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=4))
    made, seen = [], []

    def make(context: int):
        seen.append(f"cache for {context}")
        cache = PagedPQCache(model, books, SMALL, context=context)
        made.append(weakref.ref(cache))
        return cache

    class Watched(ProcessMemory):
        def __enter__(self):
            seen.append("watch")
            assert made[0]() is not None
            return super().__enter__()

    monkeypatch.setattr(peak, "ProcessMemory", Watched)
    monkeypatch.setattr(peak.kernels, "wait", lambda: seen.append("wait"))
    ids = torch.arange(100)[None]
    peaks, errors = peak.cache_peaks(model, ids, {"mine": (make, "pqlab")})
    assert not errors and seen == ["cache for 64", "wait", "watch", "cache for 100"]
    assert peaks["mine"].fallback in ("", *(reason for _, _, reason in dispatch.runs()))


def test_a_peak_of_another_backend_says_so(make_model, tiny_tokenizer, monkeypatch):
    model = make_model("llama")
    books = {"mine": Codebooks.random(model, pq=PQConfig(M=8, nbits=4))}
    with use_backend("-cpu"):
        result = evaluate(model, tiny_tokenizer, [], codebooks=books, windows=1, length=100, config=SMALL)
    note = result.table().set_index("method").note["mine"]
    assert note == "peak with fallbacks (cpu: forbidden by the setting)"
