"""What is searched: page size, exact newest tokens, M, nbits and page policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import prod
from typing import Any, Literal

from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..kernels.cuda_config import NBITS as CUDA_NBITS
from ..paging.policy import POLICIES
from ..quantization import attention_geometry

PAGE_SIZES = (16, 32, 64, 128, 256)
"""The report's grid; with each, 2 and 4 times as many exact tokens."""
TIMES = (2, 4)
NBITS = (4, 6, 8)


@dataclass(frozen=True, order=True)
class Setting:
    """One point of a `Space`; `policy` is a page policy's name."""

    page_size: int
    residual_length: int
    M: int
    nbits: int
    policy: str = "lifo"

    @classmethod
    def of_row(cls, row: Any) -> Setting:
        """The setting of a row of `Search.frame`."""
        numbers = (int(row[name]) for name in ("page_size", "residual_length", "M", "nbits"))
        return cls(*numbers, str(row["policy"]))

    def cache(self, mode: Literal["eager", "static"] = "eager") -> CacheConfig:
        return CacheConfig(self.page_size, self.residual_length, policy=self.policy, mode=mode)

    def pq(self) -> PQConfig:
        return PQConfig(M=self.M, nbits=self.nbits)

    def params(self) -> dict[str, Any]:
        """As Optuna keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"page {self.page_size}, R {self.residual_length}, M {self.M}, {self.nbits} bits, {self.policy}"


@dataclass(frozen=True)
class Space:
    """Values that a search may take, each field in the order it is tried.

    Raises:
        ConfigError: an empty field, or a value that no cache takes.
    """

    page_size: tuple[int, ...]
    residual_length: tuple[int, ...]
    M: tuple[int, ...]
    nbits: tuple[int, ...]
    policy: tuple[str, ...] = ("lifo",)

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name):
                raise ConfigError(f"{field.name} has no value to try; give at least one")
        for page_size, residual in product(self.page_size, self.residual_length):
            CacheConfig(page_size, residual)
        for m, nbits in product(self.M, self.nbits):
            PQConfig(m, nbits)
        for name in self.policy:
            if name not in POLICIES:
                raise ConfigError(f"policy = {name!r} is unknown; set one of {', '.join(sorted(POLICIES))}")

    @classmethod
    def of(cls, model: Any, **chosen: Sequence[Any] | None) -> Space:
        """The space for a model: what is not chosen is the report's grid, M of d/4 and d/2, every policy, and the bits
        that its device has kernels for.

        Raises:
            ConfigError: M does not divide a head size of the model.
        """
        sizes = {d for _, d in attention_geometry(model).values()}
        d = min(sizes)
        values: dict[str, Sequence[Any]] = {
            "page_size": PAGE_SIZES,
            "residual_length": sorted({times * page for times in TIMES for page in PAGE_SIZES}),
            "M": [m for m in (d // 4, d // 2) if m],
            "nbits": CUDA_NBITS if model.device.type == "cuda" else NBITS,
            "policy": sorted(POLICIES, key=lambda name: (name != "lifo", name)),
        }
        values |= {name: given for name, given in chosen.items() if given}
        for m, size in product(values["M"], sizes):
            PQConfig(M=m).num_subspaces(size)
        return cls(**{name: tuple(dict.fromkeys(given)) for name, given in values.items()})

    @property
    def size(self) -> int:
        """Settings there are."""
        return prod(len(getattr(self, field.name)) for field in fields(self))

    def __contains__(self, setting: object) -> bool:
        return isinstance(setting, Setting) and all(
            getattr(setting, field.name) in getattr(self, field.name) for field in fields(self)
        )

    def report_grid(self) -> Iterator[Setting]:
        """The report's grid, page size times residual, as far as it lies in the space, at its most bits a token."""
        m, nbits, policy = max(self.M), max(self.nbits), self.policy[0]
        for page, times in product(PAGE_SIZES, TIMES):
            setting = Setting(page, times * page, m, nbits, policy)
            if setting in self:
                yield setting
