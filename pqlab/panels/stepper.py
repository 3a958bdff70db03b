"""The decode stepper panel: a traced decode, step by step, paged PQ beside standard exact attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import traitlets

from ..figures.decode import decode_figure
from ..figures.decode_data import error_grid, next_tokens
from ..figures.text import text_html
from ..trace import DecodeTrace
from ..trace.data import KINDS
from . import controls
from .base import Panel
from .play import play
from .tables import table_html, table_widget

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go


class DecodeStepper(Panel):
    """A step, a layer and a head of a decode; see `decode_stepper`."""

    title = "Decode stepper"
    sweep = "step"

    step = traitlets.Int(0).tag(state=True)
    layer = traitlets.Int(0).tag(state=True)
    head = traitlets.Int(0).tag(state=True)
    kind = traitlets.Enum(KINDS, KINDS[0]).tag(state=True)
    scale = traitlets.Enum(("log", "linear"), "log").tag(state=True)

    def __init__(self, trace: DecodeTrace, **state: Any) -> None:
        self.trace = trace
        self._errors: dict[str, np.ndarray] = {}
        middle = trace.layers[len(trace.layers) // 2] if trace.layers else 0
        super().__init__(**{"step": min(1, trace.num_steps - 1), "layer": middle, **state})

    def controls(self) -> list[widgets.Widget]:
        def last() -> int:
            return self.trace.num_steps - 1

        buttons = [
            controls.button(self, "", lambda: self._move(-1), icon="step-backward", tooltip="one step back"),
            controls.button(self, "", lambda: self._move(1), icon="step-forward", tooltip="one step on"),
        ]
        buttons[0].add_class("pqlab-step-back")
        buttons[1].add_class("pqlab-step-on")
        kinds = {"isolated (same query and tokens)": "isolated", "end to end (both runs went on)": "end to end"}
        chosen = [
            controls.number(self, "layer", "layer", values=self.trace.layers),
            controls.number(self, "head", "query head", low=0, high=self.trace.num_heads - 1),
            controls.choice(self, "kind", "compare", kinds),
            controls.choice(self, "scale", "weights", ["log", "linear"]),
        ]
        steps = [controls.number(self, "step", "step", low=0, high=last), play(self, "step", last, interval=700)]
        return [*steps, widgets.HBox(buttons), *(chosen if self.trace.layers else [])]

    def text(self) -> str:
        return text_html(self.trace, self.step)

    def below(self) -> list[widgets.Widget]:
        self._pages = table_widget("pages")
        return [self._pages]

    def refresh(self) -> None:
        pages = self.trace.pages(self.step).tail(8)
        self._pages.value = table_html(pages.assign(text=[_short(text) for text in pages.text]))

    def draw(self) -> go.Figure:
        return decode_figure(
            self.trace,
            self.step,
            layer=self.layer,
            head=self.head,
            kind=self.kind,
            scale=self.scale,
            errors=self._error_grid(),
            theme=None,
        )

    def frame(self) -> pd.DataFrame:
        """The likeliest next tokens of both runs after this step."""
        return next_tokens(self.trace, self.step)

    def click(self, point: dict[str, Any]) -> None:
        """A bar of the KL goes to its step; a cell of the errors shows that head."""
        kinds = [trace["type"] for trace in self.figure.data]
        if point["trace"] == 0:
            self.set(step=int(point["x"]))
        elif kinds[point["trace"]] == "heatmap" and self.figure.data[point["trace"]].name == "errors":
            self.set(layer=int(point["y"]), head=int(point["x"]))

    def sweep_values(self) -> dict[str, list[Any]]:
        return {
            "step": list(range(self.trace.num_steps)),
            "layer": self.trace.layers,
            "head": list(range(self.trace.num_heads)),
            "kind": list(KINDS),
        }

    def _move(self, by: int) -> None:
        self.set(step=min(max(self.step + by, 0), self.trace.num_steps - 1))

    def _error_grid(self) -> np.ndarray | None:
        if self.trace.layers and self.kind not in self._errors:
            self._errors[self.kind] = error_grid(self.trace, self.kind)
        return self._errors.get(self.kind)


def decode_stepper(trace: DecodeTrace | str | Path, **state: Any) -> DecodeStepper:
    """Play, step and drag through a decode: text, pages, one head's attention, all heads' errors, next tokens.

    Args:
        trace: from `pqlab.trace_decode`, or the file that its `save` wrote (no model is needed then).
        **state: starting values, e.g. `step=20, layer=3, head=0, kind="end to end"`; see `.state` of the panel.
    """
    return DecodeStepper(trace if isinstance(trace, DecodeTrace) else DecodeTrace.load(trace), **state)


def _short(text: str, length: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
