"""Page strategies: which free page is handed out next. A strategy owns the free ids, nothing else.

To add one, subclass `PagePolicy` with a name; the cache then takes it by that name::

    class Random(PagePolicy, name="random"): ...
    CacheConfig(policy="random")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from typing import ClassVar

from ..errors import ConfigError

POLICIES: dict[str, type[PagePolicy]] = {}
"""Every strategy by its name; filled by subclassing `PagePolicy`."""


class PagePolicy(ABC):
    """The free page ids of a pool; at first all of `range(max_pages)`.

    `take` and `give` have to be O(1). The pool never takes from an empty strategy and never gives a page twice.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name in POLICIES:
            raise ValueError(f"page policy {name!r} is taken by {POLICIES[name].__qualname__}")
        cls.name = name
        POLICIES[name] = cls

    @abstractmethod
    def __init__(self, max_pages: int) -> None: ...

    @abstractmethod
    def take(self) -> int:
        """Remove one free id and return it."""

    @abstractmethod
    def give(self, page: int) -> None:
        """Take a page back; it is free from now on."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of free ids."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """The free ids, the next one to be taken first. For checks and pictures; O(n)."""


class Lifo(PagePolicy, name="lifo"):
    """The page freed last is taken first: it is the likeliest to be in a cache still, and few pages are touched."""

    def __init__(self, max_pages: int) -> None:
        self._stack = array("i", range(max_pages - 1, -1, -1))  # [0, _size) is free, its top is next
        self._size = max_pages

    def take(self) -> int:
        self._size -= 1
        return self._stack[self._size]

    def give(self, page: int) -> None:
        self._stack[self._size] = page
        self._size += 1

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return iter(self._stack[: self._size][::-1])


class Fifo(PagePolicy, name="fifo"):
    """The page freed longest ago is taken first: codes of a dropped sequence stay in memory as long as they can."""

    def __init__(self, max_pages: int) -> None:
        self._ring = array("i", range(max_pages))  # free: _size entries from _head, around the end
        self._head, self._size = 0, max_pages

    def take(self) -> int:
        page = self._ring[self._head]
        self._head = (self._head + 1) % len(self._ring)
        self._size -= 1
        return page

    def give(self, page: int) -> None:
        self._ring[(self._head + self._size) % len(self._ring)] = page
        self._size += 1

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return (self._ring[(self._head + i) % len(self._ring)] for i in range(self._size))


def make_policy(name: str, max_pages: int) -> PagePolicy:
    """The strategy of that name over `range(max_pages)`; `ConfigError` lists the names there are."""
    if name not in POLICIES:
        raise ConfigError(f"policy = {name!r} is unknown; set one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](max_pages)
