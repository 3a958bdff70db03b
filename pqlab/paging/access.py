"""What one load touches when codes are read from a page: the three byte orders of `paging.layout` compared.

Memory is not read byte by byte: a GPU fetches sectors of 32 bytes, a CPU cache lines of 64. An order is good for a
way of reading when what is fetched is also wanted, and when each lane gets codes of one subspace only, so that it
keeps to one codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import out_of_range
from .layout import ORDERS, TILE, PageLayout

if TYPE_CHECKING:
    import pandas as pd

Pattern = Literal["tile", "token", "subspace"]
PATTERNS: dict[str, str] = {
    "tile": "all subspaces of a tile of 16 tokens (decode)",
    "token": "all subspaces of one token",
    "subspace": "one subspace of consecutive tokens",
}
"""Ways of reading; the first is how decode reads."""
STARTS: dict[str, tuple[str, int]] = {"tile": ("slot", TILE), "token": ("slot", 1), "subspace": ("subspace", 1)}
"""What says where a pattern starts, and how many of them further the next start is; it does not ask for the other."""


@dataclass(frozen=True)
class Load:
    """One load instruction: `lanes` pieces of `lane_bytes` aligned bytes; memory delivers whole `sector_bytes`."""

    name: str
    lanes: int
    lane_bytes: int
    sector_bytes: int
    sector: str


LOADS: dict[str, Load] = {
    "warp": Load("a warp's load: 32 lanes x 16 bytes", 32, 16, 32, "sectors of 32 bytes"),
    "vector": Load("a CPU vector load: 32 bytes", 1, 32, 64, "cache lines of 64 bytes"),
}


@dataclass(frozen=True)
class Access:
    """What reading a pattern in one order takes; addresses are bytes within the page.

    Attributes:
        wanted: int64, the bytes that hold wanted codes, ascending.
        lanes: int64, the first bytes of the pieces of the first load, one a lane.
        sectors: int64, the first bytes of the sectors which the first load fetches.
        loads: loads needed for all wanted codes.
        useful_bytes: wanted bytes that the first load brings (bits of codes / 8).
        subspaces_per_lane: most subspaces whose wanted codes one lane of the first load receives.
    """

    layout: PageLayout
    load: Load
    wanted: np.ndarray
    lanes: np.ndarray
    sectors: np.ndarray
    loads: int
    useful_bytes: float
    subspaces_per_lane: int

    @property
    def fetched_bytes(self) -> int:
        return len(self.sectors) * self.load.sector_bytes

    @property
    def sectors_used(self) -> int:
        """Sectors that would have been enough for the useful bytes."""
        return int(-(-self.useful_bytes // self.load.sector_bytes))

    @property
    def share(self) -> float:
        """Useful bytes over fetched bytes, 0 to 1."""
        return self.useful_bytes / self.fetched_bytes

    def marks(self, head: int) -> np.ndarray:
        """int8 [head_bytes], what the first load does to each byte of a head: 0 nothing, 1 fetched only, 2 wanted."""
        first = head * self.layout.head_bytes
        marks = np.zeros(self.layout.head_bytes, np.int8)
        for start, size, mark in ((self.sectors, self.load.sector_bytes, 1), (self._loaded_wanted(), 1, 2)):
            places = (start[:, None] + np.arange(size)).ravel() - first
            marks[places[(places >= 0) & (places < len(marks))]] = mark
        return marks

    def lane_of(self, head: int) -> np.ndarray:
        """int16 [head_bytes], the lane that loads each byte of a head in the first load, -1 where none does."""
        first = head * self.layout.head_bytes
        lanes = np.full(self.layout.head_bytes, -1, np.int16)
        for lane, start in enumerate(self.lanes - first):
            lanes[max(0, start) : start + self.load.lane_bytes] = lane
        return lanes

    def _loaded_wanted(self) -> np.ndarray:
        return self.wanted[np.isin(self.wanted // self.load.lane_bytes, self.lanes // self.load.lane_bytes)]


@lru_cache(maxsize=64)
def code_addresses(layout: PageLayout, head: int = 0) -> np.ndarray:
    """int64 [page_size, M]: first bit of every code of a head within its page (read only)."""
    by_slot = np.array([layout.bit_address(slot, head, 0) for slot in range(layout.page_size)], np.int64)
    by_subspace = np.array([layout.bit_address(0, head, m) for m in range(layout.num_subspaces)], np.int64)
    bits = by_slot[:, None] + by_subspace - by_slot[0]  # every order adds a token's and a subspace's offset (tested)
    bits.flags.writeable = False
    return bits


@lru_cache(maxsize=64)
def byte_owners(layout: PageLayout, head: int = 0) -> np.ndarray:
    """int32 [head_bytes, 2]: token slot and subspace of the first code in every byte of a head (read only)."""
    starts = code_addresses(layout, head).ravel()
    order = np.argsort(starts)
    first_bits = (head * layout.head_bytes + np.arange(layout.head_bytes)) * 8
    owner = order[np.searchsorted(starts[order], first_bits, side="right") - 1]  # the code that holds the first bit
    owners = np.stack(np.divmod(owner, layout.num_subspaces), axis=-1).astype(np.int32)
    owners.flags.writeable = False
    return owners


def random_codes(page_size: int, num_subspaces: int, nbits: int, head: int = 0, seed: int = 0) -> np.ndarray:
    """uint8 [page_size, M]: codes that stand for no text, to look at bytes without a model."""
    return np.random.default_rng((seed, head)).integers(0, 2**nbits, (page_size, num_subspaces), dtype=np.uint8)


def access(layout: PageLayout, pattern: str, load: Load, *, head: int = 0, slot: int = 0, subspace: int = 0) -> Access:
    """What reading a `PATTERNS` way takes in the byte order of `layout`; `slot` or `subspace` says where it starts.

    Lanes take the aligned pieces that hold wanted codes, in the order of their addresses.
    """
    for name, value, limit in (("slot", slot, layout.page_size), ("subspace", subspace, layout.num_subspaces)):
        if not 0 <= value < limit:
            raise IndexError(out_of_range(name, value, limit))
    bits = code_addresses(layout, head)
    numbers = np.broadcast_to(np.arange(layout.num_subspaces), bits.shape)
    if pattern == "subspace":
        chosen = np.s_[:, subspace : subspace + 1]
    elif pattern == "token":
        chosen = np.s_[slot : slot + 1]
    elif pattern == "tile":
        chosen = np.s_[slot // TILE * TILE : slot // TILE * TILE + TILE]
    else:
        raise ValueError(f"pattern = {pattern!r} is unknown; one of {', '.join(PATTERNS)}")
    each = (bits[chosen][..., None] + np.arange(layout.nbits)).ravel()  # every bit of every wanted code
    owner = np.repeat(numbers[chosen].ravel(), layout.nbits)
    piece = each // 8 // load.lane_bytes
    pieces = np.unique(piece)
    first = pieces[: load.lanes]
    loaded = np.isin(piece, first)
    pairs = np.unique(np.stack([piece[loaded], owner[loaded]]), axis=1)  # (piece, subspace) that meet in a lane
    return Access(
        layout,
        load,
        wanted=np.unique(each // 8),
        lanes=first * load.lane_bytes,
        sectors=np.unique(first * load.lane_bytes // load.sector_bytes) * load.sector_bytes,
        loads=int(-(-len(pieces) // load.lanes)),
        useful_bytes=float(loaded.sum() / 8),
        subspaces_per_lane=int(np.unique(pairs[0], return_counts=True)[1].max()),
    )


def compare_orders(
    page_size: int, num_heads: int, num_subspaces: int, nbits: int, pattern: str, load: Load, **where: int
) -> dict[str, Access]:
    """`access` of the same codes in every byte order, by the order's name."""
    layouts = (PageLayout(page_size, num_heads, num_subspaces, nbits, order) for order in ORDERS)
    return {layout.order: access(layout, pattern, load, **where) for layout in layouts}


def access_frame(accesses: dict[str, Access]) -> pd.DataFrame:
    """One row an order: what the first load wants, uses and fetches, and how many loads everything takes."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "order": order,
                "wanted_bytes": len(found.wanted),
                "loads": found.loads,
                "lanes_used": len(found.lanes),
                "useful_bytes": found.useful_bytes,
                "sectors_used": found.sectors_used,
                "sectors_fetched": len(found.sectors),
                "share": found.share,
                "subspaces_per_lane": found.subspaces_per_lane,
            }
            for order, found in accesses.items()
        ]
    )
