"""A play button that runs a state of a panel through its values."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets

from .base import Panel
from .controls import bind


def play(panel: Panel, name: str, high: Callable[[], int], *, interval: int = 900) -> widgets.Play:
    """Counts `name` from 0 to `high()`, a step every `interval` milliseconds; follows the state when it is dragged."""
    button = widgets.Play(max=high(), interval=interval, show_repeat=False, tooltip=f"play {name}")

    def show() -> None:
        button.max = high()
        button.value = getattr(panel, name)

    bind(panel, show, (button, lambda value: panel.set(**{name: value})))
    button.add_class(f"pqlab-{name}-play")
    return button
