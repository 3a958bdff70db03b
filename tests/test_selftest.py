"""`python -m pqlab check`: what is asked for runs, what is wrong is found, said and told by the exit code."""

from __future__ import annotations

import argparse
import json
import re
import time

import pytest
import torch
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, Codebooks, PagedPQCache, PQConfig, cli, kernels, selftest
from pqlab.benchmarks.decode_bench import Case
from pqlab.cache.contiguous import contiguous_cache, nearest
from pqlab.kernels import dispatch, reference
from pqlab.kernels.backend import Backend
from pqlab.model_runs import apart, attention, follow
from pqlab.paging.policy import POLICIES, Lifo
from pqlab.results.provenance import commit
from pqlab.selftest import PHASES, Console, Phase, Session, chosen_phases, compare, expect, performance

kernels.start()


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    selftest.configure(parser)
    return parser.parse_args(argv)


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ["environment", "phase1", "phase2", "phase3"]),
        (["--quick"], ["environment", "phase1", "phase2", "phase3"]),
        (["--full"], list(PHASES)),
        (["--phase2", "--phase1"], ["phase1", "phase2"]),
        (["--full", "--compare"], ["compare"]),
        (["--performance", "--debug", "x", "--seed", "3"], ["performance"]),
    ],
)
def test_phases(argv, names):
    assert [phase.name for phase in chosen_phases(parse(*argv))] == names


@pytest.mark.parametrize("argv", [["--quick", "--full"], ["--phase4"], ["--seed", "x"], ["--debug"]])
def test_what_cannot_be_asked_for(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_help_names_every_flag_of_the_report(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "--help"])
    said = capsys.readouterr().out
    flags = "--help --quick --full --phase1 --phase2 --phase3 --performance --compare --debug".split()
    assert stop.value.code == 0 and [flag for flag in flags if flag not in said] == []


# -- how it is said --------------------------------------------------------------------------------------------------


def with_checks(monkeypatch, *checks, name="phase1"):
    monkeypatch.setitem(PHASES, name, Phase(name, "A phase", lambda session: checks, "Do the phase's remedy."))


def fails() -> str:
    expect(1 + 1 == 3, "1 + 1 is 2, should be 3", "Count again.")
    return ""


def breaks() -> str:
    raise KeyError("gone")


def test_one_failing_check_does_not_keep_the_others_from_running(monkeypatch, capsys):
    with_checks(monkeypatch, ("bad", fails), ("broken", breaks), ("good", lambda: "7 equals 7"))
    assert cli.main(["check", "--phase1"]) == 1
    said = capsys.readouterr().out
    assert "== A phase ==" in said and "== Summary ==" in said
    assert "[ERROR] bad: 1 + 1 is 2, should be 3 What to do: Count again." in said
    assert "[ERROR] broken: KeyError: 'gone' What to do: Do the phase's remedy." in said
    assert "[SUCCESS] good: 7 equals 7" in said
    assert "[ERROR] Verdict: 2 of 3 checks failed" in said
    assert "bad: Count again." in said and "broken: Do the phase's remedy." in said
    seed = re.search(r"\[INFO\] seed (\d+)", said).group(1)
    assert f"python -m pqlab check --phase1 --seed {seed} --debug" in said
    assert re.search(r"phase1 +good +passed", said) and re.search(r"phase1 +bad +FAILED", said)


def test_a_phase_that_cannot_be_prepared_is_a_failure(monkeypatch, capsys):
    def checks(session):
        raise OSError("no model")

    monkeypatch.setitem(PHASES, "phase1", Phase("phase1", "A phase", checks, "Fetch it."))
    assert cli.main(["check", "--phase1"]) == 1
    assert "[ERROR] preparation: OSError: no model What to do: Fetch it." in capsys.readouterr().out


def test_nothing_checked_is_no_success(monkeypatch, capsys):
    with_checks(monkeypatch)
    assert cli.main(["check", "--phase1"]) == 1
    assert "[ERROR] Nothing was checked." in capsys.readouterr().out


def test_warnings_and_log_lines_are_shown(monkeypatch, capsys):
    def check() -> str:
        import logging
        import warnings

        warnings.warn("mind the gap", stacklevel=1)
        logging.getLogger("pqlab").warning("a fallback")
        return "fine"

    with_checks(monkeypatch, ("loud", check))
    assert cli.main(["check", "--phase1"]) == 0
    said = capsys.readouterr().out
    assert "[INFO] loud warned: mind the gap" in said and "[INFO] a fallback" in said
    assert "[SUCCESS] Verdict: all 1 checks passed" in said


def test_the_log_has_what_the_terminal_has_and_the_traceback(monkeypatch, capsys, tmp_path):
    with_checks(monkeypatch, ("broken", breaks))
    assert cli.main(["check", "--phase1", "--debug", str(tmp_path / "run")]) == 1
    log, said = (tmp_path / "run.log").read_text(), capsys.readouterr().out
    assert all(line in log for line in said.splitlines())
    assert "[DEBUG]" in log and "Traceback" in log and "backend setting: auto" in log
    assert "[DEBUG]" not in said and "Traceback" not in said


def test_a_log_that_cannot_be_written(tmp_path, capsys):
    assert cli.main(["check", "--phase1", "--debug", str(tmp_path / "none" / "run")]) == 2
    assert "give --debug another name" in capsys.readouterr().err


def test_json_on_the_last_line(monkeypatch, capsys):
    with_checks(monkeypatch, ("bad", fails), ("good", lambda: "7 equals 7"))
    assert cli.main(["check", "--phase1", "--seed", "5", "--json", "-f", "no-such-model"]) == 1, "the code is kept"
    *_, before, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "The same checks with every detail" in before
    bad, good = found.pop("checks")
    assert (bad["phase"], bad["check"], bad["passed"]) == ("phase1", "bad", False)
    assert bad["said"] == "1 + 1 is 2, should be 3" and bad["remedy"] == "Count again." and bad["seconds"] >= 0
    assert (good["check"], good["passed"], good["said"], good["remedy"]) == ("good", True, "7 equals 7", "")
    assert found["command"] == "check" and found["seed"] == 5 and not found["full"] and not found["passed"]
    assert found["model"] == "no-such-model" and not found["random_weights"], "nothing looked for it"
    assert found["device"] and found["date"] and found["commit"] == commit()
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("checks", "code"), [((), 1), ((("good", lambda: "fine"),), 0)])
def test_json_of_a_whole_success_and_of_nothing(checks, code, monkeypatch, capsys):
    with_checks(monkeypatch, *checks)
    assert cli.main(["check", "--phase1", "--json"]) == code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["passed"] == (code == 0) and len(found["checks"]) == len(checks)


# -- real checks, and faults that they have to find ------------------------------------------------------------------


def run(capsys, *argv: str) -> tuple[int, str]:
    code = cli.main(["check", *argv])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("seed", range(6))
def test_pages_and_kernels_pass_here(seed, capsys):
    if dispatch.backends()["cpu"].status().state != "ready":
        pytest.skip("no C++ kernels here")
    code, said = run(capsys, "--phase1", "--phase2", "--seed", str(seed))
    assert code == 0, said
    assert "cpu compiles and binds" in said and "[INFO] variant pqlab_cpu" in said
    if not torch.cuda.is_available():
        assert "[INFO] cuda: not on this machine, nothing to check (torch sees no CUDA device)" in said


def test_the_same_seed_gives_the_same_inputs_and_another_seed_others():
    from pqlab.selftest.backends import random_decode

    def inputs(seed: int) -> tuple:
        session = Session(Console(), seed=seed)
        return session.random("a").random(), session.generator("a").initial_seed(), random_decode(
            session.generator("b"), "cpu", (64, 32, 8)
        )[5]  # fmt: skip

    (number, first, books), again, other = inputs(5), inputs(5), inputs(6)
    assert (number, first) == again[:2] and torch.equal(books, again[2])
    assert number != other[0] and first != other[1]
    assert books.shape != other[2].shape or not torch.equal(books, other[2])


class WrongCpu(Backend):
    """A CPU backend with one fault; the rest is the reference's."""

    name = "cpu"
    remedy = "Mend WrongCpu."
    decode = staticmethod(reference.decode)
    encode = staticmethod(reference.encode)
    encode_pages_ = staticmethod(reference.encode_pages_)


class LosesTheLastToken(WrongCpu):
    def decode(self, *args):
        args = list(args)
        args[4] = args[4] - (args[4] > 0) * torch.tensor([0, 0, 1], dtype=torch.int32)  # one window token less
        return reference.decode(*args)


class TakesTheSecondNearest(WrongCpu):
    def encode(self, x, books):
        codes = reference.encode(x, books)
        return codes ^ (torch.arange(codes.numel()).view(codes.shape) % 50 == 0).to(torch.uint8)


class WritesOneSlotTooFar(WrongCpu):
    def encode_pages_(self, pages, x, books, page_ids, first_slot, nbits):
        room = page_ids.numel() * pages.shape[2] * 16 - first_slot - x.shape[1]
        if room:
            x = torch.cat([x, x[:, -1:]], 1)
        reference.encode_pages_(pages, x, books, page_ids, first_slot, nbits)


class TakesAllForOne(WrongCpu):
    def cell_sums(self, x, weights, codes, num_centroids):
        return reference.cell_sums(x, torch.ones_like(weights), codes, num_centroids)


class ForgetsASink(WrongCpu):
    def append_(self, sink_k, *args):
        reference.append_(sink_k, *args, encode_pages_=self.encode_pages_)
        sink_k[:, :, :1] = 0


@pytest.fixture
def register():
    before = dispatch.backends()["cpu"]
    yield dispatch.register_backend
    dispatch.register_backend(before)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (LosesTheLastToken, "cpu decode"),
        (TakesTheSecondNearest, "cpu encode"),
        (WritesOneSlotTooFar, "cpu encode"),
        (TakesAllForOne, "cpu sums over cells"),
        (ForgetsASink, "cpu append"),
    ],
)
def test_a_wrong_kernel_is_found(kernel, found, register, capsys):
    register(kernel())
    code, said = run(capsys, "--phase2", "--seed", "11")
    assert code == 1
    assert f"[ERROR] {found}: " in said and re.search(f"phase2 +{found} +FAILED", said)
    assert "PQLAB_BACKEND=-cpu" in said.split("Verdict")[1]
    assert "[SUCCESS] reference decode" in said, "the others still run"


def test_a_kernel_that_was_not_built_is_found(register, capsys):
    class NotBuilt(WrongCpu):
        def status(self):
            return kernels.BuildStatus("failed", "the compiler said no")

        def unable(self, op, args):
            return "the compiler said no"

    register(NotBuilt())
    code, said = run(capsys, "--phase2")
    assert code == 1 and "the compiler said no" in said and "Mend WrongCpu." in said.split("Verdict")[1]


def test_a_wrong_page_policy_is_found(capsys):
    class Twice(Lifo, name="twice"):
        """Gives the same page out again when a page has come back."""

        def give(self, page):
            super().give(self._stack[0] if self._size else page)

    try:
        code, said = run(capsys, "--phase1", "--seed", "1")
    finally:
        del POLICIES["twice"]
    assert code == 1 and "[ERROR] pool (twice)" in said and "[SUCCESS] pool (lifo)" in said


def test_a_policy_that_scans_is_found(capsys):
    class Slow(Lifo, name="slow"):
        """Looks at every free page before it takes one."""

        def take(self):
            assert -1 not in self._stack[: self._size : 4]
            return super().take()

    try:
        code, said = run(capsys, "--phase1")
    finally:
        del POLICIES["slow"]
    assert code == 1 and "[ERROR] constant time (slow)" in said and "O(1)" in said.split("Verdict")[1]


# -- the contiguous PQ that paged PQ is held to ----------------------------------------------------------------------


def test_nearest_is_a_search():
    g = torch.Generator().manual_seed(0)
    x, books = torch.randn(2, 3, 40, 16, generator=g), torch.randn(3, 8, 64, 2, generator=g)
    codes = nearest(x, books)
    assert codes.shape == (2, 3, 40, 8)
    split = x.double().view(2, 3, 40, 8, 2).transpose(2, 3)
    assert torch.equal(codes, torch.cdist(split, books.double()[None]).argmin(-1).transpose(2, 3).to(torch.uint8))


@pytest.mark.parametrize("maps", [False, True])
def test_contiguous_is_paged_in_a_batch_and_in_chunks(make_model, maps):
    model, config = make_model("llama"), CacheConfig(page_size=16, residual_length=20, num_sinks=3)
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=5), maps=maps)
    ids = torch.randint(0, 200, (1, 130), generator=torch.Generator().manual_seed(1))
    paged, plain = PagedPQCache(model, books, config), contiguous_cache(model, books, config)
    with attention(model, "pqlab"):
        ours = [follow(model, paged, part, n).logits for part, n in ((ids[:, :90], 60), (ids[:, 90:], 10))]
    with attention(model, "sdpa"):
        theirs = [follow(model, plain, part, n).logits for part, n in ((ids[:, :90], 60), (ids[:, 90:], 10))]
        dynamic = DynamicCache(config=model.config)
        exact = follow(model, dynamic, ids, 130).logits
    assert max(apart(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert apart(ours[1][-1], exact[-1]) > 0.1, "random codebooks lose a lot: exact tokens would show nothing"
    layer = plain.layers[0]
    assert [part[0].shape[2] for part in (layer.sinks, layer.codes, layer.window)] == paged.lengths[0].tolist()
    assert layer.codes[0].dtype == torch.uint8 and layer.nbytes < dynamic.layers[0].keys.nbytes


# -- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_quick_passes_on_the_real_model(default_model, all_threads, capsys):
    from pqlab import default_codebooks

    default_codebooks(*default_model, progress=False)  # warm: what a set-up leaves behind
    begin = time.perf_counter()
    code, said = run(capsys, "--quick")
    assert code == 0, said
    for check in ("exact storage is DynamicCache", "quantized cache runs fused", "selection in levels"):
        assert f"[SUCCESS] {check}" in said
    assert "model default: 135 M parameters" in said
    assert time.perf_counter() - begin < 120  # 20 s on two idle cores; a minute is promised


@pytest.mark.filterwarnings("default")
def test_a_model_of_random_weights_is_checked_too(capsys):
    code, said = run(capsys, "--phase3", "-f", "debug-model")
    assert code == 0, said
    assert "M parameters of random weights" in said and "[SUCCESS] quantized cache runs fused" in said


@pytest.mark.filterwarnings("default")
def test_what_was_timed_is_said_and_growing_caches_build_no_cudnn_plans(monkeypatch, capsys):
    allowed = {True: set(), False: set()}

    def watched(model, cache, *args):
        allowed[model.config._attn_implementation == "sdpa"].add(torch.backends.cuda.cudnn_sdp_enabled())
        return follow(model, cache, *args)

    monkeypatch.setattr(performance, "follow", watched)
    monkeypatch.setattr(compare, "follow", watched)
    _, said = run(capsys, "--performance", "--compare", "-f", "debug-model", "--json")
    assert allowed[True] == {False} and True in allowed[False]
    found = json.loads(said.splitlines()[-1])
    assert found["random_weights"] and found["model"] == "debug-model"
    figures = {check["check"]: check["said"] for check in found["checks"]}
    assert len(figures) == 6 and "eager steps, torch.float32" in figures["whole model"]
    how = "replays of CUDA graphs with a cold L2" if torch.cuda.is_available() else "ordinary calls in turns"
    for name in performance.LAYERS:
        assert re.search(
            rf"torch.float\d\d: [\d.]+x exact attention \([\w ]+, .* ms\); {how}; ", figures[f"one layer, {name}"]
        )


def test_one_layer_is_held_to_the_fastest_exact_attention(monkeypatch):
    monkeypatch.setattr(performance, "exact_times", lambda case, timer: {"flash": 3 * timer(str), "cudnn": 200.0})
    times = performance.replayed(str, Case(32, 8, (64,)), lambda function: 100.0)  # microseconds
    assert times.beside_exact == "2.00x exact attention (cudnn, 0.200 ms)"
    assert "no exact attention" in performance.LayerTimes(1e-4, {}, "").beside_exact


def test_ordinary_calls_are_held_to_every_exact_attention():
    times = performance.called(lambda: time.sleep(0.01), Case(6, 2, (300,), m=8, head_dim=16), torch.device("cpu"))
    assert times.fused >= 0.01 and len(times.exact) == 6 and max(times.exact.values()) < 0.01


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_one_layer_on_a_gpu_is_what_its_kernels_take():
    """Calls from Python take several times as long as the kernels do."""
    session = Session(Console(), seed=3)
    said = performance.one_layer(session, "32/32 heads of 128")
    assert float(re.search(r"([\d.]+)x exact attention", said).group(1)) > 1, said


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_wrong_kernel_shows_in_the_real_model_and_the_comparison(default_model, all_threads, register, capsys):
    register(LosesTheLastToken())
    code, said = run(capsys, "--phase3", "--compare", "--seed", "2")
    assert code == 1
    assert "[ERROR] quantized cache runs fused: logits differ" in said
    assert "[ERROR] contiguous beside paged PQ: paged PQ, fused: logits differ" in said
    assert "[SUCCESS] exact storage" not in said or "[ERROR]" in said
    assert "--phase2" in said.split("Verdict")[1]
