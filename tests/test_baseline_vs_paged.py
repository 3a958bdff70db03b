"""The report's first table: rows per context and cache, ratios, and a command."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, PQConfig, cli
from pqlab.benchmarks import baseline_vs_paged as module
from pqlab.benchmarks.baseline_vs_paged import EXACT, NO_CUDNN, PAGED, baseline_vs_paged, beside_exact, render
from pqlab.errors import ConfigError
from pqlab.figures.performance import baseline_figure
from pqlab.model_runs import cudnn_attention_off
from pqlab.quantization import Codebooks
from pqlab.results.shipped import shipped_like


def test_a_row_per_context_and_cache(make_model, tiny_tokenizer):
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=8))
    config = CacheConfig(page_size=16, residual_length=32)
    frame = baseline_vs_paged(model, tiny_tokenizer, [100, 400], codebooks=books, config=config, batch=2, new_tokens=3)
    assert list(zip(frame.context, frame.cache, strict=True)) == [
        (100, "exact"), (100, "paged"), (400, "exact"), (400, "paged"),
    ]  # fmt: skip
    assert (frame[["first_token_seconds", "token_ms", "cache_bytes"]] > 0).all().all()
    exact = frame[frame.cache == "exact"]
    assert exact.cache_bytes.tolist() == [2 * 2 * 2 * 3 * 16 * 4 * (n + 2) for n in (100, 400)]  # the last: not fed
    assert (exact.reserved_bytes == 0).all() and (frame[frame.cache == "paged"].reserved_bytes > 0).all()
    ratios = beside_exact(frame)
    assert ratios.cache.iloc[1] > ratios.cache.iloc[0] > 1
    traces = baseline_figure(frame).data
    assert [t.name for t in traces] == ["exact", "paged"] * 4 and list(traces[2].y) == exact.token_ms.tolist()
    with pytest.raises(ConfigError, match="longest context is 4093"):
        baseline_vs_paged(model, tiny_tokenizer, [4094], codebooks=books, new_tokens=3)


def test_static_caches_are_emptied_and_used_again(make_model, tiny_tokenizer):
    model = make_model("llama")
    options = {"codebooks": Codebooks.random(model, pq=PQConfig(M=8, nbits=8)), "new_tokens": 9}
    static = baseline_vs_paged(model, tiny_tokenizer, [100], static=True, **options)
    eager = baseline_vs_paged(model, tiny_tokenizer, [100], **options)
    assert list(static.cache) == ["exact", "paged"] and (static.token_ms > 0).all()
    bytes_of = {n: f.set_index("cache").cache_bytes for n, f in (("static", static), ("eager", eager))}
    assert bytes_of["static"]["exact"] >= bytes_of["eager"]["exact"], "a buffer for all tokens from the start"
    assert bytes_of["static"]["paged"] > 0


def table(*rows: tuple, context: int = 64) -> pd.DataFrame:
    names = ["cache", "first_token_seconds", "token_ms", "cache_bytes", "reserved_bytes", "peak_bytes"]
    return pd.DataFrame(rows, columns=names).assign(context=context)


def test_ratios_are_exact_over_paged():
    rows = [("exact", 2.0, 30.0, 400, 0, 900.0), ("paged", 4.0, 10.0, 100, 150, 300.0)]
    frame = table(*rows)
    assert beside_exact(frame).iloc[0].tolist() == [64, 0.5, 3.0, 4.0, 3.0, EXACT, EXACT]
    assert "64 tokens, paged: first token 0.50x as fast, each token 3.00x; cache 4.00x smaller" in render(frame)


def test_ratios_are_of_the_faster_exact_row():
    short = [(EXACT, 2.0, 60.0, 400, 0, 900.0), (NO_CUDNN, 3.0, 20.0, 400, 0, 800.0), (PAGED, 4.0, 40.0, 100, 150, 400)]
    long = [(EXACT, 9.0, 10.0, 400, 0, 900.0), (NO_CUDNN, 6.0, 20.0, 400, 0, 900.0), (PAGED, 3.0, 5.0, 100, 150, 300)]
    frame = pd.concat([table(*long, context=128), table(*short)])
    ratios = beside_exact(frame)
    assert ratios.iloc[0].tolist() == [128, 2.0, 2.0, 4.0, 3.0, NO_CUDNN, EXACT], "contexts in the order of the table"
    assert ratios.iloc[1].tolist() == [64, 0.5, 0.5, 4.0, 2.0, EXACT, NO_CUDNN]
    said = render(frame)
    assert "first token 0.50x as fast (beside exact), each token 0.50x (beside exact, no cuDNN); cache" in said
    traces = baseline_figure(frame).data
    assert [t.name for t in traces[:3]] == [EXACT, NO_CUDNN, PAGED]
    assert len({(t.line.color, t.line.dash, t.marker.symbol) for t in traces}) == 3, "three that can be told apart"


def test_on_a_gpu_the_eager_exact_cache_is_measured_twice(make_model, tiny_tokenizer, monkeypatch):
    model = make_model("llama")
    options = {"codebooks": Codebooks.random(model, pq=PQConfig(M=8, nbits=8)), "new_tokens": 3}
    timed, real, allowed = module.time_generation, [], []
    monkeypatch.setattr(module, "time_generation", lambda *args, **kw: real.append(timed(*args, **kw)) or real[-1])
    baseline_vs_paged(model, tiny_tokenizer, [100], **options)

    def pretend(given, ids, make, new_tokens, *, static):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return replace(real[0], token_ms=float(len(allowed)))

    monkeypatch.setattr(module, "time_generation", pretend)
    on_gpu = SimpleNamespace(config=model.config, device=torch.device("cuda"))
    frame = baseline_vs_paged(on_gpu, tiny_tokenizer, [100], **options)
    assert list(frame.cache) == [EXACT, NO_CUDNN, PAGED] and frame.token_ms.tolist() == [1, 2, 3]
    assert allowed == [True, False, True]
    assert list(baseline_vs_paged(on_gpu, tiny_tokenizer, [100], static=True, **options).cache) == [EXACT, PAGED]


def test_cudnn_attention_comes_back():
    with pytest.raises(KeyError), cudnn_attention_off(), cudnn_attention_off():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", shipped_like("baseline-*"))
def test_shipped_tables_are_read(name):
    frame = pd.DataFrame(shipped_like(name)[name]["records"])
    assert len(render(frame).splitlines()) == 1 + len(frame) + frame.context.nunique()
    assert {t.name for t in baseline_figure(frame).data} == set(frame.cache)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_rows_of_a_gpu(make_model, tiny_tokenizer):
    model = make_model("llama", head_dim=64).to("cuda", torch.float16)
    books = Codebooks.random(model, pq=PQConfig(M=32, nbits=8))
    frame = baseline_vs_paged(model, tiny_tokenizer, [300], codebooks=books, new_tokens=12)
    assert list(frame.cache) == [EXACT, NO_CUDNN, PAGED] and (frame.token_ms > 0).all()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_command(capsys):
    options = ["-f", "debug-model", "--random-weights", "--context", "200", "--new-tokens", "3", "--device", "cpu"]
    assert cli.main(["bench", "baseline", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["cache"] for r in found["records"]] == ["exact", "paged"] and found["random_weights"]
    assert cli.main(["bench", "baseline", *options[:-2], "--device", "cpu", "--context", "99999"]) == 2
    assert "longest context" in capsys.readouterr().err
