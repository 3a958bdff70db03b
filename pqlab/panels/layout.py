"""The memory layout panel: where the codes of a page lie, and what reading them fetches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets

from ..benchmarks.layout_bench import measure_orders
from ..errors import in_runs
from ..figures.layout import COLOUR_BY, layout_figure
from ..paging.access import LOADS, PATTERNS, STARTS, access_frame, compare_orders, random_codes
from . import controls
from .base import Panel

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go
    from ipywidgets import Widget

    from ..cache import PagedPQCache
    from ..paging import PageLayout

_SIDES = {"K": 0, "V": 1}
_SHAPE = ("page_size", "num_subspaces", "nbits", "num_heads")
"""State that a cache prescribes, by layer and side."""


class MemoryLayout(Panel):
    """Bytes of one page and one load over them; see `memory_layout`."""

    title = "Memory layout"
    page_size = traitlets.Int(64).tag(state=True)
    num_subspaces = traitlets.Int(32).tag(state=True)
    nbits = traitlets.Int(8).tag(state=True)
    num_heads = traitlets.Int(3).tag(state=True)
    layer = traitlets.Int(0).tag(state=True)
    side = traitlets.Enum(list(_SIDES), "K").tag(state=True)
    page = traitlets.Int(0).tag(state=True)
    head = traitlets.Int(0).tag(state=True)
    pattern = traitlets.Enum(list(PATTERNS), next(iter(PATTERNS))).tag(state=True)
    load = traitlets.Enum(list(LOADS), "warp").tag(state=True)
    slot = traitlets.Int(0).tag(state=True)
    subspace = traitlets.Int(0).tag(state=True)
    colour_by = traitlets.Enum(COLOUR_BY, "token").tag(state=True)

    def __init__(self, cache: PagedPQCache | None = None, **state: Any) -> None:
        self._cache = cache
        self._measured: dict[tuple[Any, ...], pd.DataFrame] = {}
        if cache is not None:
            used = cache.as_frame().page.tolist() or [0]
            state = {"layer": next(iter(self._layouts)), "page": used[0], **state}
        super().__init__(**{name: state.pop(name) for name in ("layer", "side", "theme") if name in state})
        self._take_shape()
        self.state = state

    @property
    def _layouts(self) -> dict[int, tuple[PageLayout, PageLayout]]:
        """K and V page of every quantized layer of the cache; none without one."""
        if self._cache is None:
            return {}
        layers = [layer.index for layer in self._cache.quantized_layers]
        return dict(zip(layers, self._cache.pool.layout.layers, strict=True))

    def _prescribed(self, layer: int) -> dict[str, int]:
        """The shape of the cache's pages in a layer, on the present side; nothing without a cache."""
        if self._cache is None:
            return {}
        if layer not in self._layouts:
            there = in_runs(self._layouts)
            raise traitlets.TraitError(f"layer {layer} is not quantized in this cache; quantized are {there}")
        layout = self._layouts[layer][_SIDES[self.side]]
        return {name: getattr(layout, name) for name in _SHAPE}

    @traitlets.validate("layer")
    def _a_quantized_layer(self, proposal: Any) -> int:
        self._prescribed(proposal.value)
        return proposal.value

    @traitlets.validate(*_SHAPE)
    def _as_prescribed(self, proposal: Any) -> int:
        name, value = proposal.trait.name, proposal.value
        own = self._prescribed(self.layer).get(name, value)
        if value != own:
            where = f"layer {self.layer}, {self.side} of the cache"
            raise traitlets.TraitError(f"{name} = {value}, but {where} has {own}; choose by layer and side")
        return value

    @traitlets.observe("layer", "side")
    def _take_shape(self, _: Any = None) -> None:
        self._assign(self._prescribed(self.layer))

    @traitlets.observe("page_size", "num_subspaces", "num_heads")
    def _stay_inside(self, _: Any) -> None:
        counts = {"slot": self.page_size, "subspace": self.num_subspaces, "head": self.num_heads}
        self._assign({name: min(getattr(self, name), max(0, count - 1)) for name, count in counts.items()})

    def controls(self) -> list[Widget]:
        def number(name: str, description: str, **bounds: Any) -> Widget:
            return controls.number(self, name, description, **bounds)

        if self._cache is None:
            what = [
                number("page_size", "page size", low=16, high=512, step=16),
                number("num_subspaces", "subspaces M", values=(4, 8, 16, 24, 32, 48, 64, 96, 128)),
                number("nbits", "bits per code", low=1, high=8),
            ]
        else:
            what = [
                number("layer", "layer", values=list(self._layouts)),
                controls.choice(self, "side", "side", list(_SIDES)),
                number("page", "page", low=0, high=self._cache.pool.max_pages - 1),
            ]
        return [
            *what,
            number("head", "kv head", low=0, high=lambda: self.num_heads - 1),
            controls.choice(self, "pattern", "read", {text: name for name, text in PATTERNS.items()}),
            controls.choice(self, "load", "with", {load.name: name for name, load in LOADS.items()}),
            number(
                "slot",
                "token slot",
                high=lambda: self.page_size - self._step("slot"),
                step=lambda: self._step("slot"),
                used=lambda: self.sweep == "slot",
            ),
            number(
                "subspace",
                "subspace",
                high=lambda: self.num_subspaces - self._step("subspace"),
                step=lambda: self._step("subspace"),
                used=lambda: self.sweep == "subspace",
            ),
            controls.choice(self, "colour_by", "colour by", COLOUR_BY),
            controls.button(
                self, "Measure", self.measure, icon="tachometer", tooltip="read each order on this machine"
            ),
        ]

    @property
    def sweep(self) -> str:
        """Slot or subspace: which of them the present pattern starts at."""
        return STARTS[self.pattern][0]

    def _step(self, name: str) -> int:
        """From one start of the present pattern to the next; 1 for what it does not start at."""
        return dict([STARTS[self.pattern]]).get(name, 1)

    @property
    def codes(self) -> np.ndarray:
        """uint8 [page_size, M]: the codes shown."""
        if self._cache is None:
            return random_codes(self.page_size, self.num_subspaces, self.nbits, self.head)
        return self._cache.page_codes(self.layer, _SIDES[self.side], self.page, self.head).numpy()

    @property
    def source(self) -> str:
        """Where the codes come from, in words."""
        if self._cache is None:
            return f"random codes (no cache given), head {self.head} of {self.num_heads}"
        return f"codes of the cache: layer {self.layer}, {self.side}, page {self.page}, head {self.head}"

    @property
    def measured(self) -> pd.DataFrame | None:
        """What `measure` found for the present pattern and page, or None."""
        return self._measured.get(self._measured_key)

    def measure(self) -> None:
        """Read the three orders on this machine, in the background; the figure shows it when it is done."""
        key, where = self._measured_key, {"page_size": self.page_size, "num_subspaces": self.num_subspaces}

        def done(found: pd.DataFrame) -> None:
            self._measured[key] = found
            self.redraw()
            self.say(f"measured on {found.device.iloc[0]}: {found.wanted_bytes.iloc[0]:,} wanted bytes of 8-bit codes")

        self.background(lambda: measure_orders(self.pattern, **where), done, busy="measuring (a few seconds)")

    def draw(self) -> go.Figure:
        return layout_figure(
            self._accesses(),
            self.codes,
            head=self.head,
            colour_by=self.colour_by,
            measured=self.measured,
            source=self.source,
            theme=None,
        )

    def frame(self) -> pd.DataFrame:
        found = access_frame(self._accesses())
        if self.measured is None:
            return found.assign(gb_per_s=float("nan"))
        return found.merge(self.measured[["order", "gb_per_s", "device"]], on="order")

    def sweep_values(self) -> dict[str, list[Any]]:
        of_a_cache = {} if self._cache is None else {"layer": list(self._layouts), "side": list(_SIDES)}
        return {
            **of_a_cache,
            "slot": list(range(0, self.page_size, self._step("slot"))),
            "subspace": list(range(self.num_subspaces)),
            "head": list(range(self.num_heads)),
            "pattern": list(PATTERNS),
            "load": list(LOADS),
            "colour_by": list(COLOUR_BY),
        }

    @property
    def _measured_key(self) -> tuple[Any, ...]:
        return self.pattern, self.page_size, self.num_subspaces

    def _accesses(self) -> dict[str, Any]:
        shape = self.page_size, self.num_heads, self.num_subspaces, self.nbits
        where = {"head": self.head, "slot": self.slot, "subspace": self.subspace}
        return compare_orders(*shape, self.pattern, LOADS[self.load], **where)


def memory_layout(cache: PagedPQCache | None = None, **state: Any) -> MemoryLayout:
    """One page at byte level, row-major, transposed and tiled side by side, and what one load touches in each.

    Args:
        cache: whose pages are shown; without one the codes are random, and labelled as such.
        **state: starting values, e.g. `page_size=128, pattern="token"`; see `.state` of the panel. With a cache its
            layer and side say what page_size, num_subspaces, nbits and num_heads are.
    """
    return MemoryLayout(cache, **state)
