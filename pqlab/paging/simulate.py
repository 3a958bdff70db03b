"""Events in, the state of pool and page tables after each out; beside it, contiguous allocation of the same tokens.

The pool and the table are the real ones, without bytes. Tokens reach the pages in one of two ways::

    whole pages   [0, sinks) exact | [sinks, sinks + coded) codes | exact window of R to R + P - 1   (PagedPQCache)
    each token    [0, n) in pages                                                                    (PagedAttention)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import CacheConfig
from ..errors import ConfigError, PageAllocationError
from .arena import Arena, ArenaState
from .pool import PagePool
from .scenario import Event
from .state import PoolState, pool_state, sequence_name
from .table import PageEvent, PageTable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SequenceState:
    """Tokens of one sequence: (sinks, coded, window), as in the cache. `alive` is False before start and after end."""

    seq: int
    sinks: int
    coded: int
    window: int
    alive: bool

    @property
    def tokens(self) -> int:
        return self.sinks + self.coded + self.window


@dataclass(frozen=True)
class Step:
    """Everything after one event. `error` is the message of an event that was refused and changed nothing."""

    event: Event | None
    error: str
    changes: tuple[PageEvent, ...]
    sequences: tuple[SequenceState, ...]
    pool: PoolState
    arena: ArenaState


def simulate(
    events: Sequence[Event],
    cache: CacheConfig,
    *,
    whole_pages: bool = True,
    reserve: int = 2048,
    words: Sequence[str] = (),
) -> list[Step]:
    """Run events on a pool and, beside it, on a contiguous arena of the same number of slots.

    Args:
        cache: page size, sinks, residual length, policy; `max_pages` has to be set.
        whole_pages: codes leave the exact window in whole pages; False: every token goes to a page at once.
        reserve: slots a sequence reserves in the contiguous arena, rounded up to whole pages.
        words: texts of tokens; each sequence reads its own part of them, so that pages hold text.

    Returns:
        The state before the first event, then one per event.

    Raises:
        ConfigError: `max_pages` is not set, or `reserve` is below 1.
    """
    run = _Run(cache, whole_pages, reserve, words)
    return [run.step(event) for event in (None, *events)]


def split_words(text: str) -> list[str]:
    """Pieces of a text that join to it again, a word with the blanks before it each: tokens without a tokenizer."""
    return re.findall(r"\s*\S+|\s+$", text)


class _Run:
    def __init__(self, cache: CacheConfig, whole_pages: bool, reserve: int, words: Sequence[str]) -> None:
        if cache.max_pages is None:
            raise ConfigError("a simulation needs a pool of fixed size; set max_pages")
        if reserve < 1:
            raise ConfigError(f"reserve = {reserve} is out of range (at least 1); the nearest good value is 1")
        self.cache = cache
        self.whole_pages = whole_pages
        self.sinks = cache.num_sinks if whole_pages else 0
        self.words = words
        self.pool = PagePool(cache.max_pages, policy=cache.policy)
        self.table = PageTable(self.pool, cache.page_size)
        self.arena = Arena(cache.max_pages * cache.page_size, reserve, granule=cache.page_size)
        self.tokens: list[int] = []
        self.alive: list[bool] = []
        self.spans: list[list[tuple[int, int]]] = []  # parts [from, to) of `words` that each sequence has read
        self.cursor: list[int] = []
        self.changes: list[PageEvent] = []
        self.table.listener = self.changes.append

    def step(self, event: Event | None) -> Step:
        self.changes.clear()
        error = self._do(event) if event is not None else ""
        texts = [self._text(seq) for seq in range(self.table.num_seqs)]
        first = [min(self.sinks, n) for n in self.tokens]
        state = pool_state(self.pool, self.table, texts, first)
        return Step(event, error, tuple(self.changes), self._sequences(), state, self.arena.state())

    def _do(self, event: Event) -> str:
        """Apply an event; why it was refused, or nothing."""
        self._make_rows(max(event.seq, event.source) + 1)
        actor = event.source if event.kind == "fork" else event.seq
        if event.kind != "start" and not self.alive[actor]:
            return f"{sequence_name(actor)} is not running, so nothing happens."
        if event.kind in ("start", "fork") and self.alive[event.seq]:
            return f"{sequence_name(event.seq)} is running already, so nothing happens."
        try:
            getattr(self, f"_{event.kind}")(event)
        except PageAllocationError as refused:
            return str(refused)
        return ""

    def _make_rows(self, count: int) -> None:
        while self.table.num_seqs < count:
            seq = self.table.add_sequence()
            self.tokens.append(0)
            self.alive.append(False)
            self.spans.append([])
            self.cursor.append(seq * 7919)  # far apart, so that sequences read different text

    def _start(self, event: Event) -> None:
        self._extend(event.seq, event.tokens)
        self.alive[event.seq] = True
        self.arena.start(event.seq, self.table.num_tokens(event.seq))

    def _grow(self, event: Event) -> None:
        self._extend(event.seq, event.tokens)
        self.arena.resize(event.seq, self.table.num_tokens(event.seq))

    def _extend(self, seq: int, count: int) -> None:
        """The table is asked first: when it refuses, nothing has changed."""
        tokens, coded = self.tokens[seq] + count, self.table.num_tokens(seq)
        window = tokens - min(tokens, self.sinks) - coded
        counts = [0] * self.table.num_seqs
        counts[seq] = self.cache.flush_count(coded, window) if self.whole_pages else window
        self.table.extend(counts)
        self.tokens[seq] = tokens
        self.spans[seq].append((self.cursor[seq], self.cursor[seq] + count))
        self.cursor[seq] += count

    def _crop(self, event: Event) -> None:
        seq, count = event.seq, min(event.tokens, self.tokens[event.seq])
        self.tokens[seq] -= count
        codes = max(0, self.tokens[seq] - self.sinks)
        if codes < self.table.num_tokens(seq):
            self.table.truncate(seq, codes)
        self.arena.resize(seq, self.table.num_tokens(seq))
        self.cursor[seq] += 101  # what follows is another text than what was dropped
        while count:
            start, stop = self.spans[seq].pop()
            kept = max(start, stop - count)
            count -= stop - kept
            if kept > start:
                self.spans[seq].append((start, kept))

    def _fork(self, event: Event) -> None:
        seq, source = event.seq, event.source
        rows = list(range(self.table.num_seqs))
        rows[seq] = source
        self.table.select(rows)
        self.tokens[seq], self.alive[seq] = self.tokens[source], True
        self.spans[seq] = list(self.spans[source])
        self.arena.free(seq)
        self.arena.start(seq, self.table.num_tokens(seq))

    def _free(self, event: Event) -> None:
        seq = event.seq
        self.table.free(seq)
        self.tokens[seq], self.alive[seq], self.spans[seq] = 0, False, []
        self.arena.free(seq)
        for waiting in self.arena.state().refused:
            self.arena.start(waiting, self.table.num_tokens(waiting))

    def _sequences(self) -> tuple[SequenceState, ...]:
        states = []
        for seq, tokens in enumerate(self.tokens):
            sinks, coded = min(tokens, self.sinks), self.table.num_tokens(seq)
            states.append(SequenceState(seq, sinks, coded, tokens - sinks - coded, self.alive[seq]))
        return tuple(states)

    def _text(self, seq: int) -> list[str]:
        n = len(self.words)
        return [self.words[i % n] for start, stop in self.spans[seq] for i in range(start, stop)] if n else []


def pages_frame(step: Step, page_bytes: int = 0) -> pd.DataFrame:
    """Every page in use: page, sequences, first_token, tokens, fill, bytes, text."""
    import pandas as pd

    size = step.pool.page_size
    lines = [
        {
            "page": page.page,
            "sequences": " ".join(map(sequence_name, page.holders)),
            "first_token": page.first_token,
            "tokens": page.tokens,
            "fill": page.tokens / size,
            "bytes": page_bytes,
            "text": page.text,
        }
        for page in step.pool.pages
        if not page.is_free
    ]
    return pd.DataFrame(lines, columns=["page", "sequences", "first_token", "tokens", "fill", "bytes", "text"])


def sequences_frame(step: Step) -> pd.DataFrame:
    """Every running sequence: tokens, those that are exact sinks, codes and exact window, pages, shared pages."""
    import pandas as pd

    pages = step.pool.pages
    lines = [
        {
            "sequence": sequence_name(s.seq),
            "tokens": s.tokens,
            "exact sinks": s.sinks,
            "codes": s.coded,
            "exact window": s.window,
            "pages": len(step.pool.tables[s.seq]),
            "of them shared": sum(pages[page].is_shared for page in step.pool.tables[s.seq]),
        }
        for s in step.sequences
        if s.alive
    ]
    names = ["sequence", "tokens", "exact sinks", "codes", "exact window", "pages", "of them shared"]
    return pd.DataFrame(lines, columns=names)


def steps_frame(steps: Sequence[Step]) -> pd.DataFrame:
    """One row per step: event, refusal, and slots reserved, used and wasted, paged and contiguous."""
    import pandas as pd

    lines = []
    for i, step in enumerate(steps):
        line = {"step": i, "event": "" if step.event is None else str(step.event), "refused": step.error}
        for name, state in (("paged", step.pool), ("contiguous", step.arena)):
            line |= {f"{name}_{what}": getattr(state, what) for what in ("reserved", "used", "wasted")}
        lines.append(line)
    return pd.DataFrame(lines)
