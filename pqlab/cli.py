"""The command line: `python -m pqlab COMMAND`. A command is a module: `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is typed, and return its exit status.

    `pqlab claims | head` ends quietly, as it would for any other tool.
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


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="pqlab", description="A paged, product-quantized KV cache, seen and run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if argv[:1] == [name]:  # only the chosen one is imported: the doctor must not depend on the others
            import_module(module).configure(command)
    args = parser.parse_args(argv)
    return import_module(COMMANDS[args.command][0]).run(args)


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
