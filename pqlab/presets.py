"""The report's presets: settings by context length, by GPU memory and by scenario.

The tables give page_size / extended_residual / max_pages, and M for some scenarios. What a table leaves open keeps the
default: 128 exact tokens, M = d/2 (which is the report's 64 at its head size of 128).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from .config import DEFAULTS, CacheConfig, PQConfig
from .errors import ConfigError

KIB = 1024


@dataclass(frozen=True)
class Preset:
    """Named settings; `cache.max_pages` is always set. `about` is a few words for a person."""

    name: str
    about: str
    cache: CacheConfig
    pq: PQConfig

    @property
    def capacity(self) -> int:
        """Coded tokens that the pool holds, over all sequences."""
        assert self.cache.max_pages is not None
        return self.cache.page_size * self.cache.max_pages


def _preset(
    name: str, about: str, page_size: int, residual: int | None, max_pages: int, M: int | None = None
) -> tuple[str, Preset]:
    residual = DEFAULTS["extended_residual"] if residual is None else residual
    cache = CacheConfig(page_size=page_size, residual_length=residual, max_pages=max_pages)
    return name, Preset(name, about, cache, PQConfig(M=M, nbits=DEFAULTS["nbits"]))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    dict(
        [
            _preset("default", "the report's defaults", 64, 128, 1000),
            _preset("context:<8K", "contexts below 8K tokens", 32, 64, 500),
            _preset("context:8K-32K", "contexts of 8K to 32K tokens", 64, 128, 1000),
            _preset("context:>32K", "contexts above 32K tokens", 128, 256, 2000),
            _preset("memory:<16GB", "a GPU below 16 GB (development)", 32, None, 500),
            _preset("memory:16-32GB", "a GPU of 16 to 32 GB", 64, None, 1000),
            _preset("memory:32-64GB", "a GPU of 32 to 64 GB", 128, None, 2000),
            _preset("memory:>64GB", "a GPU above 64 GB (large batches)", 256, None, 4000),
            _preset("scenario:long-documents", "documents of 128K tokens and more", 128, 512, 8000, M=64),
            _preset("scenario:batch", "batch inference", 32, 64, 1000, M=32),
            _preset("scenario:memory-saving", "most memory saved", 64, 256, 4000),
            _preset("scenario:debugging", "debugging", 16, 32, 100, M=16),
        ]
    )
)
"""Every preset by its name, `kind:value`."""


def preset(name: str) -> Preset:
    """The preset of that name; `ConfigError` lists the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_for(*, context: int | None = None, memory_gib: float | None = None) -> Preset:
    """The preset of the report for a context (tokens), a memory (GiB), or both.

    With both, the context decides page size and exact tokens, and the memory bounds `max_pages`.

    Raises:
        ConfigError: neither is given, or one is not positive.
    """
    if context is None and memory_gib is None:
        raise ConfigError("preset_for needs context (tokens), memory_gib, or both")
    for name, value in (("context", context), ("memory_gib", memory_gib)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} = {value} is out of range (above 0); the nearest good value is 1")
    by_context = by_memory = None
    if context is not None:
        by_context = PRESETS[
            "context:<8K" if context < 8 * KIB else "context:8K-32K" if context <= 32 * KIB else "context:>32K"
        ]
    if memory_gib is not None:
        m = memory_gib
        by_memory = PRESETS[
            f"memory:{'<16GB' if m < 16 else '16-32GB' if m < 32 else '32-64GB' if m <= 64 else '>64GB'}"
        ]
    if by_context is None or by_memory is None:
        chosen = by_context or by_memory
        assert chosen is not None
        return chosen
    assert by_context.cache.max_pages is not None and by_memory.cache.max_pages is not None
    pages = min(by_context.cache.max_pages, by_memory.cache.max_pages)
    return Preset(
        f"{by_context.name} {by_memory.name}",
        f"{by_context.about}, {by_memory.about}",
        replace(by_context.cache, max_pages=pages),
        by_context.pq,
    )
