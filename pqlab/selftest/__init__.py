"""`python -m pqlab check`: the report's one-click test. Real runs on this machine, each held to another computation.

A module per phase; a phase is a list of checks, a check is a function that returns what it compared, with the figure,
and raises where it does not agree (`session`). Inputs are fresh at every run, from a seed that is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path

from ..arguments import add_json, add_model_name
from . import backends, compare, environment, integration, pages, performance
from .session import Console, Disagreement, Phase, Result, Session, expect, record, run_phases, verdict

__all__ = [
    "PHASES", "Console", "Disagreement", "Phase", "Result", "Session", "chosen_phases", "configure", "expect", "run",
    "run_phases",
]  # fmt: skip

PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        environment.PHASE, pages.PHASE, backends.PHASE, integration.PHASE, compare.PHASE, performance.PHASE
    )
}  # fmt: skip
"""In the order in which they run."""

QUICK = ("environment", "phase1", "phase2", "phase3")


def configure(parser: argparse.ArgumentParser) -> None:
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="phases 1 to 3 on small inputs, within a minute (default)")
    amount.add_argument("--full", action="store_true", help="every phase, on larger inputs and more of them")
    for phase in PHASES.values():
        if phase.name != "environment":
            parser.add_argument(f"--{phase.name}", action="store_true", help=f"only: {phase.title}")
    parser.add_argument("--debug", metavar="NAME", help="write every detail to NAME.log (default: no log)")
    parser.add_argument("--seed", type=int, help="the seed of an earlier run, to see it again (default: a new one)")
    add_model_name(parser)
    add_json(parser)


def chosen_phases(args: argparse.Namespace) -> list[Phase]:
    """What was asked for; without a name: the quick ones, or all of them with --full."""
    named = [phase for phase in PHASES.values() if getattr(args, phase.name, False)]
    return named or [phase for phase in PHASES.values() if args.full or phase.name in QUICK]


def run(args: argparse.Namespace) -> int:
    """Run the chosen phases; 0 when every check passed, 1 when one failed, 2 when the log cannot be written."""
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    with ExitStack() as stack:
        log = None
        if args.debug:
            path = Path(f"{args.debug.removesuffix('.log')}.log")
            try:
                log = stack.enter_context(path.open("w", encoding="utf-8"))
            except OSError as error:
                print(f"pqlab check: the log cannot be written ({error}); give --debug another name", file=sys.stderr)
                return 2
        console = Console(log)
        session = Session(console, seed=seed, full=args.full, model=args.model, random_weights=args.random_weights)
        results = run_phases(chosen_phases(args), session)
        code = verdict(results, session)
        if args.json:
            print(json.dumps(record(results, session)))
        return code
