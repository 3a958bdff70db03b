"""What a load touches: addresses are those of the layout, sectors those of a count by hand, all orders agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pqlab.benchmarks.layout_bench import measure_orders, stored_views
from pqlab.paging.access import (
    LOADS,
    PATTERNS,
    access,
    access_frame,
    byte_owners,
    code_addresses,
    compare_orders,
    random_codes,
)
from pqlab.paging.layout import ORDERS, PageLayout, write_pages

SHAPES = [(64, 3, 32, 8), (32, 2, 12, 4), (48, 3, 6, 5), (16, 1, 5, 1)]


@pytest.fixture(params=[(shape, order) for shape in SHAPES for order in ORDERS], ids=str)
def layout(request):
    shape, order = request.param
    return PageLayout(*shape, order)


def test_addresses_and_owners_are_those_of_the_layout(layout):
    head = layout.num_heads - 1
    bits = code_addresses(layout, head)
    assert all(
        bits[slot, m] == layout.bit_address(slot, head, m)
        for slot in range(layout.page_size)
        for m in range(layout.num_subspaces)
    )
    for byte, (slot, subspace) in enumerate(byte_owners(layout, head).tolist()):
        first_bit = (head * layout.head_bytes + byte) * 8
        assert 0 <= first_bit - layout.bit_address(slot, head, subspace) < layout.nbits


def page_bytes(codes: np.ndarray, layout: PageLayout, head: int = 0) -> np.ndarray:
    """uint8 [head_bytes]: codes [page_size, M] of a head, written where `code_addresses` says."""
    bits = np.zeros(layout.head_bytes * 8, np.uint8)
    first = code_addresses(layout, head) - head * layout.head_bytes * 8
    for bit in range(layout.nbits):
        bits[first + bit] = (codes >> bit) & 1
    return np.packbits(bits, bitorder="little")


def test_tiled_bytes_are_what_the_pool_holds():
    for page_size, heads, m, nbits in SHAPES:
        layout = PageLayout(page_size, heads, m, nbits)
        codes = torch.stack([torch.from_numpy(random_codes(page_size, m, nbits, head)) for head in range(heads)])
        pages = torch.zeros(2, *layout.shape, dtype=torch.uint8)
        write_pages(pages, codes, torch.tensor([1]), 0, nbits)
        for head in range(heads):
            assert page_bytes(codes[head].numpy(), layout, head).tobytes() == pages[1, head].numpy().tobytes()


def test_bytes_of_every_order_hold_the_same_codes(layout):
    codes = random_codes(layout.page_size, layout.num_subspaces, layout.nbits)
    bits = np.unpackbits(page_bytes(codes, layout), bitorder="little").astype(int)
    first = code_addresses(layout)
    read = sum(bits[first + bit] << bit for bit in range(layout.nbits))
    assert np.array_equal(read, codes)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("load", LOADS)
def test_access_is_a_count_by_hand(layout, pattern, load):
    """Code by code and bit by bit, with the scalar functions of the layout."""
    unit, head, slot, subspace = LOADS[load], layout.num_heads - 1, layout.page_size - 3, layout.num_subspaces - 1
    found = access(layout, pattern, unit, head=head, slot=slot, subspace=subspace)
    wanted = {
        "subspace": [(t, subspace) for t in range(layout.page_size)],
        "token": [(slot, m) for m in range(layout.num_subspaces)],
        "tile": [(t, m) for t in range(slot // 16 * 16, slot // 16 * 16 + 16) for m in range(layout.num_subspaces)],
    }[pattern]
    bits = {layout.bit_address(t, head, m) + b: m for t, m in wanted for b in range(layout.nbits)}
    pieces = sorted({bit // 8 // unit.lane_bytes for bit in bits})
    first = pieces[: unit.lanes]
    assert found.loads == -(-len(pieces) // unit.lanes)
    assert found.lanes.tolist() == [piece * unit.lane_bytes for piece in first]
    sectors = sorted({piece * unit.lane_bytes // unit.sector_bytes for piece in first})
    assert found.sectors.tolist() == [sector * unit.sector_bytes for sector in sectors]
    loaded = {bit: m for bit, m in bits.items() if bit // 8 // unit.lane_bytes in first}
    assert found.useful_bytes == len(loaded) / 8
    assert found.share == pytest.approx(len(loaded) / 8 / (len(sectors) * unit.sector_bytes))
    lanes = [{m for bit, m in loaded.items() if bit // 8 // unit.lane_bytes == piece} for piece in first]
    assert found.subspaces_per_lane == max(map(len, lanes))
    marks = found.marks(head)
    start = head * layout.head_bytes
    assert {start + i for i in np.flatnonzero(marks == 2)} == {bit // 8 for bit in loaded}
    first_lane = set(range(found.lanes[0], found.lanes[0] + unit.lane_bytes))
    assert {start + i for i in np.flatnonzero(found.lane_of(head) == 0)} == first_lane & set(
        range(start, start + layout.head_bytes)
    )


def test_known_numbers_of_the_default_page():
    """Page 64, M 32, 8 bits: what the panel shows first."""
    share = {o: a.share for o, a in compare_orders(64, 3, 32, 8, "subspace", LOADS["warp"]).items()}
    assert share == {"tiled": 0.5, "row_major": 1 / 32, "transposed": 1.0}
    tile = access_frame(compare_orders(64, 3, 32, 8, "tile", LOADS["warp"])).set_index("order")
    assert tile.share.to_dict() == {"tiled": 1.0, "row_major": 1.0, "transposed": 0.5}
    assert tile.subspaces_per_lane.to_dict() == {"tiled": 1, "row_major": 16, "transposed": 1}


def test_places_outside_the_page_are_refused():
    with pytest.raises(IndexError, match=r"slot = 64 is out of range \(0 to 63\)"):
        access(PageLayout(64, 1, 8, 8), "token", LOADS["warp"], slot=64)
    with pytest.raises(ValueError, match="pattern"):
        access(PageLayout(64, 1, 8, 8), "diagonal", LOADS["warp"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_views_of_all_orders_are_equal_and_lie_differently(pattern):
    codes = torch.randint(0, 256, (5, 48, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = stored_views(codes, pattern, slot=37, subspace=4)
    assert all(torch.equal(view, views["tiled"]) for view in views.values())
    assert len({view.stride() for view in views.values()}) == 3
    expected = {"subspace": codes[:, :, 4], "token": codes[:, 37], "tile": codes}[pattern]
    assert sorted(views["tiled"].flatten().tolist()) == sorted(expected.flatten().tolist())


def test_bandwidth_is_measured():
    found = measure_orders("subspace", num_bytes=2**20, repeats=3).set_index("order")
    assert set(found.index) == {*ORDERS, "contiguous"}
    assert (found.gb_per_s > 0).all() and found.device.iloc[0]
    assert found.wanted_bytes.iloc[0] == 2**20 // 32
    assert (found.gb_per_s * found.seconds * 1e9).round().eq(2**15).all()


def test_codes_of_a_cache(tiny_tokenizer):
    from tiny_trace import tiny_cache_and_trace

    cache, _ = tiny_cache_and_trace(tiny_tokenizer)
    pages = cache.table.pages(0)
    for side in (0, 1):
        stored = cache.quantized_layers[1].codes(0)[side]  # [H, coded, M]
        codes = cache.page_codes(cache.quantized_layers[1].index, side, pages[1], head=2)
        assert torch.equal(codes, stored[2, 16:32])
    with pytest.raises(ValueError, match="layer 7 is not quantized"):
        cache.page_codes(7, 0, 0, 0)
    with pytest.raises(IndexError, match="page = 60 is out of range"):
        cache.page_codes(0, 0, 60, 0)
