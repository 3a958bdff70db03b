"""The page allocation panel: sequences start, grow, fork and end; pages beside contiguous memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import traitlets

from ..config import CacheConfig, PQConfig
from ..cost import SHAPES, CacheCost
from ..errors import ConfigError, out_of_range
from ..figures.pages import allocation_figure
from ..paging import POLICIES
from ..paging.scenario import SCENARIOS, Event
from ..paging.simulate import Step, pages_frame, sequences_frame, simulate, split_words, steps_frame
from . import controls
from .base import Panel
from .play import play

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_STORAGE = {"in whole pages (pqlab)": True, "one by one (PagedAttention)": False}


class PageAllocation(Panel):
    """A pool, its page tables and a contiguous arena after each event of a scenario; see `page_allocation`."""

    title = "Page allocation"
    sweep = "event"

    scenario = traitlets.Unicode("story").tag(state=True)
    event = traitlets.Int(9).tag(state=True)
    page_size = traitlets.Int(64).tag(state=True)
    max_pages = traitlets.Int(64).tag(state=True)
    residual_length = traitlets.Int(128).tag(state=True)
    whole_pages = traitlets.Bool(True).tag(state=True)
    reserve = traitlets.Int(2048).tag(state=True)
    policy = traitlets.Enum(sorted(POLICIES), "lifo").tag(state=True)
    shape = traitlets.Enum(list(SHAPES), "SmolLM2-135M").tag(state=True)

    def __init__(self, words: Sequence[str], events: Sequence[Event] | None = None, **state: Any) -> None:
        self._words = words
        self._scenarios = {name: make() for name, make in SCENARIOS.items()}
        if events is not None:
            self._scenarios["yours"] = list(events)
            state = {"scenario": "yours", "event": 0, **state}
        self._simulated: tuple[tuple[Any, ...], list[Step]] = ((), [])
        super().__init__(**state)

    def controls(self) -> list[widgets.Widget]:
        def last() -> int:
            return len(self.events)

        sizes = (16, 32, 48, 64, 96, 128, 192, 256, 512)
        pools = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000)
        tokens = (16, 32, 64, 128, 256, 512, 1024)
        contexts = (256, 512, 1024, 2048, 4096, 8192)
        return [
            controls.choice(self, "scenario", "scenario", list(self._scenarios)),
            controls.number(self, "event", "event", high=last, tooltip="how many events have happened"),
            play(self, "event", last),
            controls.number(self, "page_size", "page size", values=sizes, tooltip="tokens per page"),
            controls.number(self, "max_pages", "max pages", values=pools, tooltip="pages of the pool"),
            controls.choice(self, "whole_pages", "tokens enter", _STORAGE, tooltip="from an exact window, or at once"),
            controls.number(self, "residual_length", "residual", values=tokens, tooltip="exact newest tokens"),
            controls.number(self, "reserve", "max context", values=contexts, tooltip="slots reserved when contiguous"),
            controls.choice(self, "policy", "free page", sorted(POLICIES), tooltip="which free page is taken next"),
            controls.choice(self, "shape", "bytes of", list(SHAPES), tooltip="model shape, 4 bits per element"),
        ]

    def below(self) -> list[widgets.Widget]:
        self._table = widgets.HTML()
        self._table.add_class("pqlab-sequences")
        return [self._table]

    def refresh(self) -> None:
        if self._widget is not None:
            table = sequences_frame(self.step).to_html(index=False, border=0, justify="right")
            self._table.value = f'<div style="line-height: 1.5; text-align: right">{table}</div>'

    @property
    def events(self) -> list[Event]:
        """The events of the present scenario."""
        return self._scenarios[self.scenario]

    @property
    def steps(self) -> list[Step]:
        """The state before the first event and after each."""
        key = tuple(value for name, value in self.state.items() if name not in ("event", "shape"))
        if self._simulated[0] != key:
            steps = simulate(
                self.events, self._cache, whole_pages=self.whole_pages, reserve=self.reserve, words=self._words
            )
            self._simulated = key, steps
        return self._simulated[1]

    @property
    def step(self) -> Step:
        """What the figure shows."""
        if not 0 <= self.event < len(self.steps):
            raise ConfigError(out_of_range("event", self.event, len(self.steps)))
        return self.steps[self.event]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page id over all layers of the model shape, K and V, at 4 bits per element."""
        return CacheCost(SHAPES[self.shape], PQConfig(), self._cache, context=1).layout.page_bytes

    def draw(self) -> go.Figure:
        return allocation_figure(self.step, page_bytes=self.page_bytes, theme=None)

    def frame(self) -> pd.DataFrame:
        """Page, holders, first token, tokens, fill, bytes and text of every page in use."""
        return pages_frame(self.step, self.page_bytes)

    def history(self) -> pd.DataFrame:
        """One row per event: slots reserved, used and wasted, paged and contiguous."""
        return steps_frame(self.steps)

    def sweep_values(self) -> dict[str, list[Any]]:
        return {
            "event": list(range(len(self.steps))),
            "page_size": [16, 32, 64, 128, 256],
            "max_pages": [32, 48, 64, 96, 128],
            "scenario": list(self._scenarios),
        }

    @property
    def _cache(self) -> CacheConfig:
        return CacheConfig(
            page_size=self.page_size,
            residual_length=self.residual_length,
            max_pages=self.max_pages,
            policy=self.policy,
        )

    @traitlets.validate("scenario")
    def _known_scenario(self, proposal: Any) -> str:
        if proposal.value not in self._scenarios:
            there = ", ".join(self._scenarios)
            raise traitlets.TraitError(f"scenario {proposal.value!r} is unknown; there are {there}")
        return proposal.value

    @traitlets.observe("scenario")
    def _fit_event(self, _: Any) -> None:
        self.event = min(self.event, len(self.events))


def page_allocation(
    text: str | None = None, tokenizer: Any = None, *, events: Sequence[Event] | None = None, **state: Any
) -> PageAllocation:
    """A pool of pages while several sequences start, grow, fork, lose tokens and end; contiguous memory beside it.

    Args:
        text: what the sequences say, so that hovering a page shows the text in it; default: Pride and Prejudice.
        tokenizer: a Hugging Face tokenizer; without one a word counts as a token.
        events: a scenario of your own (`pqlab.paging.scenario.Event`).
        **state: starting values, e.g. `page_size=32, scenario="beams"`; see `.state` of the panel.
    """
    from ..models import load_text

    text = (load_text("pride") if text is None else text)[:400_000]
    if tokenizer is None:
        return PageAllocation(split_words(text), events, **state)
    ids = tokenizer(text[:100_000], add_special_tokens=False)["input_ids"]
    return PageAllocation([tokenizer.decode([i]) for i in ids], events, **state)
