"""The value side of a decode step over codes in each byte order, by one kernel that is given strides.

    out[h] = sum over tokens t of weights[t] * book[h][codes[t, h]]

for 8-bit codes of subspaces with two dimensions. `csrc/bench/orders.cpp` and `.cu` read tiles of 16 tokens subspace by
subspace, as pqlab's decode kernels do; only the strides differ between the orders, and that codes which lie side by
side come with one load. "row_major, by token" (CPU) has the loops the other way round, which suits that order.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.build import Extension
from ..kernels.cpu import compile_flags, link_flags
from ..paging.layout import ORDERS, TILE, Order, PageLayout

SOURCES = Path(__file__).parents[1] / "kernels" / "csrc" / "bench"
BY_TOKEN = "row_major, by token"
_CPU_ARGS = struct.Struct("=5Q9q")  # struct orders_args of csrc/bench/orders.cpp
_CUDA_ARGS = struct.Struct("<5Q6i")  # struct OrdersParams of csrc/bench/orders.cu


def in_order(codes: Tensor, order: Order) -> Tensor:
    """Codes uint8 [pages, heads, page_size, M] as bytes of this order, [pages, heads, page_size * M]."""
    if order == "row_major":
        stored = codes
    elif order == "transposed":
        stored = codes.transpose(2, 3)
    else:
        stored = codes.unflatten(2, (-1, TILE)).transpose(3, 4)
    return stored.contiguous().flatten(2)


def strides(layout: PageLayout) -> tuple[int, int, int]:
    """Bytes between neighbouring tiles, tokens of a tile, and subspaces."""
    origin = layout.address(0, 0, 0)[0]
    tile = layout.address(TILE, 0, 0)[0] - origin if layout.num_tiles > 1 else 0
    return tile, layout.address(1, 0, 0)[0] - origin, layout.address(0, 0, 1)[0] - origin


class OrderKernels:
    """The kernels for one kind of device, built when this is made.

    Args:
        device: of the tensors that calls will bring.

    Raises:
        RuntimeError: no compiler, or what it said.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._library: Any = None
        if self.device.type == "cuda":
            p = torch.cuda.get_device_properties(self.device)
            self.multiprocessors = p.multi_processor_count
            flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{p.major}{p.minor},code=sm_{p.major}{p.minor}"]
            extension = Extension(
                "pqlab_orders_cuda", [SOURCES / "orders.cu"], self._load, cuda_cflags=flags, with_cuda=True
            )
        else:
            extension = Extension(
                "pqlab_orders", [SOURCES / "orders.cpp"], self._load, cflags=compile_flags(), ldflags=link_flags()
            )
        extension.start("eager")
        if self._library is None:
            raise RuntimeError(extension.status.detail)

    def _load(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        if self.device.type == "cuda":
            self._library.pqlab_orders.restype = ctypes.c_char_p
        else:
            self._library.pqlab_read.restype = ctypes.c_uint64

    @property
    def names(self) -> tuple[str, ...]:
        """What `prepare` takes: the byte orders, and on a CPU row-major codes with the loops turned."""
        return (*ORDERS, BY_TOKEN) if self.device.type == "cpu" else ORDERS

    def prepare(self, name: str, codes: Tensor, page_ids: Tensor, books: Tensor, weights: Tensor) -> WeightedSum:
        """The call for codes stored in one order.

        Args:
            name: of `names`.
            codes: uint8 [max_pages, heads, page_size, M]; M a multiple of 16, on a GPU 64.
            page_ids: integer [num_pages], the pages in token order.
            books: float32 [heads, M, 256, 2].
            weights: float32 [num_pages * page_size].
        """
        _, heads, page_size, m = codes.shape
        if m % 16 or (self.device.type == "cuda" and m != 64):
            raise ValueError(f"M = {m}: the kernels take multiples of 16, on a GPU 64")
        order: Order = "row_major" if name == BY_TOKEN else name  # type: ignore[assignment]
        return WeightedSum(self, PageLayout(page_size, heads, m, 8, order), name, codes, page_ids, books, weights)

    def read(self, data: Tensor) -> int:
        """CPU: read a contiguous tensor and do nothing with it, with all threads; a checksum."""
        return self._library.pqlab_read(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.nbytes // 8))


class WeightedSum:
    """One prepared call: run it, then look at `result()`."""

    def __init__(
        self, kernels: OrderKernels, layout: PageLayout, name: str, codes: Tensor, page_ids: Tensor, books: Tensor,
        weights: Tensor,
    ) -> None:  # fmt: skip
        heads, m = layout.num_heads, layout.num_subspaces
        self._call = kernels._library.pqlab_orders
        self.pages = in_order(codes, layout.order)
        sizes = (len(page_ids), heads)
        if kernels.device.type == "cuda":
            self._blocks = max(1, 2 * kernels.multiprocessors // heads)
            kept = (page_ids.int(), books.transpose(1, 2).half().contiguous(), weights.half()[:, None].expand(-1, 2))
            self.out = torch.zeros(self._blocks, heads, m, 2, device=kernels.device)
            numbers = (*sizes, layout.page_size, *strides(layout))
            form = _CUDA_ARGS
        else:
            parts = 4 * torch.get_num_threads()
            kept = (page_ids.long(), books, weights)
            self.out = torch.zeros(parts, heads, m, 2)
            numbers = (*sizes, m, layout.page_size, parts, *strides(layout), name == BY_TOKEN)
            form = _CPU_ARGS
        self._kept = tuple(x.contiguous() for x in kept)
        self._args = form.pack(*(x.data_ptr() for x in (self.pages, *self._kept, self.out)), *numbers)

    def __call__(self) -> None:
        if self.out.is_cuda:
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.out.device).cuda_stream)
            if message := self._call(self._args, self._blocks, stream):
                raise RuntimeError(f"the order kernel on CUDA: {message.decode()}")
        else:
            self._call(self._args)

    def result(self) -> Tensor:
        """float32 [heads, 2 * M] of the latest call."""
        return self.out.sum(0).flatten(1)


def expected(codes: Tensor, page_ids: Tensor, books: Tensor, weights: Tensor) -> Tensor:
    """The same by plain torch, in float64; arguments as of `OrderKernels.prepare`."""
    _, heads, _, m = codes.shape
    rows = codes[page_ids.long()].transpose(0, 1).flatten(1, 2).long()  # [heads, tokens, M]
    sums = torch.zeros(heads, m, 2, dtype=torch.float64, device=codes.device)
    for head in range(heads):
        counts = torch.zeros(m, 256, dtype=torch.float64, device=codes.device)
        counts.scatter_add_(1, rows[head].T, weights.double().expand(m, -1))
        sums[head] = (counts[..., None] * books[head].double()).sum(1)
    return sums.flatten(1)
