"""A trace says what happened: the tokens of generate, weights that make the outputs, a file that comes back."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, DecodeTrace, PagedPQCache, PQConfig, trace_decode
from pqlab.errors import ConfigError
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)
PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
STEPS = 40


@pytest.fixture(scope="module", params=["as they are", "anchored"])
def setting(request, tiny_tokenizer):
    from conftest import make_tiny_model

    model = make_tiny_model("llama")
    span = 64 if request.param == "anchored" else 0
    return model, tiny_tokenizer, Codebooks.random(model, pq=PQConfig(M=8, nbits=5), maps=True, span=span)


@pytest.fixture(scope="module")
def trace(setting):
    model, tokenizer, books = setting
    return trace_decode(model, tokenizer, PROMPT, STEPS, codebooks=books, config=SMALL)


def test_tokens_are_those_of_generate(setting, trace):
    model, tokenizer, books = setting
    assert model.config._attn_implementation == "sdpa", "tracing should leave the model as it was"
    model.set_attn_implementation("pqlab")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache = PagedPQCache(model, books, SMALL)
    generated = model.generate(ids, **cache_argument(model, cache), max_new_tokens=STEPS, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(trace.token_ids, generated[0])
    assert trace.steps.token_id.tolist()[1:] == generated[0, -STEPS:].tolist()
    assert trace.tables[-1, : len(cache.table.pages(0))].tolist() == list(cache.table.pages(0))
    assert trace.lengths(STEPS - 1) == tuple(cache.lengths[0].tolist())


def test_exact_storage_shows_no_difference(setting):
    model, tokenizer, _ = setting
    trace = trace_decode(model, tokenizer, PROMPT, 25, codebooks=Codebooks.identity(model), config=SMALL)
    assert trace.steps.kl.max() < 1e-5 and trace.steps.agree.all()
    assert trace.output_error().error.max() < 1e-4


def test_weights_and_values_make_the_recorded_outputs(trace):
    """What `attention` shows is what was computed: weights times V as stored give the output the model went on with."""
    for step in (0, 1, 17, STEPS):
        for layer, head in ((0, 0), (1, 5)):
            frame = trace.attention(step, layer, head)
            assert frame.paged.sum() == pytest.approx(1, abs=1e-5)
            values, _ = trace._as_stored(step, "v", layer, head // 2)
            paged = torch.tensor(frame.paged.to_numpy()) @ values
            # the map and its inverse are rounded: exact tokens have passed through both
            torch.testing.assert_close(paged, trace.tensors["output"][step, layer, head], rtol=1e-2, atol=1e-3)
            exact = torch.tensor(frame.exact.to_numpy()) @ trace.tensors["v"][layer, head // 2, : len(frame)]
            torch.testing.assert_close(exact, trace.tensors["isolated_output"][step, layer, head], rtol=1e-3, atol=1e-4)
    late = trace.attention(STEPS, 0, 0)
    assert set(late.region) == {"sink", "code", "window"}
    assert (late.exact - late.paged).abs().max() > 1e-4, "the codec is lossy, weights should differ"
    assert (trace.attention(STEPS, 1, 0, "end to end").exact - late.exact).abs().max() > 0


def test_errors_are_zero_for_the_prompt_and_not_afterwards(trace):
    errors = trace.output_error()
    assert set(errors.kind) == {"isolated", "end to end"}
    assert errors[errors.step == 0].error.max() < 1e-4
    assert errors[errors.step == STEPS].error.min() > 1e-4


def test_events_explain_the_page_tables(trace):
    for step in range(trace.num_steps):
        so_far = trace.events[trace.events.step <= step]
        allocated = so_far[so_far.kind == "allocate"].page.tolist()
        assert allocated == [page for page in trace.tables[step].tolist() if page >= 0]
        assert so_far[so_far.kind == "flush"]["count"].sum() == trace.lengths(step)[1]
    pages = trace.pages(STEPS)
    assert trace.text[3:19] == pages.text[0], "one byte a token: page 0 holds the 16 characters behind 3 sinks"
    assert "".join(trace.tokens[: trace.steps.num_tokens[0]]) == PROMPT


def test_distributions(trace):
    top = trace.topk(5)
    assert set(top.run) == {"exact", "paged"}
    best = top[(top.run == "paged") & (top["rank"] == 0)].token_id.item()
    assert best == trace.steps.next_id[5]
    assert (trace.steps.kl >= 0).all() and trace.steps.kl.max() > 0


def test_a_saved_trace_comes_back_without_the_model(trace, tmp_path):
    loaded = DecodeTrace.load(trace.save(tmp_path / "trace.safetensors"))
    assert repr(loaded) == repr(trace)
    for name in ("steps", "events", "top"):
        theirs, ours = getattr(loaded, name), getattr(trace, name)
        assert theirs.columns.tolist() == ours.columns.tolist()
        for column in ours:
            assert theirs[column].tolist() == pytest.approx(ours[column].tolist())
    pd.testing.assert_frame_equal(loaded.attention(9, 1, 2), trace.attention(9, 1, 2))
    with pytest.raises(ValueError, match="not a decode trace"):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        DecodeTrace.load(tmp_path / "other.safetensors")


def test_without_capture_only_tokens_pages_and_distributions(setting):
    model, tokenizer, books = setting
    trace = trace_decode(model, tokenizer, PROMPT, 3, codebooks=books, config=SMALL, capture=False, follow="exact")
    assert not trace.tensors and len(trace.steps) == 4
    with pytest.raises(ValueError, match="holds no attention"):
        trace.attention(0, 0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"steps": 5000}, "context of 4096"), ({"follow": "both"}, "follow"), ({"layers": [7]}, r"layers \[7\]")],
)
def test_bad_input_is_named(setting, change, says):
    model, tokenizer, books = setting
    with pytest.raises(ValueError, match=says):
        trace_decode(model, tokenizer, PROMPT, **({"steps": 3} | change), codebooks=books, config=SMALL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, r"steps = -1 is out of range \(at least 0\); the nearest good value is 0"),
        ({"steps": 2.5}, "steps = 2.5 is not a whole number"),
        ({"top": 0}, r"top = 0 is out of range \(at least 1\)"),
        ({"follow": "both"}, "follow = 'both' is unknown"),
        (
            {"config": replace(SMALL, mode="static")},
            r'mode = "static" takes all at the start; trace with .*mode="eager"',
        ),
    ],
)
def test_settings_that_cannot_be_traced_are_refused_before_anything_runs(setting, change, says):
    model, _, books = setting
    asked = []
    with pytest.raises(ConfigError, match=says):
        options = {"steps": 3, "codebooks": books, "config": SMALL} | change
        trace_decode(model, lambda *args, **kwargs: asked.append(args), PROMPT, **options)
    assert not asked


def test_no_step_is_the_prompt_alone(setting):
    model, tokenizer, books = setting
    trace = trace_decode(model, tokenizer, PROMPT, 0, codebooks=books, config=SMALL)
    assert trace.num_steps == 1 and trace.text == PROMPT and trace.attention(0, 1, 2).exact.sum() == pytest.approx(1)


def test_a_file_that_knows_of_one_setting_for_all_layers_is_read(trace, tmp_path):
    """As traces were written whose meta held M and nbits of the first layer's keys."""
    assert not {"M", "nbits"} & trace.meta.keys()
    older = replace(trace, meta=trace.meta | {"M": 8, "nbits": 5})
    loaded = DecodeTrace.load(older.save(tmp_path / "older.trace"))
    assert loaded.meta["nbits"] == 5
    pd.testing.assert_frame_equal(loaded.attention(9, 1, 2), trace.attention(9, 1, 2))


def test_token_ids_need_no_tokenizer(setting, trace):
    model, tokenizer, books = setting
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    named = trace_decode(model, None, ids, 3, codebooks=books, config=SMALL)
    assert named.steps.token_id.tolist() == trace.steps.token_id[:4].tolist()
    assert named.steps.token.tolist() == [f"<{i}>" for i in named.steps.token_id]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        trace_decode(model, None, PROMPT, 3, codebooks=books, config=SMALL)


def test_a_head_that_is_not_there_is_named(trace):
    for head in (-1, trace.num_heads):
        with pytest.raises(IndexError, match=f"head = {head} is out of range"):
            trace.attention(3, trace.layers[0], head)


def test_characters_of_several_tokens_stay_whole(setting):
    model, tokenizer, books = setting
    prompt = "caf\u00e9 \u2014 na\u00efve " * 5
    trace = trace_decode(model, tokenizer, prompt, 1, codebooks=books, config=SMALL, capture=False)
    assert "".join(trace.tokens[: trace.steps.num_tokens[0]]) == prompt
