"""Measured bandwidth of the three byte orders: the same codes, stored in each order, read in the same way.

The reader wants codes in one contiguous buffer (what a kernel would hand to its lanes), so one read is one strided
copy. Bandwidth counts the wanted bytes alone; what is fetched beside them shows as lost speed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..paging.access import PATTERNS
from ..paging.layout import ORDERS, TILE
from ..results.provenance import device_name

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_BYTES = 64 * 2**20
"""Codes per order, and bytes overwritten before each read so that it starts with cold caches."""


def stored_views(codes: torch.Tensor, pattern: str, slot: int = 0, subspace: int = 0) -> dict[str, torch.Tensor]:
    """The codes that a pattern reads, as views of a copy in each byte order; all views are equal, their strides differ.

    Args:
        codes: uint8 [pages, page_size, M], 8-bit codes of one head.
        pattern: a name of `PATTERNS`; "subspace" and "token" read their part of every page, "tile" reads everything.
    """
    pages, page_size, m = codes.shape
    tiles = codes.view(pages, page_size // TILE, TILE, m)
    row_major, transposed = codes.contiguous(), codes.transpose(1, 2).contiguous()
    tiled = tiles.transpose(2, 3).contiguous()  # [pages, tiles, M, 16]
    if pattern == "subspace":
        by_tile = row_major[:, :, subspace].unflatten(1, (-1, TILE))
        views = tiled[:, :, subspace], by_tile, transposed[:, subspace].unflatten(1, (-1, TILE))
    elif pattern == "token":
        views = tiled[:, slot // TILE, :, slot % TILE], row_major[:, slot], transposed[:, :, slot]
    elif pattern == "tile":
        by_tile = row_major.view(pages, -1, TILE, m).transpose(2, 3)
        views = tiled, by_tile, transposed.view(pages, m, -1, TILE).transpose(1, 2)
    else:
        raise ValueError(f"pattern = {pattern!r} is unknown; one of {', '.join(PATTERNS)}")
    return dict(zip(ORDERS, views, strict=True))


def measure_orders(
    pattern: str,
    *,
    page_size: int = 64,
    num_subspaces: int = 32,
    slot: int = 0,
    subspace: int = 0,
    num_bytes: int = DEFAULT_BYTES,
    repeats: int = 7,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> pd.DataFrame:
    """Read the same random 8-bit codes in every byte order on this machine, from memory, with cold caches.

    On a CPU one thread reads (numpy), on a GPU the whole device (torch).

    Args:
        pattern: a name of `paging.access.PATTERNS`.
        num_bytes: codes stored per order; five times as much memory is taken while it runs.
        repeats: timed reads of each order; the median counts.

    Returns:
        DataFrame, one row an order and one for a plain copy of as many contiguous bytes ("contiguous", what the
        machine can do): order, gb_per_s (wanted bytes, 10^9 a second), seconds, pattern, wanted_bytes, device.

    Raises:
        RuntimeError: two orders gave different codes (a fault of this function).
    """
    import pandas as pd

    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    pages = max(1, num_bytes // (page_size * num_subspaces))
    block = torch.randint(0, 256, (min(pages, 1024), page_size, num_subspaces), dtype=torch.uint8, generator=generator)
    codes = block.repeat(-(-pages // len(block)), 1, 1)[:pages].to(device)
    views = stored_views(codes, pattern, slot, subspace)
    wanted = torch.empty(views["tiled"].shape, dtype=torch.uint8, device=device)
    plain = codes.flatten()[: wanted.numel()].view(wanted.shape)
    evict = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    rows, expected = [], None
    for order, view in {**views, "contiguous": plain}.items():
        seconds = []
        for _ in range(repeats):
            evict.add_(1)
            seconds.append(_timed_read(wanted, view))
        if order != "contiguous":
            expected = wanted.clone() if expected is None else expected
            if not torch.equal(wanted, expected):
                raise RuntimeError(f"reading {pattern!r} in the {order} order gave other codes than in the tiled order")
        middle = sorted(seconds)[len(seconds) // 2]
        rows.append({"order": order, "gb_per_s": wanted.numel() / middle / 1e9, "seconds": middle})
    return pd.DataFrame(rows).assign(pattern=pattern, wanted_bytes=wanted.numel(), device=device_name(device))


def _timed_read(wanted: torch.Tensor, view: torch.Tensor) -> float:
    """Seconds that one copy of `view` into the contiguous `wanted` takes."""
    if wanted.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        wanted.copy_(view)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    into, source = wanted.numpy(), view.numpy()  # numpy copies in one thread: no waiting for others
    began = time.perf_counter()
    np.copyto(into, source)
    return time.perf_counter() - began
