"""`python -m pqlab eval`: what every method costs in bits and bytes, and how far it is from the exact cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from ..arguments import (
    add_cache_arguments,
    add_codebooks,
    add_json,
    add_model_arguments,
    add_text,
    load,
    output_file,
    whole,
)
from ..config import CacheConfig
from ..errors import ConfigError
from ..memory import MIB
from ..quantization import Codebooks
from ..quantization.defaults import CALIBRATION_TEXT
from .evaluate import CONTEXTS, Evaluation, evaluate
from .methods import check_names, default_names, names
from .records import merged

NOTES = """\
Token bits: codes, scales and zero points of a quantized token over its elements. Totals: one sequence, exact window and
model constants included. Peak: the most that the device held above the model while a real cache, in the model's dtype,
decoded the end of a window, and while its prompt was prefilled, activations included; - for what is only simulated.
Change: of perplexity. KL: nats, mean; +- is the standard error over windows. Top-1: positions whose likeliest token is
that of the exact cache. Worst: mean KL of the worst 1 % of positions."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}.\n\n{NOTES}"
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(names())} (default: {' '.join(default_names())})")
    add_codebooks(parser, "more methods, each named by its file's stem")
    add_model_arguments(parser, random=False)
    add_text(parser)
    add_text(parser, CALIBRATION_TEXT, "text for methods that are trained", "--calibration")
    add("--windows", type=whole(), default=2, metavar="COUNT", help="windows of the text, one behind the other")
    add("--length", type=whole(), default=2048, metavar="TOKENS", help="tokens of a window")
    add("--skip", type=whole(0), default=0, metavar="TOKENS", help="tokens of the text before the first window")
    add_cache_arguments(parser, "residual", "sinks", "page_size")
    add("--prompt", type=whole(), default=1, metavar="TOKENS", help="tokens of a window that are prefilled as one "
        "chunk and not counted")  # fmt: skip
    add("--versus", metavar="METHOD", help="also the difference of every other method to this one, window by window "
        "(default: no such table)")  # fmt: skip
    add_json(parser)
    add("--out", type=output_file, metavar="FILE", help="write the JSON to this file, too (default: none)")
    add("--append", action="store_true", help="keep the rows of other methods that the file of --out has already")


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status. Raises `ConfigError` for settings that cannot be measured."""
    result = _measure(args)
    parts = [_heading(result), render_table(result.table()), render_positions(result.by_position())]
    if args.versus:
        why = result.failures.get(args.versus)
        compared = f"nothing to compare with: {why}" if why else render_versus(result.versus(args.versus), args.versus)
        parts.append(compared)
    for part in (*parts, NOTES):
        print(part, end="\n\n")
    record = result.record()
    try:
        if args.append and args.out.is_file():
            record = merged(json.loads(args.out.read_text(encoding="utf-8")), record)
    except ConfigError as error:
        raise ConfigError(f"{args.out.name} was left as it is: {error}") from error
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(record))
    return 0


def _measure(args: argparse.Namespace) -> Evaluation:
    check_names(args.methods or ())  # before the model is loaded
    if args.append and not args.out:
        raise ConfigError("--append adds to a file: give one with --out")
    asked = [*(args.methods or default_names()), *(path.stem for path in args.codebooks)]
    if args.versus and args.versus not in asked:
        raise ConfigError(f"--versus {args.versus} is not among the methods that are measured: {', '.join(asked)}")
    config = CacheConfig(page_size=args.page_size, residual_length=args.residual, num_sinks=args.sinks)
    books: dict[str, Path] = {}
    for path in args.codebooks:
        if path.stem in books:
            raise ConfigError(f"two codebooks files are called {path.stem}; rename one, its stem is the method's name")
        books[path.stem] = path
    _, model, tokenizer = load(args)
    for path in args.codebooks:
        Codebooks.load(path, model)  # raises: a file that is no method is not found out after hours
    return evaluate(
        model,
        tokenizer,
        args.methods,
        codebooks=books,
        text=args.text,
        calibration=args.calibration,
        windows=args.windows,
        length=args.length,
        skip=args.skip,
        config=config,
        prompt=args.prompt,
        progress=True,
    )


def _heading(result: Evaluation) -> str:
    s, cache = result.settings, result.settings["cache"]
    return (
        f"{s['model']['name']} on {s['text']['name']}: {s['windows']} windows of {s['length']} tokens "
        f"from {s['skip']}, prompt {s['prompt']};\n{cache['num_sinks']} sinks, R {cache['residual_length']}, "
        f"page {cache['page_size']}; calibrated on {s['calibration']['name']}; {s['device']}"
    )


def render_table(table: pd.DataFrame) -> str:
    """The table of `Evaluation.table` as text; what a method does not have is a dash."""
    columns = {
        "method": table.method,
        "token bits": table.token_bits.map("{:.3f}".format),
        "exact tokens": table.exact_tokens.map("{:.0f}".format),
        "constants MiB": table.constants_mib.map("{:.2f}".format),
        **{f"{c // 1024}K MiB": (table[f"bytes_{c}"] / MIB).map("{:.1f}".format) for c in CONTEXTS},
        "peak MiB": table.peak_mib.map("{:.1f}".format),
        "with prompt": table.prompt_peak_mib.map("{:.1f}".format),
    }
    columns |= {
        "perplexity": table.perplexity.map("{:.3f}".format),
        "change": table.change.map("{:+.2%}".format),
        "KL": table.kl.map("{:.5f}".format),
        "+-": table.kl_error.map("{:.5f}".format),
        "top-1": table.agreement.map("{:.1%}".format),
        "worst": table.worst_kl.map("{:.3f}".format),
        "note": table.note,
    }
    text = pd.DataFrame(columns).replace(["nan", "nan%", "+nan%"], "-")
    with pd.option_context("display.max_colwidth", None):
        return text.to_string(index=False)


def render_positions(ranges: pd.DataFrame) -> str:
    """KL of every method by range of positions, as text."""
    if not len(ranges):
        return "no method was measured"
    spans = [f"{start}-{stop}" for start, stop in zip(ranges.start, ranges.stop, strict=True)]
    wide = ranges.assign(span=spans).pivot(index="method", columns="span", values="kl")
    wide = wide.loc[list(dict.fromkeys(ranges.method)), list(dict.fromkeys(spans))].map("{:.5f}".format)
    return wide.rename_axis(columns=None).rename_axis("KL at positions").reset_index().to_string(index=False)


def render_versus(table: pd.DataFrame, name: str) -> str:
    """`fidelity.versus` as text."""
    columns = {
        f"KL beside {name}": table.method,
        "ratio": table.ratio.map("{:.3f}".format),
        "difference": table.difference.map("{:+.6f}".format),
        "+-": table.difference_error.map("{:.6f}".format).replace("nan", "-"),
        "smaller in": table.better.astype(str) + " of " + table.windows.astype(str),
    }
    return pd.DataFrame(columns).to_string(index=False)
