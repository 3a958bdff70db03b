"""`python -m pqlab doctor`: what this machine has, what pqlab makes of it, and what to do about the rest.

Every probe runs for itself: one that fails becomes its text in the report, and the others still answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict

from .cache_memory import DEFAULT_SHAPE, cache_memory
from .chromium import find_chromium
from .finding import Finding, Probe
from .probes import PROBES

__all__ = ["PROBES", "Finding", "Probe", "examine", "find_chromium", "report"]


def configure(parser: argparse.ArgumentParser) -> None:
    from ..shapes import SHAPES

    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    asked = parser.add_argument_group("cache memory", "whether a cache would fit here, and what to lower if not")
    add = asked.add_argument
    add("--shape", metavar="NAME", help=f"the shape of a model: {', '.join(SHAPES)} (default: {DEFAULT_SHAPE})")
    add("--context", type=int, metavar="TOKENS", help="tokens of a sequence (default: the model's own limit)")
    add("--batch", type=int, metavar="ROWS", help="sequences (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Print the report, or its JSON; 2 for a cache that cannot be asked about."""
    probes = dict(PROBES)
    if (args.shape, args.context, args.batch) != (None, None, None):
        wrong = _wrong_question(args)
        if wrong:
            print(f"pqlab doctor: {wrong}", file=sys.stderr)
            return 2
        probes["cache memory"] = cache_memory(args.shape or DEFAULT_SHAPE, args.context, args.batch or 1)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a probe prints must not get into the JSON
        findings = examine(probes)
    text = json.dumps({k: asdict(v) for k, v in findings.items()}, indent=2) if args.json else report(findings)
    try:
        sys.stdout.write(text.encode("ascii", "replace").decode() + "\n")  # any terminal can show it
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; Python's last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def examine(probes: dict[str, Probe] | None = None) -> dict[str, Finding]:
    """Run every probe. Never raises: an exception becomes the finding of its probe."""
    return {name: _guarded(probe) for name, probe in (PROBES if probes is None else probes).items()}


def report(findings: dict[str, Finding]) -> str:
    """The findings as text, problems with their remedy once more at the end."""
    lines = []
    for name, finding in findings.items():
        lines.append(f"{'!' if finding.problem else ' '} {name:<18} {finding.value}")
        lines += [f"  {'':<18}   {key}: {value}" for key, value in finding.details.items()]
    problems = {name: finding for name, finding in findings.items() if finding.problem}
    lines.append("")
    lines += [f"! {name}: {finding.problem}. {finding.remedy}" for name, finding in problems.items()]
    return "\n".join(lines if problems else [*lines, "No problems found."])


def _wrong_question(args: argparse.Namespace) -> str:
    """What is wrong with the cache that was asked about, and what to type instead; "" when nothing is."""
    from ..shapes import SHAPES

    if args.shape is not None and args.shape not in SHAPES:
        return f"--shape {args.shape} is unknown; there are {', '.join(SHAPES)}"
    for name in ("context", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} {value} is out of range (at least 1); the nearest good value is 1"
    return ""


_REMEDY = "Mend what the message names; a broken package: run make setup, or pip install --force-reinstall it"


def _guarded(probe: Probe) -> Finding:
    try:
        return probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken package may even call sys.exit
        with contextlib.suppress(BaseException):
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return Finding(f"failed ({said})", f"this probe failed ({said})", _REMEDY)
        return Finding("failed", "this probe failed and its error has no text", _REMEDY)
