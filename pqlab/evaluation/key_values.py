"""Key-value retrieval: several numbers in one long text, told apart by their names, each asked for.

After Liu et al. 2023, "Lost in the Middle", section 3, with the pairs hidden in a text that fills the context, not in a
list of pairs: a cache that mixes up tokens answers with another pair's number. How it is counted: `retrieval`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd

from ..config import CacheConfig
from . import retrieval
from .retrieval import DEPTHS, LENGTHS, Haystack, Needle
from .teacher_forced import Quantize

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


def key_values(
    model,
    tokenizer,
    text: str,
    methods: Mapping[str, Quantize],
    config: CacheConfig | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    trials: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Retrieval of four-digit numbers, one hidden at each depth of one text, by the exact cache and by every method.

    Args:
        lengths: tokens of the whole sequence, at most.
        depths: of the pairs; `key` in the result is "name number".
        trials: texts of every length, each with other names and numbers.

    The other arguments, what is returned and what is raised: `retrieval.retrieve`.
    """
    if len(depths) > len(NAMES):
        raise ValueError(f"{len(depths)} depths are more than the {len(NAMES)} names of pairs; give fewer")
    numbers = random.Random(seed)
    haystacks = []
    for length, trial in product(lengths, range(trials)):
        names = numbers.sample(NAMES, len(depths))
        keys = numbers.sample(range(1_000, 10_000), len(depths))
        pairs = zip(depths, names, keys, strict=True)
        haystacks.append(Haystack(length, trial, tuple(pair(depth, name, str(key)) for depth, name, key in pairs)))
    return retrieval.retrieve(model, tokenizer, text, methods, config, haystacks, progress)


def pair(depth: float, name: str, key: str) -> Needle:
    return Needle(depth, _HIDDEN.format(name=name, key=key), _QUESTION.format(name=name), f" {key}", f"{name} {key}")


configure = retrieval.configure


def run(args: argparse.Namespace) -> int:
    return retrieval.run(args, "kv", key_values)
