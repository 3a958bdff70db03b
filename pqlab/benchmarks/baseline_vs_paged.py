"""The report's first table: time to the first token, time per token and memory, exact beside paged, by context.

Each row is one plain `generate` behind a prompt from a text (`benchmarks.generation.time_generation`), as the stages
"baseline" and "evaluation" of `python -m pqlab run --paged` measure it at one context. On a GPU an eager exact cache is
measured twice, as torch chooses its attention and without cuDNN (`model_runs.cudnn_attention_off` says why); ratios are
of the faster one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..arguments import (
    add_cache_arguments,
    add_json,
    add_model_arguments,
    add_new_tokens,
    add_text,
    load,
    whole,
)
from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..evaluation.fidelity import text_windows
from ..evaluation.longbench.answers import MakeCache
from ..memory import MIB
from ..model_runs import cudnn_attention_off
from ..models import load_text
from ..quantization import Codebooks, default_codebooks
from ..results.provenance import commit, device_name, today, versions
from .generation import time_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXTS = (512, 2048)
EXACT, NO_CUDNN, PAGED = "exact", "exact, no cuDNN", "paged"
"""Names of the rows: the first as torch chooses its attention, the second on a GPU only."""
COLUMNS = ("first_token_seconds", "token_ms", "cache_bytes", "reserved_bytes", "peak_bytes")


def baseline_vs_paged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[int] = CONTEXTS,
    *,
    codebooks: Codebooks | None = None,
    config: CacheConfig | None = None,
    text: str = "pride",
    batch: int = 1,
    new_tokens: int = 32,
    static: bool = False,
) -> pd.DataFrame:
    """A row per context and cache.

    Args:
        contexts: tokens of the prompts; batch: rows, each another piece of the text.
        codebooks: default: those of `pqlab.default_codebooks`.
        text: name of a shipped text, or a file.
        static: caches of fixed size, whose steps `generate` compiles by itself on a GPU: transformers' StaticCache, and
            `CacheConfig(mode="static")`.

    Returns:
        DataFrame: context, cache ("exact": transformers' own cache with sdpa; on a GPU, unless static, "exact, no
        cuDNN", too; "paged"), first_token_seconds, token_ms (median), cache_bytes (held for the tokens), reserved_bytes
        (pages taken in advance), peak_bytes (of the generation, above what was there before it; NaN where the system
        does not say).

    Raises:
        ConfigError: a context that the model has no positions for, or fewer than two new tokens. ValueError: the text
            is too short.
    """
    if new_tokens < 2:
        raise ConfigError(f"new_tokens = {new_tokens} is out of range (at least 2); the nearest good value is 2")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(contexts) + new_tokens > limit:
        raise ConfigError(
            f"{max(contexts)} tokens and {new_tokens} new ones are more than the model's {limit} positions; "
            f"the longest context is {limit - new_tokens}"
        )
    books = codebooks or default_codebooks(model, tokenizer)
    settings = replace(config or CacheConfig(), mode="static" if static else "eager")

    def paged(tokens: int) -> tuple[Cache, str]:
        return PagedPQCache(model, books, settings, context=tokens, max_batch=batch), "pqlab"

    def exact(tokens: int) -> tuple[Cache, str]:
        return StaticCache(model.config, tokens) if static else DynamicCache(config=model.config), "sdpa"

    caches: dict[str, MakeCache] = {EXACT: exact}
    if model.device.type == "cuda" and not static:
        caches[NO_CUDNN] = exact
    caches[PAGED] = paged
    rows = []
    for context in contexts:
        ids = torch.cat(text_windows(tokenizer, load_text(text), context, batch))
        for name, make in caches.items():
            with cudnn_attention_off() if name == NO_CUDNN else nullcontext():
                found = time_generation(model, ids, make, new_tokens, static=static)
            record = found.record()
            known = found.peak_bytes is not None and found.before_bytes is not None
            record["peak_bytes"] = found.peak_bytes - found.before_bytes if known else float("nan")
            rows.append({"context": context, "cache": name, **{column: record[column] for column in COLUMNS}})
    return pd.DataFrame(rows)


def beside_exact(frame: pd.DataFrame) -> pd.DataFrame:
    """How paged compares at each context, in each column with the exact row that is better in it.

    Returns:
        DataFrame: context, first_token and token (times faster), cache and peak (times smaller); first_token_beside and
        token_beside: the name of the exact row that was the faster one.
    """
    exact, paged = frame[frame.cache != PAGED], frame[frame.cache == PAGED].set_index("context")
    best = exact.groupby("context", sort=False)[list(COLUMNS)].min()
    ratios = (best / paged[list(COLUMNS)]).drop(columns="reserved_bytes")
    ratios = ratios.set_axis(["first_token", "token", "cache", "peak"], axis=1)
    for ratio, column in (("first_token", "first_token_seconds"), ("token", "token_ms")):
        fastest = exact.sort_values(column).drop_duplicates("context").set_index("context")
        ratios[f"{ratio}_beside"] = fastest.cache
    return ratios.reset_index()


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    add("--context", nargs="+", type=whole(), default=list(CONTEXTS), metavar="TOKENS", help="tokens of the prompts")
    add_text(parser, what="text of the prompts")
    add("--batch", type=whole(), default=1, metavar="ROWS", help="rows, each another piece of the text")
    add_new_tokens(parser, 32)
    add("--static", action="store_true", help="static caches, whose steps generate() compiles on a GPU")
    add_cache_arguments(parser, "page_size", "residual")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status. Raises like `load` and `baseline_vs_paged`."""
    config = CacheConfig(page_size=args.page_size, residual_length=args.residual)
    found, model, tokenizer = load(args)
    books = Codebooks.random(model, pq=PQConfig(), maps=True) if found.random else None
    options = {"text": args.text, "batch": args.batch, "new_tokens": args.new_tokens, "static": args.static}
    frame = baseline_vs_paged(model, tokenizer, args.context, codebooks=books, config=config, **options)
    kind = "random weights" if found.random else args.text
    mode = "static" if args.static else "eager"
    print(f"{args.model}, {kind}, batch {args.batch}, {mode} on {device_name(args.device)}")
    print(render(frame))
    if args.json:
        about = {"benchmark": "baseline", "model": args.model, "random_weights": found.random, "batch": args.batch}
        about |= {"device": device_name(args.device), "date": today(), "commit": commit(), "versions": versions()}
        about |= {"threads": torch.get_num_threads(), "half": args.half, "page_size": args.page_size}
        about |= {"mode": mode}
        print(json.dumps({**about, "records": frame.round(5).to_dict("records")}))
    return 0


def render(frame: pd.DataFrame) -> str:
    """The table, and under it the ratios of `beside_exact`, as text; they name the exact row where there are two."""
    shown = pd.DataFrame(
        {
            "context": frame.context, "cache": frame.cache,
            "first token s": frame.first_token_seconds.map("{:.2f}".format),
            "token ms": frame.token_ms.map("{:.1f}".format),
            **{f"{name} MiB": (frame[f"{name}_bytes"] / MIB).map("{:.1f}".format) for name in
               ("cache", "reserved", "peak")},
        }
    )  # fmt: skip
    two = bool((frame.cache == NO_CUDNN).any())

    def beside(name: str) -> str:
        return f" (beside {name})" if two else ""

    ratios = [
        f"{r.context:,} tokens, paged: first token {r.first_token:.2f}x as fast{beside(r.first_token_beside)}, "
        f"each token {r.token:.2f}x{beside(r.token_beside)}; cache {r.cache:.2f}x smaller, peak {r.peak:.2f}x"
        for r in beside_exact(frame).itertuples()
    ]
    return "\n".join([shown.to_string(index=False), *ratios])
