"""Bytes by formula against bytes of real tensors, pools and caches."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pqlab import memory
from pqlab.config import CacheConfig, PQConfig
from pqlab.cost import SHAPES, CacheCost, ModelShape, coded_tokens, fit_max_pages, max_context_for, max_pages_for
from pqlab.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from pqlab.memory import MIB, free_memory
from pqlab.paging import PageLayout, PagePool, PageTable
from pqlab.transformers_api import cache_argument

TINY = ModelShape(2, 6, 3, 16, "tiny")


def stepwise(context: int, cache: CacheConfig) -> int:
    """Coded tokens found by playing the window token by token: when R + P are in it, the oldest P leave."""
    coded = window = 0
    for _ in range(max(0, context - cache.num_sinks)):
        window += 1
        if window == cache.window_length:
            coded, window = coded + cache.page_size, window - cache.page_size
    return coded


@pytest.mark.parametrize("residual", [1, 20, 32])
def test_coded_tokens_are_what_the_window_leaves(residual):
    cache = CacheConfig(page_size=16, residual_length=residual, num_sinks=4)
    assert [coded_tokens(n, cache) for n in range(200)] == [stepwise(n, cache) for n in range(200)]


def test_pages_and_context_are_inverse():
    cache = CacheConfig(page_size=16, residual_length=24, num_sinks=4)
    for pages, batch in itertools.product(range(3, 30), (1, 2, 3)):
        longest = max_context_for(pages, batch, cache)
        assert max_pages_for(longest, batch, cache) <= pages < max_pages_for(longest + 1, batch, cache)
    assert [max_pages_for(1, batch, cache) for batch in (1, 2, 3)] == [1, 2, 3], "a page each, as static mode takes"


@pytest.mark.parametrize("nbits", [1, 4, 5, 8])
@pytest.mark.parametrize("context", [3, 40, 53, 500])
def test_bytes_are_those_of_real_tensors(nbits, context):
    cache, pq = CacheConfig(page_size=16, residual_length=20, num_sinks=4), PQConfig(M=8, nbits=nbits)
    cost = CacheCost(TINY, pq, cache, context, batch=3)
    pool = PagePool(cost.max_pages, cost.layout)
    table = PageTable(pool, 16, 3)
    table.extend([coded_tokens(context, cache)] * 3)
    assert cost.pool_bytes == pool.buffer.nbytes
    assert cost.pages_used == pool.num_used and cost.pages_missing == 0
    assert cost.code_bytes == sum(pool.view(i, s)[: pool.num_used].nbytes for i in range(2) for s in range(2))
    buffers = [torch.empty(3, 3, n, 16, dtype=torch.float16) for n in (4, cache.window_length)]
    assert [cost.sink_bytes, cost.window_bytes] == [2 * 2 * b.nbytes for b in buffers]  # layers, K and V
    books = torch.empty(2, 2, 3, 8, 2**nbits, 2, dtype=torch.float16)
    assert cost.constant_bytes == books.nbytes + map_bytes()
    exact = torch.empty(2, 2, 3, 3, context, 16, dtype=torch.float16)
    assert cost.baseline_bytes == exact.nbytes
    assert cost.compression == exact.nbytes / cost.stored_bytes
    assert cost.token_bits == 8 * nbits / 16
    whole = {part["part"]: part["bytes"] for part in cost.parts()}
    assert sum(whole.values()) == cost.reserved_bytes + cost.constant_bytes


@pytest.mark.parametrize("context", [2, 23, 24, 39, 40, 41, 1000])
def test_every_slot_is_filled_wasted_or_free(context):
    cache = CacheConfig(page_size=16, residual_length=20, num_sinks=4, max_pages=200)
    cost = CacheCost(TINY, PQConfig(), cache, context, batch=2)
    slots = cost.capacity + 2 * (cache.num_sinks + cache.window_length)
    assert 2 * context + cost.wasted_slots + cost.free_slots == slots
    sinks, coded, window = cost.lengths
    assert sinks + coded + window == context and window < cache.window_length


def test_a_long_context_costs_what_its_codes_cost():
    cost = CacheCost(SHAPES["Llama-3.1-8B"], PQConfig(), CacheConfig(), context=131072)
    assert cost.token_bits == 4.0
    assert 4.0 < cost.bits_per_element < 4.05
    assert 3.9 < cost.compression < 4.0
    assert cost.baseline_bytes == 16 * 2**30  # 32 layers x 8 heads x 128 x 2 (K, V) x 2 bytes x 131072
    assert cost.code_bytes == 131072 // 64 * cost.layout.page_bytes - 3 * cost.layout.page_bytes


def test_a_pool_of_given_size_may_be_too_small():
    cost = CacheCost(TINY, PQConfig(), CacheConfig(page_size=16, max_pages=10), context=1000, batch=2)
    assert cost.pages_used == 2 * 54 and cost.pages_missing == 98
    assert cost.capacity == 160 and cost.max_context == 4 + 128 + 5 * 16 + 15


def test_wrong_settings():
    with pytest.raises(ConfigError, match="M = 5 does not divide the head size 16"):
        CacheCost(TINY, PQConfig(M=5), CacheConfig(), 100)
    with pytest.raises(ConfigError, match="context = 0"):
        CacheCost(TINY, PQConfig(), CacheConfig(), 0)
    with pytest.raises(ConfigError, match="num_kv_heads = 4 does not divide the 9 query heads; .* is 3"):
        ModelShape(1, 9, 4, 64)
    with pytest.raises(ConfigError, match="head_dim = 0"):
        ModelShape(1, 9, 3, 0)


def layers(count: int = 2):
    return ((PageLayout(16, 3, 8, 8), PageLayout(16, 3, 8, 4)),) * count


def test_the_pool_is_sized_by_context_batch_and_memory():
    cache = CacheConfig(page_size=16, residual_length=32, num_sinks=4)
    page_bytes = 2 * 3 * 8 * 16 * 3 // 2
    assert fit_max_pages(layers(), cache, context=1000, batch=2, free_bytes=10**9) == 120
    assert fit_max_pages(layers(), cache, context=1000, batch=2, free_bytes=120 * page_bytes) == 120
    with pytest.raises(OutOfMemoryError) as raised:
        fit_max_pages(layers(), cache, context=1000, batch=2, free_bytes=100 * page_bytes + 5)
    text = str(raised.value)
    assert "[PQC004] 2 × 1,000 tokens need 120 pages" in text and "free on cpu" in text
    assert "context to at most 851, max_batch to at most 1 or max_pages to at most 100" in text
    assert fit_max_pages(layers(), cache, context=851, batch=2, free_bytes=100 * page_bytes) == 100
    assert fit_max_pages(layers(), cache, context=1000, batch=1, free_bytes=100 * page_bytes) == 60
    assert fit_max_pages(layers(), cache, context=1000, batch=2, free_bytes=100 * page_bytes, shrink=True) == 70
    assert fit_max_pages(layers(), cache, context=1000, free_bytes=100 * page_bytes, shrink=True) == 60
    with pytest.raises(OutOfMemoryError, match="Set max_batch to at most 2 or max_pages to at most 2, or lower M"):
        fit_max_pages(layers(), cache, context=40, batch=3, free_bytes=2 * page_bytes)  # no context is short enough
    with pytest.raises(OutOfMemoryError, match="Set max_pages to at most 2, or lower M"):
        fit_max_pages(layers(), cache, context=1000, batch=3, free_bytes=2 * page_bytes)
    with pytest.raises(OutOfMemoryError, match="Set a smaller page_size"):
        fit_max_pages(layers(), cache, context=1000, free_bytes=page_bytes - 1, shrink=True)


def test_free_memory_is_what_this_machine_has():
    free = free_memory()
    assert free is not None and 2**24 < free < 2**46
    assert fit_max_pages(layers(), CacheConfig(page_size=16), context=1000) == 54


def group(folder: Path, limit: object, used: int, cached: int = 0, *, v1: bool = False) -> None:
    """The files of a control group; limit "max" is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{'total_' * v1}inactive_file {cached}\n")


V2, V1 = "0::/job/step/task\n", "9:cpu,cpuacct:/elsewhere\n4:memory:/job/step\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "groups", "left"),
    [
        # a container, whose group is its root
        ("0::/\n", [(".", 50 * MIB, 20 * MIB, 5 * MIB)], 35 * MIB),
        # Slurm: the limit is on the job, above the task's own group; the root has no such files
        (V2, [("job", 50 * MIB, 20 * MIB), ("job/step", "max", MIB), ("job/step/task", "max", MIB)], 30 * MIB),
        # several limits: the one that leaves least, which need not be the lowest
        (V2, [("job", 50 * MIB, 45 * MIB), ("job/step/task", 20 * MIB, MIB)], 5 * MIB),
        (V2, [("job", 50 * MIB, 20 * MIB), ("job/step/task", 20 * MIB, MIB, MIB)], 20 * MIB),
        # a task over its limit, and a group of somebody else
        (V2, [("job/step/task", MIB, 2 * MIB)], 0),
        (V2, [("other", MIB, MIB)], None),
        # cgroup v1: its memory controller has a tree and a way of its own
        (V1, [("memory", 2**63 - 4096, MIB), ("memory/job", 9 * MIB, MIB), ("memory/elsewhere", MIB, MIB)], 8 * MIB),
        # v1 in a container without a namespace: the way is that of the host, the group is at the root
        ("4:memory:/docker/0a1b\n", [("memory", 9 * MIB, MIB, 2 * MIB)], 10 * MIB),
        # a process outside of its namespace's root; and a system that tells nothing
        ("0::/../other\n", [(".", 9 * MIB, MIB), ("other", MIB, MIB)], 8 * MIB),
        (None, [(".", 9 * MIB, MIB)], 8 * MIB),
    ],
)
def test_memory_is_what_every_group_on_the_way_leaves(membership, groups, left, tmp_path, monkeypatch):
    root, own = tmp_path / "cgroup", tmp_path / "self"
    root.mkdir()
    for name, *numbers in groups:
        group(root / name, *numbers, v1=name.startswith("memory"))
    if membership is not None:
        own.write_text(membership)
    monkeypatch.setattr(memory, "_CGROUPS", root)
    monkeypatch.setattr(memory, "_MEMBERSHIP", own)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 10**9)
    assert free_memory() == (10**9 if left is None else left)


def test_shapes_are_read_from_configurations(make_model):
    shape = ModelShape.from_config(make_model("llama"), name="tiny llama")
    assert shape == ModelShape(2, 6, 3, 16, "tiny llama", 4096)
    gemma = ModelShape.from_config(make_model("gemma3").config)
    assert (gemma.num_layers, gemma.num_sliding_layers, gemma.sliding_window) == (2, 2, 24)
    cost = CacheCost(gemma, PQConfig(), CacheConfig(), context=100)
    assert cost.sliding_bytes == 2 * 24 * 3 * 16 * 2 * 2  # a window's tokens, not the context's
    assert cost.baseline_bytes == cost.sliding_bytes + gemma.token_bytes() * 100


def test_layers_of_unequal_heads_have_no_shape(monkeypatch):
    monkeypatch.setattr("pqlab.quantization.geometry.attention_geometry", lambda model: {0: (3, 16), 1: (3, 32)})
    with pytest.raises(UnsupportedModelError, match="3 kv heads x 16 or 3 kv heads x 32"):
        ModelShape.from_config(None)


def map_bytes() -> int:
    """Of both sides of TINY's layers: forward in eight bits, backward in float16, mean and spread of the keys."""
    maps = sum(torch.empty(2, 2, 3, 16, 16, dtype=dtype).nbytes for dtype in (torch.int8, torch.float16))
    return maps + torch.empty(2, 2, 3, 16, dtype=torch.float16).nbytes


def test_maps_are_model_constants():
    plain, mapped = (CacheCost(TINY, PQConfig(), CacheConfig(), 100, maps=maps) for maps in (False, True))
    assert mapped.constant_bytes - plain.constant_bytes == map_bytes()
    assert mapped.stored_bytes - plain.stored_bytes == mapped.fit_bytes == torch.empty(2, 2, 3, 16).nbytes


def test_codebooks_of_that_shape_have_these_bytes():
    from pqlab.quantization import Codebooks

    for maps in (False, True):
        books = Codebooks.random(2, 3, 16, pq=PQConfig(M=4, nbits=5), maps=maps)
        cost = CacheCost(TINY, PQConfig(M=4, nbits=5), CacheConfig(page_size=32), 500, maps=maps)
        assert books.nbytes == cost.constant_bytes
        assert books.layouts(32) == cost.layout.layers
        assert books.bits_per_element == cost.token_bits


@pytest.mark.parametrize("context", [30, 100])
def test_a_running_cache_has_these_bytes(make_model, context):
    from pqlab import PagedPQCache
    from pqlab.quantization import Codebooks

    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    settings, pq = CacheConfig(page_size=16, residual_length=20, num_sinks=4, max_pages=20), PQConfig(M=4, nbits=5)
    cache = PagedPQCache(model, Codebooks.random(model, pq=pq, maps=True), settings)
    model(torch.arange(2 * context).view(2, context) % 250, **cache_argument(model, cache))
    cost = CacheCost(ModelShape.from_config(model), pq, settings, context, batch=2, exact_bytes=4)
    held = cache.nbytes()
    assert [tuple(row) for row in cache.lengths.tolist()] == [cost.lengths] * 2
    assert held["codes"] == cost.code_bytes and held["codes"] + held["free_pages"] == cost.pool_bytes
    assert abs(cache.reserved_bytes - cost.reserved_bytes) < 64, "the table of pages has places to spare"
    assert held["exact_tokens"] == cost.sink_bytes + cost.window_bytes
    assert held["key_fits"] == cost.fit_bytes
    assert held["model_constants"] == cost.constant_bytes
