"""Settings of the quantizer and of the cache, with the report's parameters, defaults and ranges.

Two kinds of bounds: what the library can do (checked when a config is made, `ConfigError`), and the narrower ranges
of the report (`REPORT_RANGES`), which hold for the command line and the presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import Literal

from .errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Whole numbers from low to high (both included) that are multiples of step."""

    low: int
    high: int
    step: int = 1

    def nearest(self, value: float) -> int:
        """The good value closest to `value`; the smaller of two."""
        steps = -int((self.step / 2 - value) // self.step)  # rounds halves down
        return min(max(steps * self.step, self.low), self.high)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.nearest(value) == value

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + (f", a multiple of {self.step}" if self.step > 1 else "")


REPORT_RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "page_size": Range(16, 512, 16),
        "extended_residual": Range(32, 1024),
        "max_pages": Range(100, 10_000),
        "M": Range(16, 128),
        "nbits": Range(4, 8),
    }
)
"""The report's ranges (its appendix A) under the names of its command line."""

DEFAULTS: Mapping[str, int] = MappingProxyType(
    {"page_size": 64, "extended_residual": 128, "max_pages": 1000, "M": 64, "nbits": 8}
)
"""The report's defaults. The library's own are those of the configs: M = d/2, pages as context and memory ask."""


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
        _require_int(self, "nbits", 1, 8)
        _require_int(self, "M", 1, None)

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
        policy: name of the page strategy (`pqlab.paging.policy.POLICIES`); looked up when a pool is made.
        mode: "eager" takes pages as needed; "static" fixes capacity and shapes for graphs.
    """

    page_size: int = 64
    residual_length: int = 128
    max_pages: int | None = None
    num_sinks: int = 4
    policy: str = "lifo"
    mode: Literal["eager", "static"] = "eager"

    def __post_init__(self) -> None:
        _require_int(self, "page_size", 16, 512, step=16)
        _require_int(self, "residual_length", 1, None)
        _require_int(self, "num_sinks", 0, None)
        _require_int(self, "max_pages", 1, None)
        if self.mode not in ("eager", "static"):
            raise ConfigError(f'mode = {self.mode!r} is unknown; set "eager" or "static"')

    @property
    def window_length(self) -> int:
        """Tokens the window's buffer holds: R plus the page that waits to be flushed."""
        return self.residual_length + self.page_size

    def flush_count(self, coded: int, window: int) -> int:
        """How many of the oldest of `window` tokens leave it for pages, which hold `coded` tokens of the sequence: none
        while the buffer is not full, else the most that end on a page's edge and leave R or more."""
        if window < self.window_length:
            return 0
        spare = window - self.residual_length
        return spare - (coded + spare) % self.page_size


@dataclass(frozen=True)
class RangeProblem:
    """A setting outside the report's range, or an M that does not divide the head size."""

    name: str
    value: int
    low: int
    high: int
    nearest: int
    message: str


def check_report_ranges(*, head_dim: int | None = None, **params: int | None) -> list[RangeProblem]:
    """What is wrong with settings under the report's names, in the order given; empty when all is well.

    Settings that are None are left to a default and not checked. With `head_dim`, M also has to divide it.

    Raises:
        ConfigError: a name that the report does not have.
    """
    problems = []
    for name, value in params.items():
        if name not in REPORT_RANGES:
            raise ConfigError(f"{name} is no parameter of the report; it has {', '.join(REPORT_RANGES)}")
        if value is None:
            continue
        bounds = REPORT_RANGES[name]
        nearest = bounds.nearest(value)
        reason = f"is outside the report's range ({bounds})" if value not in bounds else ""
        if name == "M" and head_dim is not None:
            nearest = min(good_subspaces(head_dim), key=lambda m: abs(m - value))
            if value < 1 or head_dim % value:
                reason = f"does not divide the head size {head_dim}" + (f" and {reason}" if reason else "")
        if reason:
            text = f"{name} = {value} {reason}; the nearest good value is {nearest}"
            problems.append(RangeProblem(name, value, bounds.low, bounds.high, nearest, text))
    return problems


def good_subspaces(head_dim: int) -> list[int]:
    """Every M that divides a head of `head_dim` elements and is in the report's range; if none is, all divisors."""
    divisors = [m for m in range(1, head_dim + 1) if head_dim % m == 0]
    return [m for m in divisors if m in REPORT_RANGES["M"]] or divisors


def report_params(cache: CacheConfig, pq: PQConfig) -> dict[str, int | None]:
    """The settings under the report's names."""
    return {
        "page_size": cache.page_size,
        "extended_residual": cache.residual_length,
        "max_pages": cache.max_pages,
        "M": pq.M,
        "nbits": pq.nbits,
    }


def _require_int(config: object, name: str, low: int, high: int | None, step: int = 1) -> None:
    """Check a field and make it an int: numpy's whole numbers are taken, too, and None where it is the default."""
    value = getattr(config, name)
    if value is None and getattr(type(config), name) is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} = {value!r} is not a whole number")
    object.__setattr__(config, name, int(value))
    bound = f"{low} to {high}" if high is not None else f"at least {low}"
    multiple = f", a multiple of {step}" if step > 1 else ""
    nearest = max(low, round(value / step) * step)
    nearest = min(nearest, high) if high is not None else nearest
    if nearest != value:
        raise ConfigError(f"{name} = {value} is out of range ({bound}{multiple}); the nearest good value is {nearest}")
