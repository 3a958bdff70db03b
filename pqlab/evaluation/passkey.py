"""Passkey retrieval: one number in a long text, by depth and length.

Mohtashami and Jaggi 2023, "Landmark Attention", section 4.2; how it is asked and counted: `retrieval`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence

import pandas as pd

from ..config import CacheConfig
from . import retrieval
from .retrieval import DEPTHS, LENGTHS, Haystack, Needle
from .teacher_forced import Quantize

_HIDDEN = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


def passkey(
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
    """Retrieval of a five-digit number by the exact cache and by every method; a text a cell.

    Args:
        lengths: tokens of the whole sequence.
        depths: of the hidden sentence, 0 the beginning and 1 the end of the text.
        trials: numbers tried in every cell.

    The other arguments, what is returned and what is raised: `retrieval.retrieve`.
    """
    numbers = random.Random(seed)
    haystacks = [
        Haystack(length, trial, (needle(depth, str(numbers.randrange(10_000, 100_000))),))
        for length in lengths
        for depth in depths
        for trial in range(trials)
    ]
    return retrieval.retrieve(model, tokenizer, text, methods, config, haystacks, progress)


def needle(depth: float, key: str) -> Needle:
    return Needle(depth, _HIDDEN.format(key=key), _QUESTION, f" {key}", key)


configure = retrieval.configure


def run(args: argparse.Namespace) -> int:
    return retrieval.run(args, "passkey", passkey)
