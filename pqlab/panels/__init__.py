"""What a person drags: one function call per view, each returning a `Panel` that a notebook cell displays.

`page_settings()`, `memory_layout()`, `page_allocation()`, `decode_stepper()` and `key_anchors()` live in the module of
their view and are loaded when first used, so that one panel costs the imports of one panel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocation import page_allocation
    from .anchors import key_anchors
    from .base import Panel
    from .layout import memory_layout
    from .settings import page_settings
    from .stepper import decode_stepper

__all__ = ["Panel", "decode_stepper", "key_anchors", "memory_layout", "page_allocation", "page_settings"]

_HOME = {
    "Panel": "base",
    "decode_stepper": "stepper",
    "key_anchors": "anchors",
    "memory_layout": "layout",
    "page_allocation": "allocation",
    "page_settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
