"""The report's tables derived again: what is best follows from bytes and from what was measured."""

from __future__ import annotations

import json
from itertools import product

import pandas as pd
import pytest

from pqlab import CacheConfig, Codebooks, ConfigError, PQConfig, cli
from pqlab.cost import SHARE_OF_DEFAULT, CacheCost
from pqlab.figures.tuning import evidence_figure
from pqlab.presets import PRESETS
from pqlab.results.shipped import shipped
from pqlab.shapes import SHAPES
from pqlab.tune import Workload
from pqlab.tune.derive import CONTEXTS, PARAMETERS, RESIDUALS, by_context, by_memory, evidence
from pqlab.tune.space import PAGE_SIZES

SHAPE = SHAPES["Llama-2-7B"]


def measured(milliseconds=lambda page: 10.0, kl=lambda page, residual: 1.0 / (residual + page / 2)) -> pd.DataFrame:
    rows = [(p, r, kl(p, r), milliseconds(p), 0.01) for p, r in product(PAGE_SIZES, RESIDUALS)]
    return pd.DataFrame(rows, columns=["page_size", "residual_length", "kl", "milliseconds", "milliseconds_error"])


def test_by_bytes_alone_no_other_setting_is_smaller():
    table = by_context(SHAPE)
    assert list(table.report) == ["32 / 64 / 500", "64 / 128 / 1000", "128 / 256 / 2000"]
    for row, (name, context) in zip(table.itertuples(), CONTEXTS.items(), strict=True):
        residual = PRESETS[name].cache.residual_length
        all_bytes = [CacheCost(SHAPE, PQConfig(), CacheConfig(p, r), context).stored_bytes
                     for p, r in product(PAGE_SIZES, RESIDUALS) if r >= residual]  # fmt: skip
        assert row.ours_bytes == min(all_bytes) <= row.report_bytes
        page, _, pages = map(int, row.ours.split(" / "))
        assert page * pages + residual + page > context - 4 >= page * pages, "one sequence of that length fits"
        assert "not measured" in row.why


def test_time_and_divergence_decide():
    same = by_context(SHAPE, measured())
    for row, name in zip(same.itertuples(), CONTEXTS, strict=True):
        theirs = PRESETS[name].cache
        page, residual, _ = map(int, row.ours.split(" / "))
        assert residual + page / 2 >= theirs.residual_length + theirs.page_size / 2, "not farther from exact"
    large = by_context(SHAPE, measured(lambda page: 10 - page / 64))
    pages = [int(row.split(" / ")[0]) for row in large.ours]
    assert all(page >= PRESETS[name].cache.page_size for page, name in zip(pages, CONTEXTS, strict=True))
    assert same.why.str.startswith("page and residual are the report's").all(), "at this KL nothing smaller is as close"
    smaller = by_context(SHAPE, measured(kl=lambda page, residual: 1 / residual))
    assert smaller.ours.str.startswith("16 / ").all() and (smaller.ours_bytes < smaller.report_bytes).all()
    assert "ms a token instead of" in smaller.why[1] and "KL " in smaller.why[1]
    kept = by_context(SHAPE, measured(lambda page: 10.0, lambda page, residual: 0.0 if page == 32 else 1.0))
    assert kept.ours[0].startswith("32 / "), "only pages of 32 are as close as the report's"


def test_by_memory_counts_what_fits():
    table = by_memory(SHAPE)
    books = CacheCost(SHAPE, PQConfig(), CacheConfig(), 4096).constant_bytes
    for row in table.itertuples():
        page, pages = map(int, row.ours.split(" / "))
        page_bytes = CacheCost(SHAPE, PQConfig(), CacheConfig(page), 4096).layout.page_bytes
        assert row.free_bytes == row.gib * 2**30 - 2 * PARAMETERS["Llama-2-7B"] - books
        assert pages * page_bytes <= SHARE_OF_DEFAULT * row.free_bytes < (pages + 1) * page_bytes
        assert ("PQC004" in row.why) == (row.report_bytes > row.free_bytes)
    assert "PQC004" in table.why.iloc[-1], "256 x 4000 tokens of a 7B model are more than 80 GiB"
    assert "the weights alone do not fit" in set(by_memory(SHAPES["Llama-3.1-70B"]).why)
    assert by_memory(SHAPE, page_size=16).ours.str.startswith("16 / ").all()
    with pytest.raises(ConfigError, match="--parameters"):
        by_memory(SHAPES["Gemma-3-270M"])


def test_the_evidence_is_measured(make_model, tiny_tokenizer):
    found = Workload(make_model("llama"), tiny_tokenizer, "A long story. " * 60, context=300, positions=80)
    found._books[8, 8] = Codebooks.random(found.model, pq=PQConfig(M=8, nbits=8))
    table = evidence(found, page_sizes=(16, 32), residuals=(32, 64))
    assert len(table) == 4 and (table.milliseconds > 0).all() and table.kl.nunique() == 4
    assert table.groupby("page_size").milliseconds.nunique().eq(1).all()


def test_the_command(capsys):
    assert cli.main(["presets", "--no-measure", "--json"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert len(result["by_context"]) == 3 and len(result["by_memory"]) == 4 and result["evidence"] is None
    assert "report 64 / 128 / 1000" in said and "(16 GiB)" in said
    assert cli.main(["presets", "--shape", "Lama"]) == 2
    assert "Llama-2-7B" in capsys.readouterr().err
    assert cli.main(["presets", "--no-measure", "--shape", "Gemma-3-270M", "--parameters", "2.7e8"]) == 0


def test_the_shipped_tables_follow_from_the_shipped_evidence():
    result = shipped("presets-smollm2")
    frame = pd.DataFrame(result["evidence"])
    assert len(frame) == len(PAGE_SIZES) * len(RESIDUALS)
    shape = SHAPES[result["shape"]]
    for name, table in (("by_context", by_context(shape, frame)), ("by_memory", by_memory(shape))):
        assert json.loads(table.to_json(orient="records")) == result[name]
    figure = evidence_figure(frame)
    assert [len(trace.x) for trace in figure.data] == [len(RESIDUALS)] * len(PAGE_SIZES) + [len(PAGE_SIZES)]
