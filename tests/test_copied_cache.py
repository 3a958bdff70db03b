"""A copied cache is another one: same tokens, own pages, and each goes on without the other."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from test_cache import SMALL, feed, tokens

from pqlab import CacheConfig, PagedPQCache
from pqlab.paging import PagePool
from pqlab.quantization import Codebooks

STATIC = CacheConfig(page_size=16, residual_length=20, num_sinks=3, mode="static")


@pytest.fixture(params=["trained", "fitted"])
def codecs(request, model, books):
    return books if request.param == "trained" else Codebooks.random(model.config, maps=True)


@pytest.mark.parametrize("config", [SMALL, STATIC], ids=["eager", "static"])
def test_a_copy_and_its_original_go_their_own_ways(model, codecs, config):
    prompt = tokens(90, rows=2)
    first = PagedPQCache(model, codecs, config, context=400, max_batch=2)
    expected = [PagedPQCache(model, codecs, config, context=400, max_batch=2) for _ in range(2)]
    for cache in (first, *expected):
        feed(model, cache, prompt)
    second = deepcopy(first)
    # past the eight columns that a page table begins with, so that both tables grow
    for n in range(120):
        for cache, alone, seed in zip((first, second), expected, (n, 1000 + n), strict=True):
            step = tokens(1, rows=2, seed=seed)
            torch.testing.assert_close(feed(model, cache, step), feed(model, alone, step), rtol=0, atol=0)
    for cache, alone in zip((first, second), expected, strict=True):
        assert torch.equal(cache.lengths, alone.lengths)
        cache.group.check_integrity()
        assert cache.as_frame().equals(alone.as_frame())


def test_what_never_changes_is_shared_and_the_rest_is_not(model, books):
    cache = PagedPQCache(model, books, SMALL)
    cache.group.probe = cache.table.listener = print
    feed(model, cache, tokens(90))
    copied = deepcopy(cache)
    ours, theirs = copied.quantized_layers[0], cache.quantized_layers[0]
    assert copied.codebooks is cache.codebooks and ours.codec is theirs.codec
    assert ours.config is theirs.config, "which attention is set is asked of the model"
    assert ours.group is copied.group is not cache.group
    assert copied.group.probe is None and copied.table.listener is None and cache.group.probe is print
    assert ours.k_pages.data_ptr() == copied.pool.view(0, 0).data_ptr() != theirs.k_pages.data_ptr()
    copied.reset()
    assert copied.pool.num_used == 0 < cache.pool.num_used


def test_rows_of_a_copied_cache_can_be_repeated_and_cropped(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(90))
    copied = deepcopy(cache)
    copied.batch_repeat_interleave(3)
    copied.crop(-30)
    copied.group.check_integrity()
    after = PagedPQCache(model, books, SMALL)
    feed(model, after, tokens(90))
    step = tokens(1, seed=5)
    torch.testing.assert_close(feed(model, cache, step), feed(model, after, step), rtol=0, atol=0)


def test_a_pool_of_bare_ids_is_copied_with_its_counts():
    pool = PagePool(8)
    held = pool.allocate(3)
    copied = deepcopy(pool)
    pool.free(held)
    copied.check_integrity()
    assert (pool.num_used, copied.num_used) == (0, 3)
    assert copied.allocate(2) == pool.allocate(5)[3:], "the free list is copied as it is"
