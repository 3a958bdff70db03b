"""The command line: `python -m pqlab COMMAND`. A command is a module: `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from .errors import PQCacheError

COMMANDS = {
    "bench": ("pqlab.benchmarks.bench", "time one part of pqlab"),
    "check": ("pqlab.selftest", "run pqlab's own checks on this machine: pages, kernels, a real model"),
    "claims": ("pqlab.claims", "the report's claims beside what was measured, and how they stand"),
    "doctor": ("pqlab.doctor", "say what is installed, what works, and what to do about the rest"),
    "eval": ("pqlab.evaluation.eval_command", "bits, bytes and fidelity of every method: KL, perplexity, agreement"),
    "explain": ("pqlab.explain", "say what an error code means and what to set"),
    "plan": ("pqlab.evaluation.plan_command", "choose M by layer and side under a budget of bits, MiB or KL"),
    "presets": ("pqlab.tune.presets_command", "the report's tables of settings, derived again on this machine"),
    "run": ("pqlab.pipeline.command", "the report's pipeline: baseline, sampling, training, evaluation"),
    "setup": ("pqlab.prepare", "fetch the default model, calibrate its codebooks, build the kernels"),
    "tune": ("pqlab.tune", "search for page size, residual, M, nbits and policy: time per token against divergence"),
}

BROKEN_PIPE = 128 + 13
"""What a shell says of a program that ended because nobody read its output any more (SIGPIPE)."""

WRONG = 2
"""Exit status of a command that cannot be run as it was typed; argparse's own."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that says the default of every option, where the option's own text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, value = action.help or "", action.default
        is_said = "(default" in said or not action.option_strings
        if is_said or value is argparse.SUPPRESS or value is None or isinstance(value, bool):
            return said
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return f"{said} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and not how the whole command is used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message} ({self.prog} --help says what can be typed)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is typed, and return its exit status; `WRONG` for what cannot be run as it was typed.

    What is wrong is said in a line on standard error: of every error but those that are faults of pqlab itself, which
    leave with their traceback. `pqlab claims | head` ends quietly, as it would for any other tool.
    """
    try:
        try:
            return _run(argv)
        finally:  # argparse leaves with an exception when it has printed its help
            sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_broken():
            raise
        return BROKEN_PIPE


def parsed(argv: Sequence[str]) -> tuple[Parser, argparse.Namespace]:
    """What is typed, and the parser that can say what is wrong with it. Leaves with `SystemExit` as argparse does."""
    parser = Parser(prog="pqlab", description="A paged, product-quantized KV cache, seen and run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if list(argv[:1]) == [name]:  # only the chosen one is imported: the doctor must not depend on the others
            import_module(module).configure(command)
    args, unknown = parser.parse_known_args(argv)
    parser.prog = " ".join(filter(None, ("pqlab", args.command, getattr(args, "benchmark", None))))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parser, args


def _run(argv: Sequence[str] | None) -> int:
    parser, args = parsed(sys.argv[1:] if argv is None else argv)
    try:
        return import_module(COMMANDS[args.command][0]).run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        advice = _advice(error)
        if advice is None:
            raise
        print(f"{parser.prog}: {error}{advice}", file=sys.stderr)
        return WRONG


def _advice(error: Exception) -> str | None:
    """What to add to an error that a person can do something about; None for a fault of the program."""
    if isinstance(error, PQCacheError) or not isinstance(error, RuntimeError):
        return ""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # of torch, GPU and CPU
        return "\nTake a smaller model, context, length or batch, or --half or --device cpu, as far as there are these."
    return None


def _output_is_broken() -> bool:
    """Whether it is standard output that nobody reads; then it goes nowhere, for Python writes the rest at its end."""
    try:
        output = sys.stdout.fileno()
        watch = select.poll()
    except (OSError, AttributeError):  # no file, or a system without poll
        return False
    watch.register(output, 0)  # errors are told in any case
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True
