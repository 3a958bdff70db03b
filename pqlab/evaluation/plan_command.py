"""`python -m pqlab plan`: budgets in, files that `Plan.load`, `Codebooks.load` and `eval --codebooks` take out."""

from __future__ import annotations

import argparse
from math import isnan
from pathlib import Path
from typing import Any

from ..arguments import (
    above_zero,
    add_cache_choices,
    add_model_arguments,
    add_span,
    add_text,
    load,
    output_folder,
    whole,
)
from ..config import CacheConfig
from ..errors import ConfigError
from ..memory import MIB
from ..models import calibration_text
from ..quantization.defaults import CALIBRATION_TEXT
from .exact_tokens import RESIDUALS, SINKS
from .options import check_budget, check_room
from .plan import BITS, CONTEXT_LENGTH, DEFAULT_BITS, LENGTH, Planner
from .plan_file import Plan

HELP = """\
Give at least one budget. Every budget becomes a file of codebooks in which each layer's keys and values have as many
bits as the model feels their loss, and which says what was measured of it on text that nothing was chosen by: for
`eval --codebooks`, `run --codebooks`, Codebooks.load and Plan.load."""


def configure(parser: argparse.ArgumentParser) -> None:
    default = CacheConfig()
    add = parser.add_argument
    parser.description = f"{parser.description}.\n\n{HELP}"
    add_model_arguments(parser, random=False)
    add_text(parser, CALIBRATION_TEXT, "text that codebooks are trained on, and at whose end is measured")
    add("--bits", nargs="+", type=above_zero, default=[], metavar="BITS", help="budgets, bits per element, beside "
        "--sinks and --residual (default: none)")  # fmt: skip
    add("--mib", nargs="+", type=above_zero, default=[], metavar="MIB", help="budgets, MiB of a sequence of --context "
        "tokens as it is stored; sinks and residual are chosen, too (default: none)")  # fmt: skip
    add("--kl", nargs="+", type=above_zero, default=[], metavar="NATS", help="budgets, nats: the fewest bits that keep "
        "them, and with --context the fewest bytes, sinks and residual chosen, too (default: none)")  # fmt: skip
    add("--context", type=whole(), metavar="TOKENS", help="tokens of a sequence whose bytes count (default: none; then "
        "exact tokens cost nothing)")  # fmt: skip
    add("--choices", nargs="+", type=int, choices=BITS, default=list(DEFAULT_BITS), metavar="BITS",
        help=f"bits per element that a layer's side may get, of {' '.join(map(str, BITS))}")  # fmt: skip
    add_span(parser)
    add_cache_choices(
        parser,
        residual=f"newest tokens that stay exact (default: {default.residual_length}); with --context those to choose "
        f"from (default: {' '.join(map(str, RESIDUALS))})",
        sinks=f"first tokens that stay exact (default: {default.num_sinks}); with --context those to choose from "
        f"(default: {' '.join(map(str, SINKS))})",
    )
    add("--length", type=whole(), metavar="TOKENS", help="tokens of a window that is measured on; what is longer than "
        f"that is told worse (default: {LENGTH}; with --context up to {CONTEXT_LENGTH})")  # fmt: skip
    add("--windows", type=whole(), default=2, metavar="COUNT", help="windows of every text to choose by, and as many "
        "again to measure")  # fmt: skip
    add("--out", type=output_folder, default=Path("."), metavar="FOLDER", help="for plan-<budget>.safetensors; it is "
        "made where it is missing")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Plan every budget, print what was measured, write the files; the exit status.

    Raises:
        ConfigError: no budget, or one that cannot be met.
    """
    budgets = [(name, value) for name in ("bits", "mib", "kl") for value in getattr(args, name)]
    if not budgets:
        raise ConfigError("give budgets: --bits 2.25, --kl 0.002, or --mib 24 --context 8192")
    settings = _settings(args)
    for name, budget in budgets:
        check_budget(**{"bits": None, "mib": None, "kl": None, name: budget}, context=args.context)
    if args.bits and min(args.bits) < min(args.choices):
        raise ConfigError(f"bits = {min(args.bits):g} is below the smallest choice, {min(args.choices)}")
    args.out.mkdir(parents=True, exist_ok=True)
    _, model, tokenizer = load(args)
    if args.mib:
        check_room(model, min(args.mib), args.context, args.choices, args.sinks, args.residual)
    planner = Planner(model, tokenizer, calibration_text(args.text), **settings)
    if args.context and planner.length < args.context:
        print(
            f"measured on windows of {planner.length} tokens, which flatters a large R for a context of "
            f"{args.context}; --length {args.context} sees all of it",
            flush=True,
        )
    for name, budget in budgets:
        found = planner.plan(**{name: budget})
        at = (f"-{args.context}" if args.context else "") + (f"-span{args.span}" if args.span else "")
        path = args.out / f"plan-{name}-{budget:g}{at}.safetensors"
        found.save(path)
        print(f"{path.name}: {found}", flush=True)
        if len(found.tried):
            print(render_tried(found), flush=True)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `Planner` is given."""
    given = {"sinks": args.sinks, "residuals": args.residual}
    settings = {"choices": args.choices, "length": args.length, "windows": args.windows, "span": args.span}
    settings |= {"text_name": Path(args.text).name}
    if args.context is not None:
        return {**settings, "context": args.context, **given}
    for name, values in given.items():
        if values is not None and len(values) > 1:
            raise ConfigError(f"{name} = {values} are to choose from for a context; give --context, or one of them")
    default = CacheConfig()
    (residual,), (sinks,) = args.residual or [default.residual_length], args.sinks or [default.num_sinks]
    return {**settings, "config": CacheConfig(residual_length=residual, num_sinks=sinks)}


def render_tried(found: Plan) -> str:
    """What every choice of sinks (rows) and R (columns) was predicted to come to, as text."""
    tried = found.tried.assign(mib=found.tried.bytes / MIB)
    grids = (
        ("bits", "bits per element", "{:.3f}"),
        ("mib", f"MiB at {found.certificate['context']} tokens", "{:.2f}"),
        ("predicted_kl", "predicted KL", "{:.5f}"),
    )
    parts = []
    for column, title, form in grids:
        grid = tried.pivot(index="num_sinks", columns="residual_length", values=column)
        grid = grid.map(lambda value, form=form: "-" if isnan(value) else form.format(value))
        parts.append(f"{title}, by sinks and R\n{grid.rename_axis(index=None, columns=None).to_string()}")
    return "\n".join(parts)
