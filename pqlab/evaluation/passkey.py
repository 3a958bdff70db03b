"""Passkey retrieval: one number in a long text, by depth and length.

Mohtashami and Jaggi 2023, "Landmark Attention", section 4.2; how it is asked and counted: `retrieval`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import pandas as pd

from . import retrieval
from .retrieval import Haystack, Needle

_HIDDEN = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


def passkey(model, tokenizer, text: str, methods, config=None, **options) -> pd.DataFrame:
    """Retrieval of a five-digit number, a text for every length, depth and trial, by the exact cache and every method.

    Arguments and options, what is returned and what is raised: `retrieval.retrieve`.
    """
    return retrieval.retrieve(hide, model, tokenizer, text, methods, config, **options)


def hide(numbers: random.Random, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Haystack]:
    """A text with one number for every length, depth and trial; see `retrieval.Hide`."""
    return [
        Haystack(length, trial, (needle(depth, str(numbers.randrange(10_000, 100_000))),))
        for length in lengths
        for depth in depths
        for trial in range(trials)
    ]


def needle(depth: float, key: str) -> Needle:
    return Needle(depth, _HIDDEN.format(key=key), _QUESTION, f" {key}", key)


configure = retrieval.configure


def run(args: argparse.Namespace) -> int:
    return retrieval.run(args, "passkey", hide)
