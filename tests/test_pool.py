"""The pool: ids, reference counts, strategies, bytes."""

from __future__ import annotations

import random
import sys

import pytest

from pqlab.errors import ConfigError, OutOfMemoryError, PageAllocationError
from pqlab.paging import POLICIES, PageLayout, PagePolicy, PagePool, PageTable, PoolLayout
from pqlab.process_memory import resident_bytes


def layout(max_pages: int = 8) -> PoolLayout:
    k, v = PageLayout(16, 3, 4, 8), PageLayout(16, 3, 8, 4)
    return PoolLayout(((k, v), (k, v)), max_pages)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_page_is_handed_out_once(policy):
    pool = PagePool(50, policy=policy)
    pages = pool.allocate(20) + [pool.allocate()[0] for _ in range(30)]
    assert sorted(pages) == list(range(50))
    assert (pool.num_free, pool.num_used) == (0, 50)
    assert pool.free(pages[:7]) == pages[:7]
    assert sorted(pool.allocate(7)) == sorted(pages[:7])
    pool.check_integrity()


def test_strategies_differ_in_the_page_they_take():
    lifo, fifo = PagePool(4, policy="lifo"), PagePool(4, policy="fifo")
    for pool in (lifo, fifo):
        pool.free(pool.allocate(2))
    assert lifo.free_pages()[0] in (0, 1)
    assert fifo.free_pages() == [2, 3, 0, 1]
    assert [lifo.allocate()[0], fifo.allocate()[0]] == [1, 2]


def test_a_strategy_is_a_subclass_with_a_name():
    try:

        class Shuffled(PagePolicy, name="shuffled-for-a-test"):
            def __init__(self, max_pages):
                self.ids, self.rng = list(range(max_pages)), random.Random(0)

            def take(self):
                i = self.rng.randrange(len(self.ids))
                self.ids[i], self.ids[-1] = self.ids[-1], self.ids[i]
                return self.ids.pop()

            def give(self, page):
                self.ids.append(page)

            def __len__(self):
                return len(self.ids)

            def __iter__(self):
                return iter(self.ids)

        pool = PagePool(40, policy="shuffled-for-a-test")
        pages = pool.allocate(40)
        assert sorted(pages) == list(range(40)) != pages
        pool.check_integrity()
        with pytest.raises(ValueError, match="is taken by"):
            type("Again", (PagePolicy,), {}, name="shuffled-for-a-test")
    finally:
        POLICIES.pop("shuffled-for-a-test", None)


def test_unknown_strategy_lists_the_known():
    with pytest.raises(ConfigError, match="'best' is unknown; set one of fifo, lifo"):
        PagePool(4, policy="best")


def test_running_out_changes_nothing_and_says_what_to_set():
    pool = PagePool(10)
    held = pool.allocate(8)
    before = pool.free_pages()
    with pytest.raises(PageAllocationError) as raised:
        pool.allocate(3)
    text = str(raised.value)
    assert "[PQC001]" in text and "3 pages are needed, 2 of 10 are free" in text
    assert "Raise max_pages to at least 11" in text and "free or crop" in text
    assert pool.free_pages() == before
    assert [pool.refcount(page) for page in held] == [1] * 8
    pool.free(held[:1])
    assert len(pool.allocate(3)) == 3


def test_references():
    pool = PagePool(4)
    a, b = pool.allocate(2)
    pool.share([a, a])
    assert pool.refcount(a) == 3
    assert pool.free([a, b]) == [b]
    assert pool.free([a, a]) == [a]  # two references in one call
    assert pool.num_free == 4


@pytest.mark.parametrize("act", ["share", "free"])
def test_wrong_pages_are_refused_before_any_change(act):
    pool = PagePool(4)
    a, b, c = pool.allocate(3)
    pool.free([c])
    for wrong, what in (
        (c, f"page {c} is free"),
        (4, r"page = 4 is out of range \(0 to 3\)"),
        (-1, "page = -1 is out"),
    ):
        with pytest.raises(ValueError, match=what):
            getattr(pool, act)([a, b, wrong])
    with pytest.raises(ValueError, match="is free"):
        pool.free([a, a])  # one reference, dropped twice
    assert [pool.refcount(page) for page in (a, b, c)] == [1, 1, 0]
    pool.check_integrity()


def test_one_buffer_holds_every_page():
    pool = PagePool(8, layout())
    assert pool.buffer.numel() == layout().num_bytes and not pool.buffer.any()
    assert pool.buffer.data_ptr() % 64 == 0
    for layer in range(2):
        for side in range(2):
            pool.view(layer, side)[5] = 10 * layer + side + 1
    assert pool.buffer.count_nonzero() == layout().page_bytes
    pool.copy_page(5, 2)
    assert pool.buffer.count_nonzero() == 2 * layout().page_bytes
    assert all((pool.view(i, s)[2] == 10 * i + s + 1).all() for i in range(2) for s in range(2))


def test_a_pool_that_does_not_fit_names_the_pages_that_would(monkeypatch):
    monkeypatch.setattr("pqlab.memory.free_memory", lambda device: 5 * layout().page_bytes + 3)
    with pytest.raises(OutOfMemoryError, match=r"\[PQC004\] A pool of 8 pages .* Set max_pages to at most 5"):
        PagePool(8, layout())
    PagePool(5, layout(5))


def test_bare_ids_have_no_bytes():
    pool = PagePool(4)
    pool.copy_page(0, 1)
    with pytest.raises(ValueError, match="no layout"):
        pool.view(0, 0)
    with pytest.raises(ConfigError, match="layout is made for 8"):
        PagePool(4, layout(8))
    with pytest.raises(ConfigError, match="max_pages = 0"):
        PagePool(0)


def test_integrity_check_sees_damage():
    pool = PagePool(4)
    table = PageTable(pool, 16, 1)
    table.extend([40])
    pool.check_integrity([table])
    pool._refcounts[0] += 1
    with pytest.raises(AssertionError, match="page 0 has 2 references, the tables hold it 1 times"):
        pool.check_integrity([table])
    pool._refcounts[0] = 0
    with pytest.raises(AssertionError, match=r"disagree on \[0\]"):
        pool.check_integrity()


@pytest.mark.gpu
def test_the_buffer_lives_on_the_device():
    assert PagePool(8, layout(), device="cuda").view(0, 0).is_cuda


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is resident")
def test_memory_is_committed_where_it_is_written():
    """A few pages in each of 60 regions of 6 MiB: with huge pages they would be 120 MiB."""
    side = PageLayout(64, 3, 32, 8)
    before = resident_bytes()
    pool = PagePool(1000, PoolLayout(((side, side),) * 30, 1000), sparse=True)
    assert pool.buffer.numel() > 2**28
    for layer in range(30):
        for part in range(2):
            pool.view(layer, part)[:4] = 1
    taken = resident_bytes() - before
    assert 4 * 60 * side.page_bytes <= taken < 4 * 60 * side.page_bytes + 2**23
    assert int(pool.view(29, 1)[:5].sum()) == 4 * side.page_bytes, "the rest is zero"
