"""What happens to sequences, as lists of events: a story that shows everything, a beam search, random requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .state import sequence_name


@dataclass(frozen=True)
class Event:
    """One act on sequence `seq` (sequences are numbered from 0 as they start or are forked).

    start: `tokens` of prompt.   grow: `tokens` more.   crop: `tokens` fewer.   free: the sequence ends.
    fork: `seq` becomes a copy of `source` that shares its pages.
    """

    kind: Literal["start", "grow", "crop", "fork", "free"]
    seq: int
    tokens: int = 0
    source: int = -1

    def __str__(self) -> str:
        name = sequence_name(self.seq)
        return {
            "start": f"{name} starts with {self.tokens:,} tokens",
            "grow": f"{name} grows by {self.tokens:,} tokens",
            "crop": f"{name} drops its last {self.tokens:,} tokens",
            "fork": f"{sequence_name(max(0, self.source))} forks: {name} shares its pages",
            "free": f"{name} ends, its pages go back",
        }[self.kind]


def story() -> list[Event]:
    """Four requests, two forks, a crop, a pool that runs out at 64 pages of 64 tokens, and goes on."""
    return [
        Event("start", 0, 1400),
        Event("start", 1, 900),
        Event("grow", 0, 150),
        Event("fork", 2, source=0),
        Event("grow", 0, 200),
        Event("grow", 2, 260),
        Event("crop", 1, 420),
        Event("fork", 3, source=1),
        Event("grow", 3, 330),
        Event("grow", 1, 180),
        Event("start", 4, 1900),
        Event("free", 0),
        Event("free", 2),
        Event("start", 4, 1900),
        Event("grow", 3, 400),
        Event("grow", 4, 300),
        Event("free", 1),
        Event("free", 3),
        Event("free", 4),
    ]


def beams() -> list[Event]:
    """One prompt, four beams; after every round the worst two are dropped and the best two are forked."""
    events = [Event("start", 0, 1600), *(Event("fork", seq, source=0) for seq in (1, 2, 3))]
    for lost, best in (((2, 3), (0, 1)), ((0, 3), (1, 2)), ((1, 3), (0, 2))):
        events += [Event("grow", seq, 120) for seq in range(4)]
        events += [Event("free", seq) for seq in lost]
        events += [Event("fork", seq, source=source) for seq, source in zip(lost, best, strict=True)]
    return events


def requests(seed: int = 0, count: int = 40) -> list[Event]:
    """Independent requests of random lengths (log-normal) that come, grow and go, at most seven at a time."""
    rng = random.Random(seed)
    events: list[Event] = []
    alive: set[int] = set()
    for _ in range(count):
        idle = [seq for seq in range(7) if seq not in alive]
        kind = rng.choices(("start", "grow", "free"), (len(idle), 2 * len(alive), 0.6 * len(alive)))[0]
        seq = rng.choice(idle if kind == "start" else sorted(alive))
        tokens = min(2000, round(rng.lognormvariate(6.2, 0.7))) if kind == "start" else rng.randint(20, 250)
        events.append(Event(kind, seq, 0 if kind == "free" else tokens))
        alive = alive | {seq} if kind == "start" else alive - {seq} if kind == "free" else alive
    return events


SCENARIOS: Mapping[str, Callable[[], list[Event]]] = MappingProxyType(
    {"story": story, "beams": beams, "requests": requests}
)
"""Ready lists of events, by name."""
