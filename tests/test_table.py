"""The page table against a plain model: lists of tokens, and the codes that come back from the pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pqlab.errors import PageAllocationError
from pqlab.paging import POLICIES, PageLayout, PagePool, PageTable, PageWrite, PoolLayout, read_pages, write_pages

P = 16
M = 2


def codes_pool(max_pages: int, policy: str = "lifo") -> PagePool:
    k, v = PageLayout(P, 1, M, 8), PageLayout(P, 1, M, 5)
    return PagePool(max_pages, PoolLayout(((k, v),), max_pages), policy=policy)


def put(pool: PagePool, table: PageTable, counts: list[int], stamps: list[list[int]]) -> list[PageWrite]:
    """Extend and write: the token with stamp x has codes x % 256 (K) and x % 32 (V)."""
    writes = table.extend(counts)
    for write in writes:
        start = write.first_token - (table.num_tokens(write.seq) - counts[write.seq])
        run = torch.tensor(stamps[write.seq][start : start + write.count])
        for side, nbits in ((0, 8), (1, 5)):
            codes = (run % 2**nbits).to(torch.uint8)[None, :, None].expand(1, -1, M)
            write_pages(pool.view(0, side), codes, torch.tensor([write.page]), write.first_slot, nbits)
    return writes


def stored(pool: PagePool, table: PageTable, seq: int) -> tuple[list[int], list[int]]:
    pages = table.as_tensor()[seq, : len(table.pages(seq))]
    n = table.num_tokens(seq)
    sides = [read_pages(pool.view(0, side), pages, nbits)[0, :n] for side, nbits in ((0, 8), (1, 5))]
    assert all((side == side[:, :1]).all() for side in sides)
    return sides[0][:, 0].tolist(), sides[1][:, 0].tolist()


class PoolMachine(RuleBasedStateMachine):
    """Two tables on one small pool, against lists of stamps. Pages are counted by sets, bytes are read back."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), max_pages=st.integers(2, 24))
    def start(self, policy, max_pages):
        self.pool = codes_pool(max_pages, policy)
        self.tables = [PageTable(self.pool, P, 2), PageTable(self.pool, P, 1)]
        self.model = [[[], []], [[]]]
        self.stamp = 0

    def fresh(self, n):
        self.stamp += n
        return list(range(self.stamp - n, self.stamp))

    @rule(which=st.integers(0, 1), counts=st.lists(st.integers(0, 40), min_size=6, max_size=6))
    def extend(self, which, counts):
        table, model = self.tables[which], self.model[which]
        counts = counts[: table.num_seqs]
        stamps = [self.fresh(n) for n in counts]
        before = self.snapshot()
        needed = table.pages_needed(counts)
        used = self.pool.num_used
        try:
            put(self.pool, table, counts, stamps)
        except PageAllocationError:
            assert needed > self.pool.num_free
            assert self.snapshot() == before
            return
        assert self.pool.num_used == used + needed  # not one page more than announced
        for row, new in zip(model, stamps, strict=True):
            row += new

    @rule(which=st.integers(0, 1), seq=st.integers(0, 5), part=st.floats(0, 1))
    def truncate(self, which, seq, part):
        table, model = self.tables[which], self.model[which]
        if seq >= len(model):
            with pytest.raises(IndexError):
                table.truncate(seq, 0)
            return
        keep = round(part * len(model[seq]))
        table.truncate(seq, keep)
        del model[seq][keep:]

    @rule(which=st.integers(0, 1), picks=st.lists(st.integers(0, 5), max_size=5))
    def select(self, which, picks):
        model = self.model[which]
        rows = [pick % len(model) for pick in picks] if model else []
        assert self.tables[which].select(rows) is self.tables[which]
        self.model[which] = [list(model[row]) for row in rows]

    @precondition(lambda self: all(len(rows) < 6 for rows in self.model))
    @rule(which=st.integers(0, 1))
    def add_sequence(self, which):
        assert self.tables[which].add_sequence() == len(self.model[which])
        self.model[which].append([])

    @rule(which=st.integers(0, 1), seq=st.integers(0, 5))
    def free(self, which, seq):
        if seq < len(self.model[which]):
            self.tables[which].free(seq)
            self.model[which][seq] = []

    @rule(which=st.integers(0, 1))
    def clear(self, which):
        self.tables[which].clear()
        self.model[which] = [[] for _ in self.model[which]]

    def snapshot(self):
        rows = [[(t.pages(s), t.num_tokens(s)) for s in range(t.num_seqs)] for t in self.tables]
        counts = [self.pool.refcount(page) for page in range(self.pool.max_pages)]
        return rows, counts, self.pool.free_pages(), self.pool.buffer.tolist()

    @invariant()
    def everything_agrees(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.tables)
        held = set()
        for table, model in zip(self.tables, self.model, strict=True):
            table.check_integrity()
            assert table.num_seqs == len(model)
            for seq, stamps in enumerate(model):
                held.update(table.pages(seq))
                assert stored(self.pool, table, seq) == ([s % 256 for s in stamps], [s % 32 for s in stamps])
        assert self.pool.num_used == len(held)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPoolMachine = PoolMachine.TestCase


def test_extend_fills_the_partial_page_first():
    table = PageTable(PagePool(10), P, 2)
    assert table.extend([20, 0]) == [PageWrite(0, 0, 0, 0, 16), PageWrite(0, 1, 0, 16, 4)]
    assert table.extend([14, 3]) == [PageWrite(0, 1, 4, 20, 12), PageWrite(0, 2, 0, 32, 2), PageWrite(1, 3, 0, 0, 3)]
    assert (table.pages(0), table.pages(1)) == ((0, 1, 2), (3,))


def test_all_rows_or_none():
    pool = PagePool(3)
    table = PageTable(pool, P, 2)
    table.extend([16, 10])
    with pytest.raises(PageAllocationError, match=r"2 pages are needed, 1 of 3 is free"):
        table.extend([1, 7])
    assert (table.num_tokens(0), table.num_tokens(1), pool.num_free) == (16, 10, 1)
    table.free(0)
    table.extend([1, 7])  # the sequences go on
    pool.check_integrity([table])


def test_wrong_arguments_change_nothing():
    table = PageTable(PagePool(4), P, 2)
    table.extend([5, 5])
    with pytest.raises(ValueError, match="1 counts for 2 sequences"):
        table.extend([1])
    with pytest.raises(ValueError, match=r"counts\[1\] = -1 is negative"):
        table.extend([20, -1])
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"has 5 coded tokens, cannot keep {wrong}"):
            table.truncate(0, wrong)
    with pytest.raises(IndexError, match="sequence = 2 is out of range"):
        table.select([0, 2])
    with pytest.raises(ValueError, match="pages of 16 tokens"):
        PageTable(codes_pool(2), 32)
    assert [table.num_tokens(seq) for seq in range(2)] == [5, 5]


def test_copy_on_write_takes_one_page_less_than_there_are_holders():
    pool = codes_pool(4)
    table = PageTable(pool, P, 1)
    put(pool, table, [10], [list(range(10))])
    table.select([0, 0, 0])
    assert pool.num_used == 1
    assert table.pages_needed([1, 1, 1]) == 2  # the last holder writes in place
    assert table.pages_needed([1, 0, 1]) == 2
    put(pool, table, [1, 1, 1], [[100], [101], [102]])
    assert [stored(pool, table, seq)[0] for seq in range(3)] == [[*range(10), 100 + seq] for seq in range(3)]


def test_whole_shared_pages_are_never_copied():
    pool = codes_pool(4)
    table = PageTable(pool, P, 1)
    put(pool, table, [16], [list(range(16))])
    table.select([0, 0])
    put(pool, table, [1, 1], [[50], [51]])
    assert table.pages(0)[0] == table.pages(1)[0] and pool.num_used == 3


def test_a_truncated_sibling_does_not_overwrite_the_longer_one():
    pool = codes_pool(4)
    table = PageTable(pool, P, 1)
    put(pool, table, [12], [list(range(12))])
    table.select([0, 0])
    table.truncate(1, 5)
    put(pool, table, [0, 6], [[], [90, 91, 92, 93, 94, 95]])
    assert stored(pool, table, 0)[0] == list(range(12))
    assert stored(pool, table, 1)[0] == [*range(5), 90, 91, 92, 93, 94, 95]


def test_events_tell_the_story():
    pool = PagePool(5)
    table = PageTable(pool, P, 1)
    events = []
    table.listener = lambda e: events.append((e.kind, e.page, e.seq, e.first_token, e.count))
    table.extend([20])
    table.select([0, 0])
    table.extend([0, 2])
    table.truncate(0, 16)
    table.free(0)
    table.free(1)
    assert events == [
        *[("allocate", 0, 0, 0, 0), ("allocate", 1, 0, 16, 0), ("flush", 0, 0, 0, 16), ("flush", 1, 0, 16, 4)],
        *[("share", 0, 1, 0, 16), ("share", 1, 1, 16, 4)],
        *[("copy", 2, 1, 16, 4), ("flush", 2, 1, 20, 2)],
        ("free", 1, 0, 16, 4),  # page 0 still has a holder, so freeing row 0 is no event
        *[("free", 0, 1, 0, 16), ("free", 2, 1, 16, 6)],
    ]


def test_the_tensor_is_a_live_view_until_it_has_to_grow():
    table = PageTable(PagePool(100), P, 2)
    table.reserve(2, 40)
    tensor = table.as_tensor()
    assert tensor.shape == (2, 40) and tensor.dtype == torch.int32 and (tensor == -1).all()
    table.extend([33, 16])
    assert tensor[0].tolist() == [0, 1, 2] + [-1] * 37
    assert tensor[1].tolist() == [3] + [-1] * 39
    assert table.as_tensor().data_ptr() == tensor.data_ptr() and tensor.is_contiguous()
    table.extend([40 * P, 0])
    assert table.as_tensor().shape[1] >= 43
    np.testing.assert_array_equal(table.as_tensor()[0, :43].numpy(), table.pages(0))


def test_growing_rebuilds_the_tensor_rarely():
    table = PageTable(PagePool(1000), P, 1)
    addresses = set()
    for _ in range(1000):
        table.extend([P])
        addresses.add((table.as_tensor().data_ptr(), table.as_tensor().shape[1]))
    assert len(addresses) <= 9  # 8, 16, ... 1024


def test_a_device_copy_follows_changes():
    table = PageTable(PagePool(10), P, 1)
    table.extend([16])
    assert table.as_tensor("meta").shape == (1, 8)
    if torch.cuda.is_available():
        first = table.as_tensor("cuda")
        table.extend([16])
        again = table.as_tensor("cuda")
        assert again.data_ptr() == first.data_ptr() and again[0, :2].tolist() == list(table.pages(0))


def test_frame_has_a_line_per_page_of_a_sequence():
    pool = codes_pool(6)
    table = PageTable(pool, P, 1)
    table.extend([20])
    table.select([0, 0])
    table.extend([0, 1])
    frame = table.as_frame(first_token=[4, 6])
    assert frame["page"].tolist() == [0, 1, 0, 2]
    assert frame["sequence"].tolist() == [0, 0, 1, 1]
    assert frame["first_token"].tolist() == [4, 20, 6, 22]
    assert frame["tokens"].tolist() == [16, 4, 16, 5]
    assert frame["fill"].tolist() == [1.0, 0.25, 1.0, 5 / 16]
    assert frame["shared_by"].tolist() == [2, 1, 2, 1]
    assert set(frame["bytes"]) == {pool.layout.page_bytes}
    assert frame["address"].tolist() == [pool.layout.offset(0, 0, page) for page in (0, 1, 0, 2)]
    bare = PageTable(PagePool(2), P, 1)
    assert bare.as_frame().empty
    bare.extend([1])
    assert bare.as_frame()["bytes"].isna().all()


def test_integrity_check_sees_damage():
    table = PageTable(PagePool(4), P, 1)
    table.extend([20])
    table.as_tensor()[0, 1] = 3
    with pytest.raises(AssertionError, match="row 0"):
        table.check_integrity()
