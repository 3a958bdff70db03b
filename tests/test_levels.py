"""The levels CUDA, CPU, reference, exact attention: forced, forbidden, and taken when one above fails."""

from __future__ import annotations

import logging

import pytest
import torch

import pqlab
from pqlab import CacheConfig, Codebooks, KernelMissingError, PagedPQCache, PQConfig, UnsupportedModelError
from pqlab.kernels import dispatch, reference, use_backend
from pqlab.kernels.backend import Backend
from pqlab.transformers_api import cache_argument

CONFIG = CacheConfig(page_size=16, residual_length=20, num_sinks=3)


@pytest.fixture
def books(model):
    return Codebooks.random(model, pq=PQConfig(M=8, nbits=4), maps=True)


@pytest.fixture
def register():
    before, runs = dispatch.backends()["cpu"], dispatch.runs()
    forget_runs()
    yield dispatch.register_backend
    dispatch.register_backend(before)
    dispatch._runs.update(runs)


def forget_runs() -> None:
    dispatch._forget_known()  # calls are counted there, too
    dispatch._runs.clear()


def generate(model, books, config: CacheConfig = CONFIG, **inputs) -> tuple[torch.Tensor, PagedPQCache]:
    prompt = (torch.arange(90)[None] * 7) % 200
    cache = PagedPQCache(model, books, config, context=200)
    given = {"attention_mask": torch.ones_like(prompt), **inputs}
    ids = model.generate(prompt, **cache_argument(model, cache), **given, max_new_tokens=40, do_sample=False)
    return ids, cache


class Fails(Backend):
    """A CPU backend that runs for a while, and then raises in the middle of a step, after it has stored a part."""

    name = "cpu"
    encode = staticmethod(reference.encode)
    encode_pages_ = staticmethod(reference.encode_pages_)

    def __init__(self, error: Exception, after: int) -> None:
        self.error, self.left = error, after

    def append_(self, *args):
        reference.append_(*args, encode_pages_=self.encode_pages_)

    def decode(self, *args):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return reference.decode(*args)


@pytest.mark.parametrize("error", [RuntimeError("illegal\ninstruction"), MemoryError("no scratch space")])
def test_a_kernel_that_fails_in_a_generation_does_not_end_it(error, model, books, register, caplog):
    with use_backend("reference"):
        wanted, cache = generate(model, books)
    register(Fails(error, after=21))
    with caplog.at_level(logging.WARNING, logger="pqlab"):
        got, again = generate(model, books)
    assert torch.equal(got, wanted) and torch.equal(again.lengths, cache.lengths)
    assert torch.equal(again.quantized_layers[1].codes(0)[1], cache.quantized_layers[1].codes(0)[1])
    why = f"cpu: it failed when it ran ({type(error).__name__}: {' '.join(str(error).split())})"
    calls = {key: count for key, count in dispatch.runs().items() if key[0] == "step_"}
    assert calls["step_", "cpu", "first choice"] == 22, "the failed one is not tried again"
    assert calls["step_", "reference", why] == 2 * 39 - 21
    assert [r.getMessage() for r in caplog.records] == [f"step_ runs on the reference backend; {why}"], "said once"
    report = {(c.op, c.device): c for c in pqlab.backend_report().choices}
    assert (report["step_", "cpu"].backend, report["step_", "cpu"].reason) == ("reference", why)
    assert report["encode", "cpu"].backend == "cpu", "other operations keep it"
    register(Fails(error, after=10**9))
    assert dispatch.chosen("step_", "cpu") == ("cpu", "first choice"), "another backend of that name is tried"


def test_errors_of_arguments_and_of_forced_backends_are_raised(model, books, register):
    register(Fails(ValueError("a page id lies outside the pool"), after=3))
    with pytest.raises(ValueError, match="page id"):
        generate(model, books)
    register(Fails(RuntimeError("broken"), after=3))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="broken"):
        generate(model, books)


@pytest.mark.parametrize("padded", [False, True])
def test_exact_attention_can_be_forced(padded, model, books, register, caplog):
    mask = torch.ones(1, 90, dtype=torch.long)
    mask[0, : 13 * padded] = 0
    with use_backend("reference"):
        wanted, _ = generate(model, books, attention_mask=mask)
    forget_runs()
    with use_backend("exact"), caplog.at_level(logging.WARNING, logger="pqlab"):
        got, _ = generate(model, books, attention_mask=mask)
        report = pqlab.backend_report()
    assert torch.equal(got, wanted)
    assert not any(op in ("decode", "step_") for op, _, _ in dispatch.runs()), "no kernel has read codes"
    assert dispatch.runs()["attention", "dequantize", "forced"] == 2 * 40
    assert "attention runs on the dequantize backend; forced" in caplog.text
    (choice,) = [c for c in report.choices if c.op == "attention"]
    assert (choice.backend, choice.reason) == ("dequantize", "forced") and "exact" in report.setting
    assert "dequantize" in repr(report) and "dequantize" in report._repr_html_()


def test_chunks_under_forced_exact_attention(model, books):
    ids = (torch.arange(120)[None] * 5) % 200

    def logits(setting: str) -> torch.Tensor:
        cache = PagedPQCache(model, books, CONFIG, context=200)
        with use_backend(setting), torch.inference_mode():
            parts = [model(part, **cache_argument(model, cache)).logits for part in ids.split((70, 40, 9, 1), 1)]
        return torch.cat(parts, 1)

    assert torch.allclose(logits("exact"), logits("auto"), atol=1e-3)


def test_static_mode_has_no_exact_level(model, books):
    config = CacheConfig(page_size=16, residual_length=20, mode="static")
    with use_backend("exact"), pytest.raises(UnsupportedModelError, match='mode="eager"'):
        generate(model, books, config)


def test_exact_attention_can_be_forbidden(model, books):
    model.set_attn_implementation("sdpa")
    with use_backend("-exact"), pytest.raises(KernelMissingError, match='PQC002.*forbidden.*"sdpa".*PQLAB_BACKEND'):
        generate(model, books)
    cache = PagedPQCache(model, books, CONFIG, context=200)
    given = {**cache_argument(model, cache), "max_new_tokens": 5}
    with use_backend("-exact"):
        with pytest.raises(KernelMissingError):
            model.generate(torch.ones(3, 60, dtype=torch.long), **given)
        model.set_attn_implementation("pqlab")
        model.generate(torch.ones(1, 60, dtype=torch.long), **given)  # refused before the cache took three rows
    assert cache.lengths.sum(1).tolist() == [64]


def test_a_trace_says_what_ran_and_why(model, books, tiny_tokenizer, tmp_path):
    with use_backend("-cpu"):
        trace = pqlab.trace_decode(model, tiny_tokenizer, "x" * 60, 5, codebooks=books, config=CONFIG)
    trace.save(tmp_path / "a.trace")
    ran = pqlab.DecodeTrace.load(tmp_path / "a.trace").kernels()
    step = ran[ran.operation == "step_"].iloc[0]
    assert (step.backend, step.reason, step.calls) == ("reference", "cpu: forbidden by the setting", 2 * 5)
    with use_backend("exact"):
        trace = pqlab.trace_decode(model, tiny_tokenizer, "x" * 60, 5, codebooks=books, config=CONFIG)
    ran = trace.kernels()
    assert list(ran[ran.operation == "attention"].reason) == ["forced"]
    assert trace.attention(3, 0, 0).paged.sum() == pytest.approx(1, abs=1e-4)
