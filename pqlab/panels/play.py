"""A play button that runs a state of a panel through its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from .base import Panel


def play(panel: Panel, name: str, high: Callable[[], int], *, interval: int = 900) -> widgets.Play:
    """Counts `name` from 0 to `high()`, a step every `interval` milliseconds; follows the state when it is dragged."""
    button = widgets.Play(
        value=getattr(panel, name), max=high(), interval=interval, show_repeat=False, tooltip=f"play {name}"
    )
    following = False

    def follow(_: Any) -> None:
        nonlocal following
        following = True
        try:
            button.max = high()
            button.value = getattr(panel, name)
        finally:
            following = False

    def count(change: Any) -> None:
        if not following:
            panel.set(**{name: change.new})

    panel.observe(follow, panel.state_names())
    button.observe(count, "value")
    button.add_class(f"pqlab-{name}-play")
    return button
