"""The page table: which pages hold the coded tokens of each sequence, in token order.

Per sequence, u is the code index, that is the token's index less the exact sinks before it::

    u         [0, P) [P, 2P) ...  [kP, num_tokens)
    pages     pages[0] pages[1] ... pages[k]            only the last page may be partial
    page      pages[u // P], slot u % P                 P = page_size

Sequences may share pages (beams, repeated rows). A shared page is never written: a partial last page is copied to a
page of its own before tokens are added to it (copy on write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import out_of_range
from .pool import PagePool, require
from .rows import NO_PAGE, PageRows

if TYPE_CHECKING:
    import pandas as pd
    import torch

EventKind = Literal["allocate", "flush", "share", "copy", "free"]


@dataclass(frozen=True)
class PageWrite:
    """A run of new tokens inside one page: code indices [first_token, first_token + count) from slot first_slot."""

    seq: int
    page: int
    first_slot: int
    first_token: int
    count: int


@dataclass(frozen=True)
class PageEvent:
    """Something that happened to a page; `first_token` is a code index of `seq`, `count` the tokens it is about.

    allocate: taken for seq, empty yet (count 0).     flush: tokens are written (what a `PageWrite` says).
    share: seq holds it too, with count tokens.       copy: seq got its own copy of a shared page, count tokens.
    free: went back to the pool; seq was its last holder and had count tokens in it.
    """

    kind: EventKind
    page: int
    seq: int
    first_token: int
    count: int


class PageTable:
    """Several sequences over one pool.

    Args:
        pool: where pages come from; several tables may use one pool.
        page_size: tokens per page, P; must be the layout's where the pool has one.
        num_seqs: empty sequences to start with.
    """

    def __init__(self, pool: PagePool, page_size: int, num_seqs: int = 0) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        if pool.layout is not None and pool.layout.layers:
            expected = pool.layout.layers[0][0].page_size
            if page_size != expected:
                raise ValueError(f"page_size is {page_size}, but the pool's layout has pages of {expected} tokens")
        self.pool = pool
        self.page_size = page_size
        self.listener: Callable[[PageEvent], None] | None = None
        self._pages: list[list[int]] = [[] for _ in range(num_seqs)]
        self._tokens: list[int] = [0] * num_seqs
        self._rows = PageRows()
        self._rows.reserve(num_seqs, 0)

    @property
    def num_seqs(self) -> int:
        return len(self._pages)

    def num_tokens(self, seq: int) -> int:
        """Coded tokens of a sequence."""
        return self._tokens[self._row(seq)]

    def pages(self, seq: int) -> tuple[int, ...]:
        """Page ids of a sequence in token order."""
        return tuple(self._pages[self._row(seq)])

    def pages_needed(self, counts: Sequence[int]) -> int:
        """Pages that `extend(counts)` would take from the pool, copies of shared partial pages included."""
        if len(counts) != self.num_seqs:
            raise ValueError(f"got {len(counts)} counts for {self.num_seqs} sequences")
        needed = 0
        writers: Counter[int] = Counter()  # shared partial page -> rows that are about to write to it
        for seq, count in enumerate(counts):
            if count < 0:
                raise ValueError(f"counts[{seq}] = {count} is negative; truncate drops tokens")
            if count == 0:
                continue
            tokens = self._tokens[seq]
            needed += self._num_pages(tokens + count) - len(self._pages[seq])
            if tokens % self.page_size:
                writers[self._pages[seq][-1]] += 1
        # Each writer copies while somebody else holds the page; the last holder of all writes in place.
        return needed + sum(min(rows, self.pool.refcount(page) - 1) for page, rows in writers.items())

    def extend(self, counts: Sequence[int]) -> list[PageWrite]:
        """Make room for `counts[seq]` new coded tokens in every sequence; returns where they go, in token order.

        Free slots of a partial last page are filled first. All rows or none: PQC001 before anything is changed.
        The caller writes the codes; until then the new slots hold whatever the page held before.
        """
        fresh = iter(self.pool.allocate(self.pages_needed(counts)))
        writes: list[PageWrite] = []
        for seq, count in enumerate(counts):
            start = self._tokens[seq]
            if count and start % self.page_size:
                self._own_last_page(seq, fresh)
            new = [next(fresh) for _ in range(self._num_pages(start + count) - len(self._pages[seq]))]
            self._append_pages(seq, new)
            self._tokens[seq] = start + count
            writes += self._runs(seq, start, start + count)
        return writes

    def truncate(self, seq: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of a sequence; pages without any go back, the last may become partial."""
        seq = self._row(seq)
        if not 0 <= num_tokens <= self._tokens[seq]:
            raise ValueError(f"sequence {seq} has {self._tokens[seq]} coded tokens, cannot keep {num_tokens}")
        keep = self._num_pages(num_tokens)
        dropped = self._pages[seq][keep:]
        spans = [self._span(seq, index) for index in range(keep, keep + len(dropped))] if self.listener else []
        self._tokens[seq] = num_tokens
        if not dropped:
            return
        freed = set(self.pool.free(dropped))
        del self._pages[seq][keep:]
        self._rows.erase(seq, keep, keep + len(dropped))
        for page, (first, count) in zip(dropped, spans, strict=False):
            if page in freed:
                self._tell("free", page, seq, first, count)

    def select(self, rows: Sequence[int]) -> PageTable:
        """Make row i what row `rows[i]` was: reorder, repeat or drop sequences, in place. Never takes a page.

        A row named several times shares its pages; a row not named is freed. Returns this table.
        """
        rows = [self._row(int(row)) for row in rows]
        seen: Counter[int] = Counter()
        repeats: list[tuple[int, int]] = []  # (new row, old row) of all uses of a row but the first
        for new, old in enumerate(rows):
            if seen[old]:
                repeats.append((new, old))
            seen[old] += 1
        for _, old in repeats:
            self.pool.share(self._pages[old])
        for old in range(self.num_seqs):
            if not seen[old]:
                self.truncate(old, 0)
        self._pages = [list(self._pages[old]) for old in rows]
        self._tokens = [self._tokens[old] for old in rows]
        self._rows.select(rows)
        if self.listener:
            for new, _ in repeats:
                for index, page in enumerate(self._pages[new]):
                    self._tell("share", page, new, *self._span(new, index))
        return self

    def add_sequence(self) -> int:
        """Add an empty row; returns its index."""
        self._pages.append([])
        self._tokens.append(0)
        self.reserve(self.num_seqs, 0)
        return self.num_seqs - 1

    def free(self, seq: int) -> None:
        """Drop all tokens of a sequence; the row stays, empty."""
        self.truncate(seq, 0)

    def clear(self) -> None:
        """Drop all tokens of all sequences; the rows stay, empty."""
        for seq in range(self.num_seqs):
            self.truncate(seq, 0)

    def reserve(self, num_seqs: int, pages_per_seq: int) -> None:
        """Make `as_tensor` large enough for so many rows and pages, so that its shape and address last until then."""
        self._rows.reserve(num_seqs, pages_per_seq)

    def as_tensor(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """int32 [num_seqs, capacity >= pages of the longest row], contiguous; unused entries are -1.

        A live view, not a copy: changes of the table show in it until the capacity doubles (`reserve` avoids that).
        On another device than the CPU, one copy per change brings it up to date, at the same address; a call
        without a change in between copies nothing.
        """
        return self._rows.as_tensor(self.num_seqs, device)

    def as_frame(self, first_token: int | Sequence[int] = 0) -> pd.DataFrame:
        """One line per (sequence, page): what a person wants to see of the table.

        Columns: page, sequence, first_token (code index plus the argument `first_token`, one number or one per row:
        the sinks), tokens, fill (0 to 1), shared_by (holders of the page), bytes (of the page id over all layers, K
        and V) and address (its first byte in the pool's buffer: layer 0, K). Both are missing without a layout.
        """
        import pandas as pd

        layout, pool = self.pool.layout, self.pool
        offsets = [first_token] * self.num_seqs if isinstance(first_token, int) else list(first_token)
        if len(offsets) != self.num_seqs:
            raise ValueError(f"got {len(offsets)} first tokens for {self.num_seqs} sequences")
        lines = []
        for seq, pages in enumerate(self._pages):
            for index, page in enumerate(pages):
                first, count = self._span(seq, index)
                where = (layout.page_bytes, layout.offset(0, 0, page)) if layout else (None, None)
                lines.append(
                    (page, seq, offsets[seq] + first, count, count / self.page_size, pool.refcount(page), *where)
                )
        names = ["page", "sequence", "first_token", "tokens", "fill", "shared_by", "bytes", "address"]
        whole = {name: "Int64" for name in names if name != "fill"}
        return pd.DataFrame(lines, columns=names).astype({**whole, "fill": "float64"})

    def check_integrity(self) -> None:
        """Raise AssertionError when rows, pool and tensor contradict each other. O(n), for tests."""
        held: Counter[int] = Counter()
        rows = self._rows.as_tensor(self._rows.shape[0], "cpu")
        for seq, pages in enumerate(self._pages):
            need = self._num_pages(self._tokens[seq])
            require(len(pages) == need, f"sequence {seq} has {len(pages)} pages for {self._tokens[seq]} tokens")
            require(len(set(pages)) == len(pages), f"sequence {seq} holds a page twice")
            row = rows[seq].tolist()
            require(row[:need] == pages, f"the tensor's row {seq} is not {pages}")
            require(all(entry == NO_PAGE for entry in row[need:]), f"row {seq} has stale entries after page {need}")
            held.update(pages)
        stale = rows[self.num_seqs :] != NO_PAGE
        require(not bool(stale.any()), "a row that does not exist has pages in the tensor")
        for page, count in held.items():
            known = self.pool.refcount(page)
            require(known >= count, f"page {page} has {known} references, this table holds it {count} times")

    def __repr__(self) -> str:
        return f"PageTable({self.num_seqs} sequences, {sum(self._tokens)} tokens, pages of {self.page_size})"

    def _row(self, seq: int) -> int:
        if not 0 <= seq < len(self._pages):
            raise IndexError(out_of_range("sequence", seq, len(self._pages)))
        return seq

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _span(self, seq: int, index: int) -> tuple[int, int]:
        """(first token, tokens) of a row's index-th page."""
        first = index * self.page_size
        return first, min(self.page_size, self._tokens[seq] - first)

    def _append_pages(self, seq: int, new: list[int]) -> None:
        if not new:
            return
        old = len(self._pages[seq])
        self._pages[seq] += new
        self._rows.write(seq, old, new)
        for index, page in enumerate(new, old):
            self._tell("allocate", page, seq, index * self.page_size, 0)

    def _own_last_page(self, seq: int, fresh: Iterable[int]) -> None:
        """Copy on write: the row's partial last page becomes its own before it is written."""
        page = self._pages[seq][-1]
        if self.pool.refcount(page) == 1:
            return
        copy = next(iter(fresh))
        self.pool.copy_page(page, copy)
        self.pool.free([page])
        index = len(self._pages[seq]) - 1
        self._pages[seq][index] = copy
        self._rows.write(seq, index, [copy])
        self._tell("copy", copy, seq, *self._span(seq, index))

    def _runs(self, seq: int, start: int, stop: int) -> list[PageWrite]:
        """[start, stop) cut at page borders."""
        runs = []
        while start < stop:
            index, slot = divmod(start, self.page_size)
            count = min(self.page_size - slot, stop - start)
            runs.append(PageWrite(seq, self._pages[seq][index], slot, start, count))
            self._tell("flush", runs[-1].page, seq, start, count)
            start += count
        return runs

    def _tell(self, kind: EventKind, page: int, seq: int, first_token: int, count: int) -> None:
        if self.listener:
            self.listener(PageEvent(kind, page, seq, first_token, count))
