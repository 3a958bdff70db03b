"""`python -m pqlab bench rotary`: what keys that are stored as they were before the rotary embedding cost at decode.

There is no such cache. Beside the decode operation as it is stands a lower bound of what every step would do more, for
every stored token and kv head, before a key can be asked:

1. with a map across dimensions, bring the key home from code space: a d × d product with the backward map,
   2 · n · H_kv · d² floating-point operations, at the rate that one large product of the dtype that attention has on
   the device (fp16 on a GPU, float32 on a CPU) reaches in the same run;
2. turn it by its position: d/2 pairs, 6 operations each. Their rate is not measured; the bound takes them to be free.

The bound leaves out more, all in favour of keys before the rotary embedding: that the tables of q · centroid by which
the CPU kernels look scores up serve a single position only; moving keys between registers, shared memory and matrix
units; the cosines and sines; and that a small product per page does not reach the rate of a large one. It assumes that
what the decode operation does now remains. On a GPU one might hope to hide the product behind the look-ups; then the
longer of the two times counts instead of the sum, and both are printed.

Where keys are turned back to their page's first token (`pq-4-page-relative`), queries are turned and mapped instead,
once a page: 2 · n / P · H_q · d² operations, and a query a page is written and read again.

Where only the two numbers of a pair are coded together (`pq-4-before-rotary-pairs`) there is no product: the pair that
a lookup gives, or the query's, is turned as it is met. That is 4 multiply-adds beside the 2 of a lookup at
d_m = d/M = 2, and 8 beside 4 where a subspace has two pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from .. import kernels
from ..kernels import ops, use_backend
from ..results.provenance import commit, device_name, today, versions
from .cpu_bench import cpu_arguments, interleaved
from .decode_bench import PAGE, Case, Timer, decode_arguments

CASES = tuple(
    Case(*heads, (n,), m=d // 2, head_dim=d)
    for *heads, d in ((9, 3, 64), (32, 8, 128), (32, 32, 128))
    for n in (8192, 32768)
)
_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product gives the rate."""

_TURN = 4
"""Multiply-adds that turn the two numbers of a pair."""


def product_rate(device: str | torch.device = "cpu", *, seconds: float = 1.0) -> float:
    """TFLOP/s of one large product, in the dtype that attention has on the device."""
    device = torch.device(device)
    side, dtype = _SIDE[device.type], torch.float32 if device.type == "cpu" else torch.float16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _microseconds(lambda: a @ b, device, seconds) / 1e6


def bench_rotary(
    case: Case, tflops: float, device: str | torch.device = "cpu", *, seconds: float = 1.0
) -> dict[str, Any]:
    """One record of a layer at decode.

    Args:
        tflops: of `product_rate`.

    Returns:
        case; microseconds, of the decode operation as it is; product_flops, of bringing all coded keys home;
        product_microseconds at the rate; ratio, of both together to the operation as it is; hidden_ratio, of the
        longer of both; page_ratio, of the operation and the products of a query a page to the operation as it is;
        pair_multiply_adds, of a lookup in pairs before the rotary embedding, and lookup_multiply_adds, as it is now.
    """
    device = torch.device(device)
    args = cpu_arguments(case) if device.type == "cpu" else decode_arguments(case, device=str(device))
    with use_backend(device.type):
        ops.decode(*args)  # kernels are built for what they are asked
        kernels.wait()
        decode = _microseconds(lambda: ops.decode(*args), device, seconds)
    coded = int(args[4][:, 1].sum())
    flops = 2 * coded * case.kv_heads * case.head_dim**2
    product = flops / tflops / 1e6
    by_page = product / PAGE * case.heads / case.kv_heads
    wide = case.head_dim // case.m
    return {
        "case": case.name,
        "microseconds": decode,
        "product_flops": flops,
        "product_microseconds": product,
        "ratio": (decode + product) / decode,
        "hidden_ratio": max(decode, product) / decode,
        "page_ratio": (decode + by_page) / decode,
        "lookup_multiply_adds": wide,
        "pair_multiply_adds": wide + _TURN * wide // 2,
    }


def _microseconds(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """On a GPU the median with a cold L2, on a CPU the fastest call, which other loads slow least."""
    if device.type == "cuda":
        return Timer(str(device))(call)
    return min(interleaved({"": call}, seconds)[""]) * 1e6


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU (default: torch's own number)")
    parser.add_argument("--seconds", type=float, default=1.0, help="a contender, on a CPU")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table (and JSON); the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    kernels.start()
    kernels.wait()
    tflops = product_rate(device, seconds=args.seconds)
    print(
        f"{device_name(device)}, {tflops:.3g} TFLOP/s in a large product; µs of decode as it is, µs at least to bring"
    )
    print("keys home; times as long together, if one hides the other, with a query a page; multiply-adds in pairs")
    records = []
    for case in (c for c in CASES if args.only in c.name):
        records.append(r := bench_rotary(case, tflops, device, seconds=args.seconds))
        adds = f"{r['pair_multiply_adds']} instead of {r['lookup_multiply_adds']}"
        times = f"{r['microseconds']:>10.1f}{r['product_microseconds']:>11.1f}"
        print(
            f"  {r['case']:<42}{times}{r['ratio']:>8.2f}{r['hidden_ratio']:>8.2f}{r['page_ratio']:>8.2f}   {adds}",
            flush=True,
        )
    if args.json:
        about = {"benchmark": "rotary", "device": device_name(device), "date": today(), "commit": commit()}
        about |= {"versions": versions(), "threads": torch.get_num_threads(), "tflops": round(tflops, 4)}
        rounded = [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in records]
        print(json.dumps({**about, "records": rounded}))
    return 0
