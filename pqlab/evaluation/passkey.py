"""Does a compressed cache still find one number in a long text? Passkey retrieval over depth and length.

A sentence with a number is hidden at some depth of a long text, which is prefilled; then the question is fed token by
token, as a user's next turn would be, so that it sees the hidden sentence as codes (Mohtashami and Jaggi 2023,
"Landmark Attention", section 4.2). An answer counts when every one of its tokens is the model's likeliest: what greedy
generation would say. Positions run side by side (`teacher_forced`), so a cell costs one forward over its length.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from ..config import CacheConfig
from ..models import load_model, load_text
from ..quantization import Codebooks
from .fidelity import last_hidden
from .provenance import commit, text_record, today, versions
from .teacher_forced import Quantize, TeacherForcedCache, from_codebooks

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

_HIDDEN = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


@torch.inference_mode()
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
    """Retrieval of a five-digit number by the exact cache and by every method.

    Args:
        text: the haystack; as many tokens of it as a length needs, from its beginning.
        methods: name -> what its storage does to K and V.
        config: sinks, residual length and page size of all methods.
        lengths: tokens of the whole sequence.
        depths: of the hidden sentence, 0 the beginning and 1 the end of the text.
        trials: numbers tried in every cell.

    Returns:
        DataFrame: method ("exact" first), length, depth, trial, key, found (bool), logp (of the answer, nats).

    Raises:
        ValueError: a length that the text, the model or the question does not allow.
    """
    config = config or CacheConfig()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(lengths)
    if max(lengths) > limit:
        raise ValueError(f"lengths reach {max(lengths)} tokens, the model {limit}; give shorter ones")
    ids = tokenizer(text[: 12 * max(lengths)], add_special_tokens=False).input_ids
    numbers = random.Random(seed)
    before = model.config._attn_implementation
    model.set_attn_implementation("pqlab")
    cells = [(n, depth, trial) for n in lengths for depth in depths for trial in range(trials)]
    if progress:
        from tqdm.auto import tqdm

        cells = tqdm(cells, desc="pass keys", unit="cell")
    rows = []
    try:
        for length, depth, trial in cells:
            key = str(numbers.randrange(10_000, 100_000))
            whole, prompt, answer = _sequence(tokenizer, ids, length, depth, key)
            whole = torch.tensor([whole], device=model.device)
            for name, quantize in {"exact": None, **methods}.items():
                cache = TeacherForcedCache(model, quantize, config, prompt) if quantize else None
                hidden = last_hidden(model, whole, cache)[-answer - 1 : -1]
                log_p = model.get_output_embeddings()(hidden).float().log_softmax(-1)
                target = whole[0, -answer:]
                found = bool((log_p.argmax(-1) == target).all())
                rows.append((name, length, depth, trial, key, found, float(log_p.gather(1, target[:, None]).sum())))
    finally:
        model.set_attn_implementation(before)
    return pd.DataFrame(rows, columns=["method", "length", "depth", "trial", "key", "found", "logp"])


def _sequence(tokenizer, ids: list[int], length: int, depth: float, key: str) -> tuple[list[int], int, int]:
    """Token ids of one cell, the tokens of it that are prefilled, and those of the answer at its end."""
    hidden, question, answer = (
        tokenizer(part, add_special_tokens=False).input_ids for part in (_HIDDEN.format(key=key), _QUESTION, f" {key}")
    )
    room = length - len(hidden) - len(question) - len(answer)
    if room < 1 or room > len(ids):
        allowed = (length - room + 1, length - room + len(ids))
        raise ValueError(f"length {length} is out of range: this text and question allow {allowed[0]} to {allowed[1]}")
    at = round(depth * room)
    whole = ids[:at] + hidden + ids[at:room] + question + answer
    return whole, room + len(hidden), len(answer)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name, hub id or folder (default: the embedded model)")
    parser.add_argument("--codebooks", nargs="*", default=[], metavar="PATH", help="files, each a method")
    parser.add_argument("--text", default="pride", help="name of a shipped text, or a file")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens")
    parser.add_argument("--depths", nargs="+", type=float, default=list(DEPTHS), help="0 to 1")
    parser.add_argument("--trials", type=int, default=1, help="numbers a cell")
    parser.add_argument("--residual", type=int, default=CacheConfig().residual_length, help="exact newest tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")


def run(args: argparse.Namespace) -> int:
    """Try every cell, print a grid a method (and JSON); the exit status."""
    from ..models import default_codebooks

    model, tokenizer = load_model(args.model) if args.model else load_model()
    books = {Path(path).stem: Codebooks.load(path, model) for path in args.codebooks}
    books = books or {"pq-4": default_codebooks(model, tokenizer)}
    methods = {name: from_codebooks(book) for name, book in books.items()}
    config = CacheConfig(residual_length=args.residual)
    options = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials}
    try:
        frame = passkey(model, tokenizer, load_text(args.text), methods, config, progress=True, **options)
    except ValueError as error:
        print(f"pqlab bench passkey: {error}")
        return 2
    for name, part in frame.groupby("method", sort=False):
        print(f"{name}: found, by depth and length")
        print(part.pivot_table(index="depth", columns="length", values="found", aggfunc="mean").to_string())
    if args.json:
        about = {"benchmark": "passkey", "date": today(), "commit": commit(), "versions": versions()}
        cells = frame.drop(columns="key").round(4).to_dict("records")
        print(json.dumps({**about, "text": text_record(args.text), "residual": args.residual, "records": cells}))
    return 0
