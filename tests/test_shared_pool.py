"""Caches that share a pool: who owns which pages, and what of a config the pool decides."""

from __future__ import annotations

import gc

import pytest
from test_cache import SMALL, feed, tokens

from pqlab import CacheConfig, PagedPQCache
from pqlab.errors import ConfigError
from pqlab.paging import PagePool


def test_the_pages_of_a_dropped_cache_come_back(model, books):
    kept = PagedPQCache(model, books, SMALL)
    feed(model, kept, tokens(90))
    used = kept.pool.num_used
    for _ in range(3):
        other = PagedPQCache(model, books, SMALL, pool=kept.pool)
        feed(model, other, tokens(120))
        assert kept.pool.num_used > used
        del other
        gc.collect()
        assert kept.pool.num_used == used
    kept.pool.check_integrity([kept.table])


def test_pages_that_garbage_holds_are_there_for_who_needs_them(model, books):
    first = PagedPQCache(model, books, SMALL)
    other = PagedPQCache(model, books, SMALL, pool=first.pool)
    feed(model, other, tokens(16 * 50))
    del other
    gc.collect()
    feed(model, first, tokens(16 * 50))
    assert first.pool.num_used < 60


def test_a_pool_decides_its_pages_and_their_order(model, books):
    settings = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
    made = PagedPQCache(model, books, settings, context=300)
    pool = PagePool(9, type(made.pool.layout)(made.pool.layout.layers, 9), policy="fifo")
    cache = PagedPQCache(model, books, settings, pool=pool)
    assert (cache.settings.max_pages, cache.settings.policy) == (9, "fifo")
    with pytest.raises(ConfigError, match="max_pages = 60, but the given pool has 9 pages"):
        PagedPQCache(model, books, SMALL, pool=pool)


@pytest.mark.parametrize("context", [0, -3])
def test_a_context_of_nothing_is_refused(model, books, context):
    with pytest.raises(ConfigError, match=f"context = {context} is out of range"):
        PagedPQCache(model, books, SMALL, context=context)
