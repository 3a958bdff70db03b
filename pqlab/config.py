"""Settings of the quantizer and of the cache, with the report's parameters, defaults and ranges.

Two kinds of bounds: what the library can do (checked when a config is made, `ConfigError`), and the narrower ranges
of the report (`REPORT_RANGES`), which hold for the command line and the presets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError


@dataclass(frozen=True)
class PQConfig:
    """Product quantization of one head vector of d elements: M subspaces of d/M, `2**nbits` centroids each.

    Args:
        M: subspaces; None means d/2, that is 4 bits per element at nbits 8.
        nbits: bits per code, 1 to 8.
    """

    M: int | None = None
    nbits: int = 8

    def __post_init__(self) -> None:
        _require_int("nbits", self.nbits, 1, 8)
        if self.M is not None:
            _require_int("M", self.M, 1, None)

    def num_subspaces(self, head_dim: int) -> int:
        """M for heads of `head_dim` elements; raises `ConfigError` when M does not divide it."""
        m = self.M if self.M is not None else max(1, head_dim // 2)
        if head_dim % m:
            divisors = [n for n in range(1, head_dim + 1) if head_dim % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - m))
            raise ConfigError(f"M = {m} does not divide the head size {head_dim}; the nearest M that does is {nearest}")
        return m

    def bits_per_element(self, head_dim: int) -> float:
        return self.num_subspaces(head_dim) * self.nbits / head_dim


@dataclass(frozen=True)
class CacheConfig:
    """Pages and exact tokens of a `PagedPQCache`.

    Args:
        page_size: tokens per page, 16 to 512, a multiple of 16.
        residual_length: R, newest tokens that are always exact (the report's extended_residual); tokens.
        max_pages: pages of the pool; None sizes the pool from the context, the batch and the free memory.
        num_sinks: first tokens of every sequence that stay exact for ever; tokens.
        policy: name of the page strategy (`pqlab.paging.policy.POLICIES`).
        mode: "eager" takes pages as needed; "static" fixes capacity and shapes for graphs.
    """

    page_size: int = 64
    residual_length: int = 128
    max_pages: int | None = None
    num_sinks: int = 4
    policy: str = "lifo"
    mode: Literal["eager", "static"] = "eager"

    def __post_init__(self) -> None:
        _require_int("page_size", self.page_size, 16, 512, step=16)
        _require_int("residual_length", self.residual_length, 1, None)
        _require_int("num_sinks", self.num_sinks, 0, None)
        if self.max_pages is not None:
            _require_int("max_pages", self.max_pages, 1, None)
        if self.mode not in ("eager", "static"):
            raise ConfigError(f'mode = {self.mode!r} is unknown; set "eager" or "static"')

    @property
    def window_length(self) -> int:
        """Tokens the window's buffer holds: R plus the page that waits to be flushed."""
        return self.residual_length + self.page_size


def _require_int(name: str, value: object, low: int, high: int | None, step: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r} is not a whole number")
    bound = f"{low} to {high}" if high is not None else f"at least {low}"
    multiple = f", a multiple of {step}" if step > 1 else ""
    nearest = max(low, round(value / step) * step)
    nearest = min(nearest, high) if high is not None else nearest
    if nearest != value:
        raise ConfigError(f"{name} = {value} is out of range ({bound}{multiple}); the nearest good value is {nearest}")
