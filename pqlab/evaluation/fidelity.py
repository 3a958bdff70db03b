"""How far a quantized cache is from the exact one: perplexity, KL divergence and top-1 agreement on a text.

Every window of the text is run once exactly and once per method, teacher-forced, in the decode path
(`teacher_forced`). Per position, with p the exact and q the method's next-token distribution:

    nll = -log q(next token)      kl = sum p log(p / q), nats      agree = argmax p == argmax q
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..config import CacheConfig
from ..transformers_api import cache_argument
from .teacher_forced import Quantize, TeacherForcedCache, schedule

CHUNK = 256
"""Positions whose logits are held at a time: vocabularies are large."""

SUMMARY = (
    "method",
    "perplexity",
    "exact_perplexity",
    "change",
    "change_error",
    "kl",
    "kl_error",
    "agreement",
    "worst_kl",
    "positions",
)
"""Columns of `summarize`."""

_COLUMNS = ["method", "window", "position", "coded", "exact_nll", "nll", "kl", "agree"]


def text_windows(tokenizer, text: str, length: int, count: int, skip: int = 0) -> list[torch.Tensor]:
    """`count` windows of `length` tokens, one behind the other, after the first `skip` tokens: int64 [1, length].

    Raises ValueError when the text is too short, with the count it allows, and when nothing is asked for.
    """
    if count < 1 or length < 1 or skip < 0:
        raise ValueError(
            f"{count} windows of {length} tokens behind {skip} are nothing to measure; set at least 1 of 1"
        )
    characters = (skip + count * length) * 12  # tokens of natural text are shorter
    ids = tokenizer(text[:characters], return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
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
    own_configs: Mapping[str, CacheConfig] | None = None,
    failures: dict[str, Exception] | None = None,
) -> pd.DataFrame:
    """Every position of every window under every method, beside the exact run.

    Args:
        model: a model that `PagedPQCache` supports; its attention is switched for the run and back.
        windows: int64 [1, n] token ids.
        methods: name -> what its storage does to K and V.
        config: sinks, residual length and page size of all methods.
        prompt: tokens that are prefilled; positions from there on are counted.
        own_configs: name -> config of methods that are not measured under `config`.
        failures: a method that raises is left out and its error put here under its name; None lets it raise.

    Returns:
        DataFrame: method, window, position, coded (tokens seen as codes), exact_nll, nll, kl (nats), agree.

    Raises:
        ValueError: the exact run or (see `failures`) a method gives distributions that are not finite.
    """
    config = config or CacheConfig()
    own_configs = own_configs or {}
    before = model.config._attn_implementation
    model.set_attn_implementation("pqlab")
    frames = []
    bar = tqdm(total=len(windows) * (1 + len(methods)), desc="evaluating", unit="run", disable=not progress)
    try:
        for i, ids in enumerate(windows):
            ids = ids.to(model.device)
            exact = last_hidden(model, ids, None)
            if not exact.isfinite().all():
                raise ValueError(f"window {i}: the exact model itself is not finite; load it in another dtype")
            bar.update()
            hidden: dict[str, torch.Tensor] = {}
            for name, quantize in methods.items():
                if failures is None or name not in failures:
                    own = own_configs.get(name, config)
                    try:
                        hidden[name] = last_hidden(model, ids, TeacherForcedCache(model, quantize, own, prompt))
                    except Exception as error:
                        if failures is None:
                            raise
                        failures[name] = error
                bar.update()
            for name, frame in measure(model, ids, exact, hidden, prompt).items():
                if missing := int(frame.kl.isna().sum()):  # a mean would pass over them
                    error = ValueError(f"{name}: next-token distributions are not finite at {missing} positions")
                    if failures is None:
                        raise error
                    failures[name] = error
                seen = _coded(ids.shape[1], prompt, own_configs.get(name, config))
                frames.append(frame.assign(method=name, window=i, coded=frame.position.map(seen)))
    finally:
        bar.close()
        model.set_attn_implementation(before)
    frames = [frame for frame in frames if not failures or frame.method[0] not in failures]
    return pd.concat(frames, ignore_index=True)[_COLUMNS] if frames else pd.DataFrame(columns=_COLUMNS)


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """What `compare` found, one row a method.

    Returns:
        DataFrame: method; perplexity and exact_perplexity over all positions; change, their ratio - 1; change_error;
        kl, the mean in nats; kl_error; agreement, 0 to 1; worst_kl, the mean of the worst 1 % of positions; positions.
        Errors are standard errors over windows, NaN for a single window: positions of one window are not independent.
    """
    rows = []
    for method, group in frame.groupby("method", sort=False):
        exact, ours = (exp(group[column].mean()) for column in ("exact_nll", "nll"))
        rows.append(
            {
                "method": method,
                "perplexity": ours,
                "exact_perplexity": exact,
                "change": ours / exact - 1,
                "change_error": ours / exact * _error_over_windows(group, group.nll - group.exact_nll),
                "kl": group.kl.mean(),
                "kl_error": _error_over_windows(group, group.kl),
                "agreement": group.agree.mean(),
                "worst_kl": group.kl[group.kl >= group.kl.quantile(0.99)].mean(),
                "positions": len(group),
            }
        )
    return pd.DataFrame(rows, columns=SUMMARY)


def by_position(frame: pd.DataFrame, width: int = 512) -> pd.DataFrame:
    """KL along the text: where in a window a method is how far from exact.

    Args:
        frame: what `compare` found.
        width: positions of a range.

    Returns:
        DataFrame: method, start, stop (positions start to stop - 1; the last range ends with the window), kl (mean,
        nats), kl_error (over windows), agreement, coded (mean tokens seen as codes), positions.
    """
    if width < 1:
        raise ValueError(f"width = {width} is no number of positions; set it to at least 1")
    rows = []
    last = int(frame.position.max()) + 1 if len(frame) else 0
    for (method, part), group in frame.groupby(["method", frame.position // width], sort=False):
        rows.append(
            {
                "method": method,
                "start": part * width,
                "stop": min((part + 1) * width, last),
                "kl": group.kl.mean(),
                "kl_error": _error_over_windows(group, group.kl),
                "agreement": group.agree.mean(),
                "coded": group.coded.mean(),
                "positions": len(group),
            }
        )
    return pd.DataFrame(rows)


def versus(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Every method beside one of them, window by window: what a text makes hard for all cancels.

    Args:
        frame: what `compare` found, every method on the same windows.
        name: the method that the others are compared with.

    Returns:
        DataFrame: method; kl; ratio, its KL over that of `name` on all positions; difference, mean over windows of its
        KL minus that of `name`, nats; difference_error, the standard error of that mean (NaN for one window); better,
        the windows in which its KL is the smaller one; windows.

    Raises:
        ValueError: `name` is not in the frame.
    """
    by_window = frame.pivot_table(index="window", columns="method", values="kl", sort=False)
    if name not in by_window:
        raise ValueError(f'there are no numbers of "{name}"; there are some of {", ".join(by_window)}')
    differences = by_window.drop(columns=name).sub(by_window[name], axis=0)
    return (
        pd.DataFrame(
            {
                "kl": by_window.mean(),
                "ratio": by_window.mean() / by_window[name].mean(),
                "difference": differences.mean(),
                "difference_error": differences.sem(),
                "better": (differences < 0).sum(),
                "windows": len(by_window),
            }
        )
        .loc[list(differences)]
        .rename_axis("method")
        .reset_index()
    )


def _error_over_windows(group: pd.DataFrame, values: pd.Series) -> float:
    means = values.groupby(group.window).mean()
    return means.std() / len(means) ** 0.5 if len(means) > 1 else float("nan")


def last_hidden(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """[n, hidden size] behind the last layer, of one text [1, n]; the cache may be None: exact."""
    base = model.base_model
    return base(ids, **cache_argument(base, cache), use_cache=cache is not None).last_hidden_state[0]


def _coded(length: int, prompt: int, config: CacheConfig) -> dict[int, int]:
    return {p: s.coded for s in schedule(length, prompt, config) for p in range(s.start, s.stop)}


def measure(model, ids, exact, hidden: Mapping[str, torch.Tensor], prompt: int = 0) -> dict[str, pd.DataFrame]:
    """position, exact_nll, nll, kl, agree of the positions from `prompt` on, by method; the last has no target.

    Vocabularies are large, so the exact distributions of a chunk serve all methods.

    Args:
        ids: int64 [1, n]; exact, and hidden by method: `last_hidden` of the runs, [n, hidden size].
    """
    head = model.get_output_embeddings()
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in hidden}
    for first in range(prompt, ids.shape[1] - 1, CHUNK):
        rows = slice(first, min(first + CHUNK, ids.shape[1] - 1))
        target = ids[0, rows.start + 1 : rows.stop + 1, None]
        log_p = head(exact[rows]).float().log_softmax(-1)
        p, likeliest, exact_nll = log_p.exp(), log_p.argmax(-1), -log_p.gather(1, target)[:, 0]
        for name, states in hidden.items():
            log_q = head(states[rows]).float().log_softmax(-1)
            part = {
                "position": range(rows.start, rows.stop),
                "exact_nll": exact_nll.cpu().numpy(),
                "nll": -log_q.gather(1, target)[:, 0].cpu().numpy(),
                "agree": (likeliest == log_q.argmax(-1)).cpu().numpy(),
                "kl": (p * (log_p - log_q)).sum(-1).clamp_min(0).cpu().numpy(),
            }
            parts[name].append(pd.DataFrame(part))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
