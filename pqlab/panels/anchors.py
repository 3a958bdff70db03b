"""The anchors panel: what it does to keys that they are turned back to the position of their span's first token."""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, Any

import traitlets

from ..errors import in_runs, out_of_range
from ..figures.anchors import anchors_figure
from ..quantization.rotary import Rotary
from ..quantization.turned_keys import SPANS, VIEWS, pair_that_gains_most, spread_by_span, turned_pair
from . import controls
from .base import Panel

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from ipywidgets import Widget

    from ..quantization import Samples

_CHOICES = tuple(span for span in SPANS if span > 1)


class KeyAnchors(Panel):
    """One rotary pair of one head; see `key_anchors`."""

    title = "Keys and where they stand"
    sweep = "span"

    layer = traitlets.Int(0).tag(state=True)
    head = traitlets.Int(0).tag(state=True)
    pair = traitlets.Int(0).tag(state=True)
    span = traitlets.Int(256).tag(state=True)

    def __init__(self, samples: Samples, frequencies: Any, **state: Any) -> None:
        self._samples, self._frequencies = samples, frequencies
        self._spreads: dict[tuple[int, int], pd.DataFrame] = {}
        state.setdefault("layer", next(iter(samples.keys)))
        super().__init__(**state)
        if "pair" not in state:
            self.pair = pair_that_gains_most(self._keys(), samples.positions, frequencies, self.span)

    def controls(self) -> list[Widget]:
        return [
            controls.number(self, "span", "tokens a span", values=_CHOICES),
            controls.number(
                self, "pair", "rotary pair", high=len(self._frequencies) - 1, tooltip="pair 0 turns fastest"
            ),
            controls.number(self, "layer", "layer", values=list(self._samples.keys)),
            controls.number(self, "head", "kv head", high=lambda: len(self._heads()) - 1),
        ]

    def sweep_values(self) -> dict[str, list[Any]]:
        return {"span": list(_CHOICES), "layer": list(self._samples.keys)}

    @property
    def spreads(self) -> pd.DataFrame:
        """`quantization.turned_keys.spread_by_span` of the head that is shown."""
        shown = self.layer, self.head
        if shown not in self._spreads:
            keys, positions = self._keys(), self._samples.positions
            self._spreads[shown] = spread_by_span(keys, positions, self._frequencies)
        return self._spreads[shown]

    def draw(self) -> go.Figure:
        pairs = turned_pair(self._keys(), self._samples.positions, self._frequencies, self._pair(), self.span)
        return anchors_figure(pairs, self._samples.positions.numpy(), self.spreads, self.span, None)

    def frame(self) -> pd.DataFrame:
        """`spreads`."""
        return self.spreads

    def text(self) -> str:
        pair, d = self._pair(), self._keys().shape[-1]
        turns = float(self._frequencies[pair]) * (self.span - 1) / (2 * pi)
        share = self.spreads.set_index("span").share
        often = f"{turns:.2g}" if turns < 10 else f"{turns:.0f}"
        return (
            f"Dimensions {pair} and {pair + d // 2}. Within {self.span} tokens this pair turns {often} times "
            f"around, and the whole head spreads {share[self.span]:.0%} as far as it does now. {VIEWS[2].capitalize()} "
            f"it would be {share[1]:.0%}."
        )

    def _heads(self) -> Any:
        if self.layer not in self._samples.keys:
            raise ValueError(f"layer = {self.layer} has no samples; there are some of {in_runs(self._samples.keys)}")
        return self._samples.keys[self.layer]

    def _keys(self) -> Any:
        every = self._heads()
        if not 0 <= self.head < len(every):
            raise ValueError(out_of_range("head", self.head, len(every)))
        return every[self.head]

    @traitlets.validate("span")
    def _a_span(self, proposal: Any) -> int:
        if proposal.value not in _CHOICES:
            raise traitlets.TraitError(f"span = {proposal.value} is none of {', '.join(map(str, _CHOICES))}")
        return proposal.value

    def _pair(self) -> int:
        pairs = self._keys().shape[-1] // 2
        if not 0 <= self.pair < pairs:
            raise ValueError(out_of_range("pair", self.pair, pairs))
        return self.pair


def key_anchors(model: Any, samples: Samples, **state: Any) -> KeyAnchors:
    """Keys of a text among their anchors (`quantization.anchors`), with sliders for span, rotary pair, layer and head.

    Args:
        model: whose rotary embedding turned the keys.
        samples: keys of a text with their positions, of `record_kv` or `collect_kv`.
        state: starting values of the panel's state: layer, head, pair (by default that which gains most), span.

    Raises:
        ConfigError: the model's rotary embedding cannot be undone (`quantization.rotary`).
    """
    samples.code_indexes()  # says so where positions are missing
    frequencies = Rotary(model).frequencies.cpu()
    for i, keys in samples.keys.items():
        want = len(samples.positions), 2 * len(frequencies)
        if keys.shape[1:] != want:
            raise ValueError(
                f"layer {i}: keys of {want[0]} positions and {want[1]} dimensions, got {[*keys.shape[1:]]}"
            )
    return KeyAnchors(samples.to("cpu"), frequencies, **state)
