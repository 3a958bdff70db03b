"""Plans for a context: sinks and window are chosen with the codes, under bytes or a KL; what is stored fits."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from pqlab import CacheConfig, cli
from pqlab.errors import ConfigError
from pqlab.evaluation import methods, plan_command
from pqlab.evaluation.evaluate import evaluate
from pqlab.evaluation.exact_tokens import RESIDUALS, ExactTokens, exact_sizes, mean_kl
from pqlab.evaluation.fidelity import compare
from pqlab.evaluation.methods import Setting, sequence_bytes
from pqlab.evaluation.options import Options
from pqlab.evaluation.plan import Plan, Planner, plan
from pqlab.evaluation.plan_file import planned_configs
from pqlab.evaluation.teacher_forced import from_codebooks
from pqlab.memory import MIB

TEXT = " ".join(f"Chapter {i}: the {i * 7919 % 997}th whale was {i * 31 % 89} feet long, and sang." for i in range(400))
SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
CONTEXT = 400
SIZES = {"context": CONTEXT, "sinks": (1, 3), "residuals": (20, 48, 96)}
FEW = {"config": SMALL, "choices": (1, 2, 4), "num_tokens": 3000, "windows": 1, "progress": False}


@pytest.fixture(scope="module")
def tiny():
    from conftest import make_tiny_model

    return make_tiny_model("llama")


@pytest.fixture(scope="module")
def planner(tiny, tiny_tokenizer):
    return Planner(tiny, tiny_tokenizer, TEXT, **FEW, **SIZES, text_name="whales")


def options(factors: dict[tuple[int, int], float], context: int | None) -> Options:
    """Two sides of 64 elements each; a KL of 1, .25 and .025 a side at 1, 2 and 4 bits, times the factor."""
    curve = {1: 1.0, 2: 0.25, 4: 0.025}
    rows = [(0, side, bits, 64, kl) for side in "kv" for bits, kl in curve.items()]
    costs = pd.DataFrame(rows, columns=["layer", "side", "bits", "elements", "kl"])
    exact = [ExactTokens(CacheConfig(16, r, num_sinks=s), factor) for (s, r), factor in factors.items()]
    return Options(costs, exact, context, constant_bytes=1000)


def test_what_a_window_takes_is_missing_from_the_codes():
    """A context of 1000 tokens: R 32 leaves 60 pages of 2048 bits a bit, R 512 30; an exact token takes 256 bytes."""
    found = options({(0, 32): 1.0, (0, 512): 0.5}, 1000)
    room = sequence_bytes(1000, CacheConfig(16, 32, num_sinks=0), 3 * 16 * 128 // 8, 128, 1000)  # 3 bits
    small, *none = found.within(room)
    assert not none, "R 512 alone would take more"
    assert (small.exact.config.residual_length, small.bits, small.size) == (32, 3, room)
    assert small.kl == pytest.approx(0.25 + 0.025), "one side of two has 4 bits"
    both = found.within(room + 480 * 256)
    assert [option.exact.config.residual_length for option in both] == [32, 512]
    assert both[0].bits == 4 and both[1].kl == pytest.approx(0.5 * 0.05)
    assert found.least_bytes() == sequence_bytes(1000, CacheConfig(16, 32, num_sinks=0), 16 * 16, 128, 1000)
    assert found.within(found.least_bytes() - 1) == [] and len(found.within(found.least_bytes())) == 1


def test_the_smallest_that_keeps_a_divergence():
    found = options({(0, 32): 1.0, (0, 512): 0.5}, 1000)
    small, large = found.keeping(0.63)
    assert (small.bits, large.bits) == (2, pytest.approx(1.5)), "half the KL allows fewer bits"
    assert small.size < large.size and small.kl <= 0.63 and large.kl <= 0.63
    assert [o.exact.config.residual_length for o in found.keeping(0.03)] == [512]
    assert found.keeping(0.01) == []
    without = options({(0, 32): 1.0}, None)
    assert without.keeping(0.5)[0].size == without.keeping(0.5)[0].bits == 2, "no context: exact tokens cost nothing"


@pytest.mark.parametrize("off", [1.5, 1.02, 1.0, 0.7])
def test_a_miss_by_a_hair_is_no_reason_for_exact_layers(off, monkeypatch):
    """Plans measure `off` times what is predicted, and R 512 a little more: both are found to be so."""
    planner = Planner.__new__(Planner)
    planner.options, planner.context = options({(0, 32): 1.0, (0, 512): 0.5}, 1000), 1000

    def made(option, tried):
        wide = 1.01 if option.exact.config.residual_length == 512 else 1.0
        certificate = {"predicted_kl": option.kl, "kl": option.kl * off * wide}
        return SimpleNamespace(certificate=certificate, total_bytes=lambda context: option.size)

    monkeypatch.setattr(planner, "_made", made)
    for kl in (0.3, 0.5, 0.505, 0.63, 1.2):
        found = planner.plan(kl=kl)
        assert found.certificate["kl"] <= kl
        assert found.total_bytes(1000) <= min(o.size for o in planner.options.keeping(kl / off / 1.07))


def test_what_is_stored_is_within_the_budget_and_a_tight_one_takes_a_smaller_window(tiny, tiny_tokenizer, planner):
    floor = planner.options.least_bytes()
    plans = {more: planner.plan(mib=(floor + more) / MIB) for more in (1000, 6000, 40_000)}
    for more, made in plans.items():
        method = methods.from_codebooks("plan", made.codebooks, Setting(tiny, tiny_tokenizer), config=made.config)
        assert method.total_bytes(CONTEXT) == made.total_bytes(CONTEXT) == made.certificate["bytes"] <= floor + more
        cache = made.cache(tiny, context=CONTEXT)
        assert cache.settings == made.config and made.config.page_size == SMALL.page_size
    tight, _, loose = plans.values()
    assert tight.config.residual_length == 20 and loose.config.residual_length == 96
    assert loose.certificate["kl"] < tight.certificate["kl"]
    assert len(tight.tried) < len(loose.tried) == 6, "what does not fit was not to be had"
    best = loose.tried.loc[loose.tried.predicted_kl.idxmin()]
    assert (best.num_sinks, best.residual_length) == (loose.config.num_sinks, loose.config.residual_length)
    assert best.predicted_kl == pytest.approx(loose.certificate["predicted_kl"])
    assert best.bytes == loose.total_bytes(CONTEXT)
    assert "R 96" in repr(loose) and "MiB at 400 tokens" in repr(loose)


def test_the_factors_are_those_of_the_harness(tiny, planner):
    """Both exact tokens at once, which were never measured together, on windows that nothing was measured on."""
    chosen = dict.fromkeys(planner.options.costs.set_index(["layer", "side"]).index, 2)
    quantize = from_codebooks(planner._books(chosen), SMALL.page_size)
    configs = {f"{e.config.num_sinks} {e.config.residual_length}": e.config for e in planner.options.exact}
    frame = compare(tiny, planner._windows, dict.fromkeys(configs, quantize), own_configs=configs)
    measured = frame.groupby("method").kl.mean()
    factors = {f"{e.config.num_sinks} {e.config.residual_length}": e.factor for e in planner.options.exact}
    for name, factor in factors.items():
        assert measured[name] / measured["3 20"] == pytest.approx(factor / factors["3 20"], rel=0.3), name
    assert factors["3 96"] < factors["3 48"] < factors["3 20"]


def test_the_fewest_bytes_that_keep_a_divergence(planner):
    limit = planner.plan(mib=(planner.options.least_bytes() + 20_000) / MIB).certificate["kl"]
    found = planner.plan(kl=limit)
    assert found.certificate["kl"] <= limit and found.certificate["bytes"] == found.total_bytes(CONTEXT)
    assert found.total_bytes(CONTEXT) <= found.tried.bytes.max()
    least = planner.plan(kl=planner.plan(kl=1e9).certificate["kl"] * 10)
    assert least.total_bytes(CONTEXT) == planner.options.least_bytes()
    exact = planner.plan(kl=planner._made(planner._largest).certificate["kl"] * 0.6)
    assert exact.codebooks.exact and exact.config.residual_length == 96, "the largest window before exact layers"
    assert len(exact.tried) == 0


def test_a_file_brings_its_sinks_and_window(tiny, tiny_tokenizer, planner, tmp_path, monkeypatch):
    monkeypatch.setattr("pqlab.quantization.codebook.fingerprint", lambda model: planner.origin.fingerprint)
    made = planner.plan(mib=(planner.options.least_bytes() + 40_000) / MIB)
    made.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan", tiny)
    assert back.config == made.config != SMALL
    pd.testing.assert_frame_equal(back.tried, made.tried, check_dtype=False)
    assert repr(back) == repr(made)
    made.codebooks.save(tmp_path / "books")
    assert planned_configs([tmp_path / "plan", tmp_path / "books"]) == {"plan": made.config}
    settings = {"windows": 1, "length": 300, "config": SMALL, "codebooks": {"planned": tmp_path / "plan"}}
    result = evaluate(tiny, tiny_tokenizer, [], **settings)
    row = result.table().set_index("method").loc["planned"]
    assert row.exact_tokens == made.config.num_sinks + made.config.residual_length
    assert row.note == f"its own {made.config.num_sinks} sinks and R {made.config.residual_length}"
    assert row.bytes_2048 == made.total_bytes(2048)
    quantize = {"planned": from_codebooks(back.codebooks, SMALL.page_size)}
    again = compare(tiny, [result_windows(tiny_tokenizer)], quantize, made.config)
    assert row.kl == pytest.approx(again.kl.mean())
    short = evaluate(tiny, tiny_tokenizer, [], **{**settings, "length": 100}).table().set_index("method")
    assert "length = 100 quantizes nothing" in short.note["planned"]


def result_windows(tokenizer):
    from pqlab import load_text
    from pqlab.evaluation.fidelity import text_windows

    return text_windows(tokenizer, load_text("pride"), 300, 1)[0]


def test_sizes_to_choose_from():
    base = CacheConfig()
    assert exact_sizes(base, None, None, None, 1024) == [base]
    pairs = [(c.num_sinks, c.residual_length) for c in exact_sizes(base, (4, 0), (64, 32, 64), 2048, 2048)]
    assert pairs == [(0, 32), (0, 64), (4, 32), (4, 64)]
    assert {c.residual_length for c in exact_sizes(base, None, None, 8192, 2048)} == set(RESIDUALS)
    assert {c.residual_length for c in exact_sizes(base, None, None, 8192, 1024)} == {32, 64, 128, 256}
    assert max(c.residual_length for c in exact_sizes(base, None, None, 512, 512)) == 256, "512 leaves no codes"
    for sizes, says in (
        (((4,), None, None, 1024), "give context=, or a config"),
        ((None, (512,), 8192, 1024), "give length = 2048, or residuals up to 256"),
        ((None, (512,), 512, 512), "leave nothing to choose from"),
        (((), None, 2048, 2048), "leave nothing to choose from"),
        (((-1,), None, 2048, 2048), "num_sinks = -1 is out of range"),
    ):
        with pytest.raises(ConfigError, match=says):
            exact_sizes(base, *sizes)


def test_what_lies_behind_the_windows_is_like_their_end():
    frame = pd.DataFrame({"position": range(8), "kl": [0.0, 0, 0, 0, 0, 0, 1, 3]})
    assert mean_kl(frame, 8) == mean_kl(frame, 5) == 0.5
    assert mean_kl(frame, 16) == pytest.approx((4 + 8 * 2) / 16)


def test_wrong_budgets_for_a_context(tiny, tiny_tokenizer, planner):
    for budget, says in (
        ({"mib": 5}, "for a sequence of how many tokens. Give context="),
        ({"bits": 2, "context": 4096}, "counts no exact tokens, .* give mib= or kl="),
        ({"mib": -1, "context": 4096}, "mib = -1 is no budget"),
        ({"kl": 0.1, "mib": 3, "context": 4096}, "give one budget"),
        ({"kl": 0.1, "context": 0}, "context = 0 is out of range"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan(None, None, "", **budget)
    with pytest.raises(ConfigError, match=r"below the smallest plan of 400 tokens, 0\.1. MiB \(0\.1. of them model"):
        planner.plan(mib=0.01)
    with pytest.raises(ConfigError, match="with the 3 sinks and R 390 of the config nothing is coded"):
        config = CacheConfig(page_size=16, residual_length=390, num_sinks=3)
        Planner(tiny, tiny_tokenizer, TEXT, **{**FEW, "config": config, "choices": (1,)}, **SIZES)


def test_what_cannot_be_met_is_said_before_anything_is_trained(tiny, tiny_tokenizer, monkeypatch):
    def trained(*args, **settings):
        raise AssertionError("this takes minutes")

    monkeypatch.setattr("pqlab.evaluation.plan.collect_kv", trained)
    with pytest.raises(ConfigError, match="mib = 0.001 is below the smallest plan of 400 tokens, .* model constants"):
        plan(tiny, tiny_tokenizer, TEXT, mib=0.001, **FEW, **SIZES)
    with pytest.raises(AssertionError, match="minutes"):
        plan(tiny, tiny_tokenizer, TEXT, mib=0.2, **FEW, **SIZES)


def test_command(tiny, tiny_tokenizer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan_command, "load", lambda args: (None, tiny, tiny_tokenizer))
    monkeypatch.setattr(plan_command, "calibration_text", lambda name: TEXT)
    common = ["plan", "--choices", "1", "2", "--length", "400", "--out", str(tmp_path)]
    sizes = ["--context", "400", "--sinks", "1", "4", "--residual", "32", "64"]
    assert cli.main([*common, *sizes, "--mib", "0.2"]) == 0
    said = capsys.readouterr().out
    made = Plan.load(tmp_path / "plan-mib-0.2-400.safetensors", tiny)
    assert made.total_bytes(400) <= 0.2 * MIB and made.certificate["context"] == 400
    assert "plan-mib-0.2-400.safetensors: Plan(" in said and "predicted KL, by sinks and R" in said
    for bad, says in (
        ([], "give budgets: --bits 2.25"),
        (["--mib", "1"], "Give context="),
        (["--bits", "1", "--sinks", "1", "4"], "to choose from for a context; give --context, or one of them"),
        (["--mib", "0.01", *sizes], "below the smallest plan"),
        (["--kl", "1", "--context", "4000", "--residual", "200"], "give length = 800, or residuals up to 100"),
    ):
        assert cli.main([*common, *bad]) == 2
        assert says in capsys.readouterr().err
