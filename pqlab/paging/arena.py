"""Contiguous allocation, for comparison: every sequence reserves slots for the longest it may become, in one piece."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Region:
    """Slots [start, start + reserved) of one sequence, the first `used` of them filled."""

    seq: int
    start: int
    reserved: int
    used: int


@dataclass(frozen=True)
class ArenaState:
    """A contiguous arena at one moment; all numbers are slots."""

    capacity: int
    regions: tuple[Region, ...]
    refused: tuple[int, ...]
    """Sequences that found no gap large enough, or outgrew their region."""

    @property
    def reserved(self) -> int:
        return sum(region.reserved for region in self.regions)

    @property
    def used(self) -> int:
        return sum(region.used for region in self.regions)

    @property
    def wasted(self) -> int:
        return self.reserved - self.used


class Arena:
    """First-fit allocation of one region per sequence in `capacity` slots.

    Args:
        capacity: slots in all.
        reserve: slots that every sequence gets at its start: the longest context it may reach.
        granule: regions are multiples of so many slots.
    """

    def __init__(self, capacity: int, reserve: int, granule: int = 1) -> None:
        self.capacity = capacity
        self.reserve = reserve
        self.granule = granule
        self._regions: dict[int, Region] = {}
        self._refused: set[int] = set()

    def start(self, seq: int, tokens: int) -> bool:
        """Reserve a region for a new sequence; False when no gap takes it."""
        size = -(-max(self.reserve, tokens, 1) // self.granule) * self.granule
        for first, gap in _gaps(self.capacity, tuple(self._regions.values())):
            if gap >= size:
                self._regions[seq] = Region(seq, first, size, tokens)
                self._refused.discard(seq)
                return True
        self._refused.add(seq)
        return False

    def resize(self, seq: int, tokens: int) -> bool:
        """The sequence has `tokens` tokens now; False when it was refused or outgrows its region (it then leaves)."""
        region = self._regions.get(seq)
        if region is None:
            return False
        if tokens > region.reserved:
            del self._regions[seq]
            self._refused.add(seq)
            return False
        self._regions[seq] = replace(region, used=tokens)
        return True

    def free(self, seq: int) -> None:
        self._regions.pop(seq, None)
        self._refused.discard(seq)

    def state(self) -> ArenaState:
        regions = tuple(sorted(self._regions.values(), key=lambda region: region.start))
        return ArenaState(self.capacity, regions, tuple(sorted(self._refused)))


def _gaps(capacity: int, regions: tuple[Region, ...]) -> list[tuple[int, int]]:
    """(first slot, slots) of every free piece, in order."""
    gaps, at = [], 0
    for region in sorted(regions, key=lambda region: region.start):
        if region.start > at:
            gaps.append((at, region.start - at))
        at = region.start + region.reserved
    if at < capacity:
        gaps.append((at, capacity - at))
    return gaps
