"""The page settings panel: what page size, residual, pages, M and nbits come to for a model, a context and a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import traitlets

from ..config import (
    REPORT_RANGES,
    CacheConfig,
    PQConfig,
    RangeProblem,
    check_report_ranges,
    good_subspaces,
    report_params,
)
from ..cost import SHAPES, CacheCost, ModelShape
from ..errors import ConfigError
from ..figures.settings import cost_frame, range_frame, settings_figure
from ..presets import PRESETS
from ..presets import preset as named_preset
from . import controls
from .base import Panel
from .tables import BAD, table_html, table_widget

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_OWN = "your own"


class PageSettings(Panel):
    """Settings of the cache and what they cost; see `page_settings`."""

    title = "Page settings"
    sweep = "page_size"

    model = traitlets.Unicode().tag(state=True)
    page_size = traitlets.Int(64).tag(state=True)
    residual_length = traitlets.Int(128).tag(state=True)
    size_pool = traitlets.Bool(True).tag(state=True)
    max_pages = traitlets.Int(1000).tag(state=True)
    num_sinks = traitlets.Int(4).tag(state=True)
    M = traitlets.Int(None, allow_none=True).tag(state=True)  # None: d/2, whatever the model
    nbits = traitlets.Int(8).tag(state=True)
    context = traitlets.Int(8192).tag(state=True)
    batch = traitlets.Int(1).tag(state=True)

    def __init__(self, shape: ModelShape | None = None, **state: Any) -> None:
        self._shapes = {**({shape.name: shape} if shape is not None else {}), **SHAPES}
        self._chosen = ""
        super().__init__(**{"model": next(iter(self._shapes)), **state})
        self._assign(state)  # a size_pool that was asked for beside max_pages

    @property
    def shape(self) -> ModelShape:
        return self._shapes[self.model]

    @property
    def cache_config(self) -> CacheConfig:
        """The settings as a `CacheConfig`; raises `ConfigError` for what the library cannot do."""
        return CacheConfig(
            page_size=self.page_size,
            residual_length=self.residual_length,
            max_pages=None if self.size_pool else self.max_pages,
            num_sinks=self.num_sinks,
        )

    @property
    def pq_config(self) -> PQConfig:
        return PQConfig(M=self.M, nbits=self.nbits)

    @property
    def cost(self) -> CacheCost:
        """What the settings cost."""
        return CacheCost(self.shape, self.pq_config, self.cache_config, self.context, self.batch)

    def in_force(self, name: str) -> Any:
        """An M of None is the d/2 of the present model."""
        left = name == "M" and self.M is None
        return PQConfig().num_subspaces(self.shape.head_dim) if left else super().in_force(name)

    @property
    def params(self) -> dict[str, int | None]:
        """The settings under the report's names; None is left to context and batch."""
        return {
            "page_size": self.page_size,
            "extended_residual": self.residual_length,
            "max_pages": None if self.size_pool else self.max_pages,
            "M": self.in_force("M"),
            "nbits": self.nbits,
        }

    @property
    def problems(self) -> list[RangeProblem]:
        """Which settings are outside the report's ranges, and why."""
        return check_report_ranges(head_dim=self.shape.head_dim, **self.params)

    @property
    def preset(self) -> str:
        """Name of a preset with these settings, "" when there is none."""
        names = [*([self._chosen] if self._chosen else []), *PRESETS]  # some presets are equal: keep the chosen one
        return next((name for name in names if self._has(name)), "")

    def use_preset(self, name: str) -> None:
        """Take the settings of a preset of the report; model, context and batch stay."""
        if name:
            self._chosen = name
            self.state = self.preset_state(name)

    def _has(self, name: str) -> bool:
        wanted = PRESETS[name]
        try:
            m = wanted.pq.num_subspaces(self.shape.head_dim)
        except ConfigError:  # its M does not divide this head size
            return False
        return self.params == {**report_params(wanted.cache, wanted.pq), "M": m}

    def preset_state(self, name: str) -> dict[str, Any]:
        """What a preset sets, as a part of `.state`; `ConfigError` when its M does not divide this head size."""
        wanted = named_preset(name)
        wanted.pq.num_subspaces(self.shape.head_dim)
        return {
            "page_size": wanted.cache.page_size,
            "residual_length": wanted.cache.residual_length,
            "size_pool": False,
            "max_pages": wanted.cache.max_pages,
            "M": wanted.pq.M,
            "nbits": wanted.pq.nbits,
        }

    def controls(self) -> list[widgets.Widget]:
        bounds = REPORT_RANGES
        pages, window, bits = bounds["page_size"], bounds["extended_residual"], bounds["nbits"]
        pool = (100, 200, 500, 1000, 2000, 4000, 8000, bounds["max_pages"].high)
        contexts = tuple(2**n for n in range(8, 18))
        presets = {f"{preset.name} ({preset.about})": name for name, preset in PRESETS.items()}
        return [
            controls.choice(self, "model", "model shape", list(self._shapes)),
            controls.chooser(self, "preset", {_OWN: "", **presets}, lambda: self.preset, self.use_preset),
            controls.number(
                self,
                "page_size",
                "page size",
                low=pages.low,
                high=pages.high,
                step=pages.step,
                tooltip="tokens per page",
            ),
            controls.number(
                self,
                "residual_length",
                "residual",
                low=window.low,
                high=window.high,
                step=16,
                tooltip="newest tokens that are always exact",
            ),
            controls.number(
                self,
                "M",
                "subspaces M",
                values=lambda: good_subspaces(self.shape.head_dim),
                default="d/2",
                tooltip="codes per token and kv head",
            ),
            controls.number(self, "nbits", "bits per code", low=1, high=bits.high, tooltip="2 to this power centroids"),
            controls.number(self, "context", "context", values=contexts, tooltip="tokens of each sequence"),
            controls.number(self, "batch", "batch", values=(1, 2, 4, 8, 16, 32, 64), tooltip="sequences"),
            controls.number(self, "max_pages", "max pages", values=pool, tooltip="pages of a pool that is not sized"),
            controls.switch(
                self,
                "size_pool",
                "size the pool by context × batch",
                tooltip="as many pages as the context and the batch ask for",
            ),
        ]

    def below(self) -> list[widgets.Widget]:
        self._ranges, self._numbers = table_widget("ranges"), table_widget("numbers")
        side_by_side = widgets.Layout(flex_flow="row wrap", align_items="flex-start", width="100%", overflow="visible")
        return [widgets.Box([self._ranges, self._numbers], layout=side_by_side)]

    def refresh(self) -> None:
        ranges = range_frame(self.params, self.problems)
        self._ranges.value = table_html(ranges, colour=lambda _, value: BAD if str(value).startswith("✗") else None)
        self._numbers.value = table_html(self.frame()[["quantity", "shown"]], header=False)

    def warning(self) -> str:
        cost = self.cost
        if not cost.pages_missing:
            return ""
        return (
            f"PQC001: context × batch takes {cost.pages_used:,} pages, and the pool has {cost.max_pages:,}. Raise max "
            f"pages to {cost.pages_used:,}, let it be sized, or lower context to at most {cost.max_context:,}."
        )

    def draw(self) -> go.Figure:
        return settings_figure(self.cost, theme=None)

    def frame(self) -> pd.DataFrame:
        return cost_frame(self.cost)

    def sweep_values(self) -> dict[str, list[Any]]:
        return {
            "page_size": [16, 32, 64, 96, 128, 192, 256, 384, 512],
            "residual_length": [32, 64, 128, 256, 512, 1024],
            "context": [2**n for n in range(8, 18)],
            "batch": [1, 2, 4, 8, 16, 32, 64],
            "nbits": [4, 5, 6, 7, 8],
            "M": [m for m in range(1, self.shape.head_dim + 1) if self.shape.head_dim % m == 0],
            "model": list(self._shapes),
        }

    @traitlets.observe("max_pages")
    def _take_max_pages(self, _: Any) -> None:
        self.size_pool = False  # or it would have no effect

    @traitlets.validate("model")
    def _known_model(self, proposal: Any) -> str:
        if proposal.value not in self._shapes:
            there = ", ".join(self._shapes)
            raise traitlets.TraitError(f"model shape {proposal.value!r} is unknown; there are {there}")
        return proposal.value


def page_settings(shape: ModelShape | None = None, preset: str | None = None, **state: Any) -> PageSettings:
    """Sliders for pages, window and quantizer; bits, bytes, capacity and waste for a model, a context and a batch.

    Args:
        shape: a model beside the well-known ones, e.g. `ModelShape.from_config(model)`; it is shown first.
        preset: name of a preset of the report (`pqlab.presets.PRESETS`) to start from.
        **state: starting values, e.g. `page_size=32, context=32768, model="Llama-3.1-8B"`; see `.state` of the panel.
            An M of None is half the head size of whichever model is chosen; max_pages without size_pool sets that to
            False, as does moving its slider.
    """
    panel = PageSettings(shape, **state)
    if preset is not None:
        panel.use_preset(preset)
    return panel
