"""Times the C++ decode and encode kernels against exact attention and plain torch, on this CPU, in one run.

One layer at decode, all threads of torch. The exact side is the fastest of torch's SDPA with and without `enable_gqa`
and a grouped matmul, each in float32 and bfloat16, for the shape. All contenders take turns, so that another load on
the machine meets them alike; a time is the median of its turns, and the share of the fastest turn is given beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..arguments import add_json
from ..errors import ConfigError
from ..kernels import dispatch, ops, use_backend
from ..kernels.cpu import CpuBackend
from ..results.provenance import commit, today, versions
from .arguments import add_machine, add_only, add_threads, matching
from .decode_bench import Case, decode_arguments

CASES = tuple(
    Case(*heads, (n,), m=d // 2, head_dim=d)
    for *heads, d in ((9, 3, 64), (32, 8, 128), (32, 32, 128))
    for n in (1024, 2048, 4096, 8192, 32768)
)
HELP = """\
One layer, all threads: microseconds of the kernel and of the fastest of torch's exact attentions in fp32 and bf16, and
how many times faster the kernel is, by medians and by fastest turns. Then encoding, beside plain torch."""

_ENCODE = "encode"
_SECONDS = 1.0  # a contender
_ENCODED = 4096  # tokens


def interleaved(contenders: Mapping[str, Callable[[], Any]], seconds: float | None = None) -> dict[str, list[float]]:
    """Seconds of every call of the contenders, which take turns for `seconds` each on average, five turns at least."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    end = time.perf_counter() + (_SECONDS if seconds is None else seconds) * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def exact_contenders(case: Case, device: torch.device | str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """Exact attention of one new token, every way that torch offers."""
    batch, n, d = len(case.tokens), case.tokens[0], case.head_dim
    groups = case.heads // case.kv_heads
    found: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(batch, case.heads, 1, d).to(device, dtype)
        k, v = (torch.randn(batch, case.kv_heads, n, d).to(device, dtype) for _ in range(2))
        grouped = q.view(batch, case.kv_heads, groups, d)

        def repeated(q=q, k=k, v=v) -> Tensor:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(q, k, v)

        def gqa(q=q, k=k, v=v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)

        def matmul(q=grouped, k=k, v=v) -> Tensor:
            return ((q @ k.mT) * d**-0.5).softmax(-1) @ v

        name = str(dtype).removeprefix("torch.")
        found |= {f"sdpa {name}": gqa, f"matmul {name}": matmul}
        if groups > 1:
            found[f"sdpa repeated {name}"] = repeated
    return found


def cpu_arguments(case: Case) -> list[Any]:
    """`decode_arguments` as a model in float32 gives them."""
    args = list(decode_arguments(case, device="cpu"))
    args[5:7] = [books.half() for books in args[5:7]]  # as calibration leaves them
    for exact in (0, *range(7, 11)):
        args[exact] = args[exact].float()
    return args


def bench_decode(case: Case, seconds: float | None = None) -> dict[str, Any]:
    """One record: microseconds of the kernel and of the best exact attention, and their ratio."""
    args = cpu_arguments(case)
    with use_backend("cpu"):
        out, _ = ops.decode(*args)
        with use_backend("reference"):
            expected, _ = ops.decode(*args)
        error = ((out - expected).norm() / expected.norm()).item()
        if error > 1e-4:
            raise RuntimeError(f"{case.name}: the kernel differs from the reference by {error:.1e}")
        times = interleaved({"pqlab": lambda: ops.decode(*args), **exact_contenders(case)}, seconds)
    ours = times.pop("pqlab")
    best = min(times, key=lambda name: statistics.median(times[name]))
    return {
        "case": case.name,
        "microseconds": statistics.median(ours) * 1e6,
        "exact": best,
        "exact_microseconds": statistics.median(times[best]) * 1e6,
        "speedup": statistics.median(times[best]) / statistics.median(ours),
        "speedup_of_fastest_turns": min(min(t) for t in times.values()) / min(ours),
        "relative_error": error,
    }


def bench_encode(case: Case) -> dict[str, Any]:
    """Encoding keys of one layer: the kernel beside the plain torch encode."""
    books = torch.randn(case.kv_heads, case.m, 256, case.head_dim // case.m)
    x = torch.randn(case.kv_heads, _ENCODED, case.head_dim)

    def run(backend: str) -> Callable[[], Tensor]:
        def encode() -> Tensor:
            with use_backend(backend):
                return ops.encode(x, books)

        return encode

    same = (run("cpu")() == run("reference")()).float().mean().item()
    times = interleaved({"pqlab": run("cpu"), "torch": run("reference")})
    ours, torchs = (statistics.median(times[name]) * 1e6 for name in ("pqlab", "torch"))
    name = f"encode {_ENCODED} tokens, {case.kv_heads} kv heads d{case.head_dim}, M {case.m}, 8 bit"
    return {"case": name, "microseconds": ours, "torch_microseconds": torchs, "speedup": torchs / ours, "same": same}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}.\n\n{HELP}"
    add_only(parser)
    add_threads(parser)
    add_machine(parser)
    add_json(parser)


@contextmanager
def kernels_for(machine: str) -> Iterator[CpuBackend]:
    """The CPU backend while its kernels are those for another processor (`-march`); "native" is the usual one.

    Raises `ConfigError` when none can be built for the other one.
    """
    kernels.wait()
    usual = dispatch.backends()["cpu"]
    if machine == "native":
        yield usual
        return
    backend = CpuBackend(machine)
    backend.extension.start("eager")
    if backend.status().state != "ready":
        raise ConfigError(f"--machine {machine}: no kernels could be built for it ({backend.status().detail})")
    dispatch.register_backend(backend)
    try:
        yield backend
    finally:
        dispatch.register_backend(usual)


def run(args: argparse.Namespace) -> int:
    """Time every case, print a table (and JSON); the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with kernels_for(args.machine) as backend:
        return _run(args, backend)


def _run(args: argparse.Namespace, backend: CpuBackend) -> int:
    cases = matching(CASES, args.only, _ENCODE)
    status = backend.status()
    if status.state != "ready":
        what = f"the C++ kernels are not there ({status.state}: {status.detail})"
        print(f"pqlab bench cpu: {what}; python -m pqlab doctor says more", file=sys.stderr)
        return 1
    print(
        f"{torch.get_num_threads()} threads, kernels with {backend.isa}, torch with {_torch_isa()}; "
        "µs, best exact, and how many times faster (by medians, by fastest turns)"
    )
    records = []
    for case in cases:
        records.append(r := bench_decode(case))
        print(
            f"  {r['case']:<46}{r['microseconds']:>9.0f}{r['exact_microseconds']:>9.0f} {r['exact']:<18}"
            f"{r['speedup']:>6.2f}{r['speedup_of_fastest_turns']:>6.2f}",
            flush=True,
        )
    for case in (CASES[0], CASES[5]):
        if args.only in _ENCODE:
            records.append(r := bench_encode(case))
            print(f"  {r['case']:<46}{r['microseconds']:>9.0f}{r['torch_microseconds']:>9.0f} torch", end=" " * 14)
            print(f"{r['speedup']:>6.2f}", flush=True)
    if args.json:
        about = {"benchmark": "cpu", "date": today(), "commit": commit(), "versions": versions()}
        about |= {"threads": torch.get_num_threads(), "cpu": _cpu_name(), "kernels": backend.isa}
        about |= {"torch_isa": _torch_isa()}
        print(json.dumps({**about, "records": records}))
    return 0


def _torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


def _cpu_name() -> str:
    from ..doctor.probes import cpu

    return cpu().value
