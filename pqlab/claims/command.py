"""`python -m pqlab claims`: the table as text, Markdown or JSON."""

from __future__ import annotations

import argparse
import json
from textwrap import wrap

import pandas as pd

from .reported import CLAIMS
from .results import Results
from .verdict import NOT_MEASURED, table

_WIDTHS = {"claim": 26, "report": 18, "pqlab": 46, "verdict": 24, "measured on": 26}


def configure(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--markdown", action="store_true", help="print a Markdown table")
    shape.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--results", metavar="FOLDER", help="JSON files of measurements (default: the package's own)")


def run(args: argparse.Namespace) -> int:
    """Print every claim beside what was measured. Raises `ConfigError` for results that cannot be read."""
    found = table(CLAIMS, Results(args.results))
    if args.json:
        rows = found.astype(object).where(found.notna(), None).to_dict("records")
        print(json.dumps({"command": "claims", "claims": rows}))
    elif args.markdown:
        print(_markdown(_shown(found)))
    else:
        print(_text(_shown(found)))
        print(_commands(found))
    return 0


def _shown(found: pd.DataFrame) -> pd.DataFrame:
    """What a person reads: the claim, both figures, the verdict, and where, when and by which commit."""
    on = [", ".join(filter(None, cells)) for cells in zip(found.device, found.date, found.commit, strict=True)]
    columns = (found.claim, found.reported, found.measured.where(found.measured != "", "-"), found.verdict, on)
    return pd.DataFrame(dict(zip(_WIDTHS, columns, strict=True)))


def _text(shown: pd.DataFrame) -> str:
    """A table whose cells are wrapped, a line between its rows."""
    widths = list(_WIDTHS.values())
    rule = "  ".join("-" * width for width in widths)

    def row(cells: list[str]) -> list[str]:
        wrapped = [wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
        lines = range(max(map(len, wrapped)))
        parts = [[(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(wrapped, widths, strict=True)]
                 for i in lines]  # fmt: skip
        return ["  ".join(part).rstrip() for part in parts]

    lines = row(list(shown.columns))
    for cells in shown.itertuples(index=False):
        lines += [rule, *row(list(cells))]
    return "\n".join(lines)


def _markdown(shown: pd.DataFrame) -> str:
    rows = [list(shown.columns), ["---"] * len(shown.columns), *map(list, shown.itertuples(index=False))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _commands(found: pd.DataFrame) -> str:
    """What measures what, each command once; what is not measured yet first."""
    lines = []
    for missing, title in ((True, "Not measured yet:"), (False, "Measured with:")):
        part = found[found.verdict.str.startswith(NOT_MEASURED) == missing]
        if len(part):
            lines += ["", title]
            for command, rows in part.groupby("command", sort=False):
                lines.append(f"  {command}  [{'; '.join(rows.claim)}]")
    return "\n".join(lines)
