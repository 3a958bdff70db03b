"""State of a panel: traits tagged `state=True`, read and set as one dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
        try:
            self._assign(values)
        except Exception:
            self._assign(before)  # all of them or none
            raise
        self.redraw()

    def in_force(self, name: str) -> Any:
        """The value of a state; where None leaves it to the panel, what the panel takes."""
        return getattr(self, name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Settings may change inside the block without a drawing; observers and controls follow as always."""
        held, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = held

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Set several settings without a drawing; observers are called when all are set."""
        with self.paused():
            for _ in range(2):  # again, since what an observer changed along with them gives way to what was asked for
                with self.hold_trait_notifications():
                    for name, value in values.items():
                        setattr(self, name, value)

    def _known(self, values: Iterable[str], also: tuple[str, ...] = ()) -> None:
        unknown = [name for name in values if name not in (*self.state_names(), *also)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no state {', '.join(unknown)}; it has {', '.join(self.state_names())}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.state.items())})"
