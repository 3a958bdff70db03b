"""Controls bound to a panel's state: a slider with a number beside it, choices, switches, buttons.

A control never holds a value of its own: it sets the panel's state (errors go to the status line) and follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets as widgets

from .base import Panel

_WORDS = {"description_width": "8.5em"}


def number(
    panel: Panel,
    name: str,
    description: str,
    *,
    low: int = 0,
    high: int | Callable[[], int] = 0,
    step: int = 1,
    values: Sequence[int] = (),
    tooltip: str = "",
) -> widgets.Widget:
    """A slider from `low` to `high` (or over `values`) with a number entry beside it.

    A `high` that depends on other state is a function, asked after every change. The entry takes any number, also one
    outside the slider: what is wrong with it is for the panel to say.
    """
    present = getattr(panel, name)
    kept: dict[str, Any] = {"description": description, "style": _WORDS, "tooltip": tooltip or description}
    wide = widgets.Layout(width="20em")
    if values:
        slider = widgets.SelectionSlider(
            options=list(values), value=_nearest(values, present), readout=False, layout=wide, **kept
        )
    else:
        top = high() if callable(high) else high
        slider = widgets.IntSlider(
            value=min(max(present, low), top), min=low, max=top, step=step, readout=False, layout=wide, **kept
        )
    narrow = widgets.Layout(width="6em")
    entry = widgets.IntText(value=present, step=step, tooltip=tooltip or description, layout=narrow)
    guard = _Guard()

    def follow(change: Any) -> None:
        with guard.held():
            entry.value = change.new
            slider.value = _nearest(values, change.new) if values else min(max(change.new, slider.min), slider.max)

    def widen(_: Any) -> None:
        with guard.held():
            slider.max = high()  # type: ignore[operator]
            slider.value = min(max(getattr(panel, name), slider.min), slider.max)

    if callable(high):
        panel.observe(widen, panel.state_names())
    for control in (slider, entry):
        control.observe(guard.unless_held(lambda change: panel.set(**{name: change.new})), "value")
    panel.observe(follow, name)
    slider.add_class(f"pqlab-{name}")
    entry.add_class(f"pqlab-{name}-entry")
    return widgets.HBox([slider, entry], layout=widgets.Layout(margin="0 1em 0 0"))


def choice(
    panel: Panel, name: str, description: str, options: Sequence[Any] | Mapping[str, Any], *, tooltip: str = ""
) -> widgets.Widget:
    """A drop-down list of values (or of labels to values)."""
    box = widgets.Dropdown(
        options=list(options.items()) if isinstance(options, Mapping) else list(options),
        value=getattr(panel, name),
        description=description,
        tooltip=tooltip or description,
        style=_WORDS,
        layout=widgets.Layout(width="26.5em", margin="0 1em 0 0"),
    )
    return _bound(panel, name, box)


def toggles(panel: Panel, name: str, description: str, options: Sequence[Any] | Mapping[str, Any]) -> widgets.Widget:
    """A few values side by side, one of them pressed."""
    box = widgets.ToggleButtons(
        options=list(options.items()) if isinstance(options, Mapping) else list(options),
        value=getattr(panel, name),
        description=description,
        style={"description_width": "8.5em", "button_width": "auto"},
    )
    return _bound(panel, name, box)


def switch(panel: Panel, name: str, description: str, *, tooltip: str = "") -> widgets.Widget:
    """On or off."""
    box = widgets.Checkbox(
        value=getattr(panel, name),
        description=description,
        tooltip=tooltip or description,
        indent=False,
        layout=widgets.Layout(width="auto", margin="0 1em 0 0"),
    )
    return _bound(panel, name, box)


def button(panel: Panel, description: str, on_click: Callable[[], None], *, icon: str = "", tooltip: str = "") -> Any:
    """A button; errors of `on_click` go to the panel's status line."""
    box = widgets.Button(
        description=description, icon=icon, tooltip=tooltip or description, layout=widgets.Layout(width="auto")
    )

    def clicked(_: Any) -> None:
        with panel.guarded():
            on_click()

    box.on_click(clicked)
    return box


def _bound(panel: Panel, name: str, box: Any) -> Any:
    guard = _Guard()

    def follow(change: Any) -> None:
        with guard.held():
            box.value = change.new

    box.observe(guard.unless_held(lambda change: panel.set(**{name: change.new})), "value")
    panel.observe(follow, name)
    box.add_class(f"pqlab-{name}")
    return box


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value - wanted))


class _Guard:
    """Against echo: while a control follows the state, its own change event sets nothing."""

    def __init__(self) -> None:
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def unless_held(self, act: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda change: None if self._held else act(change)
