"""Times `pq_decode` and `pq_encode` on a GPU against exact attention on the same shapes, everything in one run.

Each case is one layer at decode, captured in a CUDA graph; before every replay 256 MiB are overwritten, so that nothing
is left in L2, and the median of the replays counts. The exact side is the fastest of flash SDPA, cuDNN SDPA and, where
it can be imported, FlashInfer, on fp16 tensors of the same lengths. `read` is the time in which the bytes of the codes
can just be read, `exact_read` that of the exact keys and values, which no exact attention can beat.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import kernels
from ..arguments import add_json, output_file
from ..errors import ConfigError
from ..kernels import ops, use_backend
from ..kernels.build import Extension
from ..kernels.cuda_config import SOURCES
from .arguments import add_only, matching
from .decode_steps import refusals_unsaid

HELP = """\
One layer, cold caches, CUDA graphs: microseconds of the kernel and of the fastest of torch's exact attentions in fp16
(and FlashInfer's, where it is installed), their ratio, the kernel's share of the rate at which its bytes can just be
read, and its error against float64."""

_ENCODE = "encode"

REPLAYS = 30
SINKS, WINDOW, SLOTS, PAGE = 4, 128, 192, 64
RAGGED = tuple(4096 + 28672 * ((7 * row) % 16) // 15 for row in range(16))
"""4K to 32K tokens, evenly spread, not in order."""


@dataclass(frozen=True)
class Case:
    """One layer: query and kv heads, M subspaces of 8-bit codes at head size d (V may have its own), tokens a row."""

    heads: int
    kv_heads: int
    tokens: tuple[int, ...]
    m: int = 64
    head_dim: int = 128
    v_m: int | None = None

    @property
    def ms(self) -> tuple[int, int]:
        """M of K and of V."""
        return self.m, self.m if self.v_m is None else self.v_m

    @property
    def name(self) -> str:
        tokens = f"{self.tokens[0]}" if len(set(self.tokens)) == 1 else f"{min(self.tokens)}-{max(self.tokens)}"
        bits = 8 * sum(self.ms) / 2 / self.head_dim
        return f"{self.heads}/{self.kv_heads} d{self.head_dim} {bits:g} bit, batch {len(self.tokens)}, {tokens} tokens"


CASES = (
    *(Case(32, kv, (n,)) for kv in (32, 8) for n in (1024, 2048, 4096, 8192, 32768, 131072)),
    Case(32, 8, RAGGED),
    Case(32, 32, (32768,), m=32),
    Case(32, 8, (32768,), m=32),
    Case(32, 32, (32768,), m=128, v_m=64),
    Case(32, 8, (32768,), m=128, v_m=64),
    *(Case(9, 3, (n,), m=32, head_dim=64) for n in (1024, 8192)),
    *(Case(4, 1, (n,), m=128, head_dim=256) for n in (1024, 8192, 32768)),
    *(Case(16, 8, (n,), m=128, head_dim=256) for n in (1024, 8192, 32768, 131072)),
)


class Timer:
    """Median microseconds of a function, captured in a graph, with a cold L2."""

    def __init__(self, device: str = "cuda", replays: int = REPLAYS) -> None:
        self.replays = replays
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                function()
        times = []
        for _ in range(self.replays):
            self._flush.fill_(1)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        return statistics.median(times)


def decode_arguments(
    case: Case, *, exact_tokens: bool = True, seed: int = 0, device: str = "cuda", page_size: int = PAGE
) -> tuple[Any, ...]:
    """Random arguments of `ops.decode`: pages shuffled over a pool that is a little too large."""
    g = torch.Generator(device=device).manual_seed(seed)
    batch, d, heads = len(case.tokens), case.head_dim, case.kv_heads
    beside = SINKS + WINDOW if exact_tokens else 0
    coded = [max(0, n - beside) for n in case.tokens]
    per_row = -(-max(coded) // page_size)
    max_pages = batch * per_row + 7

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    pages = [
        torch.randint(0, 256, (max_pages, heads, page_size // 16, m, 16), generator=g, device=device, dtype=torch.uint8)
        for m in case.ms
    ]
    table = torch.randperm(max_pages, generator=g, device=device)[: batch * per_row].view(batch, per_row)
    used = torch.arange(per_row, device=device) * page_size < torch.tensor(coded, device=device)[:, None]
    exact = [SINKS, WINDOW] if exact_tokens else [0, 0]
    lengths = torch.tensor([[exact[0], n, exact[1]] for n in coded], dtype=torch.int32, device=device)
    books = [random(heads, m, 256, d // m) for m in case.ms]
    sinks = [random(batch, heads, SINKS, d).half() for _ in range(2)]
    window = [random(batch, heads, SLOTS, d).half() for _ in range(2)]
    q = random(batch, case.heads, 1, d).half()
    return (q, *pages, torch.where(used, table, -1).int(), lengths, *books, *sinks, *window, 8, 8, d**-0.5)


def exact_times(case: Case, timer: Timer) -> dict[str, float]:
    """Microseconds of each exact attention on fp16 tensors of this case; rows of one length only."""
    batch, n, d = len(case.tokens), case.tokens[0], case.head_dim
    q = torch.randn(batch, case.heads, 1, d, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(batch, case.kv_heads, n, d, device="cuda", dtype=torch.float16) for _ in range(2))
    grouped = case.heads != case.kv_heads
    times = {}
    for name, chosen in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with refusals_unsaid(), sdpa_kernel(chosen):
                times[name] = timer(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped))
        except RuntimeError:  # this backend has no kernel for the shape
            continue
    try:
        import flashinfer
    except ImportError:
        return times
    one, keys, values = q[0, :, 0].contiguous(), k[0].contiguous(), v[0].contiguous()
    if batch == 1:
        times["flashinfer"] = timer(
            lambda: flashinfer.single_decode_with_kv_cache(one, keys, values, kv_layout="HND", use_tensor_cores=grouped)
        )
    return times


def ragged_exact_times(case: Case, timer: Timer) -> dict[str, float]:
    """Microseconds of each way torch has to attend exactly to rows of different lengths, fp16, one new token a row.

    cuDNN row by row, and with the rows side by side on eight streams; flash over packed rows, the query heads of a
    group as its new tokens; FlexAttention over padded rows, masked by length; cuDNN over padded rows with a mask.
    """
    g = torch.Generator(device="cuda").manual_seed(0)
    lengths, heads, d, group = case.tokens, case.kv_heads, case.head_dim, case.heads // case.kv_heads
    batch, longest = len(lengths), max(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.float16)

    q, k, v = random(batch, case.heads, 1, d), random(batch, heads, longest, d), random(batch, heads, longest, d)
    rows = [tuple(x[i : i + 1, :, :n].contiguous() for x in (k, v)) for i, n in enumerate(lengths)]
    streams = [torch.cuda.Stream() for _ in range(8)]

    def row_by_row() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for i, (keys, values) in enumerate(rows):
                F.scaled_dot_product_attention(q[i : i + 1], keys, values, enable_gqa=True)

    def side_by_side() -> None:
        here = torch.cuda.current_stream()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for stream in streams:
                stream.wait_stream(here)
            for i in sorted(range(batch), key=lambda i: -lengths[i]):
                with torch.cuda.stream(streams[i % len(streams)]):
                    F.scaled_dot_product_attention(q[i : i + 1], *rows[i], enable_gqa=True)
            for stream in streams:
                here.wait_stream(stream)

    packed_q = q.view(batch, heads, group, d).transpose(1, 2).reshape(batch * group, heads, d)
    packed = [torch.cat([row[side][0].transpose(0, 1) for row in rows]).contiguous() for side in range(2)]
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    query_starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * group

    def flash() -> None:
        torch.ops.aten._flash_attention_forward(
            packed_q, *packed, query_starts, starts, group, longest, 0.0, False, False, scale=d**-0.5
        )

    ends = torch.tensor(lengths, device="cuda")
    mask = torch.arange(longest, device="cuda") < ends[:, None, None, None]

    def masked() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def flex() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(lambda b, h, i, j: j < ends[b], batch, None, 1, longest, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "cudnn, row by row": lambda: row_by_row, "cudnn, rows side by side": lambda: side_by_side,
        "flash, packed rows": lambda: flash, "flex": flex, "cudnn, masked": lambda: masked,
    }  # fmt: skip
    times = {}
    for name, make in ways.items():
        try:
            with refusals_unsaid():
                times[name] = timer(make())
        except Exception as error:  # what torch cannot do for the shape is no baseline; it is said
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    return times


class ReadRate:
    """Microseconds in which bytes can just be read from memory."""

    def __init__(self, timer: Timer) -> None:
        self._timer, self._library = timer, None
        major, minor = torch.cuda.get_device_capability()
        flags = ["-O3", f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"]
        extension = Extension(
            "pqlab_read_rate", [SOURCES / "read_rate.cu"], self._load, cuda_cflags=flags, with_cuda=True
        )
        extension.start("eager")
        if self._library is None:
            raise RuntimeError(extension.status.detail)

    def _load(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.pqlab_read.restype = ctypes.c_char_p

    def __call__(self, num_bytes: int) -> float:
        num_bytes = max(16, num_bytes // 16 * 16)
        buffer = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
        never = torch.zeros(16, dtype=torch.uint8, device="cuda")
        blocks = torch.cuda.get_device_properties(0).multi_processor_count

        def read(times: int) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(num_bytes), ctypes.c_void_p(never.data_ptr())
            self._library.pqlab_read(*pointers, blocks * times, stream)

        return min(self._timer(lambda times=times: read(times)) for times in (1, 2))


def relative_error(args: tuple[Any, ...]) -> float:
    """Of the CUDA kernel against the reference in float64, for the first row (the sums of all would take minutes)."""
    from ..kernels import reference

    with use_backend("cuda"):
        out, _ = ops.decode(*args)
    row = (args[0][:1].double(), args[1], args[2], args[3][:1], args[4][:1], *args[5:7], *(x[:1] for x in args[7:11]))
    expected, _ = reference.decode(*row, *args[11:])
    return ((out[:1].double() - expected).norm() / expected.norm()).item()


def bench_decode(case: Case, timer: Timer, read: ReadRate) -> dict[str, Any]:
    args = decode_arguments(case)
    error = relative_error(args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with use_backend("cuda"):
        ops.decode(*args)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        microseconds = timer(lambda: ops.decode(*args))
    coded = int(args[4][:, 1].sum()) * case.kv_heads * sum(case.ms)
    exact = (SINKS + WINDOW) * len(case.tokens) * case.kv_heads * case.head_dim * 4
    ragged = len(set(case.tokens)) > 1
    exact_bytes = sum(case.tokens) * case.kv_heads * case.head_dim * 4
    if ragged:
        others = ragged_exact_times(case, timer)
    else:
        others = exact_times(case, timer)
    best = min(others, key=others.__getitem__)
    read_us = read(coded + exact)
    return {
        "case": case.name, **asdict(case), "us": round(microseconds, 1), "exact": best,
        "exact_us": {name: round(us, 1) for name, us in others.items()},
        "speedup": round(others[best] / microseconds, 2),
        "bytes": coded + exact, "read_us": round(read_us, 1), "share_of_read_rate": round(read_us / microseconds, 2),
        "exact_read_us": round(read(exact_bytes), 1),
        "extra_bytes": peak, "relative_error": float(f"{error:.1e}"),
    }  # fmt: skip


def bench_encode(timer: Timer, tokens: int = 32768, heads: int = 8, m: int = 64, d: int = 128) -> dict[str, Any]:
    """Nearest centroid and page write of K and V of one layer, and of one flushed page."""
    g = torch.Generator(device="cuda").manual_seed(0)
    books = torch.randn(heads, m, 256, d // m, generator=g, device="cuda")
    x = torch.randn(heads, tokens, d, generator=g, device="cuda").half()
    pages = torch.zeros(tokens // PAGE, heads, PAGE // 16, m, 16, dtype=torch.uint8, device="cuda")
    ids = torch.randperm(tokens // PAGE, generator=g, device="cuda").int()
    with use_backend("cuda"):
        ops.encode_pages_(pages, x[:, :PAGE], books, ids[:1], 0, 8)

        def both() -> None:
            for _ in range(2):
                ops.encode_pages_(pages, x, books, ids, 0, 8)

        full = timer(both)
        flush = timer(lambda: ops.encode_pages_(pages, x[:, :PAGE], books, ids[:1], 0, 8))
    return {"case": f"encode K and V, {tokens} tokens x {heads} heads, M {m}", "us": round(full, 1),
            "one page of one side us": round(flush, 1)}  # fmt: skip


def environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()), "commit": commit,
    }  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}.\n\n{HELP}"
    add_only(parser)
    add_json(parser)
    parser.add_argument(
        "--out", type=output_file, metavar="FILE", help="write the JSON to this file, too (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status. Raises `ConfigError` without a GPU, or for cases that there are not."""
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; bench cpu measures the kernels of a CPU")
    cases = matching(CASES, args.only, _ENCODE)
    kernels.start()
    timer = Timer()
    read = ReadRate(timer)
    records = []
    print(f"{'case':<52} {'us':>8} {'exact':>8} {'':>10} {'speedup':>8} {'of read rate':>13} {'error':>8}")
    for case in cases:
        r = bench_decode(case, timer, read)
        records.append(r)
        exact = min(r["exact_us"].values())
        print(
            f"{r['case']:<52} {r['us']:>8} {exact:>8} {r['exact']:>10.10} {r['speedup']:>7}x"
            f" {r['share_of_read_rate']:>12.0%} {r['relative_error']:>8.0e}",
            flush=True,
        )
    if args.only in _ENCODE:
        records.append(bench_encode(timer))
        print(records[-1])
    result = {"benchmark": "decode", **environment(), "records": records}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    return 0
