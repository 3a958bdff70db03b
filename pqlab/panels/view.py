"""One figure in the browser, sent whole once and then by what changes.

plotly's own `FigureWidget` carries plotly.js (5 MB) in every figure, evaluates it for each, and loses all later
updates when that takes longer than the two seconds that anywidget waits. Here plotly.js is sent once, with the first
figure of a kernel; it does not wait to be asked for, since a kernel that runs a whole notebook answers only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from ..figures.html_file import Plain, plain
from ..figures.theme import THEMES, template


def changes(before: Plain, after: Plain) -> Plain | None:
    """What turns one plain figure into another, for `view.js`: {"traces": {index: values}, "layout": values}.

    None where they do not have the same traces in the same order.
    """
    kinds = [[trace["type"] for trace in figure["data"]] for figure in (before, after)]
    if kinds[0] != kinds[1]:
        return None
    pairs = enumerate(zip(before["data"], after["data"], strict=True))
    traces = {str(i): found for i, (old, new) in pairs if (found := _differing(old, new))}
    return {"traces": traces, "layout": _differing(before["layout"], after["layout"])}


def _differing(old: Plain, new: Plain) -> Plain:
    gone = {key: None for key in old if key not in new}
    return gone | {key: value for key, value in new.items() if key not in old or old[key] != value}


class FigureView(anywidget.AnyWidget):
    """Shows a plotly figure; `show` changes it in place.

    Args:
        figure: what is shown first.
        theme: "light", "dark", or "auto": JupyterLab's, elsewhere the browser's.

    Attributes:
        on_click: called with {"trace", "x", "y", "z", "customdata"} of a clicked point.
    """

    _esm = Path(__file__).with_name("view.js")

    _sent: ClassVar[bool] = False
    """Whether a figure of this kernel has brought plotly.js along."""

    theme = traitlets.Enum(("auto", *THEMES), default_value="auto").tag(sync=True)
    _figure = traitlets.Dict().tag(sync=True)
    _templates = traitlets.Dict().tag(sync=True)
    _version = traitlets.Unicode().tag(sync=True)

    def __init__(self, figure: go.Figure, theme: str = "auto") -> None:
        self.on_click: Callable[[Plain], None] = lambda point: None
        super().__init__(
            theme=theme,
            layout=widgets.Layout(width="100%", overflow="auto hidden"),  # wider than the page: it is scrolled
            _figure=plain(figure),
            _templates={name: template(name).to_plotly_json() for name in THEMES},
            _version=get_plotlyjs_version(),
        )
        self.on_msg(self._answer)
        if not FigureView._sent:
            FigureView._sent = True
            self._send_plotlyjs()

    def show(self, figure: go.Figure) -> None:
        """Change the picture into `figure`; zoom and hidden traces stay as they are.

        What differs is sent where it has the same traces as before, which is quicker; else the whole figure.
        """
        after = plain(figure)
        patch = changes(self._figure, after)
        if patch is None:
            self._figure = after
        elif patch["traces"] or patch["layout"]:
            self._trait_values["_figure"] = after  # a page that opens later gets it whole; open ones get the patch
            self.send({"kind": "patch", **patch})

    def _answer(self, _: Any, message: Plain, buffers: list[Any]) -> None:
        if message.get("kind") == "plotly.js":
            self._send_plotlyjs()
        elif message.get("kind") == "click":
            self.on_click(message["point"])

    def _send_plotlyjs(self) -> None:
        self.send({"kind": "plotly.js"}, buffers=[get_plotlyjs().encode()])
