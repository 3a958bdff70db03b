"""`python -m pqlab bench NAME`: benchmarks by name, each a module with `configure(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
from importlib import import_module

BENCHMARKS = {
    "baseline": ("pqlab.benchmarks.baseline_vs_paged", "time to the first token, per token, and memory, by context"),
    "breakdown": ("pqlab.benchmarks.breakdown_bench", "where a decode step's time goes, part by part"),
    "calibration": (
        "pqlab.evaluation.calibration_bench",
        "what samples, maps, weights, anchors and shared codebooks buy",
    ),
    "cpu": ("pqlab.benchmarks.cpu_bench", "the C++ kernels beside the best exact attention, on this CPU"),
    "decode": ("pqlab.benchmarks.decode_bench", "the decode kernel beside the best exact attention, on a GPU"),
    "kv": ("pqlab.evaluation.key_values", "several numbers in a long text, each asked for by its name"),
    "layout": ("pqlab.benchmarks.order_bench", "byte orders and page sizes: time, and share of the rate of memory"),
    "memory": ("pqlab.benchmarks.memory_timeline", "memory over a long generation, paged beside exact, sampled"),
    "model": ("pqlab.benchmarks.model_bench", "time per token of a whole model, paged beside exact, in CUDA graphs"),
    "passkey": ("pqlab.evaluation.passkey", "one number in a long text, found by depth and length"),
    "pool": ("pqlab.benchmarks.pool_bench", "what a page costs to allocate and free in pools of any size"),
    "rotary": (
        "pqlab.benchmarks.rotary_bench",
        "what it costs that keys are stored turned back, by anchors or altogether",
    ),
    "texts": ("pqlab.evaluation.texts_bench", "codebooks of one kind of text measured on another"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, (module, about) in BENCHMARKS.items():
        import_module(module).configure(names.add_parser(name, help=about, description=about))


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; the exit status."""
    return import_module(BENCHMARKS[args.benchmark][0]).run(args)
