"""The report's presets: settings by context length, by GPU memory and by scenario; and presets as files.

The tables give page_size / extended_residual / max_pages, and M for some scenarios. What a table leaves open keeps the
default: 128 exact tokens, M = d/2 (which is the report's 64 at its head size of 128).

    preset = Preset.load("tuned.json")      # what `python -m pqlab tune` has written
    books = pqlab.default_codebooks(model, tokenizer, preset.pq)
    cache = pqlab.PagedPQCache(model, books, preset.cache)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .config import DEFAULTS, CacheConfig, PQConfig
from .errors import ConfigError

KIB = 1024
SCHEMA, VERSION = "pqlab preset", 1


@dataclass(frozen=True)
class Preset:
    """Named settings; `cache.max_pages` is set in the report's. `about` is a few words for a person.

    `measured` is what a search found about them, and on what: plain JSON values, empty for the report's presets.
    """

    name: str
    about: str
    cache: CacheConfig
    pq: PQConfig
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def capacity(self) -> int:
        """Coded tokens that the pool holds, over all sequences."""
        assert self.cache.max_pages is not None
        return self.cache.page_size * self.cache.max_pages

    def save(self, path: str | Path) -> None:
        """One JSON file, which `load` reads."""
        content = {"schema": SCHEMA, "version": VERSION, **asdict(replace(self, measured=dict(self.measured)))}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Preset:
        """Read what `save` wrote.

        Args:
            model: a model (or its config) that the preset has to fit; None leaves that to `PagedPQCache`.

        Raises:
            ConfigError: no such file, no preset, one of a later pqlab, a setting that is unknown or out of its range,
                or an M that does not divide a head size of the model. The message names what does not fit.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the preset {path} cannot be read ({error.strerror}); python -m pqlab tune writes one"
                              ) from error  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{path.name} is no JSON ({error}); python -m pqlab tune writes a preset") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ConfigError(f'{path.name} is no preset: its "schema" is not "{SCHEMA}"; python -m pqlab tune writes '
                              "one")  # fmt: skip
        if content.get("version") != VERSION:
            raise ConfigError(
                f"{path.name} is a preset of version {content.get('version')}, this pqlab reads version {VERSION}; "
                "write it again with python -m pqlab tune, or install the pqlab that wrote it"
            )
        try:
            preset = cls(
                str(content.get("name", path.stem)),
                str(content.get("about", "")),
                _config(CacheConfig, content, "cache"),
                _config(PQConfig, content, "pq"),
                content.get("measured") or {},
            )
            if model is not None:
                from .quantization import attention_geometry

                for _, head_dim in attention_geometry(model).values():
                    preset.pq.num_subspaces(head_dim)
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from error
        return preset


def _config(kind: type, content: Mapping[str, Any], part: str) -> Any:
    """CacheConfig or PQConfig of a part of a preset's file; `ConfigError` names a field that does not fit."""
    given = content.get(part)
    if not isinstance(given, dict):
        raise ConfigError(f'"{part}" is missing; it holds the settings of a {kind.__name__}')
    known = [one.name for one in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f'"{part}" has the unknown setting {unknown[0]!r}; a {kind.__name__} has {", ".join(known)}')
    if kind is CacheConfig:
        from .paging.policy import POLICIES

        if given.get("policy", "lifo") not in POLICIES:
            raise ConfigError(f"policy = {given['policy']!r} is unknown; set one of {', '.join(sorted(POLICIES))}")
    return kind(**given)


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
