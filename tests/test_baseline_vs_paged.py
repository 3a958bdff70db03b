"""The report's first table: rows per context and cache, ratios, and a command."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from pqlab import CacheConfig, PQConfig, cli
from pqlab.benchmarks.baseline_vs_paged import baseline_vs_paged, beside_exact, render
from pqlab.errors import ConfigError
from pqlab.figures.performance import baseline_figure
from pqlab.quantization import Codebooks


def test_a_row_per_context_and_cache(make_model, tiny_tokenizer):
    model = make_model("llama")
    books = Codebooks.random(model, config=PQConfig(M=8, nbits=8))
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
    options = {"codebooks": Codebooks.random(model, config=PQConfig(M=8, nbits=8)), "new_tokens": 9}
    static = baseline_vs_paged(model, tiny_tokenizer, [100], static=True, **options)
    eager = baseline_vs_paged(model, tiny_tokenizer, [100], **options)
    assert list(static.cache) == ["exact", "paged"] and (static.token_ms > 0).all()
    bytes_of = {n: f.set_index("cache").cache_bytes for n, f in (("static", static), ("eager", eager))}
    assert bytes_of["static"]["exact"] >= bytes_of["eager"]["exact"], "a buffer for all tokens from the start"
    assert bytes_of["static"]["paged"] > 0


def test_ratios_are_exact_over_paged():
    rows = [("exact", 2.0, 30.0, 400, 0, 900.0), ("paged", 4.0, 10.0, 100, 150, 300.0)]
    names = ["cache", "first_token_seconds", "token_ms", "cache_bytes", "reserved_bytes", "peak_bytes"]
    frame = pd.DataFrame(rows, columns=names).assign(context=64)
    assert beside_exact(frame).iloc[0].tolist() == [64, 0.5, 3.0, 4.0, 3.0]
    assert "64 tokens, paged: first token 0.50x as fast, each token 3.00x; cache 4.00x smaller" in render(frame)


def test_the_command(capsys):
    options = ["-f", "debug-model", "--random-weights", "--context", "200", "--new-tokens", "3", "--device", "cpu"]
    assert cli.main(["bench", "baseline", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["cache"] for r in found["records"]] == ["exact", "paged"] and found["random_weights"]
    assert cli.main(["bench", "baseline", *options[:-2], "--device", "cpu", "--context", "99999"]) == 2
    assert "longest context" in capsys.readouterr().out
