"""One layer's decode on this machine, whatever it has, in the form of the shipped results."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from .. import kernels
from ..results.provenance import commit, device_name, today
from ..results.shipped import decode_frame, measured_with
from . import cpu_bench, decode_bench
from .decode_bench import Case, ReadRate, Timer
from .order_kernels import OrderKernels


def decode_here(
    contexts: Sequence[int] = (1024, 4096, 16384),
    *,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    bits: int = 4,
    device: str | None = None,
    seconds: float = 0.3,
) -> pd.DataFrame:
    """The decode kernel beside the fastest exact attention at some contexts, batch 1: a frame like `decode_frame`'s.

    Args:
        heads, kv_heads, head_dim: of the layer; default: SmolLM2's.
        bits: 8-bit codes of `8 / bits` dimensions a subspace.
        device: "cpu" or "cuda"; default: a GPU where there is one.
        seconds: a contender and context, on a CPU.

    Returns:
        the frame; `.attrs["measured_with"]` says on what.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [Case(heads, kv_heads, (n,), m=head_dim * bits // 8, head_dim=head_dim) for n in contexts]
    rate = None
    if device == "cuda":
        kernels.start()
        timer = Timer(replays=10)
        read = ReadRate(timer)
        records = [decode_bench.bench_decode(case, timer, read) for case in cases]
    else:
        kernels.wait()
        records = [cpu_bench.bench_decode(case, seconds) for case in cases]
        rate = _read_gb_per_s()
    result = {"records": records, "device": device_name(device), "date": today(), "commit": commit()}
    result |= {"torch": torch.__version__, **({"threads": torch.get_num_threads()} if device == "cpu" else {})}
    frame = decode_frame(result, rate)
    frame.attrs["measured_with"] = measured_with(result)
    return frame


def _read_gb_per_s(num_bytes: int = 64 << 20) -> float:
    """Rate at which this CPU reads bytes that no cache holds, with all threads."""
    reader, data = OrderKernels(), torch.zeros(num_bytes, dtype=torch.uint8)
    times = cpu_bench.interleaved({"read": lambda: reader.read(data)}, 0.2)["read"]
    return num_bytes / min(times) / 1e9
