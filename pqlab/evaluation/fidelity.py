"""How far a quantized cache is from the exact one: perplexity, KL divergence and top-1 agreement on a text.

Every window of the text is run once exactly and once per method, teacher-forced, in the decode path
(`teacher_forced`). Per position, with p the exact and q the method's next-token distribution:

    nll = -log q(next token)      kl = sum p log(p / q), nats      agree = argmax p == argmax q
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
import torch

from ..config import CacheConfig
from ..transformers_api import cache_argument
from .teacher_forced import Quantize, TeacherForcedCache, schedule

CHUNK = 256
"""Positions whose logits are held at a time: vocabularies are large."""


def text_windows(tokenizer, text: str, length: int, count: int, skip: int = 0) -> list[torch.Tensor]:
    """`count` windows of `length` tokens, one behind the other, after the first `skip` tokens: int64 [1, length].

    Raises ValueError when the text is too short, with the count it allows.
    """
    characters = (skip + count * length) * 12  # tokens of natural text are shorter
    ids = tokenizer(text[:characters], return_tensors="pt", add_special_tokens=False).input_ids
    whole = (ids.shape[1] - skip) // length
    if whole < count:
        raise ValueError(f"the text has {ids.shape[1]} tokens: {max(0, whole)} windows of {length}, not {count}")
    return [ids[:, skip + i * length : skip + (i + 1) * length] for i in range(count)]


@torch.inference_mode()
def compare(
    model,
    windows: list[torch.Tensor],
    methods: Mapping[str, Quantize],
    config: CacheConfig | None = None,
    *,
    prompt: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Every position of every window under every method, beside the exact run.

    Args:
        model: a model that `PagedPQCache` supports; its attention is switched for the run and back.
        windows: int64 [1, n] token ids.
        methods: name -> what its storage does to K and V.
        config: sinks, residual length and page size of all methods.
        prompt: tokens that are prefilled; positions from there on are counted.

    Returns:
        DataFrame: method, window, position, coded (tokens seen as codes), exact_nll, nll, kl (nats), agree.
    """
    config = config or CacheConfig()
    before = model.config._attn_implementation
    model.set_attn_implementation("pqlab")
    frames = []
    runs = [(i, ids.to(model.device)) for i, ids in enumerate(windows)]
    if progress:
        from tqdm.auto import tqdm

        runs = tqdm(runs, desc="evaluating", unit="window")
    try:
        for i, ids in runs:
            exact = _hidden(model, ids, None)
            seen = _coded(ids.shape[1], prompt, config)
            for name, quantize in methods.items():
                hidden = _hidden(model, ids, TeacherForcedCache(model, quantize, config, prompt))
                frame = pd.concat(_measure(model, ids, exact, hidden, prompt), ignore_index=True)
                frames.append(frame.assign(method=name, window=i, coded=[seen[p] for p in frame.position]))
    finally:
        model.set_attn_implementation(before)
    return pd.concat(frames, ignore_index=True)


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a method: perplexities, mean KL with its standard error over windows, agreement, worst-1 % KL."""
    rows = []
    for method, group in frame.groupby("method", sort=False):
        by_window = group.groupby("window").kl.mean()
        exact, ours = (float(torch.tensor(group[c].mean()).exp()) for c in ("exact_nll", "nll"))
        worst = group.kl[group.kl >= group.kl.quantile(0.99)].mean()
        rows.append(
            {
                "method": method,
                "perplexity": ours,
                "exact_perplexity": exact,
                "change": ours / exact - 1,
                "kl": group.kl.mean(),
                "kl_error": by_window.std() / len(by_window) ** 0.5 if len(by_window) > 1 else float("nan"),
                "agreement": group.agree.mean(),
                "worst_kl": worst,
                "positions": len(group),
            }
        )
    return pd.DataFrame(rows)


def _hidden(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """[n, hidden size] behind the last layer."""
    base = model.base_model
    return base(ids, **cache_argument(base, cache), use_cache=cache is not None).last_hidden_state[0]


def _coded(length: int, prompt: int, config: CacheConfig) -> dict[int, int]:
    return {p: s.coded for s in schedule(length, prompt, config) for p in range(s.start, s.stop)}


def _measure(model, ids, exact, hidden, prompt) -> Iterator[pd.DataFrame]:
    head = model.get_output_embeddings()
    for first in range(prompt, ids.shape[1] - 1, CHUNK):
        rows = slice(first, min(first + CHUNK, ids.shape[1] - 1))
        p, q = (head(x[rows]).float().log_softmax(-1) for x in (exact, hidden))
        target = ids[0, rows.start + 1 : rows.stop + 1, None]
        yield pd.DataFrame(
            {
                "position": range(rows.start, rows.stop),
                "exact_nll": -p.gather(1, target)[:, 0].cpu().numpy(),
                "nll": -q.gather(1, target)[:, 0].cpu().numpy(),
                "kl": (p.exp() * (p - q)).sum(-1).clamp_min(0).cpu().numpy(),
                "agree": (p.argmax(-1) == q.argmax(-1)).cpu().numpy(),
            }
        )
