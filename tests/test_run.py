"""`pqlab run`: what each stage writes, what a missing input says, and that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig

from pqlab import CacheConfig, load_text
from pqlab.benchmarks.generation import cache_bytes, time_generation
from pqlab.cli import main
from pqlab.evaluation.plan_file import Plan
from pqlab.evaluation.predicted_kl import COLUMNS
from pqlab.memory_peak import memory_peak
from pqlab.pipeline import runner, timing
from pqlab.pipeline.results import Results
from pqlab.pipeline.settings import Settings, resolved_m
from pqlab.pipeline.tables import render
from pqlab.quantization import Codebooks
from pqlab.results.provenance import text_record

SMALL = (
    "--windows 1 --length 150 --context 120 --new_tokens 6 --samples 700 --page_size 16 --extended_residual 32 "
    "--max_pages 100 --nbits 4"
).split()
TOKEN = 2 * 3 * 2 * 32 * 4
"""Bytes of an exact token of the tiny model: 2 layers, 3 kv heads, K and V of 32 elements in fp32."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, as `-f` takes it."""
    from conftest import make_tiny_model

    from pqlab.models.random_weights import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny_model("llama", head_dim=32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """`run("-p", ...)` -> (exit code, what was printed); the output folder is `run.out`."""

    (tmp_path / "some-emma.txt").write_text(load_text("emma")[:20_000], encoding="utf-8")
    common = ["--calibration", str(tmp_path / "some-emma.txt"), "--device", "cpu", "--out", str(tmp_path / "out")]

    def call(*arguments: object) -> tuple[int, str]:
        given = [str(argument) for argument in arguments]
        model = [] if "-f" in given else ["-f", str(model_folder)]
        code = main(["run", *model, *SMALL, *common, *given])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    call.out, call.common = tmp_path / "out", common
    call.records = lambda: Results(call.out / "results.jsonl").read()
    call.stages = lambda: [record["stage"] for record in call.records()]
    return call


def test_the_whole_pipeline(run):
    code, said = run("-p", "baseline", "sampling", "training", "evaluation", "--paged")
    assert code == 0, said
    baseline, sampling, training, evaluation = run.records()
    assert run.stages() == ["baseline", "sampling", "training", "evaluation"]
    assert len({record["run"] for record in run.records()}) == 1
    for record in run.records():
        assert record["schema"] == 2 and record["seed"] == 0 and record["device"]["type"] == "cpu"
        assert record["versions"]["torch"] == torch.__version__ and record["settings"]["page_size"] == 16
        assert record["model"]["M"] == 16 and record["model"]["fingerprint"].startswith("llama-2x48")
    assert baseline["texts"]["timed_on"] == baseline["texts"]["evaluated_on"] == text_record("pride")
    assert str(run.out) not in json.dumps(run.records())

    exact, paged = baseline["result"], evaluation["result"]
    assert exact["perplexity"] == pytest.approx(paged["exact_perplexity"], rel=1e-4)
    assert exact["positions"] == paged["positions"] == 148
    assert paged["kl"] > 0 and paged["token_bits"] == 2  # 16 subspaces of 4 bits for 32 elements
    assert exact["generation"]["cache_bytes"] == (120 + 6 - 1) * TOKEN
    assert paged["generation"]["cache_bytes"] < exact["generation"]["cache_bytes"]
    assert paged["generation"]["reserved_bytes"] == 100 * 16 * 2 * 3 * 2 * 16 // 2  # pages of 4-bit codes
    for result in (exact, paged):
        assert 0 < result["generation"]["token_ms"] <= result["generation"]["slowest_ms"]
        assert result["generation"]["first_token_seconds"] > 0
    assert set(paged["generation"]["backends"]) == {"encode_pages_", "step_"} and not exact["generation"]["backends"]

    samples, books = run.out / sampling["result"]["file"], run.out / training["result"]["file"]
    assert sampling["result"]["vectors"] == 700 - 4 and samples.is_file()
    assert Codebooks.load(books).origin.text == "some-emma.txt" and Codebooks.load(books).bits_per_element == 2
    assert evaluation["result"]["codebooks"] == books.name
    assert "M = 16, half of the head size" in said and "some-emma.txt" in said
    table = next(line for line in said.splitlines() if "paged pq" in line)
    assert f"{paged['kl']:.5f}" in table and "perplexity" in said


def test_without_paged_the_contiguous_cache_runs(run):
    run("-p", "sampling", "training", "evaluation", "--paged")
    code, said = run("-p", "evaluation")
    assert code == 0 and "contiguous pq" in said
    paged, contiguous = (r["result"] for r in run.records() if r["stage"] == "evaluation")
    assert contiguous["kl"] == paged["kl"], "both hold the same tokens in the same form"
    assert contiguous["generation"]["reserved_bytes"] == 0 and not contiguous["generation"]["backends"]
    assert contiguous["generation"]["constant_bytes"] == paged["generation"]["constant_bytes"] > 0


def test_samples_and_codebooks_stay_unless_forced(run):
    run("-p", "sampling", "training")
    files = sorted(run.out.glob("*.safetensors"))
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    code, said = run("-p", "sampling", "training")
    assert code == 0 and said.count("(--force replaces it)") == 2
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    assert [record["result"]["kept"] for record in run.records()] == [False, False, True, True]
    run("-p", "training", "--nbits", "5")  # other codebooks from the same samples
    assert len(sorted(run.out.glob("*.safetensors"))) == 3
    code, said = run("-p", "sampling", "training", "--force")
    assert code == 0 and "wrote samples" in said and "wrote codebooks" in said
    assert all(new.stat().st_mtime_ns > old[0] for new, old in zip(files, before, strict=True))
    assert [path.read_bytes() for path in files] == [content for _, content in before], "the same seed"


def test_samples_of_another_text_of_the_same_name_are_refused(run, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("One text and more of it. " * 60)
    assert run("-p", "sampling", "--calibration", text)[0] == 0
    text.write_text("Another text altogether. " * 60)
    code, said = run("-p", "sampling", "training", "--calibration", text)
    assert code == 1 and "from another text of this name" in said and "--force" in said
    assert run("-p", "sampling", "training", "--calibration", text, "--force")[0] == 0


def test_merged_codebooks_are_one_for_all(run):
    run("-p", "sampling", "training")
    code, said = run("-p", "training", "evaluation", "--paged", "-m")
    assert code == 0, said
    apart, merged = (r["result"] for r in run.records() if r["stage"] == "training")
    assert merged["merged"] and merged["constant_bytes"] == 2 * 16 * 16 * 2 * 2  # K and V, M, centroids, fp16 pairs
    assert merged["constant_bytes"] < apart["constant_bytes"] / 20
    books = Codebooks.load(run.out / merged["file"])
    assert not books.origin.maps and not books.origin.weighted
    assert torch.equal(books.layer(0).k.centroids[0], books.layer(1).k.centroids[2])
    assert (run.out / merged["file"]).stat().st_size < (run.out / apart["file"]).stat().st_size / 5


def test_anchors(run, tmp_path):
    stages = ["-p", "sampling", "training", "evaluation", "--paged"]
    assert run(*stages)[0] == 0
    code, said = run(*stages, "--span", "64")
    assert code == 0 and "turned back to an anchor every 64 tokens" in said and "kept samples" in said
    plain, turned = run.records()[:3], run.records()[3:]
    assert {record["settings"]["span"] for record in turned} == {64} != {record["settings"]["span"] for record in plain}
    assert len({record["key"] for record in run.records()}) == 2
    file = run.out / turned[1]["result"]["file"]
    assert Codebooks.load(file).span == Codebooks.load(file).origin.span == 64 and "-span64-" in file.name
    kls = [part[2]["result"]["kl"] for part in (plain, turned)]
    assert kls[0] != kls[1] and [part[1]["result"]["span"] for part in (plain, turned)] == [0, 64]
    code, _ = run("-p", "evaluation", "--span", "64")
    assert code == 0 and run.records()[-1]["result"]["kl"] == kls[1], "the contiguous cache has them, too"

    shutil.copy(file, tmp_path / "mine.safetensors")
    given = ["-p", "evaluation", "--paged", "--codebooks", tmp_path / "mine.safetensors"]
    for same in ([], ["--span", "64"]):
        assert run(*given, *same)[0] == 0
        assert run.records()[-1]["settings"]["span"] == run.records()[-1]["result"]["span"] == 64
    assert len({record["key"] for record in run.records()[-2:]}) == 1, "the same experiment"
    for other in ("0", "128"):
        code, said = run(*given, "--span", other)
        assert code == 2 and f"--span {other}: mine.safetensors has keys anchored every 64 tokens" in said
    shutil.copy(run.out / plain[1]["result"]["file"], tmp_path / "mine.safetensors")
    code, said = run(*given, "--span", "64")
    assert code == 2 and "mine.safetensors has keys without anchors; leave --span out" in said


def test_a_run_with_another_span_is_another_run(run, monkeypatch):
    def broken(job):
        raise ValueError("no k-means today")

    monkeypatch.setattr(runner, "STAGES", {**runner.STAGES, "training": broken})
    stages = ["-p", "baseline", "sampling", "training"]
    assert run(*stages)[0] == 1
    monkeypatch.undo()
    code, said = run(*stages, "--span", "64")
    assert code == 0 and "done already" not in said
    assert run.stages() == ["baseline", "sampling", *stages[1:]]
    code, said = run(*stages)
    assert code == 0 and "baseline, sampling done already" in said, "its own"
    assert run.stages()[5:] == ["training"] and run.records()[5]["settings"]["span"] == 0


def test_a_model_that_can_have_no_anchors_is_not_sampled(run, tmp_path):
    from test_model_kinds import make

    from pqlab.models.random_weights import byte_tokenizer

    make("gpt2").save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    code, said = run("-p", "sampling", "training", "--span", "64", "-f", tmp_path / "gpt2")
    assert code == 2 and "gpt2 has no rotary embedding" in said and not list(run.out.glob("samples-*"))


def test_random_codebooks_have_anchors_too(run):
    code, said = run("-f", "debug-model", "-p", "evaluation", "--paged", "--span", "64")
    assert code == 0 and run.records()[0]["result"]["span"] == 64, said


def test_exact_tokens_that_a_plan_was_made_with_are_named(run, tmp_path):
    run("-p", "sampling", "training")
    books = Codebooks.load(next(run.out.glob("codebooks-*.safetensors")))
    choices = pd.DataFrame([(0, "k", 16, 4, 4, 10, 0.1)], columns=COLUMNS)
    certificate = {"kl": 0.1, "kl_error": 0.01, "context": 400}
    Plan(books, CacheConfig(num_sinks=3, residual_length=64), choices, certificate).save(tmp_path / "plan.safetensors")
    given = ["-p", "evaluation", "--paged", "--codebooks", tmp_path / "plan.safetensors"]
    code, said = run(*given)
    assert code == 0 and "other exact tokens than this run has: --sinks 3 --extended_residual 64\n" in said
    code, said = run(*given, "--sinks", "3", "--extended_residual", "64")
    assert code == 0 and "other exact tokens" not in said


def test_random_weights_are_for_time_and_memory_only(run):
    code, said = run("-f", "debug-model", "-p", "baseline", "evaluation", "--paged", "--nbits", "8")
    assert code == 0, said
    assert "random weights: time and memory only" in said and "codebooks are random" in said
    baseline, evaluation = (record["result"] for record in run.records())
    assert "perplexity" not in baseline and "kl" not in evaluation and evaluation["codebooks"] == "random"
    assert baseline["generation"]["token_ms"] > 0 and run.records()[0]["model"]["random_weights"]
    assert "perplexity " not in said.split("\n\n")[1]


def test_generations_of_all_stages_are_without_cudnn_attention(run, monkeypatch):
    flags, real = [], timing.time_generation

    def timed(*args):
        flags.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args)

    monkeypatch.setattr(timing, "time_generation", timed)
    code, said = run("-f", "debug-model", "-p", "baseline", "evaluation", "--paged")
    assert code == 0 and flags == [False, False] and torch.backends.cuda.cudnn_sdp_enabled()
    records = run.records()
    assert [record["result"]["generation"]["cudnn_attention"] for record in records] == [None, None], "a CPU has none"
    assert "cuDNN" not in said
    for record in records:
        record["result"]["generation"]["cudnn_attention"] = False  # as on a GPU
    assert "Times are without cuDNN attention" in "\n".join(render(records))


@pytest.mark.parametrize("paged", [["--paged"], []])
def test_where_a_step_goes(run, paged):
    code, said = run("-f", "debug-model", "-p", "baseline", "evaluation", "--breakdown", *paged)
    assert code == 0, said
    for record in run.records():
        found = record["result"]["breakdown"]
        assert sum(row["milliseconds"] for row in found["parts"]) == pytest.approx(found["sum_milliseconds"], rel=1e-3)
        assert found["context"] == 120 and {"projection", "mlp"} <= {row["part"] for row in found["parts"]}
    fused = {"codes", "exact tokens"} & {row["part"] for row in found["parts"]}  # so few codes may take no time
    assert bool(fused) == bool(paged), "the contiguous cache has no kernel"
    assert "A decode step behind 120 tokens" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "training"], "reads sampled keys and values, .* type -p sampling training"),
        (["-p", "evaluation"], "reads trained codebooks, .* type -p sampling training evaluation, or --codebooks"),
        (["-p", "baseline", "evaluation"], "type -p baseline sampling training evaluation"),
        (["-p", "evaluation", "training", "sampling"], "type -p sampling training evaluation"),
        (["-p", "evaluation", "baseline", "training"], "type -p baseline training evaluation"),
        (["-p", "baseline", "baseline"], "named twice; type -p baseline"),
        (["-p", "evalution"], "the stages are baseline sampling training evaluation"),
        (["-p", "evaluation", "--codebooks", "nowhere"], "no codebooks file nowhere"),
        (["-p", "sampling", "training", "--codebooks", __file__], "leave it out"),
        (["-p", "baseline", "--page_size", "20"], "--page_size 20: .* type --page_size 16"),
        (["-p", "baseline", "--extended_residual", "8"], "type --extended_residual 32"),
        (["-p", "baseline", "--max_pages", "20000"], "type --max_pages 10000"),
        (["-p", "baseline", "-M", "24"], "-M 24: .*head size 32.* type -M (16|32)"),
        (["-p", "baseline", "-M", "8"], "-M 8: .* type -M 16"),
        (["-p", "baseline", "--nbits", "9"], "type --nbits 8"),
        (["-p", "baseline", "--batch", "0"], "type --batch 1 or more"),
        (["-p", "baseline", "--sinks", "-1"], "type --sinks 0 or more"),
        (["-p", "baseline", "--context", "5000"], "type --context 4090 or less"),
        (["-p", "baseline", "--length", "40"], "quantizes nothing"),
        (["-p", "sampling", "training", "evaluation", "--paged", "--batch", "30"], "need --max_pages 150"),
        (["-p", "baseline", "--dataset", "wikitext"], "no data set or text file .*longbench"),
        (["-p", "baseline", "--dataset", "pride", "--calibration", "pride"], "choose another text$"),
        (["-p", "baseline", "--dataset", "lcc", "--data", "nowhere"], "LongBench"),
        (["-p", "baseline", "--device", "tpu"], "device = tpu cannot be used"),
        (["-p", "baseline", "-f", "debug-modle"], 'did you mean "debug-model"'),
        (["-p", "baseline", "-f", "./nowhere"], "there is no model folder"),
    ],
)
def test_what_cannot_be_run_says_what_to_type(run, arguments, message):
    code, said = run(*arguments)
    assert code == 2 and not (run.out / "results.jsonl").exists()
    assert re.search(message, said), said


def test_half_is_fp16(run):
    code, said = run("-f", "debug-model", "-p", "baseline", "evaluation", "--paged", "--half")
    assert code == 0, said
    baseline, evaluation = run.records()
    assert baseline["model"]["dtype"] == "float16"
    assert baseline["result"]["generation"]["cache_bytes"] == (120 + 6 - 1) * 2 * 2 * 2 * 64 * 2
    assert evaluation["result"]["generation"]["cache_bytes"] > 0


def test_memory_that_runs_out_says_what_to_lower(run, monkeypatch):
    def full(job):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(runner, "STAGES", {**runner.STAGES, "baseline": full})
    code, said = run("-p", "baseline")
    assert code == 1 and "Tried to allocate 9 GiB" in said and "Lower --batch, --context" in said


def test_every_problem_is_said_at_once(run):
    code, said = run("-p", "baseline", "--page_size", "20", "--nbits", "3", "--batch", "0")
    assert code == 2 and said.count("type -") == 3


def test_weights_that_cannot_be_fetched(run, monkeypatch):
    def no_hub(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("pqlab.models.hub.hub_answers", lambda: False)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", no_hub)
    code, said = run("-p", "baseline", "-f", "llama-2-7b")
    assert code == 2 and "meta-llama/Llama-2-7b-hf" in said and "--random-weights" in said and "no route" in said
    assert "the Hugging Face hub does not answer" in said


def test_a_text_that_is_too_short_is_said(run, tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words.")
    code, said = run("-p", "baseline", "--dataset", tmp_path / "short.txt")
    assert code == 1 and "the text has 17 tokens" in said


def test_longbench_through_the_command(run, tmp_path):
    row = {"context": "Rome is in Italy.", "input": "Where is Rome?", "answers": ["Italy"], "all_classes": None}
    (tmp_path / "hotpotqa.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    tasks = ["--dataset", "hotpotqa", "--data", tmp_path, "--examples", "2"]
    code, said = run("-p", "baseline", "sampling", "training", "evaluation", "--paged", *tasks)
    assert code == 0, said
    baseline, evaluation = (record["result"] for record in run.records() if "generation" in record["result"])
    assert [row["cache"] for row in baseline["longbench"]] == ["exact"]
    assert [(row["cache"], row["examples"]) for row in evaluation["longbench"]] == [("exact", 2), ("paged pq", 2)]
    assert baseline["longbench"][0]["score"] == evaluation["longbench"][0]["score"]
    assert "hotpotqa" in said and "perplexity" not in baseline and list(run.records()[0]["texts"]) == ["timed_on"]
    assert run.records()[0]["settings"]["data"] == tmp_path.name


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_the_one_to_go_on_with(run, monkeypatch):
    def broken(job):
        raise ValueError("no k-means today")

    real = dict(runner.STAGES)
    monkeypatch.setattr(runner, "STAGES", {**real, "training": broken})
    code, said = run("-p", "baseline", "sampling", "training", "evaluation", "--paged")
    assert code == 1 and "no k-means today" in said and run.stages() == ["baseline", "sampling"]
    monkeypatch.setattr(runner, "STAGES", real)
    code, said = run("-p", "baseline", "sampling", "training", "evaluation", "--paged")
    assert code == 0 and "baseline, sampling done already" in said
    assert run.stages() == ["baseline", "sampling", "training", "evaluation"]
    assert len({record["run"] for record in run.records()}) == 1
    run("-p", "baseline", "sampling", "training", "evaluation", "--paged")  # a finished run is run anew
    assert len(run.records()) == 8


def test_other_settings_are_another_run(run, monkeypatch):
    monkeypatch.setattr(runner, "STAGES", {**runner.STAGES, "sampling": lambda job: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        run("-p", "baseline", "sampling")
    monkeypatch.undo()
    code, said = run("-p", "baseline", "sampling", "--seed", "1")
    assert code == 0 and "done already" not in said and run.stages() == ["baseline", "baseline", "sampling"]


def test_a_killed_run_goes_on_with_the_stage_it_was_killed_in(run, model_folder):
    """SIGKILL while the samples are being written: half a file lies there under another name.

    Until there, no package of an extra was needed.
    """
    arguments = ["run", "-f", str(model_folder), *SMALL, *run.common, "-p", "baseline", "sampling", "training"]
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        import safetensors.torch
        import torch
        torch.set_num_threads(1)

        def half(tensors, path, metadata):
            pathlib.Path(path).write_bytes(b"half a file")
            print(sorted({{"datasets", "rouge", "rapidfuzz", "jieba", "plotly"}} & set(sys.modules)), flush=True)
            time.sleep(600)

        safetensors.torch.save_file = half
        from pqlab.cli import main
        main({arguments!r})
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "[]":
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert run.stages() == ["baseline"]
    assert [path.name for path in run.out.iterdir() if ".unfinished-" in path.name]
    assert not list(run.out.glob("samples-*"))

    with open(run.out / "results.jsonl", "a") as file:  # and a record that was cut off
        file.write('{"run": "x", "stage"')
    code, said = run("-p", "baseline", "sampling", "training")
    assert code == 0 and "baseline done already" in said and "wrote samples" in said
    assert run.stages() == ["baseline", "sampling", "training"]
    assert len({record["run"] for record in run.records()}) == 1
    assert not [path for path in run.out.iterdir() if ".unfinished-" in path.name]


def test_one_run_at_a_time_in_a_folder(run):
    from filelock import FileLock

    run.out.mkdir()
    with FileLock(run.out / ".lock"):
        code, said = run("-p", "baseline")
    assert code == 2 and "another run works in" in said
    assert run("-p", "baseline")[0] == 0


def test_results_are_read_to_the_last_whole_line(tmp_path):
    results = Results(tmp_path / "deep" / "results.jsonl")
    assert results.read() == []
    results.append({"a": 1})
    with open(results.path, "a") as file:
        file.write('{"b": ')
    assert results.read() == [{"a": 1}]
    results.append({"c": 3})
    assert results.read() == [{"a": 1}, {"c": 3}]
    results.path.write_text('{"a": 1}\nnot json\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        results.read()


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "m"), [(128, 64), (256, 64), (64, 32), (96, 48), (80, 40), (16, 8)])
def test_the_reports_m_where_it_suits_the_heads(head_dim, m):
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, num_hidden_layers=1)
    pq, said = resolved_m(Settings(()), config)
    assert pq.num_subspaces(head_dim) == m and bool(said) == (m != 64)
    assert resolved_m(Settings((), M=16), config)[0].M == 16


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' /proc")
def test_a_peak_is_that_of_its_block():
    torch.ones(2**27)  # 512 MiB before it
    with memory_peak(torch.device("cpu")) as peak:
        torch.ones(2**26)  # large enough never to come from what the heap has left
    assert 0.9 * 2**28 < peak.peak - peak.before < 2**29


def test_a_generation_is_timed_token_by_token(make_model):
    from transformers.cache_utils import DynamicCache

    model, made = make_model("llama"), []

    def make(tokens):
        made.append(DynamicCache(config=model.config))
        return made[-1], "sdpa"

    found = time_generation(model, torch.randint(0, 200, (3, 20)), make, new_tokens=5)
    assert (found.batch, found.context, found.new_tokens) == (3, 20, 5) and len(made) == 2
    assert found.cache_bytes == cache_bytes(made[-1])[0] == 3 * (20 + 4) * 2 * 3 * 2 * 16 * 4
    assert found.tokens_per_second == pytest.approx(3000 / found.token_ms)
