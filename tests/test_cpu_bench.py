"""The CPU benchmark: contenders compute the same attention, take turns, and end in records."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from pqlab import kernels
from pqlab.benchmarks import cpu_bench
from pqlab.benchmarks.decode_bench import Case
from pqlab.kernels import dispatch

TINY = Case(6, 2, (300,), m=8, head_dim=16)


def test_contenders_take_turns():
    calls = []
    times = cpu_bench.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, seconds=1e-5)
    assert calls[:2] == ["a", "b"] and calls[2:] == ["a", "b"] * (len(calls) // 2 - 1)
    assert len(times["a"]) == len(times["b"]) >= 5


def test_every_exact_contender_is_the_same_attention(monkeypatch):
    made = []
    randn = torch.randn

    def same(*shape):  # both dtypes see the same numbers
        generator = torch.Generator().manual_seed(len(made) % 3)
        made.append(shape)
        return randn(*shape, generator=generator)

    monkeypatch.setattr(torch, "randn", same)
    outs = {name: f().float().reshape(6, 16) for name, f in cpu_bench.exact_contenders(TINY).items()}
    assert len(outs) == 6
    for name, out in outs.items():
        assert torch.allclose(out, outs["sdpa float32"], atol=0.05 if "bfloat16" in name else 1e-5), name


def test_the_command_prints_ratios_and_records(monkeypatch, capsys):
    kernels.wait()
    if dispatch.backends()["cpu"].status().state != "ready":
        pytest.skip("no compiled CPU kernels here")
    monkeypatch.setattr(cpu_bench, "CASES", (TINY,) * 6)
    monkeypatch.setattr(cpu_bench, "_SECONDS", 0.001)
    parser = argparse.ArgumentParser()
    cpu_bench.configure(parser)
    assert cpu_bench.run(parser.parse_args(["--json"])) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    decode, encode = found["records"][0], found["records"][-1]
    assert decode["speedup"] == pytest.approx(decode["exact_microseconds"] / decode["microseconds"])
    assert decode["relative_error"] < 1e-4 and encode["same"] > 0.999 and found["threads"] >= 1


def test_kernels_for_a_lesser_machine(monkeypatch, capsys):
    kernels.wait()
    usual = dispatch.backends()["cpu"]
    if usual.status().state != "ready" or not usual.isa.startswith("avx"):
        pytest.skip("no kernels with AVX2 here")
    monkeypatch.setattr(cpu_bench, "CASES", (TINY,) * 6)
    monkeypatch.setattr(cpu_bench, "_SECONDS", 0.001)
    parser = argparse.ArgumentParser()
    cpu_bench.configure(parser)
    assert cpu_bench.run(parser.parse_args(["--machine", "x86-64-v3", "--json"])) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kernels"] == "avx2" and found["records"][0]["relative_error"] < 1e-4
    assert dispatch.backends()["cpu"] is usual
