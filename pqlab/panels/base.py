"""`Panel`: state, controls, one figure and a status line. Every view is a subclass that adds no arithmetic.

A subclass declares its state as traits tagged `state=True`, builds its controls once in `controls()`, and returns from
`draw()` what a pure function of `pqlab.figures` made of that state. The base keeps one view and changes it in place.
In JupyterLab an exception in a callback vanishes in a log; here it is shown in the status line and kept in `error`.
The figure stays as it was, and the state goes back to what the figure shows.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets

from ..figures.theme import THEMES
from .latest import Latest
from .state import Stateful
from .view import FigureView

if TYPE_CHECKING:
    import pandas as pd


class Panel(Stateful):
    """One view: display it in a cell, or read and set its state as values.

    With the environment variable PQLAB_PANELS=static it is displayed as HTML that needs no kernel: for notebooks that
    are executed into HTML files.

    Args:
        **state: starting values of the state's traits (and `theme`).

    Attributes:
        theme: "light", "dark", or "auto": JupyterLab's theme, elsewhere the browser's.
        error: the exception of the last callback, or None. The status line shows it.
    """

    title: ClassVar[str] = ""
    sweep: str = ""
    """Name of the state that gets a slider in the file that `to_html` writes."""

    _static: ClassVar[bool] = False
    """Whether a panel of this process was shown as static HTML, plotly.js included."""

    theme = traitlets.Enum(("auto", *THEMES), default_value="auto")

    def __init__(self, **state: Any) -> None:
        self._known(state, also=("theme",))
        self._closed = False
        self._figure: go.Figure | None = None
        self._drawn: dict[str, Any] | None = None  # the state that the figure shows, to go back to
        self._view: FigureView | None = None
        self._widget: widgets.Widget | None = None
        self._latest = Latest()
        self.error: BaseException | None = None
        self._warned = ""
        self._status = widgets.HTML(layout=widgets.Layout(min_height="1.6em"))
        self._status.add_class("pqlab-status")
        self._text = widgets.HTML()
        self._text.add_class("pqlab-text")
        super().__init__(**state)
        self.observe(self._follow_state, names=self.state_names())

    # what a subclass gives

    def controls(self) -> list[widgets.Widget]:
        """The controls, built once; see `pqlab.panels.controls`."""
        return []

    def text(self) -> str:
        """HTML between controls and figure, asked for after every change; "" for none."""
        return ""

    def below(self) -> list[widgets.Widget]:
        """Widgets under the figure, built once; `refresh` keeps them right."""
        return []

    def draw(self) -> go.Figure:
        """The figure of the present state; always the same traces in the same order. The base adds the theme."""
        raise NotImplementedError(f"{type(self).__name__} has no draw()")

    def refresh(self) -> None:
        """Called after every change, also one that was refused: bring the widgets of `below()` up to date."""

    def warning(self) -> str:
        """What the status line warns of while this state lasts, asked for after every change; "" for nothing."""
        return ""

    def click(self, point: dict[str, Any]) -> None:
        """Called when a point of the figure is clicked: trace (its number), x, y, z, customdata."""

    def frame(self) -> pd.DataFrame:
        """What the figure shows, as a table."""
        raise NotImplementedError(f"{type(self).__name__} has no frame()")

    def sweep_values(self) -> dict[str, Iterable[Any]]:
        """What the slider of `to_html` can run over: names of the state, and the values of each."""
        return {}

    # view

    @property
    def figure(self) -> go.Figure:
        """The figure that is shown now."""
        if self._figure is None:
            self._keep(self.draw())
        return self._figure

    @property
    def view(self) -> FigureView:
        """The figure's widget alone; built when first asked for, changed in place from then on."""
        if self._view is None:
            first = go.Figure(layout={"height": 120})  # shown if the very first state cannot be drawn
            with self.guarded():
                first = self.figure
            self._view = FigureView(first, self.theme)
            self._view.on_click = self._clicked
            traitlets.dlink((self, "theme"), (self._view, "theme"))
        return self._view

    @property
    def widget(self) -> widgets.Widget:
        """The whole panel as one widget, to be placed into layouts of your own."""
        if self._widget is None:
            # "visible": boxes have scroll bars by default, and get them for a pixel that rounding adds
            flow = {"flex_flow": "row wrap", "align_items": "center", "overflow": "visible"}
            row = widgets.Box(self.controls(), layout=widgets.Layout(**flow))
            heading = [widgets.HTML(f"<b>{html.escape(self.title)}</b>")] if self.title else []
            self._widget = widgets.VBox(
                [*heading, row, self._text, self.view, self._status, *self.below()],
                layout=widgets.Layout(width="100%", overflow="auto hidden"),  # a table may be wider than the page
            )
            self._widget.add_class("pqlab-panel")
            with self.guarded(clears=False):
                self._refresh()
        return self._widget

    def redraw(self) -> None:
        """Draw the present state anew; what cannot be drawn is taken back, and the status line says why."""
        if self._holding or self._closed or (self._figure is None and self._view is None):
            return
        with self.guarded():
            try:
                self._keep(self.draw())
                if self._view is not None:
                    self._view.show(self._figure)
            except Exception:
                if self._drawn is not None:
                    self._assign(self._drawn)
                raise
            finally:
                self._refresh()

    def _follow_state(self, _: Any) -> None:
        if self.state != self._drawn:  # it may be drawn already: another observer changed something along with it
            self.redraw()

    def _keep(self, figure: go.Figure) -> None:
        self._figure, self._drawn = figure, self.state

    def _refresh(self) -> None:
        if self._widget is not None:
            self._text.value = self.text()
            self._text.layout.display = None if self._text.value else "none"
            self.refresh()
            if self.warning() != self._warned:
                self._rest()

    def _rest(self) -> None:
        """The status line when there is no error, and nothing to tell of what has just been done."""
        self._warned = self.warning()
        self.say(self._warned, kind="warning" if self._warned else "note")

    # callbacks

    def set(self, **values: Any) -> None:
        """What a control calls: set state; a bad value goes to the status line and changes nothing."""
        self.view  # noqa: B018  built, and so drawn: there is a state to go back to
        with self.guarded():
            self.state = values

    def _clicked(self, point: dict[str, Any]) -> None:
        with self.guarded():
            self.click(point)

    @contextmanager
    def guarded(self, clears: bool = True) -> Iterator[None]:
        """Errors of the block are shown in the status line and kept in `error`, instead of being raised.

        A block without one clears an earlier error, unless `clears` is False.
        """
        before = self.error
        try:
            yield
        except Exception as error:
            self.error = error
            self.say(_message(error), kind="error")
        else:
            if clears and before is not None and self.error is before:  # not one that a redraw inside has just shown
                self.error = None
                self._rest()

    def background(self, work: Callable[[], Any], done: Callable[[Any], None], busy: str) -> None:
        """Run `work()` in the background, then `done(result)`; a newer call replaces one that waits."""

        def finish(result: Any, error: BaseException | None) -> None:
            if self._closed:
                return
            self._rest()
            with self.guarded():
                if error is not None:
                    raise error
                done(result)

        self.say(f"{busy} …", kind="busy")
        self._latest.submit(work, finish)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the background work is done and shown; False if `timeout` seconds were too short."""
        return self._latest.wait(timeout)

    def say(self, text: str, kind: str = "note") -> None:
        """Write the status line; kind is "note", "busy", "warning" or "error"."""
        mark, colour = {
            "note": ("", "inherit"),
            "busy": ("⏳ ", "inherit"),
            "warning": ("⚠ ", "var(--jp-warn-color0, #b85c00)"),
            "error": ("⚠ ", "var(--jp-error-color1, #c62828)"),
        }[kind]
        self._status.value = (
            f'<span role="status" class="pqlab-{kind}" style="color: {colour}">{mark}{html.escape(text)}</span>'
        )

    @property
    def status(self) -> str:
        """The status line as HTML."""
        return self._status.value

    # life

    def close(self) -> None:
        """Remove the panel's widgets from the page and from the kernel. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._latest.cancel()
        if self._view is not None:
            self._view.close()
        if self._widget is not None:
            _close_all(self._widget)
        self._status.close()
        self._text.close()
        self.unobserve_all()

    def to_html(self, path: str | os.PathLike[str], sweep: str | None = None) -> Path:
        """Write one self-contained HTML file (plotly.js inlined) that needs neither a server nor a kernel.

        Args:
            sweep: name of the state that the file's slider moves; default the panel's `sweep`, "" for none.
        """
        from .export import write_html

        return write_html(self, Path(path), self.sweep if sweep is None else sweep)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if os.environ.get("PQLAB_PANELS") == "static":  # notebooks that are executed into HTML files
            from .export import fragment

            first, Panel._static = not Panel._static, True
            return {"text/plain": repr(self), "text/html": fragment(self, self.sweep, plotlyjs=first)}
        return self.widget._repr_mimebundle_(**kwargs)


def _message(error: Exception) -> str:
    """What an error says; with its class where that is not in words (a KeyError says a key)."""
    said = str(error)
    return f"{type(error).__name__}: {said}" if not said or isinstance(error, KeyError) else said


def _close_all(widget: widgets.Widget) -> None:
    for child in getattr(widget, "children", ()):
        _close_all(child)
    widget.close()
