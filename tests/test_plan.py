"""Plans: budgets are kept, choices follow measured sensitivities, files come back whole."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, Codebooks, PQConfig
from pqlab.errors import ConfigError
from pqlab.evaluation import methods
from pqlab.evaluation.allocation import allocate
from pqlab.evaluation.fidelity import compare, last_hidden
from pqlab.evaluation.plan import Plan, Planner, plan
from pqlab.evaluation.predicted_kl import predict_kl
from pqlab.evaluation.teacher_forced import TeacherForcedCache, from_codebooks
from pqlab.quantization import CodebookError, IdentityCodec, LayerCodec

TEXT = " ".join(f"Chapter {i}: the {i * 7919 % 997}th whale was {i * 31 % 89} feet long, and sang." for i in range(400))
SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)


def costs(curves: dict, elements: int = 64) -> pd.DataFrame:
    rows = [(*key, bits, elements, kl) for key, curve in curves.items() for bits, kl in curve.items()]
    return pd.DataFrame(rows, columns=["layer", "side", "bits", "elements", "kl"])


def test_the_best_choice_under_a_budget():
    """Against every combination: convex curves are solved up to the last step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scale = torch.rand(4, generator=generator).tolist()
        table = costs({(i, "k"): {1: s, 2: s / 4, 4: s / 40} for i, s in enumerate(scale)})
        chosen = allocate(table, 2.25)
        spent = sum(chosen.values()) / 4
        best = min(
            sum(s * {1: 1, 2: 1 / 4, 4: 1 / 40}[b] for s, b in zip(scale, combination, strict=True))
            for combination in itertools.product((1, 2, 4), repeat=4)
            if sum(combination) / 4 <= spent
        )
        ours = sum(s * {1: 1, 2: 1 / 4, 4: 1 / 40}[chosen[i, "k"]] for i, s in enumerate(scale))
        assert spent <= 2.25 and ours == pytest.approx(best)


def test_a_curve_that_does_not_fall_is_never_climbed():
    assert allocate(costs({(0, "k"): {1: 0.5, 2: 0.6, 4: 0.5}, (0, "v"): {1: 1, 2: 1.1, 4: 0.1}}), 4) == {
        (0, "k"): 1,
        (0, "v"): 4,
    }


@pytest.fixture(scope="module")
def tiny():
    from conftest import make_tiny_model

    return make_tiny_model("llama")


@pytest.fixture(scope="module")
def planner(tiny, tiny_tokenizer):
    settings = {"config": SMALL, "length": 200, "progress": False, "text_name": "whales"}
    return Planner(tiny, tiny_tokenizer, TEXT, choices=(1, 2, 4), **settings)


def test_sensitivity_is_the_measured_divergence(tiny, planner):
    """Each side alone, through the real decode path: the second-order prediction is right within a factor of two."""
    windows = [torch.randint(0, 200, (1, 300), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    found = predict_kl(tiny, windows, planner.candidates, SMALL)
    measured_by = {}
    for r in found.itertuples():
        exact = {i: IdentityCodec(*layer.geometry) for i, layer in planner.candidates[1].items()}
        layers = {i: LayerCodec(c, c) for i, c in exact.items()}
        codec = getattr(planner.candidates[r.bits][r.layer], r.side)
        pair = {"k": exact[r.layer], "v": exact[r.layer]} | {r.side: codec}
        layers[r.layer] = LayerCodec(**pair)
        measured_by[f"{r.layer} {r.side} {r.bits}"] = from_codebooks(Codebooks(layers))
    measured = compare(tiny, windows, measured_by, SMALL).groupby("method", sort=False).kl.mean()
    ratio = found.kl.to_numpy() / measured.to_numpy()
    assert ((ratio > 0.4) & (ratio < 2.5)).all(), ratio
    ranks = found.kl.rank().corr(pd.Series(measured.to_numpy()).rank())
    assert ranks > 0.8


def test_budgets_are_kept_and_more_bits_are_better(planner):
    plans = [planner.plan(bits=bits) for bits in (1, 2.25, 4)]
    assert plans[0].bits == 1 and plans[1].bits == 2.25
    assert 2.25 < plans[2].bits <= 4, "what does not help is not bought"
    divergence = [p.certificate["kl"] for p in plans]
    assert divergence == sorted(divergence, reverse=True)
    mixed = plans[1]
    assert mixed.choices.bits.mean() == 2.25 and set(mixed.choices.bits) <= {1, 2, 4}
    for r in mixed.choices.itertuples():
        assert getattr(mixed.codebooks.layer(r.layer), r.side).num_subspaces == r.M


def test_eight_bits_are_for_the_layers_that_need_them(tiny, tiny_tokenizer, planner):
    settings = {"config": SMALL, "length": 200, "num_tokens": 1500, "windows": 1, "progress": False}
    wide = Planner(tiny, tiny_tokenizer, TEXT, choices=(4, 8), **settings)
    assert len(wide.candidates[4]) == 2 and len(wide.candidates[8]) == 1, "a quarter of the layers, at least one"
    (chosen,) = wide.candidates[8]
    four = wide.costs[wide.costs.bits == 4].groupby("layer").kl.sum()
    assert four[chosen] == four.max()
    made = wide.plan(bits=6)
    assert set(made.choices[made.choices.bits == 8].layer) == {chosen} and made.bits <= 6
    assert made.certificate["kl"] < wide.plan(bits=4).certificate["kl"]
    only = Planner(tiny, tiny_tokenizer, TEXT, choices=(8,), **settings)
    assert only.plan(bits=8).bits == 8


def test_a_divergence_as_budget_is_measured(planner):
    limit = planner.plan(bits=2).certificate["kl"]
    found = planner.plan(kl=limit)
    assert found.certificate["kl"] <= limit and found.bits <= 2.5
    with pytest.raises(ConfigError, match="kl = 1e-09 is not reached: with all layers but one exact, the plan of"):
        planner.plan(kl=1e-9)


def test_layers_are_left_exact_where_no_choice_holds(tiny, planner, tmp_path):
    """Beyond what the largest choices reach; the plan is a file, and generation is that of the harness."""
    best = planner.plan(bits=4)
    made = planner.plan(kl=best.certificate["kl"] * 0.7)
    assert 1 <= len(made.codebooks.exact) < len(planner.candidates[1])
    fewer = planner._made(planner._largest, list(made.codebooks.exact)[:-1]) if len(made.codebooks.exact) > 1 else best
    assert fewer.certificate["kl"] > made.certificate["kl"], "one exact layer less does not hold"
    rows = made.choices[made.choices.bits == 16]
    assert set(rows.layer) == set(made.codebooks.exact) and (rows.kl == 0).all()
    elements = made.choices.elements
    assert made.bits == pytest.approx((made.choices.bits * elements).sum() / elements.sum())
    made.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan", tiny)
    assert back.codebooks.exact == made.codebooks.exact and back.bits == made.bits
    method = methods.from_codebooks("plan", back.codebooks, methods.Setting(tiny, None, SMALL))
    assert method.token_bits == pytest.approx(made.bits)
    with pytest.raises(CodebookError, match="is left exact and has no codec"):
        back.codebooks.layer(next(iter(back.codebooks.exact)))

    ids = torch.randint(0, 200, (1, 150), generator=torch.Generator().manual_seed(3))
    tiny.set_attn_implementation("pqlab")
    whole = last_hidden(tiny, ids, TeacherForcedCache(tiny, from_codebooks(back.codebooks, SMALL.page_size), SMALL))
    cache = back.cache(tiny)
    assert [kind.startswith("exact") for kind in cache.layer_kinds()] == [i in back.codebooks.exact for i in range(2)]
    steps = [last_hidden(tiny, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    tiny.set_attn_implementation("sdpa")
    away = (torch.cat(steps) - whole).abs().max()  # exact tokens behind a map lie behind its rounded inverse
    assert away < 5e-3
    assert cache.nbytes()["exact_layers"] > 0


def test_a_plan_is_a_file_that_the_cache_takes(tiny, planner, tmp_path):
    made = planner.plan(bits=2.25)
    made.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan", tiny)
    assert back.config == SMALL and back.certificate == made.certificate and back.bits == 2.25
    pd.testing.assert_frame_equal(back.choices, made.choices, check_dtype=False)
    tiny.set_attn_implementation("pqlab")
    outputs = []
    for codebooks in (made.codebooks, Codebooks.load(tmp_path / "plan", tiny)):
        from pqlab import PagedPQCache
        from pqlab.transformers_api import cache_argument

        cache = PagedPQCache(tiny, codebooks, back.config)
        ids = torch.arange(60)[None]
        outputs.append(tiny.generate(ids, **cache_argument(tiny, cache), max_new_tokens=40, do_sample=False))
        assert cache.layer_kinds() and cache.nbytes()["codes"] > 0
    tiny.set_attn_implementation("sdpa")
    assert torch.equal(*outputs)
    Codebooks.random(tiny, pq=PQConfig(8, 4)).save(tmp_path / "books")
    with pytest.raises(ConfigError, match="without a plan; use Codebooks.load"):
        Plan.load(tmp_path / "books")


def test_wrong_budgets_are_refused_before_the_work(tiny, tiny_tokenizer):
    for budget in ({}, {"bits": 2, "kl": 0.1}):
        with pytest.raises(ConfigError, match="give one budget"):
            plan(None, None, "", **budget)
    for budget in ({"bits": 0}, {"kl": 0.0}, {"kl": float("nan")}):
        with pytest.raises(ConfigError, match="is no budget; give a number above 0"):
            plan(None, None, "", **budget)
    with pytest.raises(ConfigError, match="choices = \\[3\\] are not of"):
        Planner(tiny, tiny_tokenizer, TEXT, choices=[3])
    with pytest.raises(ConfigError, match="length = 100 quantizes nothing: .* set length to at least 197"):
        Planner(tiny, tiny_tokenizer, TEXT, length=100)
    with pytest.raises(ValueError, match="windows of 1024, not 4"):
        Planner(tiny, tiny_tokenizer, TEXT[:4000])
