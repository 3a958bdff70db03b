"""How many tokens a plan keeps exact: the sinks and windows it may choose, and what they do to the KL, measured.

A larger window costs bytes and takes tokens from the codes. By what factor the KL changes with it hardly depends on
these codes, and by what factor with the sinks hardly on the window (`LOG.md`): so both are measured along a line each,
with one set of codebooks, and multiplied. Codebooks stay as they are: the calibration knows no window, and leaves out
the first tokens of a text, which attention treats unlike all others, however many of them a cache keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from ..config import CacheConfig
from ..cost import coded_tokens
from ..errors import ConfigError
from .fidelity import compare
from .teacher_forced import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINKS = (0, 1, 2, 4, 8)
RESIDUALS = (32, 64, 128, 256, 512)
"""What a plan for a context chooses from, if nothing else is said."""

_SHARE = 4  # of a window of text, as a quarter, that a residual window may take if the context goes on behind it


@dataclass(frozen=True)
class ExactTokens:
    """One choice of sinks and window, and the KL that is measured with it over what `predict_kl` says."""

    config: CacheConfig
    factor: float = 1.0


def exact_sizes(
    base: CacheConfig, sinks: Sequence[int] | None, residuals: Sequence[int] | None, context: int | None, length: int
) -> list[CacheConfig]:
    """`base` with every pair of sinks and window to choose from; just `base` without a context.

    Args:
        sinks, residuals: None takes `SINKS`, and of `RESIDUALS` what windows of `length` tokens can tell.
        context: tokens of the sequences that a plan is for.

    Raises:
        ConfigError: a size that no cache has, that `length` cannot tell, or with which nothing is left to be coded;
            sizes without a context.
    """
    if context is None:
        if sinks is not None or residuals is not None:
            raise ConfigError(
                "sinks and residuals are chosen for a context: give context=, or a config with one of each"
            )
        return [base]
    most = context if length >= context else length // _SHARE
    if residuals is not None and max(residuals, default=0) > most:
        raise ConfigError(
            f"residuals up to {max(residuals)} cannot be told on windows of {length} tokens of a context of {context}; "
            f"give length = {min(context, _SHARE * max(residuals))}, or residuals up to {most}"
        )
    residuals = [r for r in RESIDUALS if r <= most] if residuals is None else sorted({*residuals})
    every = [
        replace(base, num_sinks=s, residual_length=r)
        for s in sorted({*(SINKS if sinks is None else sinks)})
        for r in residuals
    ]
    found = [config for config in every if coded_tokens(min(context, length) - 1, config)]
    if not found:
        raise ConfigError(
            f"sinks = {sinks} and residuals = {residuals} leave nothing to choose from: with pages of {base.page_size} "
            f"no token of a context of {context} or of windows of {length} would be coded; give smaller ones, or a "
            "longer context"
        )
    return found


def mean_kl(frame: pd.DataFrame, context: int) -> float:
    """Mean KL over the positions of a sequence of `context` tokens, from that of windows of a text.

    What lies behind shorter windows is taken to be like their last quarter, which still flatters large residual
    windows a little: of the tokens behind, they hold a smaller share (`LOG.md`).

    Args:
        frame: of one method, as `fidelity.compare` returns it.
    """
    length = int(frame.position.max()) + 1
    behind = max(0, context - length)
    late = frame.kl[frame.position >= length - length // _SHARE].mean()
    return float((length * frame.kl.mean() + behind * late) / (length + behind))


def measured(
    model: PreTrainedModel,
    windows: list[Tensor],
    quantize: Quantize,
    predicted: float,
    base: CacheConfig,
    configs: Sequence[CacheConfig],
    *,
    context: int,
    progress: bool = False,
) -> list[ExactTokens]:
    """Factors of `configs`: a run for every number of sinks beside the window of `base`, one for every window.

    Args:
        windows, quantize: what the runs are made with; see `fidelity.compare`.
        predicted: KL of `quantize` under `base` as `predict_kl` has it.
        context: tokens of the sequences that a plan is for; see `mean_kl`.
    """
    sinks = {c: replace(base, num_sinks=c.num_sinks) for c in configs}
    residuals = {c: replace(base, residual_length=c.residual_length) for c in configs}
    runs = {f"{c.num_sinks} sinks, R {c.residual_length}": c for c in (base, *sinks.values(), *residuals.values())}
    frame = compare(model, windows, dict.fromkeys(runs, quantize), own_configs=runs, progress=progress)
    kl = {runs[name]: mean_kl(part, context) for name, part in frame.groupby("method")}
    if not kl[base] or not predicted:
        raise ConfigError(
            f"with the {base.num_sinks} sinks and R {base.residual_length} of the config nothing is coded of the "
            "windows that costs are measured on; give a config with a smaller residual_length"
        )
    return [ExactTokens(c, kl[sinks[c]] * kl[residuals[c]] / kl[base] / predicted) for c in configs]
