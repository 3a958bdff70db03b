"""What was asked for, under the report's names, and what is wrong with it before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import DEFAULTS, REPORT_RANGES, CacheConfig, PQConfig, check_report_ranges
from ..cost import max_pages_for
from ..errors import ConfigError
from ..evaluation.evaluate import check_window
from ..evaluation.longbench.tasks import TASKS
from ..quantization import attention_geometry, merged_head_dim
from ..quantization.geometry import text_config
from ..quantization.samples import NUM_TOKENS

LONGBENCH = "longbench"


@dataclass(frozen=True)
class Settings:
    """One run. Names and defaults are the report's where it has them; lengths are tokens.

    Args:
        stages: in the order in which they run.
        model, random_weights: see `models.named.find_model`.
        dataset, data, calibration: see `corpora.Corpus`; LongBench's task names, "longbench" for all of them.
        M: None takes the report's 64 where it suits the heads, see `resolved_m`.
        merged: one codebook a side for all layers and heads.
        span: tokens whose keys share an anchor (`quantization.anchors`), of the codebooks that are trained or, with
            `codebooks`, of these; 0: keys are coded as the model makes them.
        paged: the paged cache; otherwise the standard one, contiguous and without fused kernels.
        windows, length: of perplexity and KL. context, new_tokens: of the timed generation.
        samples: tokens that codebooks are trained on. examples: of each LongBench task; None is all.
        codebooks: a file to evaluate instead of trained ones.
    """

    stages: tuple[str, ...]
    model: str = "default"
    random_weights: bool = False
    dataset: str = "pride"
    data: Path | None = None
    calibration: str | None = None
    batch: int = 1
    M: int | None = None
    nbits: int = DEFAULTS["nbits"]
    merged: bool = False
    span: int = 0
    half: bool = False
    paged: bool = False
    page_size: int = DEFAULTS["page_size"]
    extended_residual: int = DEFAULTS["extended_residual"]
    max_pages: int = DEFAULTS["max_pages"]
    sinks: int = CacheConfig().num_sinks
    windows: int = 2
    length: int = 2048
    context: int = 1024
    new_tokens: int = 64
    samples: int = NUM_TOKENS
    examples: int | None = None
    codebooks: Path | None = None
    breakdown: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """LongBench's tasks; empty for a text."""
        if self.dataset == LONGBENCH:
            return tuple(TASKS)
        return (self.dataset,) if self.dataset in TASKS else ()

    @property
    def cache(self) -> CacheConfig:
        """Of either cache; the contiguous one has no pages, tokens leave its window by the same rule."""
        pages = self.max_pages if self.paged else None
        return CacheConfig(self.page_size, self.extended_residual, pages, self.sinks)

    def typed(self) -> dict[str, Any]:
        """As JSON types, paths as they were typed: runs that differ in any of them are different experiments."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def record(self) -> dict[str, Any]:
        """As JSON types; of a path its name."""
        found = asdict(self)
        for name in ("model", "dataset", "calibration", "data", "codebooks"):
            if found[name] is not None and Path(found[name]).expanduser().exists():
                found[name] = Path(found[name]).expanduser().resolve().name
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def resolved_m(settings: Settings, config: Any) -> tuple[PQConfig, str]:
    """M and nbits for a model's heads, and a sentence about an M that is not the report's 64; "" otherwise.

    The report's M = 64 is made for heads of 128 elements. Where it does not divide the head size, or leaves subspaces
    of one element, d/2 is taken.
    """
    sizes = sorted({d for _, d in attention_geometry(config).values()})
    if settings.M is not None:
        return PQConfig(settings.M, settings.nbits), ""
    m = DEFAULTS["M"]
    if all(d % m == 0 and d >= 2 * m for d in sizes):
        return PQConfig(m, settings.nbits), ""
    halves = " and ".join(str(d // 2) for d in sizes)
    said = f"M = {halves}, half of the head size: the report's {m} is made for heads of 128, these have {sizes}"
    return PQConfig(sizes[0] // 2 if len(sizes) == 1 else None, settings.nbits), said


def check(settings: Settings, config: Any, random: bool) -> None:
    """Raise `ConfigError` with every problem, a line each.

    Args:
        config: of the model.
        random: its weights are random: nothing is evaluated on text.
    """
    said = []
    sizes = sorted({d for _, d in attention_geometry(config).values()})
    ranged = {name: getattr(settings, name) for name in REPORT_RANGES}
    for head_dim in sizes:
        problems = check_report_ranges(head_dim=head_dim, **ranged)
        said += [f"{_option(p.name)} {p.value}: {p.message}; type {_option(p.name)} {p.nearest}" for p in problems]
    for name in ("batch", "windows", "context", "new_tokens", "samples", "examples"):
        value = getattr(settings, name)
        least = 2 if name in ("context", "new_tokens") else 1
        if value is not None and value < least:
            said.append(f"--{name} {value} is too small; type --{name} {least} or more")
    if settings.sinks < 0:
        said.append(f"--sinks {settings.sinks} is below 0; type --sinks 0 or more")
    limit = getattr(text_config(config), "max_position_embeddings", None)
    if limit and settings.context + settings.new_tokens > limit:
        said.append(
            f"--context {settings.context} and --new_tokens {settings.new_tokens} are more than the model's {limit} "
            f"positions; type --context {max(2, limit - settings.new_tokens)} or less"
        )
    said = list(dict.fromkeys(said))
    if not said:
        said += _pages_and_windows(settings, config, random)
    if said:
        raise ConfigError("\n".join(said))


def _pages_and_windows(settings: Settings, config: Any, random: bool) -> list[str]:
    said = []
    if settings.paged and "evaluation" in settings.stages:
        pages = max_pages_for(settings.context + settings.new_tokens, settings.batch, settings.cache)
        if pages > settings.max_pages:
            said.append(
                f"--max_pages {settings.max_pages} holds {settings.max_pages * settings.page_size:,} tokens; "
                f"{settings.batch} x {settings.context + settings.new_tokens:,} need --max_pages {pages}"
            )
    if {"baseline", "evaluation"} & set(settings.stages) and not random and not settings.tasks:
        try:
            check_window(settings.windows, settings.length, 1, 0, settings.cache, config)
        except ConfigError as error:
            said.append(str(error))
    if settings.merged:
        try:
            merged_head_dim(attention_geometry(config))
        except ConfigError as error:
            said.append(f"-m: {error}; leave -m out")
        if settings.span:
            said.append(
                f"-m: its codebooks have no maps, and --span {settings.span} needs them; leave -m or --span out"
            )
    return said


def _option(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"
