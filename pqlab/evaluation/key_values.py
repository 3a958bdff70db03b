"""Key-value retrieval: several numbers in one long text, told apart by their names, each asked for.

After Liu et al. 2023, "Lost in the Middle", section 3, with the pairs hidden in a text that fills the context, not in a
list of pairs: a cache that mixes up tokens answers with another pair's number. How it is counted: `retrieval`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import product

import pandas as pd

from . import retrieval
from .retrieval import Haystack, Needle

NAMES = (
    "apple",
    "river",
    "tiger",
    "window",
    "garden",
    "silver",
    "doctor",
    "music",
    "winter",
    "bridge",
    "candle",
    "horse",
)
"""What the numbers belong to; as many pairs as these can be hidden in one text."""

_HIDDEN = "\n\nThe code of the {name} is {key}.\n\n"
_QUESTION = "\n\nWhat is the code of the {name}? The code of the {name} is"


def key_values(model, tokenizer, text: str, methods, config=None, **options) -> pd.DataFrame:
    """Retrieval of four-digit numbers, one hidden at each depth of one text, by the exact cache and by every method.

    Arguments and options, what is returned (`key` is "name number") and what is raised: `retrieval.retrieve`.
    """
    return retrieval.retrieve(hide, model, tokenizer, text, methods, config, **options)


def hide(numbers: random.Random, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Haystack]:
    """A text for every length and trial, with a pair at every depth; see `retrieval.Hide`.

    Raises:
        ValueError: more depths than `NAMES`.
    """
    if len(depths) > len(NAMES):
        raise ValueError(f"{len(depths)} depths are more than the {len(NAMES)} names of pairs; give fewer")
    haystacks = []
    for length, trial in product(lengths, range(trials)):
        names = numbers.sample(NAMES, len(depths))
        keys = numbers.sample(range(1_000, 10_000), len(depths))
        pairs = zip(depths, names, keys, strict=True)
        haystacks.append(Haystack(length, trial, tuple(pair(depth, name, str(key)) for depth, name, key in pairs)))
    return haystacks


def pair(depth: float, name: str, key: str) -> Needle:
    return Needle(depth, _HIDDEN.format(name=name, key=key), _QUESTION.format(name=name), f" {key}", f"{name} {key}")


configure = retrieval.configure


def run(args: argparse.Namespace) -> int:
    return retrieval.run(args, "kv", hide)
