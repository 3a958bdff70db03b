"""`python -m pqlab presets`: the report's tables of settings, derived again on this machine."""

from __future__ import annotations

import argparse
import json
from textwrap import indent, wrap
from typing import Any

import pandas as pd

from ..arguments import above_zero, add_json, add_model_arguments, add_text, load, whole
from ..errors import ConfigError
from ..memory import readable_bytes
from ..results.provenance import commit, device_name, text_record, today, versions
from ..shapes import SHAPES
from .derive import by_context, by_memory, evidence

HELP = """\
Bytes are those of a shape with fp16 weights; KL and time per token, by page size and residual, are measured on a model
that is run here. Beside every setting of the report stands ours, and why they differ."""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = f"{parser.description}.\n\n{HELP}"
    add("--shape", default="Llama-2-7B", metavar="NAME", help=f"whose bytes are counted, of {', '.join(SHAPES)}; the "
        "report's is Llama-2-7B")  # fmt: skip
    add("--parameters", type=above_zero, metavar="COUNT", help="weights of the shape, e.g. 7e9 (default: known, of "
        "most shapes)")  # fmt: skip
    add("--no-measure", action="store_true", help="derive from bytes alone, and run no model")
    add_model_arguments(parser, random=False)
    add_text(parser)
    add("--context", type=whole(), default=1024, metavar="TOKENS", help="tokens of the prompt behind which is measured")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Derive and print both tables. Raises `ConfigError` for a shape that is not known."""
    if args.shape not in SHAPES:
        raise ConfigError(f"--shape {args.shape} is unknown; there are {', '.join(SHAPES)}")
    shape = SHAPES[args.shape]
    memory = by_memory(shape, int(args.parameters) if args.parameters else None)
    measured, about = (None, {}) if args.no_measure else _evidence(args)
    context = by_context(shape, measured)
    if measured is not None:
        print(f"measured on {args.model}, {device_name(args.device)}, behind {args.context} tokens of {args.text}:")
        print(_evidence_table(measured), end="\n\n")
    print(f"by context, bytes of {args.shape} (page / residual / pages):")
    print(_text(context, "tokens"), end="\n\n")
    print(f"by GPU memory, {args.shape} with fp16 weights (page / pages):")
    print(_text(memory, "gib"))
    if args.json:
        about |= {"command": "presets", "date": today(), "commit": commit(), "versions": versions()}
        about |= {"device": device_name(args.device), "shape": args.shape}
        tables = {"by_context": context, "by_memory": memory, "evidence": measured}
        rows = {
            name: None if t is None else json.loads(t.to_json(orient="records", double_precision=6))
            for name, t in tables.items()
        }
        print(json.dumps({**about, **rows}))
    return 0


def _evidence(args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`evidence`, and what it was measured on."""
    from ..models import load_text
    from .workload import Workload

    _, model, tokenizer = load(args)
    workload = Workload(model, tokenizer, load_text(args.text), context=args.context, progress=True)
    return evidence(workload), {**workload.about(), "text": text_record(args.text)}


def _evidence_table(measured: pd.DataFrame) -> str:
    """KL by page size and residual, and the time of every page size."""
    wide = measured.pivot(index="page_size", columns="residual_length", values="kl").map("{:.5f}".format)
    wide.columns = [f"KL at R {residual}" for residual in wide.columns]
    firsts = measured.drop_duplicates("page_size").set_index("page_size")
    wide["ms a token"] = firsts.milliseconds.map("{:.2f}".format) + firsts.milliseconds_error.map(" +- {:.2f}".format)
    return wide.rename_axis("page").reset_index().to_string(index=False)


def _text(table: pd.DataFrame, size: str) -> str:
    """A line a case, and under it why it differs."""
    lines = []
    for row in table.itertuples():
        taken = [f"{name} {readable_bytes(getattr(row, f'{name}_bytes'))}" for name in ("report", "ours")
                 if hasattr(row, f"{name}_bytes")]  # fmt: skip
        head = f"{row.case} ({getattr(row, size):,} {size.replace('gib', 'GiB')})"
        lines.append(f"{head:<44} report {row.report:<18} ours {row.ours:<18} {', '.join(taken)}")
        lines.append(indent("\n".join(wrap(row.why, 110)), "    "))
    return "\n".join(lines)
