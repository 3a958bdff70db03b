"""Does a compressed cache still find what a long text hides? What `passkey` and `key_values` share.

Sentences are hidden at some depths of a long text, which is prefilled; then a question is fed token by token, as a
user's next turn would be, so that it sees the hidden sentences as codes. An answer counts when every one of its tokens
is the model's likeliest: what greedy generation would say.

The text is prefilled once: its own hidden states are exact under every method. Questions run behind it, all their
positions side by side (`teacher_forced`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import DynamicCache

from ..arguments import add_cache_arguments, add_codebooks, add_json, add_model_arguments, add_text, load, whole
from ..config import CacheConfig
from ..models import load_text
from ..quantization import Codebooks, default_codebooks
from ..results.provenance import commit, device_name, file_sha256, text_record, today, versions
from .fidelity import last_hidden
from .plan_file import planned_configs
from .teacher_forced import Quantize, TeacherForcedCache, from_codebooks, schedule

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
COLUMNS = ["method", "length", "depth", "trial", "key", "found", "logp"]


@dataclass(frozen=True)
class Needle:
    """A hidden sentence, where it lies (0 the beginning, 1 the end of the text), and what is asked about it."""

    depth: float
    hidden: str
    question: str
    answer: str
    key: str


@dataclass(frozen=True)
class Haystack:
    """One text to prefill: `length` tokens at most, a question and its answer included."""

    length: int
    trial: int
    needles: tuple[Needle, ...]


Hide = Callable[[random.Random, Sequence[int], Sequence[float], int], list[Haystack]]
"""What a task hides: (random numbers, lengths, depths, trials) -> its texts."""


@torch.inference_mode()
def retrieve(
    hide: Hide,
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
    own_configs: Mapping[str, CacheConfig] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Every question about everything that a task hides, under the exact cache and every method.

    Args:
        text: as many tokens of it as a length needs, from its beginning.
        methods: name -> what its storage does to K and V.
        config: sinks, residual length and page size of all methods.
        lengths: tokens of a whole sequence, question and answer included, at most.
        depths: where something is hidden, 0 the beginning and 1 the end of the text.
        trials: texts of every length, with other names and numbers.
        seed: of the names and numbers.
        own_configs: name -> config of methods that are not run under `config`.

    Returns:
        DataFrame: method ("exact" first), length, depth, trial, key, found (bool), logp (of the answer, nats).

    Raises:
        ValueError: a length that the text, the model or the question does not allow, depths outside of the text, or
            nothing to try.
    """
    config = config or CacheConfig()
    if not lengths or not depths or trials < 1:
        raise ValueError(f"{len(lengths)} lengths, {len(depths)} depths and {trials} trials; give at least one of each")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depth {outside[0]} is out of range (0, the beginning of the text, to 1, its end)")
    haystacks = hide(random.Random(seed), lengths, depths, trials)
    longest = max(haystack.length for haystack in haystacks)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit:
        raise ValueError(f"lengths reach {longest} tokens, the model {limit}; give shorter ones")
    ids = tokenizer(text[: 12 * longest], add_special_tokens=False).input_ids
    before = model.config._attn_implementation
    model.set_attn_implementation("pqlab")
    if progress:
        from tqdm.auto import tqdm

        haystacks = tqdm(haystacks, desc="texts", unit="text")
    rows = []
    try:
        for haystack in haystacks:
            prompt, questions = token_ids(tokenizer, ids, haystack)
            prefix = DynamicCache(config=model.config)
            last_hidden(model, torch.tensor([prompt], device=model.device), prefix)
            for name, quantize in {"exact": _unchanged, **methods}.items():
                own = (own_configs or {}).get(name, config)
                quantize = _once(quantize, schedule(len(prompt) + 1, len(prompt), own)[-1].coded)
                for needle, (question, answer) in zip(haystack.needles, questions, strict=True):
                    behind = torch.tensor([question + answer], device=model.device)
                    cache = TeacherForcedCache(model, quantize, own, prefix=prefix)
                    hidden = last_hidden(model, behind, cache)[-len(answer) - 1 : -1]
                    log_p = model.get_output_embeddings()(hidden).float().log_softmax(-1)
                    target = behind[0, -len(answer) :]
                    found = bool((log_p.argmax(-1) == target).all())
                    told = float(log_p.gather(1, target[:, None]).sum())
                    rows.append((name, haystack.length, needle.depth, haystack.trial, needle.key, found, told))
    finally:
        model.set_attn_implementation(before)
    return pd.DataFrame(rows, columns=COLUMNS)


def beside_exact(frame: pd.DataFrame) -> pd.DataFrame:
    """Every method beside the exact cache, question by question: the same numbers, hidden at the same places.

    Args:
        frame: what `retrieve` found.

    Returns:
        DataFrame: method; asked, questions; exact, found by the exact cache; found, by the method; lost, found by the
        exact cache alone; won, by the method alone; p, how often a method that is as good as exact would lose and win
        so unevenly or more so (two-sided sign test; 1 when nothing tells them apart); worse, better, cells of length
        and depth in which it finds fewer, more (the numbers of a cell lie in the same text, so they are hardly as many
        trials); nats, mean log-probability of the answers less that under the exact cache.
    """
    keys = ["length", "depth", "trial", "key"]
    found, told = (frame.pivot_table(v, keys, "method", sort=False).astype(float) for v in ("found", "logp"))
    rows = []
    for name in (name for name in found if name != "exact"):
        lost, won = int((found[name] < found["exact"]).sum()), int((found[name] > found["exact"]).sum())
        cells = (found[name] - found["exact"]).groupby(["length", "depth"]).sum()
        sums = int(found["exact"].sum()), int(found[name].sum())
        apart = _sign_test(lost, won), int((cells < 0).sum()), int((cells > 0).sum())
        rows.append((name, len(found), *sums, lost, won, *apart, (told[name] - told["exact"]).mean()))
    columns = ["method", "asked", "exact", "found", "lost", "won", "p", "worse", "better", "nats"]
    return pd.DataFrame(rows, columns=columns)


def _sign_test(lost: int, won: int) -> float:
    """Two-sided probability of a split at least as uneven among `lost + won` fair coins."""
    n = lost + won
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n)


def _once(quantize: Quantize, coded: int) -> Quantize:
    """The same, but the first `coded` tokens, which are the prompt's under every question, are quantized once.

    Where a question fills a page, all are quantized anew: what comes back for a token may depend on those before it
    (anchors, and what keys are fitted by).
    """
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def quantize_prompt(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if k.shape[1] != coded:
            return quantize(layer, k, v)
        if layer not in kept:
            kept[layer] = quantize(layer, k, v)
        return kept[layer]

    return quantize_prompt


def _unchanged(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return k, v


def token_ids(tokenizer, ids: Sequence[int], haystack: Haystack) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Token ids of a haystack's prompt, and of the question and the answer of every needle."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    hidden = [tokens(needle.hidden) for needle in haystack.needles]
    asked = [(tokens(needle.question), tokens(needle.answer)) for needle in haystack.needles]
    room = haystack.length - sum(map(len, hidden)) - max(len(q) + len(a) for q, a in asked)
    if room < 1 or room > len(ids):
        allowed = (haystack.length - room + 1, haystack.length - room + len(ids))
        raise ValueError(
            f"length {haystack.length} is out of range: this text and question allow {allowed[0]} to {allowed[1]}"
        )
    prompt, done = [], 0
    for needle, sentence in sorted(zip(haystack.needles, hidden, strict=True), key=lambda pair: pair[0].depth):
        at = round(needle.depth * room)
        prompt += [*ids[done:at], *sentence]
        done = at
    return prompt + list(ids[done:room]), asked


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments that every retrieval benchmark takes."""
    add = parser.add_argument
    add_model_arguments(parser, random=False)
    add_codebooks(parser, "methods, each named by its file's stem", "pq-4, the default codebooks")
    add_text(parser, what="text to hide numbers in")
    add("--lengths", nargs="+", type=whole(), default=list(LENGTHS), metavar="TOKENS", help="tokens of a whole text, "
        "question and answer included")  # fmt: skip
    add("--depths", nargs="+", type=float, default=list(DEPTHS), metavar="DEPTH", help="where a number is hidden, 0 "
        "(the beginning of the text) to 1 (its end)")  # fmt: skip
    add("--trials", type=int, default=1, metavar="COUNT", help="texts of every length, with other numbers each")
    add_cache_arguments(parser, "residual")
    add_json(parser)


def run(args: argparse.Namespace, name: str, hide: Hide) -> int:
    """Try every cell of a task, print a grid a method (and JSON); the exit status."""
    options = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials}
    config = CacheConfig(residual_length=args.residual)
    _, model, tokenizer = load(args)
    books = {Path(path).stem: Codebooks.load(path, model) for path in args.codebooks}
    books = books or {"pq-4": default_codebooks(model, tokenizer)}
    methods = {title: from_codebooks(book.to(model.device)) for title, book in books.items()}
    options["own_configs"] = planned_configs(args.codebooks)
    frame = retrieve(hide, model, tokenizer, load_text(args.text), methods, config, progress=True, **options)
    for title, part in frame.groupby("method", sort=False):
        print(f"{title}: found, by depth and length")
        print(part.pivot_table(index="depth", columns="length", values="found", aggfunc="mean").to_string())
    print("beside exact, question by question")
    print(beside_exact(frame).round(3).to_string(index=False))
    if args.json:
        print(json.dumps(record(frame, name, args)))
    return 0


def record(frame: pd.DataFrame, name: str, args: argparse.Namespace) -> dict:
    """What was found, with what it depends on, as JSON types."""
    return {
        "benchmark": name,
        "date": today(),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(args.device),
        "text": text_record(args.text),
        "half": args.half,
        "residual": args.residual,
        "codebooks": {Path(path).stem: file_sha256(path) for path in args.codebooks},
        "records": frame.round(4).to_dict("records"),
    }
