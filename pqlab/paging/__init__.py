"""Where a code lies: addresses (`layout`), pages (`pool`), sequences (`table`), strategies (`policy`)."""

from __future__ import annotations

from .layout import PageLayout, PoolLayout, read_pages, write_pages
from .policy import POLICIES, PagePolicy
from .pool import PagePool
from .table import PageEvent, PageTable, PageWrite

__all__ = [
    "POLICIES",
    "PageEvent",
    "PageLayout",
    "PagePolicy",
    "PagePool",
    "PageTable",
    "PageWrite",
    "PoolLayout",
    "read_pages",
    "write_pages",
]
