"""`python -m pqlab bench rotary`: what it costs at decode that keys are stored turned back, a little or altogether.

Anchored keys (`quantization.anchors`), which the cache has: a layer's step, maps and all, is timed with keys as the
model makes them and with spans of `SPANS` tokens, in turns.

Keys as they were before the rotary embedding, which no cache has: beside the decode operation as it is stands a lower
bound of what every step would do more, for every stored token and kv head, before a key can be asked:

1. with a map across dimensions, bring the key home from code space: a d × d product with the backward map,
   2 · n · H_kv · d² floating-point operations, at the rate that one large product of the dtype that attention has on
   the device (fp16 on a GPU, float32 on a CPU) reaches in the same run;
2. turn it by its position: d/2 pairs, 6 operations each. Their rate is not measured; the bound takes them to be free.

The bound leaves out more, all in favour of keys before the rotary embedding: that the tables of q · centroid by which
the CPU kernels look scores up serve a single position only; moving keys between registers, shared memory and matrix
units; the cosines and sines; and that a small product per page does not reach the rate of a large one. It assumes that
what the decode operation does now remains. On a GPU one might hope to hide the product behind the look-ups; then the
longer of the two times counts instead of the sum, and both are printed.

Where only the two numbers of a pair are coded together (`pq-4-before-rotary-pairs`) there is no product: the pair that
a lookup gives, or the query's, is turned as it is met. That is 4 multiply-adds beside the 2 of a lookup at
d_m = d/M = 2, and 8 beside 4 where a subspace has two pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import kernels
from ..arguments import add_device, add_json
from ..kernels import ops, use_backend
from ..models.load import check_device
from ..quantization import SPAN, Anchors
from ..results.provenance import commit, device_name, today, versions
from .arguments import add_machine, add_only, add_seconds, add_threads, matching
from .cpu_bench import cpu_arguments, interleaved, kernels_for
from .decode_bench import Case, Timer, decode_arguments

CASES = tuple(
    Case(*heads, (n,), m=d // 2, head_dim=d)
    for *heads, d in ((9, 3, 64), (32, 8, 128), (32, 32, 128), (16, 8, 256))
    for n in (8192, 32768)
)
HELP = """\
One layer. Anchored keys, which the cache has: times as long as a step without, for several spans. Keys before the
rotary embedding, which no cache has: decode as it is, and at least what bringing all keys home would cost more."""

SPANS = (64, SPAN, 1024)
_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product gives the rate."""

_TURN = 4
"""Multiply-adds that turn the two numbers of a pair."""


def product_rate(device: str | torch.device = "cpu", *, seconds: float = 1.0) -> float:
    """TFLOP/s of one large product, in the dtype that attention has on the device."""
    device = torch.device(device)
    side, dtype = _SIDE[device.type], torch.float32 if device.type == "cpu" else torch.float16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _microseconds({0: lambda: a @ b}, device, seconds)[0] / 1e6


def bench_rotary(
    case: Case, tflops: float, device: str | torch.device = "cpu", *, seconds: float = 1.0
) -> dict[str, Any]:
    """One record of a layer at decode.

    Args:
        tflops: of `product_rate`.

    Returns:
        case; microseconds, of the decode operation as it is; product_flops, of bringing all coded keys home;
        product_microseconds at the rate; ratio, of both together to the operation as it is; hidden_ratio, of the
        longer of both; step_microseconds, of a layer's step, and anchored_ratios, of steps with anchors to it, by span;
        pair_multiply_adds, of a lookup in pairs before the rotary embedding, and lookup_multiply_adds, as it is now.
    """
    device = torch.device(device)
    args = cpu_arguments(case) if device.type == "cpu" else decode_arguments(case, device=str(device))
    with use_backend(device.type):
        steps = {span: step(case, args, span) for span in (0, *SPANS)}
        for call in (lambda: ops.decode(*args), *steps.values()):
            call()  # kernels are built for what they are asked
        kernels.wait()
        decode = _microseconds({0: lambda: ops.decode(*args)}, device, seconds)[0]
        by_span = _microseconds(steps, device, seconds)
    coded = int(args[4][:, 1].sum())
    flops = 2 * coded * case.kv_heads * case.head_dim**2
    product = flops / tflops / 1e6
    wide = case.head_dim // case.m
    return {
        "case": case.name,
        "microseconds": decode,
        "product_flops": flops,
        "product_microseconds": product,
        "ratio": (decode + product) / decode,
        "hidden_ratio": max(decode, product) / decode,
        "step_microseconds": by_span[0],
        "anchored_ratios": {str(span): by_span[span] / by_span[0] for span in SPANS},
        "lookup_multiply_adds": wide,
        "pair_multiply_adds": wide + _TURN * wide // 2,
    }


def step(case: Case, args: Sequence[Any], span: int) -> Callable[[], Any]:
    """A layer's step of one row, `ops.step_`, as the default codebooks have it: maps, fitted keys, anchors for a span.

    Args:
        args: of `ops.decode`, whose tokens the row has; the newest of them is stored anew at every call.
    """
    q, k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, scale = args
    heads, d = case.kv_heads, case.head_dim
    new = [torch.randn(1, heads, 1, d, device=q.device).to(q.dtype) for _ in "kv"]
    before = after - torch.tensor([[0, 0, 1]], dtype=torch.int32, device=q.device)
    whole = torch.randint(-127, 128, (heads, d, d), device=q.device).to(torch.int8)
    half = torch.randn(heads, d, d, device=q.device).half()
    fit = torch.ones(1, heads, d, device=q.device), torch.zeros(1, heads, d, device=q.device)
    turns = None
    if span:
        frequencies = 10000 ** -torch.linspace(0, 1, d // 2, device=q.device)
        turns = Anchors(span, frequencies).turns((int(after[0, 1:].sum()) - 1) // span + 1)
    return lambda: ops.step_(
        *exact, k_pages, v_pages, *new, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale,
        whole, half, whole, half, *fit, turns, span,
    )  # fmt: skip


def _microseconds(calls: dict[int, Callable[[], Any]], device: torch.device, seconds: float) -> dict[int, float]:
    """On a GPU the median with a cold L2, on a CPU the fastest call in turns, which other loads slow least."""
    if device.type == "cuda":
        timer = Timer(str(device))
        return {key: timer(call) for key, call in calls.items()}
    return {key: min(times) * 1e6 for key, times in interleaved(calls, seconds).items()}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}.\n\n{HELP}"
    add_device(parser, numbered=False)
    add_only(parser)
    add_threads(parser)
    add_machine(parser)
    add_seconds(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table (and JSON); the exit status. Raises `ConfigError` for an unknown device or case."""
    check_device(args.device)
    matching(CASES, args.only)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    kernels.start()
    with kernels_for(args.machine) as backend:
        return _run(args, device, backend.isa if device.type == "cpu" else "cuda")


def _run(args: argparse.Namespace, device: torch.device, isa: str) -> int:
    tflops = product_rate(device, seconds=args.seconds)
    print(
        f"{device_name(device)}, {tflops:.3g} TFLOP/s in a large product; µs of decode as it is, µs at least to bring"
    )
    spans = ", ".join(map(str, SPANS))
    print("keys home; times as long together, if one hides the other; multiply-adds in pairs")
    print(f"µs of a layer's step as it is; times as long with anchors every {spans} tokens")
    records = []
    for case in matching(CASES, args.only):
        records.append(r := bench_rotary(case, tflops, device, seconds=args.seconds))
        adds = f"{r['pair_multiply_adds']} instead of {r['lookup_multiply_adds']}"
        times = f"{r['microseconds']:>10.1f}{r['product_microseconds']:>11.1f}"
        print(
            f"  {r['case']:<42}{times}{r['ratio']:>8.2f}{r['hidden_ratio']:>8.2f}   {adds:<16}"
            f"{r['step_microseconds']:>10.1f}" + "".join(f"{x:>7.2f}" for x in r["anchored_ratios"].values()),
            flush=True,
        )
    if args.json:
        about = {"benchmark": "rotary", "device": device_name(device), "date": today(), "commit": commit()}
        about |= {"versions": versions(), "kernels": isa, "threads": torch.get_num_threads()}
        about |= {"tflops": round(tflops, 4)}
        rounded = [{k: _rounded(v) for k, v in r.items()} for r in records]
        print(json.dumps({**about, "records": rounded}))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value
