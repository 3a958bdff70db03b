"""What is measured with the model on a GPU is what is measured with it on the CPU."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

from pqlab import CacheConfig, Codebooks, PagedPQCache, PQConfig
from pqlab.cli import main
from pqlab.evaluation import calibration_bench, plan_command, retrieval, texts_bench
from pqlab.evaluation.fidelity import compare, text_windows
from pqlab.evaluation.key_values import key_values
from pqlab.evaluation.passkey import passkey
from pqlab.evaluation.peak import cache_peaks
from pqlab.evaluation.plan import Plan, Planner
from pqlab.evaluation.teacher_forced import from_codebooks
from pqlab.results.provenance import device_name

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
TEXT = " ".join(f"Chapter {i}: the {i * 7919 % 997}th whale was {i * 31 % 89} feet long, and sang." for i in range(400))
NEAR = 0.05  # of a KL: other rounding, and a code that falls the other way


@pytest.fixture
def models(make_model):
    """The same weights on the CPU and on the GPU, in float32."""
    return make_model("llama"), make_model("llama").cuda()


@pytest.mark.parametrize("task", [passkey, key_values])
def test_retrieval(models, tiny_tokenizer, task):
    books = Codebooks.random(models[0], pq=PQConfig(M=8, nbits=8), maps=True)
    found = [
        task(
            model, tiny_tokenizer, TEXT, {"pq": from_codebooks(books.to(model.device))}, SMALL, lengths=[300],
            depths=[0.2, 0.7],
        ).set_index(["method", "depth", "key"])
        for model in models
    ]  # fmt: skip
    assert found[0].logp.to_dict() == pytest.approx(found[1].logp.to_dict(), rel=NEAR)


def test_variants_and_texts(models, tiny_tokenizer):
    variants = {"default": {"num_tokens": 1200, "window": 300}, "one for all": {"num_tokens": 1200, "scope": "model"}}
    options = {"windows": 2, "length": 150, "config": SMALL}
    cpu, gpu = (
        calibration_bench.calibrations(m, tiny_tokenizer, TEXT, TEXT[::-1], variants, PQConfig(8, 8), **options)
        for m in models
    )
    assert (cpu.constants_mib == gpu.constants_mib).all()
    assert gpu.kl.tolist() == pytest.approx(cpu.kl.tolist(), rel=0.3), "trained on other draws"
    texts = {"forth": TEXT, "back": TEXT[::-1]}
    cpu, gpu = (
        texts_bench.transfer(m, tiny_tokenizer, texts, texts, PQConfig(8, 8), num_tokens=1000, **options)
        for m in models
    )
    assert gpu.kl.tolist() == pytest.approx(cpu.kl.tolist(), rel=0.3)


def test_a_plan_made_on_a_gpu_holds_on_the_cpu(models, tiny_tokenizer, tmp_path):
    cpu, gpu = models
    settings = {"config": SMALL, "length": 200, "windows": 1, "progress": False}
    planner = Planner(gpu, tiny_tokenizer, TEXT, choices=(1, 2, 4), **settings)
    made = planner.plan(bits=2.25)
    assert made.certificate["device"] == device_name("cuda")
    made.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan", cpu)
    assert back.codebooks.nbytes == made.codebooks.nbytes
    window = text_windows(tiny_tokenizer, TEXT[int(len(TEXT) * 0.8) :], 200, 2)[1:]
    frame = compare(cpu, window, {"plan": from_codebooks(back.codebooks)}, SMALL)
    assert made.certificate["kl"] == pytest.approx(frame.kl.mean(), rel=NEAR)
    on_cpu = Planner(cpu, tiny_tokenizer, TEXT, choices=(1, 2, 4), **settings)
    assert planner.costs.kl.sum() == pytest.approx(on_cpu.costs.kl.sum(), rel=0.3)


def test_a_peak_awaits_the_kernels_that_it_needs(make_model):
    model = make_model("llama", head_dim=64).cuda()
    books = Codebooks.random(model, pq=PQConfig(M=32, nbits=8))
    ids = torch.randint(0, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    runs = {"mine": (lambda context: PagedPQCache(model, deepcopy(books), SMALL, context=context), "pqlab")}
    peaks, errors = cache_peaks(model, ids, runs)
    assert not errors and peaks["mine"].fallback == ""
    assert peaks["mine"].decode > books.nbytes, "copies of codebooks count"


def test_commands(make_model, tiny_tokenizer, monkeypatch, capsys, tmp_path):
    for module in (calibration_bench, texts_bench, plan_command, retrieval):
        found = lambda args: (None, make_model("llama").to(args.device), tiny_tokenizer)  # noqa: E731
        monkeypatch.setattr(module, "load", found)
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration_bench, "VARIANTS", {"default": {"num_tokens": 600}})
    monkeypatch.setattr(texts_bench, "texts", lambda: ({"back": TEXT[::-1]}, {"forth": TEXT}))
    windows = ["--windows", "1", "--length", "300"]
    for command in (
        ["passkey", "--lengths", "400", "--depths", "0.5"],
        ["kv", "--lengths", "400", "--depths", "0.5"],
        ["calibration", *windows],
        ["texts", "--tokens", "600", *windows],
    ):
        assert main(["bench", *command, "--device", "cuda", "--json"]) == 0, capsys.readouterr().out
        record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert record["device"] == torch.cuda.get_device_name()
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    assert main(["plan", "--device", "cuda", "--bits", "2", "--text", str(text), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "plan-bits-2.safetensors").is_file()
