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
    wide = widgets.Layout(width="20em", margin="2px")  # told, since the two kinds of sliders have different ones
    if values:
        slider = widgets.SelectionSlider(
            options=list(values), value=_nearest(values, present), readout=False, layout=wide, **kept
        )
    else:
        top = high() if callable(high) else high
        slider = widgets.IntSlider(
            value=_on_grid(present, low, top, step), min=low, max=top, step=step, readout=False, layout=wide, **kept
        )
    narrow = widgets.Layout(width="6em", flex="0 0 auto")  # on a narrow page the slider gives way
    entry = widgets.IntText(value=present, step=step, tooltip=tooltip or description, layout=narrow)
    guard = _Guard()

    def follow(change: Any) -> None:
        with guard.held():
            entry.value = change.new
            slider.value = (
                _nearest(values, change.new) if values else _on_grid(change.new, slider.min, slider.max, step)
            )

    def widen(_: Any) -> None:
        with guard.held():
            slider.max = high()  # type: ignore[operator]
            slider.value = _on_grid(getattr(panel, name), slider.min, slider.max, step)

    if callable(high):
        panel.observe(widen, panel.state_names())
    for control in (slider, entry):
        control.observe(guard.unless_held(lambda change: panel.set(**{name: change.new})), "value")
    panel.observe(follow, name)
    slider.add_class(f"pqlab-{name}")
    entry.add_class(f"pqlab-{name}-entry")
    together = widgets.Layout(margin="0 1em 0 0", flex="0 0 auto", max_width="100%", overflow="visible")
    return widgets.HBox([slider, entry], layout=together)


def choice(
    panel: Panel, name: str, description: str, options: Sequence[Any] | Mapping[str, Any], *, tooltip: str = ""
) -> widgets.Widget:
    """A drop-down list of values (or of labels to values)."""
    return _bound(panel, name, _list(description, options, getattr(panel, name), tooltip))


def chooser(
    panel: Panel,
    description: str,
    options: Mapping[str, Any],
    current: Callable[[], Any],
    choose: Callable[[Any], None],
) -> widgets.Widget:
    """A drop-down list that sets several settings at once: `choose(value)` acts, `current()` says what is in force."""
    box = _list(description, options, current())
    guard = _Guard()

    def follow(_: Any) -> None:
        with guard.held():
            box.value = current()

    def chosen(change: Any) -> None:
        with panel.guarded():
            choose(change.new)

    box.observe(guard.unless_held(chosen), "value")
    panel.observe(follow, panel.state_names())
    box.add_class(f"pqlab-{description}")
    return box


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


def _list(
    description: str, options: Sequence[Any] | Mapping[str, Any], value: Any, tooltip: str = ""
) -> widgets.Dropdown:
    longest = max(len(str(option)) for option in options)
    width = f"{max(26.5, 12 + 0.6 * longest):.0f}em"
    return widgets.Dropdown(
        options=list(options.items()) if isinstance(options, Mapping) else list(options),
        value=value,
        description=description,
        tooltip=tooltip or description,
        style=_WORDS,
        layout=widgets.Layout(width=width, max_width="100%", flex="0 0 auto", margin="0 1em 0 0"),
    )


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value - wanted))


def _on_grid(wanted: int, low: int, high: int, step: int) -> int:
    """What a slider can show of a number; given anything else the browser would round it and send it back as set."""
    return min(max(low + round((wanted - low) / step) * step, low), low + (high - low) // step * step)


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
