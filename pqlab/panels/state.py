"""State of a panel: traits tagged `state=True`, read and set as one dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import traitlets


class Stateful(traitlets.HasTraits):
    """Traits tagged `state=True` are the state; `redraw` is called once after every change of it through `state`."""

    def __init__(self, **values: Any) -> None:
        self._holding = True  # a subclass is not ready for observers yet
        super().__init__(**values)
        self._holding = False

    def redraw(self) -> None:
        """Bring the view up to date."""

    @classmethod
    def state_names(cls) -> list[str]:
        """Names of the state's traits, in the order of their declaration."""
        own = ((name, trait) for kind in reversed(cls.__mro__) for name, trait in vars(kind).items())
        return list(dict.fromkeys(n for n, t in own if isinstance(t, traitlets.TraitType) and t.metadata.get("state")))

    @property
    def state(self) -> dict[str, Any]:
        """All settings of the panel as a dict; assign one (or a part of one) to set them with one redraw."""
        return {name: getattr(self, name) for name in self.state_names()}

    @state.setter
    def state(self, values: dict[str, Any]) -> None:
        self._known(values)
        before = self.state
        with self.paused():
            try:
                for name, value in values.items():
                    setattr(self, name, value)
            except traitlets.TraitError:
                for name, value in before.items():  # all of them or none
                    setattr(self, name, value)
                raise
        self.redraw()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Settings may change inside the block without a drawing; controls follow at its end."""
        held, self._holding = self._holding, True
        try:
            with self.hold_trait_notifications():
                yield
        finally:
            self._holding = held

    def _known(self, values: Iterable[str], also: tuple[str, ...] = ()) -> None:
        unknown = [name for name in values if name not in (*self.state_names(), *also)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no state {', '.join(unknown)}; it has {', '.join(self.state_names())}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.state.items())})"
