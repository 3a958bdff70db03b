"""What several benchmarks of kernels ask for: which cases, and how a CPU is to run them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..arguments import above_zero, whole
from ..errors import ConfigError

if TYPE_CHECKING:
    from .decode_bench import Case


def matching(cases: Iterable[Case], only: str, *others: str) -> list[Case]:
    """The cases whose name contains `only`. Raises `ConfigError` when it is in no name, of `others` neither."""
    every = list(cases)
    found = [case for case in every if only in case.name]
    if not found and not any(only in name for name in others):
        raise ConfigError(f"--only {only}: no case is called so; there are {'; '.join([c.name for c in every])}")
    return found


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name contains this, e.g. '32768 tokens' (default: all)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=whole(), metavar="COUNT", help="threads of torch and the kernels on a CPU "
                        "(default: torch's own number)")  # fmt: skip


def add_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=above_zero, default=1.0, help="for which each contender is timed on a CPU")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--machine", default="native", metavar="NAME",
        help="processor to compile the CPU kernels for (-march), e.g. x86-64-v3 for one with AVX2 and no more; torch "
        "is held back likewise by ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 "
        "(default: native, this one)",
    )  # fmt: skip
