"""`python -m pqlab bench layout`: how near to the rate of memory a kernel comes in each byte order, and page sizes.

The same kernel idea (`order_kernels`) reads the same codes in row-major, transposed and tiled pages; beside it the time
in which the same bytes can just be read. Then the real decode operation at every page size, beside the time of reading
its codes. Caches are cold before every call, and all contenders take turns on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..arguments import add_device, add_json
from ..errors import ConfigError
from ..kernels import ops, use_backend
from ..models.load import check_device
from ..results.provenance import commit, device_name, today, versions
from .arguments import add_seconds, add_threads
from .decode_bench import Case, ReadRate, Timer, decode_arguments
from .order_kernels import OrderKernels, expected

PAGE_SIZES = (16, 32, 64, 128, 256, 512)
CASES = {
    "cpu": (Case(9, 3, (8192,), m=32, head_dim=64), Case(32, 8, (8192,))),
    "cuda": (Case(32, 32, (32768,)), Case(32, 8, (32768,))),
}
_TOKENS, _HEADS, _M = {"cpu": 65536, "cuda": 131072}, {"cpu": 8, "cuda": 32}, 64
_EVICT = 64 << 20
_TOLERANCE = {"cpu": 1e-5, "cuda": 3e-3}  # float32 sums of float32, and of fp16 products


def time_calls(calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """Microseconds of every call with cold caches; on a CPU the median of turns that take `seconds` a call in all."""
    if device.type == "cuda":
        timer = Timer()
        return {name: timer(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    evict = torch.zeros(_EVICT, dtype=torch.uint8)
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            evict.add_(1)
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def bench_orders(
    page_size: int = 64, device: str | torch.device = "cpu", *, tokens: int = 0, heads: int = 0, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """A record per byte order, and "read" for the bytes alone: microseconds, gb_per_s, share (of the read rate).

    Args:
        tokens, heads: of the codes, M = 64; 0 takes 32 MiB on a CPU, 256 MiB on a GPU.

    Raises:
        RuntimeError: no kernel could be built, or one gave another sum than plain torch.
    """
    device = torch.device(device)
    tokens, heads = tokens or _TOKENS[device.type], heads or _HEADS[device.type]
    order_kernels = OrderKernels(device)
    g = torch.Generator(device=device).manual_seed(0)
    pages = tokens // page_size
    codes = torch.randint(0, 256, (pages, heads, page_size, _M), generator=g, device=device, dtype=torch.uint8)
    ids = torch.randperm(pages, generator=g, device=device)
    books = torch.randn(heads, _M, 256, 2, generator=g, device=device)
    weights = torch.rand(pages * page_size, generator=g, device=device)
    wanted = expected(codes, ids, books, weights)
    sums = {name: order_kernels.prepare(name, codes, ids, books, weights) for name in order_kernels.names}
    for name, call in sums.items():
        call()
        error = float((call.result() - wanted).norm() / wanted.norm())
        if error > _TOLERANCE[device.type]:
            raise RuntimeError(f"the {name} kernel differs from plain torch by {error:.1e}")
    read: dict[str, Callable[[], Any]] = {}
    if device.type == "cpu":
        read["read"] = lambda: order_kernels.read(codes)
    times = time_calls({**sums, **read}, device, seconds)
    if device.type == "cuda":
        times["read"] = ReadRate(Timer())(codes.numel())
    return [
        {
            "what": "sum over codes" if name != "read" else "only reading", "order": name, "page_size": page_size,
            "bytes": codes.numel(), "microseconds": us, "gb_per_s": codes.numel() / us / 1e3,
            "share": times["read"] / us,
        }
        for name, us in times.items()
    ]  # fmt: skip


def bench_page_sizes(
    case: Case, device: str | torch.device = "cpu", page_sizes: Sequence[int] = PAGE_SIZES, *, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """A record per page size: the decode operation in shuffled pages, beside the rate of reading the codes."""
    device = torch.device(device)
    calls: dict[str, Callable[[], Any]] = {}
    for page_size in page_sizes:
        args = decode_arguments(case, device=str(device), page_size=page_size)
        if device.type == "cpu":
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x for x in args)
        calls[str(page_size)] = lambda args=args: ops.decode(*args)
    coded = sum(int(n) for n in case.tokens) * case.kv_heads * case.m * 2
    with use_backend(device.type):
        for call in calls.values():
            call()  # kernels are built for what they are asked
        kernels.wait()
        if device.type == "cpu":
            data, reader = torch.zeros(coded, dtype=torch.uint8), OrderKernels()
            calls["read"] = lambda: reader.read(data)
        times = time_calls(calls, device, seconds)
    read = times.pop("read") if device.type == "cpu" else ReadRate(Timer())(coded)
    return [
        {
            "what": "decode", "case": case.name, "page_size": int(size), "bytes": coded, "microseconds": us,
            "gb_per_s": coded / us / 1e3, "share": read / us,
        }
        for size, us in times.items()
    ]  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    add_device(parser, numbered=False)
    parser.add_argument("--page-sizes", "--page_sizes", nargs="+", type=int, default=list(PAGE_SIZES), metavar="TOKENS",
                        help="tokens of a page")  # fmt: skip
    add_threads(parser)
    add_seconds(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure both, print tables (and JSON); the exit status. Raises `ConfigError` for what cannot be asked for."""
    if wrong := [size for size in args.page_sizes if size not in PAGE_SIZES]:
        raise ConfigError(f"--page-sizes {wrong[0]} is unknown; of {', '.join(map(str, PAGE_SIZES))}")
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    kernels.start()
    kernels.wait()
    records = []
    print(f"{device_name(device)}; the value side of decode, M {_M}, 8-bit codes: µs, GB/s, share of the read rate")
    try:
        for page_size in args.page_sizes:
            for r in bench_orders(page_size, device, seconds=args.seconds):
                records.append(r)
                print(_line(f"page {page_size:<4} {r['order']}", r), flush=True)
        print("the decode operation by page size: µs, GB/s of codes, share of the read rate")
        for case in CASES[device.type]:
            for r in bench_page_sizes(case, device, args.page_sizes, seconds=args.seconds):
                records.append(r)
                print(_line(f"{case.name}, page {r['page_size']}", r), flush=True)
    except RuntimeError as error:
        print(f"pqlab bench layout: {error}; python -m pqlab doctor says what is missing", file=sys.stderr)
        return 1
    if args.json:
        about = {"benchmark": "layout", "device": device_name(device), "date": today(), "commit": commit()}
        about |= {"versions": versions(), "threads": torch.get_num_threads()}
        rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in records]
        print(json.dumps({**about, "records": rounded}))
    return 0


def _line(name: str, r: Mapping[str, Any]) -> str:
    return f"  {name:<52}{r['microseconds']:>10.1f}{r['gb_per_s']:>9.1f}{r['share']:>8.1%}"
