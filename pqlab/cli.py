"""The command line: `python -m pqlab COMMAND`. A command is a module: `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
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
    "plan": ("pqlab.evaluation.plan", "choose M by layer and side under a budget of bits or KL"),
    "presets": ("pqlab.tune.presets_command", "the report's tables of settings, derived again on this machine"),
    "run": ("pqlab.pipeline.command", "the report's pipeline: baseline, sampling, training, evaluation"),
    "setup": ("pqlab.prepare", "fetch the default model, calibrate its codebooks, build the kernels"),
    "tune": ("pqlab.tune", "search for page size, residual, M, nbits and policy: time per token against divergence"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="pqlab", description="A paged, product-quantized KV cache, seen and run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if argv[:1] == [name]:  # only the chosen one is imported: the doctor must not depend on the others
            import_module(module).configure(command)
    args = parser.parse_args(argv)
    return import_module(COMMANDS[args.command][0]).run(args)
