"""Where the labels of points go, so that they lie neither on each other nor on other points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .theme import FONT_SIZE

_PLACES = (
    *("top right", "bottom right", "bottom left", "middle left"),
    *("middle right", "top left", "top center", "bottom center"),
)
"""In the order that is tried."""
_POINT = 7  # half of a point's size, pixels
_LINE = 1.5  # half of a line's

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, pixels."""


def label_places(
    x: Sequence[float], y: Sequence[float], texts: Sequence[str], steps: Sequence[tuple[float, float]] = ()
) -> list[str]:
    """plotly's `textposition` of every point: one after the other takes the place that covers least.

    Args:
        x, y: pixels, y upwards. They need not be exact: whoever draws only guesses how wide the picture is shown.
        steps: corners of a line that goes right and then down to each (`Sheet.front`), to be kept free, too.
    """
    points = [(px - _POINT, py - _POINT, px + _POINT, py + _POINT) for px, py in zip(x, y, strict=True)]
    taken: list[Box] = list(points)
    for (left, high), (right, low) in pairwise(steps):
        taken += [(left, high - _LINE, right, high + _LINE), (right - _LINE, low, right + _LINE, high)]
    found = [""] * len(points)
    for i in np.argsort([-py for py in y], kind="stable"):  # the higher one of two neighbours has its label above
        boxes = [_box(x[i], y[i], texts[i], place) for place in _PLACES]
        best = int(np.argmin([sum(_shared(box, other) for other in taken) for box in boxes]))  # the first of equals
        taken.append(boxes[best])
        found[i] = _PLACES[best]
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
