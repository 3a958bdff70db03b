"""`python -m pqlab eval`: what every method costs in bits and bytes, and how far it is from the exact cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from ..config import CacheConfig
from ..errors import ConfigError, UnsupportedModelError
from ..memory import MIB
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
    default = CacheConfig()
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(names())} (default: {' '.join(default_names())})")
    add("--codebooks", action="append", default=[], type=Path, metavar="PATH", help="another method: a codebooks file, "
        "named by its stem; may be repeated")  # fmt: skip
    add("--model", default="default", help="as pqlab.load_model takes it")
    add("--device", default="cpu", help="torch device that the model runs on")
    add("--text", default="pride", help="name of a shipped text or path of a file")
    add("--calibration", default=CALIBRATION_TEXT, help="text for methods that are trained")
    add("--windows", type=int, default=2, help="windows of the text, one behind the other")
    add("--length", type=int, default=2048, help="tokens of a window")
    add("--skip", type=int, default=0, help="tokens of the text before the first window")
    add("--residual", type=int, default=default.residual_length, help="newest tokens that stay exact")
    add("--sinks", type=int, default=default.num_sinks, help="first tokens that stay exact")
    add("--page-size", type=int, default=default.page_size, help="tokens of a page")
    add("--prompt", type=int, default=1, help="tokens that are prefilled and not counted")
    add("--versus", metavar="METHOD", help="also the difference of every other method to this one, window by window")
    add("--json", action="store_true", help="print one JSON object, on the last line")
    add("--out", type=Path, help="write the JSON to this file, too")
    add("--append", action="store_true", help="keep the rows of other methods that the file has already")


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status: 2 for settings that cannot be measured."""
    try:
        result = _measure(args)
    except (ConfigError, UnsupportedModelError, ValueError, OSError) as error:  # OSError: no such text, model or folder
        print(f"eval: {error}")
        return 2
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
        print(f"eval: {args.out.name} was left as it is: {error}")
        return 2
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(record))
    return 0


def _measure(args: argparse.Namespace) -> Evaluation:
    from ..models import load_model

    check_names(args.methods or ())  # before the model is loaded
    if args.append and not args.out:
        raise ConfigError("--append adds to a file: give one with --out")
    asked = [*(args.methods or default_names()), *(path.stem for path in args.codebooks)]
    if args.versus and args.versus not in asked:
        raise ConfigError(f"--versus {args.versus} is not among the methods that are measured: {', '.join(asked)}")
    config = CacheConfig(page_size=args.page_size, residual_length=args.residual, num_sinks=args.sinks)
    books: dict[str, Path] = {}
    for path in args.codebooks:
        if not path.is_file():
            raise ConfigError(f"there is no codebooks file {path}; `pqlab plan` and Codebooks.save write one")
        if path.stem in books:
            raise ConfigError(f"two codebooks files are called {path.stem}; rename one, its stem is the method's name")
        books[path.stem] = path
    if args.out and not args.out.resolve().parent.is_dir():
        raise ConfigError(f"there is no folder for {args.out}; make it first")
    model, tokenizer = load_model(args.model, device=args.device)
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
