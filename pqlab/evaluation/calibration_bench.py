"""What each part of the calibration buys: samples, maps, weights, anchors, and how many heads share a codebook.

calibrations(model, tokenizer, calibration_text("mixed"), load_text("pride"))  # a row a variant
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..arguments import add_json, add_model_arguments, add_text, load, whole
from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..memory import MIB
from ..models import calibration_text, fingerprint, load_text
from ..quantization import attention_geometry, calibrate
from ..quantization.defaults import CALIBRATION_TEXT
from ..results.provenance import commit, device_name, text_record, today, versions
from . import fidelity
from .evaluate import check_window
from .teacher_forced import from_codebooks

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"{tokens} tokens": {"num_tokens": tokens} for tokens in (1536, 3072, 6144, 24576, 49152)},
    "4 iterations": {"iterations": 4},
    "16 iterations": {"iterations": 16},
    "no weights": {"weighted": False},
    "no map": {"maps": False},
    "no map, no weights": {"maps": False, "weighted": False},
    "per layer": {"scope": "layer"},
    "one for all": {"scope": "model"},
    **{f"anchors every {span}": {"span": span} for span in (64, 256, 1024)},
    "anchors every 256, per layer": {"span": 256, "scope": "layer"},
    "one for all, no map, no weights": {"scope": "model", "maps": False, "weighted": False},
}
"""Arguments of `calibrate` by what they are called in the table; the first is what the others are compared with."""


def calibrations(
    model,
    tokenizer,
    text: str | Sequence[str],
    measured: str,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    pq: PQConfig = PQConfig(),
    *,
    windows: int = 2,
    length: int = 1024,
    skip: int = 0,
    config: CacheConfig | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """KL of codebooks that differ in how they were calibrated.

    Args:
        text: what is calibrated on, one text or several.
        measured: what the divergence is measured on, in `windows` of `length` tokens.
        variants: name -> arguments of `calibrate`; None takes `VARIANTS`.
        pq: M and nbits of all.

    Returns:
        DataFrame: variant, samples (vectors a head and side), constants_mib, seconds (of calibration), kl (nats),
        kl_error (over windows), ratio (its KL over that of the first variant), change (of perplexity), agreement.
    """
    variants = VARIANTS if variants is None else variants
    check_window(windows, length, 1, skip, config or CacheConfig(), model)
    ids = fidelity.text_windows(tokenizer, measured, length, windows, skip)  # says so when the text is too short
    rows, methods = [], {}
    for name, settings in variants.items():
        begin = time.perf_counter()
        books = calibrate(model, tokenizer, text, pq, progress=progress, **settings)
        seconds = time.perf_counter() - begin
        rows.append((name, books.origin.num_samples, books.nbytes / MIB, seconds))
        methods[name] = from_codebooks(books.to(model.device))
    made = pd.DataFrame(rows, columns=["variant", "samples", "constants_mib", "seconds"])
    table = fidelity.summarize(fidelity.compare(model, ids, methods, config, progress=progress))
    table = table.rename(columns={"method": "variant"}).assign(ratio=table.kl / table.kl.iloc[0])
    return made.merge(table[["variant", "kl", "kl_error", "ratio", "change", "agreement"]], on="variant")


def add_bits(parser: argparse.ArgumentParser) -> None:
    """Add --bits, for `pq_of`."""
    parser.add_argument("--bits", type=int, default=4, choices=(1, 2, 4), help="bits per element, by codes of 8 bits")


def pq_of(model, bits: int) -> PQConfig:
    """Codes of 8 bits for as many bits per element; raises `ConfigError` where heads differ in size and so in M."""
    if bits == 4:  # the default, whatever the head
        return PQConfig()
    heads = {head_dim for _, head_dim in attention_geometry(model).values()}
    if len(heads) > 1:
        raise ConfigError(f"heads of {sorted(heads)} elements have no common M; take a model with one head size")
    return PQConfig(M=heads.pop() * bits // 8)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser, random=False)
    add("--variants", nargs="+", metavar="NAME", help="of (in quotes): " + "; ".join(VARIANTS) + " (default: all)")
    add_bits(parser)
    add_text(parser, CALIBRATION_TEXT, "text to calibrate on", "--calibration")
    add_text(parser)
    add("--windows", type=whole(), default=2, metavar="COUNT", help="windows of the text, one behind the other")
    add("--length", type=whole(), default=1024, metavar="TOKENS", help="tokens of a window")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate every variant, measure it, print the table (and JSON); the exit status."""
    chosen = args.variants or list(VARIANTS)
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise ConfigError(f"there is no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    _, model, tokenizer = load(args)
    pq = pq_of(model, args.bits)
    texts = calibration_text(args.calibration), load_text(args.text)
    options = {"windows": args.windows, "length": args.length, "progress": True}
    frame = calibrations(model, tokenizer, *texts, {name: VARIANTS[name] for name in chosen}, pq, **options)
    print(frame.round(5).to_string(index=False))
    if args.json:
        about = {"benchmark": "calibration", "date": today(), "commit": commit(), "versions": versions()}
        about |= {"model": fingerprint(model), "device": device_name(args.device), "half": args.half}
        about |= {"bits": args.bits, "windows": args.windows, "length": args.length}
        about |= {"calibration": text_record(args.calibration), "text": text_record(args.text)}
        print(json.dumps({**about, "records": frame.round(6).to_dict("records")}))
    return 0
