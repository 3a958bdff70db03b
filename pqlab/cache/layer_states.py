"""Exact layers as they were, to be put back where a change is refused midway.

Those in front of the first quantized layer store a step's tokens before that layer asks for the step's pages and looks
at its mask: where the step is refused, what they have stored is taken back, so that all layers stand where they stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LayerStates:
    """Remembers layers, each from the moment that it is asked to.

    Layers of attention make new tensors at every step, so that remembering costs references. States of linear attention
    are written in place, and copied.

    Args:
        layers: transformers' own layers; an index of one here is its position among them.
    """

    def __init__(self, layers: Sequence) -> None:
        self.layers = list(layers)
        self._kept: dict[int, dict[str, Any]] = {}
        self._updated: set[int] = set()

    def __len__(self) -> int:
        return len(self.layers)

    def keep(self, index: int) -> None:
        """Remember a layer as it is, unless it is remembered already."""
        if index not in self._kept:
            layer = self.layers[index]
            self._kept[index] = _copied(vars(layer)) if hasattr(layer, "conv_states") else dict(vars(layer))

    def keep_before_update(self, index: int) -> None:
        """The same for the one `update` of a step.

        Raises:
            RuntimeError: the step before stopped in one of these layers, which have stored a part of it.
        """
        if index in self._updated:
            raise RuntimeError(
                f"layer {index} got new tokens twice before the first quantized layer got any: the last step was "
                "interrupted; call cache.reset() before going on"
            )
        self._updated.add(index)
        self.keep(index)

    def put_back(self) -> None:
        """The change was refused: the layers are what they were before it."""
        for index, kept in self._kept.items():
            vars(self.layers[index]).clear()
            vars(self.layers[index]).update(kept)
        self.forget()

    def forget(self) -> None:
        """The change is made, or there will be none: there is nothing to take back."""
        if self._kept:
            self._kept.clear()
            self._updated.clear()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
