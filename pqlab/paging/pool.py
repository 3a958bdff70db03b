"""The page pool: every page there is, allocated once. Hands out and takes back page ids in O(1), counts references.

A page id stands for the same slot in every layer, K and V (`PoolLayout`). A page is free, owned by one holder
(reference count 1), or shared (> 1); holders are rows of `PageTable`s.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from itertools import chain, product
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, PageAllocationError, out_of_range
from ..memory import require_memory
from .layout import PoolLayout
from .policy import make_policy

if TYPE_CHECKING:
    from .table import PageTable


_HUGE_PAGE = 2**21
_SHIFT = 256  # bytes: a multiple of a cache line and of a vector register, and far from the beginning of a page


class PagePool:
    """Ids, reference counts and, with a layout, the one buffer of all codes.

    Args:
        max_pages: number of pages; capacity is `page_size * max_pages` tokens over all sequences.
        layout: where bytes lie; None makes a pool of bare ids (simulations, tests).
        device: where the buffer lives.
        policy: name of a `PagePolicy`.
        sparse: it may stay far emptier than it is large, and is not to take a CPU's memory for that.

    Raises:
        OutOfMemoryError: PQC004, the buffer does not fit into free memory; raised before anything is allocated.
        ConfigError: max_pages below 1 or unequal to the layout's, unknown policy.
    """

    max_pages: int
    layout: PoolLayout | None
    buffer: torch.Tensor | None  # uint8 [layout.num_bytes], zero at first

    def __init__(
        self,
        max_pages: int,
        layout: PoolLayout | None = None,
        device: str | torch.device = "cpu",
        policy: str = "lifo",
        *,
        sparse: bool = False,
    ) -> None:
        if max_pages < 1:
            raise ConfigError(f"max_pages = {max_pages} is out of range (at least 1); the nearest good value is 1")
        if layout is not None and layout.max_pages != max_pages:
            raise ConfigError(
                f"max_pages = {max_pages}, but the layout is made for {layout.max_pages}; make them equal"
            )
        self.max_pages = max_pages
        self.layout = layout
        self.device = torch.device(device)
        if layout is not None:
            require_memory(layout.num_bytes, layout.page_bytes, self.device)
        self._free = make_policy(policy, max_pages)
        self._refcounts = array("i", bytes(4 * max_pages))
        self._dropped: deque[Callable[[], None]] = deque()
        self._sparse = sparse
        self.buffer = None
        self._views: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        if layout is not None:
            self._make_buffer(layout)

    def _make_buffer(self, layout: PoolLayout) -> None:
        self.buffer = _zeros(layout, self.device, self._sparse)
        self._views = tuple(
            tuple(_at_offset_zero(layout.view(self.buffer, layer, side)) for side in range(2))
            for layer in range(len(layout.layers))
        )

    def __deepcopy__(self, memo: dict) -> PagePool:
        """A pool of its own with the same pages in use; the bytes of free pages are zero in it.

        Views that were taken of this pool before become views of the copy, in whatever is copied with it afterwards.

        Raises:
            OutOfMemoryError: PQC004, as when a pool is made.
        """
        self._take_back()
        copied = memo[id(self)] = type(self).__new__(type(self))
        views = {"buffer": None, "_views": (), "layout": self.layout, "_dropped": deque()}
        vars(copied).update({k: views[k] if k in views else deepcopy(v, memo) for k, v in vars(self).items()})
        if self.layout is not None:
            require_memory(self.layout.num_bytes, self.layout.page_bytes, self.device)
            copied._make_buffer(self.layout)
            used = torch.tensor([page for page, count in enumerate(self._refcounts) if count], device=self.device)
            for old, new in zip(chain(*self._views), chain(*copied._views), strict=True):
                if len(used):
                    new[used] = old[used]
                memo[id(old)] = new
        return copied

    @property
    def policy(self) -> str:
        return self._free.name

    @property
    def num_free(self) -> int:
        self._take_back()
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.max_pages - self.num_free

    def give_back_with(self, holder: object, give_back: Callable[[], None]) -> None:
        """Take a holder's pages back once it is garbage: `give_back` frees them and does not refer to the holder.

        It runs before the pool is asked for pages or counts, not in the middle of whatever the collector interrupts.
        """
        weakref.finalize(holder, self._dropped.append, give_back).atexit = False

    def _take_back(self) -> None:
        while self._dropped:
            self._dropped.popleft()()

    def allocate(self, n: int = 1) -> list[int]:
        """Take n pages, one reference each. O(1) a page. All or nothing: PQC001 before anything is changed."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        self._take_back()
        free = self._free
        if n > len(free):
            raise PageAllocationError(
                f"Page allocation failed: {n} {'page is' if n == 1 else 'pages are'} needed, "
                f"{len(free)} of {self.max_pages} {'is' if len(free) == 1 else 'are'} free.",
                f"Raise max_pages to at least {self.num_used + n}, or free or crop sequences.",
            )
        pages = [free.take() for _ in range(n)]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; all of them must be in use, else ValueError before anything is changed."""
        pages = list(pages)
        for page in pages:
            self._require_used(page)
        for page in pages:
            self._refcounts[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """Drop one reference from each page; returns those that became free. O(1) a page.

        A page with no reference left to drop is a ValueError, and nothing is changed.
        """
        pages = list(pages)
        counts = self._refcounts
        freed: list[int] = []
        for done, page in enumerate(pages):
            try:
                self._require_used(page)
            except ValueError:
                for other in pages[:done]:
                    counts[other] += 1
                raise
            counts[page] -= 1
            if not counts[page]:
                freed.append(page)
        for page in freed:
            self._free.give(page)
        return freed

    def refcount(self, page: int) -> int:
        """Holders of a page; 0 is free."""
        if not 0 <= page < self.max_pages:
            raise ValueError(out_of_range("page", page, self.max_pages))
        return self._refcounts[page]

    def view(self, layer: int, side: int) -> torch.Tensor:
        """uint8 [max_pages, heads, tiles, M, tile_bytes]: all pages of (layer, side), a view of the buffer."""
        if self.buffer is None:
            raise ValueError("this pool has no layout, so it has ids but no bytes")
        return self._views[layer][side]

    def copy_page(self, src: int, dst: int) -> None:
        """Copy the bytes of one page id, all layers and sides; does nothing in a pool of bare ids."""
        for sides in self._views:
            for pages in sides:
                pages[dst].copy_(pages[src])

    def free_pages(self) -> list[int]:
        """The free ids, the next one to be handed out first. O(n): for pictures and checks."""
        self._take_back()
        return list(self._free)

    def check_integrity(self, tables: Iterable[PageTable] = ()) -> None:
        """Raise AssertionError when ids and counts contradict each other. O(n), for tests.

        With `tables`, these must be the pool's only holders: every reference is then accounted for.
        """
        free = self.free_pages()
        require(len(free) == len(self._free), f"the policy says {len(self._free)} free pages and lists {len(free)}")
        require(len(set(free)) == len(free), "a page is in the free list twice")
        require(all(0 <= page < self.max_pages for page in free), "the free list holds an id that is no page")
        unused = {page for page, count in enumerate(self._refcounts) if not count}
        require(set(free) == unused, f"free list and reference counts disagree on {sorted(set(free) ^ unused)}")
        require(all(count >= 0 for count in self._refcounts), "a reference count is negative")
        tables = list(tables)
        if not tables:
            return
        held = Counter(page for table in tables for seq in range(table.num_seqs) for page in table.pages(seq))
        for page, count in enumerate(self._refcounts):
            require(count == held[page], f"page {page} has {count} references, the tables hold it {held[page]} times")

    def _require_used(self, page: int) -> None:
        if not self.refcount(page):
            raise ValueError(f"page {page} is free: it has no reference to share or drop")

    def __repr__(self) -> str:
        size = "bare ids" if self.layout is None else f"{self.layout.num_bytes:,} bytes on {self.device}"
        return f"PagePool({self.num_used} of {self.max_pages} pages used, {self.policy}, {size})"


def _zeros(layout: PoolLayout, device: torch.device, sparse: bool) -> torch.Tensor:
    """uint8 [layout.num_bytes], zero and aligned; on a CPU the system commits memory where it is first written.

    By 2 MiB where it can, which saves 2 % of the time of reading codes. But each layer's K and V lie in regions of
    their own, and a thousand tokens in each of 60 would be 120 MiB: in a sparse pool the beginnings of the regions are
    committed by 4 KiB. (8K to 32K tokens on an AMD EPYC; codes that begin where a page of memory does cost 2 to 4 %.)
    """
    if device.type != "cpu":
        return torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, _SHIFT + layout.num_bytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
            for layer, side in product(range(len(layout.layers)), range(2)) if sparse else ():
                start = (_SHIFT + layout.offset(layer, side)) // mmap.PAGESIZE * mmap.PAGESIZE
                memory.madvise(mmap.MADV_NOHUGEPAGE, start, min(_HUGE_PAGE, len(memory) - start))
    return torch.frombuffer(memory, dtype=torch.uint8)[_SHIFT:]


def _at_offset_zero(view: torch.Tensor) -> torch.Tensor:
    """The same bytes as a tensor with a storage of its own, which begins with it.

    Compilers look at storages: views of one buffer count as aliases, and inductor (torch 2.11) reads a mutated input
    that starts inside its storage at twice that offset.
    """
    return torch.from_dlpack(view)


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(message)
