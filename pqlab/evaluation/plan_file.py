"""What `plan` chose, and the file that it lives in: codebooks with a configuration and a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..cache import PagedPQCache
from ..config import CacheConfig
from ..errors import ConfigError
from ..memory import MIB
from ..quantization import Codebooks
from ..quantization.codebook_file import read
from .methods import stored_bytes
from .options import COLUMNS as TRIED
from .predicted_kl import COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` chose.

    Attributes:
        codebooks: a codec per (layer, side), with the M that was chosen.
        config: sinks, residual length and page size that the measurements hold for.
        choices: layer, side, M, nbits (both 0 for an exact layer), bits (per element), kl (nats; predicted, of this
            side alone).
        certificate: what was measured, on what, with which error bars, and for a context what else was to be had.
    """

    codebooks: Codebooks
    config: CacheConfig
    choices: pd.DataFrame
    certificate: Mapping[str, Any]

    @property
    def bits(self) -> float:
        """Token bits: codes per element, averaged over layers and sides."""
        return self.codebooks.bits_per_element

    @property
    def tried(self) -> pd.DataFrame:
        """The sinks and windows that the plan was chosen from: num_sinks, residual_length, bits, predicted_kl, bytes.

        Under a budget of bytes, the best that fits; under one of KL, the fewest bytes predicted to keep it. Empty for
        a plan without a context.
        """
        return pd.DataFrame(self.certificate.get("tried", ()), columns=TRIED)

    def total_bytes(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens, model constants included; see `methods.sequence_bytes`."""
        return stored_bytes(self.codebooks, self.config, context)

    def cache(self, model: PreTrainedModel, **settings) -> PagedPQCache:
        """A cache of this plan; settings are those of `PagedPQCache`."""
        return PagedPQCache(model, self.codebooks, self.config, **settings)

    def save(self, path: str | Path) -> None:
        """One file, which `Codebooks.load` reads too."""
        choices = self.choices.to_dict("records")
        self.codebooks.save(path, {"config": asdict(self.config), "choices": choices, "certificate": self.certificate})

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Plan:
        """Read what `save` wrote; refused like `Codebooks.load` when it is not for `model`."""
        codebooks = Codebooks.load(path, model)
        header, _ = read(path)
        if "choices" not in header:
            raise ConfigError(f"{Path(path).name} holds codebooks without a plan; use Codebooks.load")
        choices = pd.DataFrame(header["choices"])[COLUMNS]
        return cls(codebooks, CacheConfig(**header["config"]), choices, header["certificate"])

    def __repr__(self) -> str:
        kl, error = (self.certificate[name] for name in ("kl", "kl_error"))
        around = "" if isnan(error) else f" +- {error:.5f}"  # one window has no error
        size = f"{self.bits:.3g} bits per element"
        if context := self.certificate.get("context"):
            exact = f"{self.config.num_sinks} sinks, R {self.config.residual_length}"
            size += f", {exact}, {self.total_bytes(context) / MIB:.2f} MiB at {context} tokens"
        return f"Plan({size}, KL {kl:.5f}{around} nats on {self.certificate['on']})"


def planned_config(path: str | Path) -> CacheConfig | None:
    """The sinks, residual length and page size that belong to a file: those of a plan for a context, else None."""
    header, _ = read(path)
    chosen = header.get("certificate", {}).get("context") is not None
    return CacheConfig(**header["config"]) if chosen else None


def planned_configs(paths: Sequence[str | Path]) -> dict[str, CacheConfig]:
    """`planned_config` of files that have one, by the files' stems."""
    return {Path(path).stem: own for path in paths if (own := planned_config(path)) is not None}
