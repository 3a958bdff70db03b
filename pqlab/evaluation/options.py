"""What a budget buys, predicted: for every choice of sinks and window the allocation of bits that fits or suffices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import ceil, inf
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ..config import CacheConfig
from ..errors import ConfigError
from ..memory import MIB
from ..quantization import attention_geometry
from .allocation import allocate, rows_of
from .exact_tokens import RESIDUALS, SINKS, ExactTokens
from .methods import sequence_bytes, token_elements

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ["num_sinks", "residual_length", "bits", "predicted_kl", "bytes"]

_STEPS = 57  # budgets of bits that are looked at between the smallest and the largest choices


@dataclass(frozen=True)
class Option:
    """An allocation beside a choice of sinks and window.

    Attributes:
        exact: sinks and window.
        budget: bits per element that `allocate` is given; bits: what it spends of them.
        kl: nats, predicted.
        size: bytes of a sequence, model constants included, or `bits` where no context counts.
    """

    exact: ExactTokens
    budget: float
    bits: float
    kl: float
    size: float


@dataclass(frozen=True, eq=False)
class Options:
    """Every allocation beside every choice of sinks and window.

    Args:
        costs: `predict_kl`, whose sums the factors of `exact` multiply.
        exact: sinks and windows to choose from.
        context: tokens of the sequence whose bytes count; None: bits count, and exact tokens cost nothing.
        constant_bytes: codebooks and maps, at most, and what keys are fitted with.
    """

    costs: pd.DataFrame
    exact: Sequence[ExactTokens]
    context: int | None = None
    constant_bytes: int = 0

    @property
    def lowest(self) -> int:
        """Bits per element of the smallest choice."""
        return int(self.costs.bits.min())

    @property
    def highest(self) -> int:
        """Bits per element of the largest choice."""
        return int(self.costs.bits.max())

    def at(self, exact: ExactTokens, budget: float) -> Option:
        """The option with these exact tokens that spends at most `budget` bits per element."""
        return self._option(exact, budget, *self._spent(budget))

    def within(self, num_bytes: float) -> list[Option]:
        """The best option of every choice of exact tokens that leaves room for the smallest codes."""
        found = []
        for exact in self.exact:
            none, one = (self._bytes(exact, bits) for bits in (0, self.lowest))
            budget = (num_bytes - none) / (one - none) * self.lowest
            if budget >= self.lowest:
                found.append(self.at(exact, budget))
        return found

    def keeping(self, kl: float) -> list[Option]:
        """The smallest option of every choice of exact tokens with which `kl` is predicted to be kept."""
        found = []
        for exact in self.exact:
            every = (self._option(exact, *point) for point in self._curve)
            found += islice((option for option in every if option.kl <= kl), 1)
        return found

    def least_bytes(self) -> int:
        """Bytes of the smallest codes with the fewest exact tokens."""
        return min(self._bytes(exact, self.lowest) for exact in self.exact)

    @cached_property
    def _elements(self) -> int:
        return int(self.costs.groupby(["layer", "side"]).elements.first().sum())

    @cached_property
    def _curve(self) -> list[tuple[float, float, float]]:
        """(budget, bits, KL), from the smallest choices to the largest."""
        budgets = torch.linspace(self.lowest, self.highest, _STEPS).tolist()
        return [(budget, *self._spent(budget)) for budget in budgets]

    def _spent(self, budget: float) -> tuple[float, float]:
        """Bits and KL of `allocate`."""
        rows = rows_of(self.costs, allocate(self.costs, budget))
        return float((rows.bits * rows.elements).sum() / self._elements), float(rows.kl.sum())

    def _option(self, exact: ExactTokens, budget: float, bits: float, kl: float) -> Option:
        size = bits if self.context is None else self._bytes(exact, bits)
        return Option(exact, budget, bits, exact.factor * kl, size)

    def _bytes(self, exact: ExactTokens, bits: float) -> int:
        page_bytes = ceil(exact.config.page_size * self._elements * bits / 8)
        return sequence_bytes(self.context, exact.config, page_bytes, self._elements, self.constant_bytes)


def records(options: Iterable[Option]) -> list[dict[str, float]]:
    """One record of `COLUMNS` an option, as JSON types."""
    return [
        {
            "num_sinks": option.exact.config.num_sinks,
            "residual_length": option.exact.config.residual_length,
            "bits": option.bits,
            "predicted_kl": option.kl,
            "bytes": option.size,
        }
        for option in options
    ]


def check_room(
    model: PreTrainedModel,
    mib: float,
    context: int,
    choices: Sequence[int],
    sinks: Sequence[int] | None = None,
    residuals: Sequence[int] | None = None,
    page_size: int = CacheConfig().page_size,
) -> None:
    """Raise `ConfigError` where a budget of `plan` cannot be met whatever is trained: before it takes minutes.

    Counted are the smallest codes and the fewest exact tokens, without the model constants.
    """
    smallest = CacheConfig(page_size, min(residuals or RESIDUALS), num_sinks=min(SINKS if sinks is None else sinks))
    elements = token_elements(attention_geometry(model))
    page_bytes = ceil(page_size * elements * min(choices) / 8)
    least = sequence_bytes(context, smallest, page_bytes, elements) / MIB
    if mib < least:
        raise ConfigError(
            f"mib = {mib:g} is below the smallest plan of {context} tokens, {least:.2f} MiB and the model constants; "
            "give more, a shorter context, or smaller choices or residuals"
        )


def check_budget(bits: float | None, mib: float | None, kl: float | None, context: int | None) -> None:
    """Raise `ConfigError` unless there is one budget above 0 that goes with the context, None where there is none."""
    given = {name: value for name, value in (("bits", bits), ("mib", mib), ("kl", kl)) if value is not None}
    if len(given) != 1:
        raise ConfigError("give one budget: bits= (per element), mib= (of a sequence of context= tokens) or kl= (nats)")
    ((name, value),) = given.items()
    if not 0 < value < inf:
        raise ConfigError(f"{name} = {value} is no budget; give a number above 0")
    if context is not None and context < 1:
        raise ConfigError(
            f"context = {context} is out of range (at least 1); give the tokens that a sequence may reach"
        )
    if name == "mib" and context is None:
        raise ConfigError(f"mib = {mib} is for a sequence of how many tokens? Give context=")
    if name == "bits" and context is not None:
        raise ConfigError(
            f"bits = {bits} counts no exact tokens, so the largest window would always win; for a context of "
            f"{context} tokens give mib= or kl=, or leave the context out"
        )
