"""`python -m pqlab explain PQC001`: what an error means and what to set. The texts are the error classes' own."""

from __future__ import annotations

import argparse
import sys
import textwrap

from .errors import EXPLAINED

WIDTH = 100


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", help=f"one of {', '.join(EXPLAINED)}; left out: a list of them")


def run(args: argparse.Namespace) -> int:
    """Print one explanation, or the list; 2 for a code that does not exist."""
    if args.code is None:
        print(overview())
        return 0
    code = args.code.strip().strip("[]").upper()  # messages have it in brackets
    if code not in EXPLAINED:
        print(f"pqlab explain: there is no error {args.code!r}; there are {', '.join(EXPLAINED)}", file=sys.stderr)
        return 2
    print(explain(code))
    return 0


def overview() -> str:
    """One line an error."""
    lines = [f"{code}  {error.explanation.title:<26} {error.__name__}" for code, error in EXPLAINED.items()]
    return "\n".join([*lines, "", "python -m pqlab explain PQC001 says what happened, why, and what to set."])


def explain(code: str) -> str:
    """All there is to say about a code of `EXPLAINED`."""
    error = EXPLAINED[code]
    text = error.explanation
    parts = [f"{code}: {text.title} (pqlab.{error.__name__})"]
    for head, body in (("What happened", text.what), ("Why", text.why), ("What to set", text.remedy)):
        parts += ["", head, *textwrap.wrap(body, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join([*parts, "", "Example", textwrap.indent(text.example, "  ")])
