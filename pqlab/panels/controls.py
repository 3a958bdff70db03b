"""Controls bound to a panel's state: a slider with a number beside it, choices, switches, buttons.

A control never holds a value of its own: it sets the panel's state (errors go to the status line) and follows it, also
when what it was set to is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    step: int | Callable[[], int] = 1,
    values: Sequence[int] | Callable[[], Sequence[int]] = (),
    default: str = "",
    tooltip: str = "",
    used: Callable[[], bool] = lambda: True,
) -> widgets.Widget:
    """A slider from `low` to `high` (or over `values`) with a number entry beside it.

    What depends on other state (`high`, `step`, `values`) is a function, asked after every change; so is `used`:
    whether the state has an effect now, else both are disabled. The entry takes any number, also one outside the
    slider: what is wrong with it is for the panel to say. A state that may be None, which leaves it to the panel, has a
    box beside them that does so; `default` is its label.
    """
    kept: dict[str, Any] = {"description": description, "style": _WORDS, "tooltip": tooltip or description}
    wide = widgets.Layout(width="20em", margin="2px")  # told, since the two kinds of sliders have different ones
    if values:
        slider = widgets.SelectionSlider(options=tuple(_now(values)), readout=False, layout=wide, **kept)
    else:
        slider = widgets.IntSlider(value=low, min=low, max=max(low, _now(high)), readout=False, layout=wide, **kept)
    narrow = widgets.Layout(width="6em", flex="0 0 auto")  # on a narrow page the slider gives way
    entry = widgets.IntText(tooltip=tooltip or description, layout=narrow)

    def show() -> None:
        entry.value = panel.in_force(name)
        if values:
            if slider.options != (offered := tuple(_now(values))):
                slider.options = offered
            slider.value = _nearest(offered, entry.value)
        else:
            slider.max = max(low, _now(high))
            slider.step = entry.step = _now(step)
            slider.value = _on_grid(entry.value, low, slider.max, slider.step)
        slider.disabled = entry.disabled = not used()

    def choose(value: int) -> None:
        panel.set(**{name: value})

    bind(panel, show, (slider, choose), (entry, choose))
    slider.add_class(f"pqlab-{name}")
    entry.add_class(f"pqlab-{name}-entry")
    together = widgets.Layout(margin="0 1em 0 0", flex="0 0 auto", max_width="100%", overflow="visible")
    left = [_default(panel, name, default, f"{description}: {default}")] if default else []
    return widgets.HBox([slider, entry, *left], layout=together)


def choice(
    panel: Panel, name: str, description: str, options: Sequence[Any] | Mapping[str, Any], *, tooltip: str = ""
) -> widgets.Widget:
    """A drop-down list of values (or of labels to values)."""
    return _bound(panel, name, _list(description, options, tooltip))


def chooser(
    panel: Panel,
    description: str,
    options: Mapping[str, Any],
    current: Callable[[], Any],
    choose: Callable[[Any], None],
) -> widgets.Widget:
    """A drop-down list that sets several settings at once: `choose(value)` acts, `current()` says what is in force."""
    box = _list(description, options)

    def show() -> None:
        box.value = current()

    bind(panel, show, (box, choose))
    box.add_class(f"pqlab-{description}")
    return box


def switch(panel: Panel, name: str, description: str, *, tooltip: str = "") -> widgets.Widget:
    """On or off."""
    return _bound(panel, name, _checkbox(description, tooltip or description, margin="0 1em 0 0"))


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


def bind(panel: Panel, show: Callable[[], None], *boxes: tuple[Any, Callable[[Any], None]]) -> None:
    """Tie boxes to the state, each with what is done with a value that a person enters.

    `show()` brings them in line with the state: now, after every change of it, and when an entry was refused. What it
    changes is no entry.
    """
    showing = False

    def follow() -> None:
        nonlocal showing
        before, showing = showing, True
        try:
            show()
        finally:
            showing = before

    def listen(box: Any, act: Callable[[Any], None]) -> None:
        def entered(change: Any) -> None:
            if not showing:
                with panel.guarded():
                    act(change.new)
                follow()

        box.observe(entered, "value")

    follow()
    for box, act in boxes:
        listen(box, act)
    panel.observe(lambda _: follow(), panel.state_names())


def _bound(panel: Panel, name: str, box: Any) -> Any:
    def show() -> None:
        box.value = getattr(panel, name)

    bind(panel, show, (box, lambda value: panel.set(**{name: value})))
    box.add_class(f"pqlab-{name}")
    return box


def _default(panel: Panel, name: str, description: str, tooltip: str) -> widgets.Checkbox:
    """Whether a state is left to the panel; when it no longer is, it begins with what the panel took."""
    box = _checkbox(description, tooltip, margin="0 0 0 0.5em")

    def show() -> None:
        box.value = getattr(panel, name) is None

    def leave(whether: bool) -> None:
        panel.set(**{name: None if whether else panel.in_force(name)})

    bind(panel, show, (box, leave))
    box.add_class(f"pqlab-{name}-default")
    return box


def _checkbox(description: str, tooltip: str, margin: str) -> widgets.Checkbox:
    layout = widgets.Layout(width="auto", margin=margin)
    return widgets.Checkbox(description=description, tooltip=tooltip, indent=False, layout=layout)


def _list(description: str, options: Sequence[Any] | Mapping[str, Any], tooltip: str = "") -> widgets.Dropdown:
    longest = max(len(str(option)) for option in options)
    width = f"{max(26.5, 12 + 0.6 * longest):.0f}em"
    return widgets.Dropdown(
        options=list(options.items()) if isinstance(options, Mapping) else list(options),
        description=description,
        tooltip=tooltip or description,
        style=_WORDS,
        layout=widgets.Layout(width=width, max_width="100%", flex="0 0 auto", margin="0 1em 0 0"),
    )


def _now(bound: Any) -> Any:
    """A bound, or what the function that stands for it says."""
    return bound() if callable(bound) else bound


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value - wanted))


def _on_grid(wanted: int, low: int, high: int, step: int) -> int:
    """What a slider can show of a number; given anything else the browser would round it and send it back as set."""
    return min(max(low + round((wanted - low) / step) * step, low), low + (high - low) // step * step)
