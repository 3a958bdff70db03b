"""Where the labels of points go, so that they lie neither on each other nor on other points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .theme import FONT_SIZE

_PLACES = (
    *("middle right", "top right", "bottom right", "top center", "bottom center"),
    *("middle left", "top left", "bottom left"),
)
_POINT = 7  # half of a point's size, pixels

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, pixels."""


def label_places(x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> list[str]:
    """plotly's `textposition` of every point: one after the other takes the place that covers least.

    Args:
        x, y: pixels, y upwards. They need not be exact: whoever draws only guesses how wide the picture is shown.
    """
    points = [(px - _POINT, py - _POINT, px + _POINT, py + _POINT) for px, py in zip(x, y, strict=True)]
    taken: list[Box] = list(points)
    found = []
    for px, py, text in zip(x, y, texts, strict=True):
        boxes = [_box(px, py, text, place) for place in _PLACES]
        best = int(np.argmin([sum(_shared(box, other) for other in taken) for box in boxes]))  # the first of equals
        taken.append(boxes[best])
        found.append(_PLACES[best])
    return found


def _box(x: float, y: float, text: str, place: str) -> Box:
    width, height = 0.58 * FONT_SIZE * len(text), 1.2 * FONT_SIZE
    up, along = place.split()
    left = {"right": x + _POINT, "left": x - _POINT - width, "center": x - width / 2}[along]
    bottom = {"top": y + _POINT / 2, "middle": y - height / 2, "bottom": y - _POINT / 2 - height}[up]
    if along == "center":  # beside a point a label may begin at its height, above and below it may not
        bottom += {"top": _POINT / 2, "bottom": -_POINT / 2}[up]
    return left, bottom, left + width, bottom + height


def _shared(one: Box, other: Box) -> float:
    """Square pixels that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0) * max(up, 0)
