"""Errors that carry a code and the setting to change.

The codes PQC001 to PQC004 are those of the MILLION PagedPQCache report (appendix: error codes). Every message says
what happened, with the numbers, and what to set instead.
"""

from __future__ import annotations


class PQCacheError(RuntimeError):
    """Base of all pqlab run-time errors; `code` is one of PQC001..PQC004 and `remedy` says what to change."""

    code = "PQC000"

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"[{self.code}] {what} {remedy}")


class PageAllocationError(PQCacheError):
    """PQC001: the pool has too few free pages. Raised before anything was changed."""

    code = "PQC001"


class KernelMissingError(PQCacheError):
    """PQC002: a kernel backend was demanded that cannot run here."""

    code = "PQC002"


class ResidualOverflowError(PQCacheError):
    """PQC003: one update brings more tokens than the residual window can take, or the window cannot be flushed."""

    code = "PQC003"


class OutOfMemoryError(PQCacheError):
    """PQC004: the pages do not fit into free memory. Raised before anything was allocated."""

    code = "PQC004"


class UnsupportedModelError(ValueError):
    """The model (or its mask) needs something the cache does not do; the message names it. Raised before generation."""


class ConfigError(ValueError):
    """A setting is out of its range; the message names the value, the range and the nearest good value."""
