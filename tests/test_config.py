"""Settings: ranges, defaults and presets of the report, and errors that say what would be good."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pqlab.config import (
    DEFAULTS,
    REPORT_RANGES,
    CacheConfig,
    PQConfig,
    Range,
    check_report_ranges,
)
from pqlab.errors import ConfigError
from pqlab.presets import PRESETS, preset, preset_for


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"page_size": 20}, ["page_size = 20", "16 to 512, a multiple of 16", "nearest good value is 16"]),
        ({"page_size": 600}, ["page_size = 600", "nearest good value is 512"]),
        ({"page_size": 0}, ["page_size = 0", "nearest good value is 16"]),
        ({"residual_length": 0}, ["residual_length = 0", "at least 1", "is 1"]),
        ({"num_sinks": -1}, ["num_sinks = -1", "at least 0"]),
        ({"max_pages": 0}, ["max_pages = 0", "at least 1"]),
        ({"page_size": 64.0}, ["page_size = 64.0 is not a whole number"]),
        ({"page_size": True}, ["not a whole number"]),
        ({"mode": "fast"}, ["mode = 'fast'", '"eager" or "static"']),
    ],
)
def test_bad_cache_settings_name_the_good_ones(settings, words):
    with pytest.raises(ConfigError) as raised:
        CacheConfig(**settings)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_bad_quantizer_settings_name_the_good_ones():
    with pytest.raises(ConfigError, match=r"nbits = 9 is out of range \(1 to 8\); the nearest good value is 8"):
        PQConfig(nbits=9)
    with pytest.raises(ConfigError, match="M = 0"):
        PQConfig(M=0)
    with pytest.raises(ConfigError, match="M = 48 does not divide the head size 64; the nearest M that does is"):
        PQConfig(M=48).num_subspaces(64)


def test_default_is_four_bits_for_every_head_size():
    for head_dim in (16, 64, 80, 128, 256):
        assert PQConfig().bits_per_element(head_dim) == 4.0
    assert PQConfig(M=64).bits_per_element(64) == 8.0


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().page_size = 32


@pytest.mark.parametrize("value", [-5, 0, 15, 16, 23, 24, 25, 500, 512, 513, 10**6])
def test_nearest_is_in_range_and_none_is_nearer(value):
    bounds = Range(16, 512, 16)
    good = range(16, 513, 16)
    assert bounds.nearest(value) == min(good, key=lambda g: (abs(g - value), g))
    assert (value in bounds) == (value in good)
    assert "64" not in bounds


@pytest.mark.parametrize("residual", [1, 32, 40])
def test_what_leaves_a_window(residual):
    """Only of a full buffer; then the pages end full, R tokens stay, and no further page could leave."""
    config = CacheConfig(page_size=16, residual_length=residual)
    for coded in range(40):
        for window in range(200):
            leaving = config.flush_count(coded, window)
            if window < residual + 16:
                assert leaving == 0
            else:
                assert leaving > 0 and (coded + leaving) % 16 == 0
                assert residual <= window - leaving < residual + 16


def test_defaults_are_the_reports_and_in_range():
    assert DEFAULTS == {"page_size": 64, "extended_residual": 128, "max_pages": 1000, "M": 64, "nbits": 8}
    assert set(DEFAULTS) == set(REPORT_RANGES)
    assert check_report_ranges(**DEFAULTS) == []


def test_problems_say_everything():
    found = check_report_ranges(page_size=40, extended_residual=16, max_pages=None, M=24, nbits=3)
    assert [(p.name, p.value, p.low, p.high, p.nearest) for p in found] == [
        ("page_size", 40, 16, 512, 32),
        ("extended_residual", 16, 32, 1024, 32),
        ("nbits", 3, 4, 8, 4),
    ]
    message = "nbits = 3 is outside the report's range (4 to 8); the nearest good value is 4"
    assert found[-1].message == message


def test_m_has_to_divide_the_head_size_too():
    (problem,) = check_report_ranges(M=24, head_dim=64)
    assert problem.nearest in (16, 32) and "does not divide the head size 64" in problem.message
    (problem,) = check_report_ranges(M=8, head_dim=64)
    assert problem.nearest == 16 and "outside the report's range" in problem.message
    assert "and is outside" in check_report_ranges(M=7, head_dim=64)[0].message
    assert check_report_ranges(M=32, head_dim=64) == []
    assert check_report_ranges(M=200, head_dim=8)[0].nearest == 8  # no M of this head is in the report's range


def test_unknown_parameter():
    with pytest.raises(ConfigError, match="pagesize is no parameter of the report; it has page_size"):
        check_report_ranges(pagesize=3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_to_the_ranges(name):
    chosen = preset(name)
    assert chosen.name == name
    cache, pq = chosen.cache, chosen.pq
    params = {"page_size": cache.page_size, "extended_residual": cache.residual_length, "max_pages": cache.max_pages}
    assert check_report_ranges(**params, M=pq.M, nbits=pq.nbits) == []
    assert chosen.capacity == chosen.cache.page_size * chosen.cache.max_pages


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("default", (64, 128, 1000, None)),
        ("context:<8K", (32, 64, 500, None)),
        ("context:>32K", (128, 256, 2000, None)),
        ("memory:>64GB", (256, 128, 4000, None)),
        ("scenario:long-documents", (128, 512, 8000, 64)),
        ("scenario:batch", (32, 64, 1000, 32)),
        ("scenario:memory-saving", (64, 256, 4000, None)),
        ("scenario:debugging", (16, 32, 100, 16)),
    ],
)
def test_presets_are_the_reports(name, numbers):
    cache, pq = preset(name).cache, preset(name).pq
    assert (cache.page_size, cache.residual_length, cache.max_pages, pq.M) == numbers


@pytest.mark.parametrize(
    ("context", "name"),
    [(1, "<8K"), (8191, "<8K"), (8192, "8K-32K"), (32768, "8K-32K"), (32769, ">32K"), (10**6, ">32K")],
)
def test_preset_by_context(context, name):
    assert preset_for(context=context).name == f"context:{name}"


@pytest.mark.parametrize(
    ("memory", "name"),
    [(4, "<16GB"), (15.9, "<16GB"), (16, "16-32GB"), (32, "32-64GB"), (64, "32-64GB"), (79.6, ">64GB")],
)
def test_preset_by_memory(memory, name):
    assert preset_for(memory_gib=memory).name == f"memory:{name}"


def test_preset_by_both_is_bounded_by_memory():
    chosen = preset_for(context=100_000, memory_gib=12)
    assert (chosen.cache.page_size, chosen.cache.residual_length, chosen.cache.max_pages) == (128, 256, 500)
    assert preset_for(context=100_000, memory_gib=140).cache == PRESETS["context:>32K"].cache


def test_presets_that_do_not_exist():
    with pytest.raises(ConfigError, match="preset 'huge' is unknown; there are default, context:<8K"):
        preset("huge")
    with pytest.raises(ConfigError, match="needs context"):
        preset_for()
    with pytest.raises(ConfigError, match="context = 0"):
        preset_for(context=0)


def test_whole_numbers_of_numpy_are_taken_as_ints():
    config, pq = CacheConfig(page_size=np.int64(32), max_pages=np.int32(9)), PQConfig(M=np.int64(4))
    assert (config, pq) == (CacheConfig(page_size=32, max_pages=9), PQConfig(M=4))
    assert {type(config.page_size), type(config.max_pages), type(pq.M)} == {int}, "configs go into JSON files"
    with pytest.raises(ConfigError, match="page_size = None is not a whole number"):
        CacheConfig(page_size=None)
