"""Where a step's time goes: parts are exclusive and complete, and measuring leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pqlab import CacheConfig, cli, kernels
from pqlab.benchmarks.breakdown import breakdown
from pqlab.benchmarks.decode_steps import decode_step
from pqlab.benchmarks.filled_caches import filled_paged
from pqlab.benchmarks.step_parts import PARTS, Watch
from pqlab.errors import ConfigError, UnsupportedModelError
from pqlab.kernels import dispatch
from pqlab.transformers_api import cache_argument

PAGE = CacheConfig(page_size=16, residual_length=32)


class Ticks(Watch):
    """A clock that moves when it is told to."""

    time = 0.0

    def now(self):
        return self.time / 1e3


def test_a_moment_belongs_to_the_innermost_part():
    watch = Ticks()

    def spend(milliseconds):
        watch.time += milliseconds

    inner = watch.wrap(lambda: spend(5), "inner")

    def both():
        spend(1)
        inner()
        spend(2)

    with watch:
        spend(10)
        watch.wrap(both, "outer")()
        spend(20)
    inner()  # not measured any more
    assert watch.read() == pytest.approx({"rest": 30, "outer": 3, "inner": 5})
    watch.cost = 2.0  # taken from each of the five intervals
    assert watch.read() == pytest.approx({"rest": 26, "outer": 0, "inner": 3})


def test_an_error_closes_the_part():
    watch = Ticks()

    def fail():
        raise KeyError

    with watch:
        with pytest.raises(KeyError):
            watch.wrap(fail, "part")()
        watch.time += 1
    assert watch.read() == pytest.approx({"rest": 1, "part": 0})


def test_parts_of_every_kind_of_model(tiny_model):
    kernels.wait()
    if tiny_model.config.model_type.startswith("gemma3"):
        with pytest.raises(UnsupportedModelError, match="running a prompt"):
            breakdown(tiny_model, "paged", 100, 2)
        return
    paged = breakdown(tiny_model, "paged", 100, config=PAGE)
    exact = breakdown(tiny_model, "exact", 100, 4)
    common = {"embedding", "norms", "projection", "rotary", "store", "mlp", "lm head", "rest"}
    assert set(paged.part) == common | {"maps", "flush", "codes", "exact tokens", "bookkeeping"}
    assert set(exact.part) == common | {"attention"}
    for frame in (paged, exact):
        assert list(frame.part) == [part for part in PARTS if part in set(frame.part)]
        assert frame.share.sum() == pytest.approx(1) and (frame.milliseconds >= 0).all()
        assert frame.attrs["sum_milliseconds"] == pytest.approx(frame.milliseconds.sum())
        measured = frame.attrs["step_milliseconds"] * (1 + frame.attrs["overhead"])
        assert frame.attrs["sum_milliseconds"] <= measured * 1.001
    assert paged.attrs["steps"] == 16 and exact.attrs["steps"] == 4


def test_measuring_leaves_nothing_behind(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    ids = torch.arange(40)[None]
    before = model(ids).logits
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    rotary = __import__(type(model).__module__, fromlist=["x"]).apply_rotary_pos_emb
    breakdown(model, "paged", 100, 2)
    breakdown(model, "exact", 100, 2)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert __import__(type(model).__module__, fromlist=["x"]).apply_rotary_pos_emb is rotary
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(
        {"decode", "append_", "encode_pages_"} & set(vars(backend)) for backend in dispatch.backends().values()
    )
    assert model.config._attn_implementation == "pqlab" and torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_a_cache_of_ones_own(make_model, kind):
    model = make_model(kind)

    def prompted():
        cache = DynamicCache(config=model.config)
        model(torch.arange(50)[None], **cache_argument(model, cache))
        return cache

    frame = breakdown(model, prompted, 50, 3)
    assert frame.attrs["kind"] == "DynamicCache" and "attention" in set(frame.part)


def test_a_filled_cache_is_the_one_a_prompt_leaves(make_model):
    model = make_model("llama")
    cache = filled_paged(model, 150, PAGE)
    assert cache.lengths.tolist() == [[4, 112, 34]] and cache.get_seq_length() == 150
    cache.group.check_integrity()
    step = decode_step(model, cache, "pqlab", 150)
    for _ in range(20):
        assert torch.isfinite(step()).all()
    assert cache.lengths.sum() == 170 and cache.lengths[0, 1] == 128


def test_wrong_settings_say_what_to_set(make_model):
    model = make_model("llama")
    with pytest.raises(ConfigError, match='"paged", "exact"'):
        breakdown(model, "page", 100)
    with pytest.raises(ConfigError, match="GPU"):
        breakdown(model, "paged", 100, graph=True)


def test_the_command_compares_kinds_and_contexts(capsys):
    options = ["--shape", "tiny", "--context", "64", "200", "--steps", "3", "--device", "cpu", "--json"]
    assert cli.main(["bench", "breakdown", *options]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    runs = {(r["kind"], r["context"]) for r in found["records"]}
    assert runs == {(kind, n) for kind in ("exact", "paged") for n in (64, 200)}
    for line in ("sum of parts", "step by itself", "cost of measuring", "exact tokens"):
        assert line in out
    for named in (["--model", "default"], ["--random-weights"]):
        assert cli.main(["bench", "breakdown", "--shape", "tiny", *named]) == 2
        assert "not both" in capsys.readouterr().err
    named = ["-f", "debug-model", "--context", "64", "--steps", "3", "--kind", "paged", "--device", "cpu"]
    assert cli.main(["bench", "breakdown", *named]) == 0, "a name that means random weights has random codebooks"
    assert "debug-model on" in capsys.readouterr().out


def test_eager_steps_build_no_cudnn_plans(make_model, cudnn_seen):
    model = make_model("llama")
    seen = cudnn_seen(model)
    breakdown(model, "exact", 64, steps=2, config=PAGE)
    assert set(seen) == {(1, False)} and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["paged", "exact"])
def test_in_a_graph_parts_are_most_of_a_step(kind):
    from pqlab.benchmarks.random_models import random_model

    model = random_model("smollm2", 2048, torch.float16, "cuda")
    frame = breakdown(model, kind, 1000, config=PAGE)
    assert frame.attrs["how"] == "CUDA graph, events"
    assert {"codes", "store"} <= set(frame.part) if kind == "paged" else "attention" in set(frame.part)
    assert 0.7 < frame.attrs["sum_milliseconds"] / frame.attrs["step_milliseconds"] < 1.5
