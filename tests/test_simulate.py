"""Scenarios against a plain model of texts; contiguous memory against its own bounds."""

from __future__ import annotations

import random

import pytest

from pqlab.config import CacheConfig
from pqlab.errors import ConfigError
from pqlab.paging import PagePool, PageTable
from pqlab.paging.arena import Arena
from pqlab.paging.scenario import SCENARIOS, Event, requests
from pqlab.paging.simulate import (
    pages_frame,
    sequences_frame,
    simulate,
    split_words,
    steps_frame,
)
from pqlab.paging.state import pool_state, sequence_name

WORDS = [f"w{i} " for i in range(50_000)]
CACHE = CacheConfig(page_size=16, residual_length=32, num_sinks=4, max_pages=60)


def random_events(seed: int) -> list[Event]:
    rng = random.Random(seed)
    kinds = ["start", "grow", "grow", "crop", "fork", "fork", "free"]
    return [
        Event(rng.choice(kinds), rng.randrange(5), rng.randint(0, 250), source=rng.randrange(5)) for _ in range(120)
    ]


@pytest.mark.parametrize("whole_pages", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_pages_hold_the_text_of_their_sequences(seed, whole_pages):
    """A plain model: a sequence is a list of words; a fork copies it, a crop cuts it, a refusal changes nothing."""
    steps = simulate(random_events(seed), CACHE, whole_pages=whole_pages, words=WORDS)
    model: list[list[str]] = [[] for _ in range(5)]
    cursor = [seq * 7919 for seq in range(5)]
    for step in steps[1:]:
        event = step.event
        if step.error:
            assert not step.changes
        elif event.kind in ("start", "grow"):
            start = cursor[event.seq]
            model[event.seq] = model[event.seq] + WORDS[start : start + event.tokens]
            cursor[event.seq] += event.tokens
        elif event.kind == "crop":
            model[event.seq] = model[event.seq][: max(0, len(model[event.seq]) - event.tokens)]
            cursor[event.seq] += 101
        elif event.kind == "fork":
            model[event.seq] = list(model[event.source])
        else:
            model[event.seq] = []
        for s in step.sequences:
            words, table = model[s.seq], step.pool.tables[s.seq]
            assert s.tokens == len(words) and (s.alive or not words)
            assert s.window < CACHE.window_length if whole_pages else s.window == s.sinks == 0
            coded = words[s.sinks : s.sinks + s.coded]
            assert len(table) == -(-len(coded) // 16) and step.pool.num_tokens[s.seq] == len(coded)
            for i, page in enumerate(table):
                mine = "".join(coded[16 * i : 16 * (i + 1)])
                assert step.pool.pages[page].text.startswith(mine)  # a sharer may have more in it
                assert step.pool.pages[page].is_shared or step.pool.pages[page].text == mine
        assert step.pool.used + step.pool.wasted == step.pool.reserved <= step.pool.capacity
    events = {step.event.kind for step in steps[1:] if not step.error}
    assert events == {"start", "grow", "crop", "fork", "free"}


def texts_by_pages(step) -> list[str]:
    """What hovering the pages of each sequence reads, in token order."""
    return ["".join(step.pool.pages[page].text for page in table) for table in step.pool.tables]


def test_a_forked_sequence_says_the_same_until_it_grows():
    events = [Event("start", 0, 200), Event("fork", 1, source=0), Event("grow", 1, 100), Event("grow", 0, 100)]
    for whole in (True, False):
        first, forked, *_, last = simulate(events, CACHE, whole_pages=whole, words=WORDS)[1:]
        a, b = texts_by_pages(forked)
        assert a == b == texts_by_pages(first)[0]
        a2, b2 = texts_by_pages(last)
        assert a2 != b2 and a2.startswith(a) and b2.startswith(a)
        assert a.startswith("w4 w5 " if whole else "w0 w1 ")  # sinks are not in pages


def test_running_out_is_refused_and_the_sequence_goes_on():
    events = [
        Event("start", 0, 700),
        Event("start", 1, 900),
        Event("grow", 0, 10),
        Event("free", 0),
        Event("start", 1, 900),
    ]
    steps = simulate(events, CACHE, whole_pages=False)
    assert [bool(step.error) for step in steps] == [False, False, True, False, False, False]
    assert "[PQC001]" in steps[2].error and "57 pages are needed, 16 of 60 are free" in steps[2].error
    assert steps[-1].pool.num_tokens == (0, 900)
    nobody = simulate([Event("grow", 2, 10)], CACHE)[-1]
    assert nobody.error == "C is not running, so nothing happens."


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("whole_pages", [True, False])
def test_ready_scenarios_show_what_they_are_for(name, whole_pages):
    steps = simulate(SCENARIOS[name](), CacheConfig(max_pages=64), whole_pages=whole_pages)
    kinds = {change.kind for step in steps for change in step.changes}
    shown = {
        "story": {"allocate", "share", "free"},
        "beams": {"allocate", "share", "free"},
        "requests": {"allocate", "free"},
    }
    assert shown[name] <= kinds
    if name == "story":
        assert "copy" in kinds and any(step.error.startswith("[PQC001]") for step in steps)
        assert any(step.pool.wasted for step in steps) and steps[-1].pool.pages_used == 0
        assert not any("not running" in step.error for step in steps)
    if name == "beams":
        assert ("copy" in kinds) is not whole_pages and max(step.pool.shared_tokens for step in steps) > 4000
    assert max(len(step.arena.refused) for step in steps) > 0


def test_requests_repeat_with_their_seed():
    assert requests(3) == requests(3) != requests(4)


def test_arena_is_first_fit_without_overlap():
    arena = Arena(100, reserve=30, granule=8)
    assert arena.start(0, 5) and arena.start(1, 10) and arena.start(2, 1)
    assert not arena.start(3, 1)
    state = arena.state()
    assert [(r.start, r.reserved) for r in state.regions] == [(0, 32), (32, 32), (64, 32)]
    assert (state.reserved, state.used, state.wasted, state.refused) == (96, 16, 80, (3,))
    arena.free(0)
    arena.free(2)
    assert not arena.start(4, 40)  # 68 slots are free, in two pieces
    assert arena.start(3, 1) and arena.state().refused == (4,)
    assert not arena.resize(1, 33)  # it outgrows what it reserved
    assert arena.state().refused == (1, 4) and not arena.resize(9, 1)


def test_contiguous_memory_gets_what_pages_get():
    """Whoever was refused is admitted as soon as there is room."""
    events = [Event("start", 0, 100), Event("start", 1, 100), Event("free", 0)]
    _, one, two, three = simulate(events, CACHE, reserve=960)
    assert (one.arena.refused, two.arena.refused, three.arena.refused) == ((), (1,), ())
    assert three.arena.used == three.pool.used


def test_frames_agree_with_the_states():
    steps = simulate(SCENARIOS["story"](), CacheConfig(max_pages=64), words=WORDS)
    step = steps[9]
    pages, sequences, history = pages_frame(step, 100), sequences_frame(step), steps_frame(steps)
    assert pages["tokens"].sum() == step.pool.used and len(pages) == step.pool.pages_used
    assert set(pages["bytes"]) == {100} and pages["text"].str.count(" ").tolist() == pages["tokens"].tolist()
    assert sequences["sequence"].tolist() == ["A", "B", "C", "D"]
    assert (sequences["exact sinks"] + sequences["codes"] + sequences["exact window"]).tolist() == sequences[
        "tokens"
    ].tolist()
    assert history["paged_used"].tolist() == [s.pool.used for s in steps]
    assert history["refused"].str.contains("PQC001").sum() == sum("PQC001" in s.error for s in steps)


def test_a_simulation_needs_a_pool_size():
    with pytest.raises(ConfigError, match="max_pages"):
        simulate([], CacheConfig())


def test_words_join_to_the_text_again():
    text = "  It is\n\na truth universally acknowledged.\n "
    assert "".join(split_words(text)) == text
    assert sequence_name(0) == "A" and sequence_name(27) == "B1"


def test_the_state_of_a_table_of_ones_own():
    pool = PagePool(8)
    table = PageTable(pool, 16, 1)
    table.extend([20])
    table.select([0, 0])
    table.truncate(1, 18)
    words = [[f"a{i} " for i in range(30)], [f"b{i} " for i in range(30)]]
    state = pool_state(pool, table, words, first_token=[4, 4])
    assert state.pages[0].holders == (0, 1) and state.pages[0].text.split() == [f"a{i}" for i in range(4, 20)]
    assert state.pages[1].tokens == 4 and state.pages[1].first_token == 20
    assert (state.used, state.wasted, state.reserved, state.shared_tokens) == (20, 12, 32, 18)
    assert [page.is_free for page in state.pages] == [False, False] + [True] * 6
    assert pool_state(pool, table).pages[0].text == ""
