"""A picture of a pool at one moment, as plain data: who holds which page, how full it is, what text is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .pool import PagePool
from .table import PageTable

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def sequence_name(seq: int) -> str:
    """A, B, ..., Z, A1, B1, ...: how pictures and tables call a sequence."""
    turn, letter = divmod(seq, len(LETTERS))
    return LETTERS[letter] + (str(turn) if turn else "")


@dataclass(frozen=True)
class PageState:
    """One page. `holders` are sequences; `tokens` are those its fullest holder has in it."""

    page: int
    holders: tuple[int, ...]
    first_token: int
    tokens: int
    text: str

    @property
    def is_free(self) -> bool:
        return not self.holders

    @property
    def is_shared(self) -> bool:
        return len(self.holders) > 1


@dataclass(frozen=True)
class PoolState:
    """All pages of a pool and the page tables over it; slots are places for one token's codes.

    Attributes:
        pages: one entry per page id.
        tables: page ids of every sequence, in token order.
        num_tokens: coded tokens of every sequence.
    """

    page_size: int
    pages: tuple[PageState, ...]
    tables: tuple[tuple[int, ...], ...]
    num_tokens: tuple[int, ...]

    @property
    def max_pages(self) -> int:
        return len(self.pages)

    @property
    def capacity(self) -> int:
        return self.max_pages * self.page_size

    @property
    def pages_used(self) -> int:
        return sum(not page.is_free for page in self.pages)

    @property
    def reserved(self) -> int:
        """Slots of pages in use."""
        return self.pages_used * self.page_size

    @property
    def used(self) -> int:
        """Slots that hold a token; a shared page counts once."""
        return sum(page.tokens for page in self.pages)

    @property
    def wasted(self) -> int:
        """Slots of pages in use that hold nothing."""
        return self.reserved - self.used

    @property
    def shared_tokens(self) -> int:
        """Slots that sharing saves: tokens of all sequences less the slots that hold them."""
        return sum(self.num_tokens) - self.used


def pool_state(
    pool: PagePool, table: PageTable, texts: Sequence[Sequence[str]] = (), first_token: int | Sequence[int] = 0
) -> PoolState:
    """The present state of a pool whose pages are all held by one table (a cache's, or a simulation's).

    Args:
        texts: for every sequence the text of each of its tokens, exact ones included; may be empty.
        first_token: token of code index 0, one number or one per sequence (the sinks).
    """
    offsets = [first_token] * table.num_seqs if isinstance(first_token, int) else list(first_token)
    holders: list[list[int]] = [[] for _ in range(pool.max_pages)]
    fullest = [(0, 0, 0)] * pool.max_pages  # (tokens, sequence, code index of the first)
    tables = tuple(table.pages(seq) for seq in range(table.num_seqs))
    for seq, pages in enumerate(tables):
        for index, page in enumerate(pages):
            first = index * table.page_size
            tokens = min(table.page_size, table.num_tokens(seq) - first)
            if not holders[page] or tokens > fullest[page][0]:
                fullest[page] = (tokens, seq, first)
            holders[page].append(seq)
    states = []
    for page in range(pool.max_pages):
        tokens, seq, first = fullest[page]
        text = ""
        if holders[page]:
            first += offsets[seq]
            text = "".join(texts[seq][first : first + tokens]) if seq < len(texts) else ""
        states.append(PageState(page, tuple(holders[page]), first, tokens, text))
    lengths = tuple(table.num_tokens(seq) for seq in range(table.num_seqs))
    return PoolState(table.page_size, tuple(states), tables, lengths)
