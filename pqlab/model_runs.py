"""Runs of the real model that several checks need: greedy tokens, logits along given tokens, what ran them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .kernels import dispatch
from .transformers_api import cache_argument

Runs = dict[tuple[str, str, str], int]
"""(operation, backend, reason) -> calls."""


def check_positions(model, tokens: int, what: str = "context") -> None:
    """Raise `ConfigError` for more tokens than a model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ConfigError(f"{what} = {tokens} is more than the model's {limit} positions; set it to at most {limit}")


@contextmanager
def attention(model, name: str) -> Iterator[None]:
    """Switch the model's attention for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def cudnn_attention_off() -> Iterator[None]:
    """Keep torch's SDPA from cuDNN for a while; nothing changes on a CPU.

    cuDNN is torch's first choice on Hopper GPUs, and builds an execution plan for every new length of the keys. A cache
    that grows by a token a step has a new length at every step, so that an eager decode is a time of building plans.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def counted() -> Iterator[Runs]:
    """The operations that ran inside the block, filled when it ends."""
    before, runs = dispatch.runs(), {}
    yield runs
    runs |= {key: n - before.get(key, 0) for key, n in dispatch.runs().items() if n > before.get(key, 0)}


def generate(model, cache, prompt: Tensor, new_tokens: int) -> Tensor:
    """int64 [1, n + new_tokens]: plain greedy `generate()`; the end of the text does not end it."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **cache_argument(model, cache), do_sample=False,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, disable_compile=True,
    )  # fmt: skip


@dataclass
class Followed:
    """Logits [steps, vocabulary] behind the prompt and every token after it, and how long it took."""

    logits: Tensor
    prefill_seconds: float
    token_seconds: float  # median of a step


@torch.inference_mode()
def follow(model, cache, ids: Tensor, prompt: int) -> Followed:
    """Feed `ids` [1, n]: the first `prompt` tokens at once, the rest one by one, whatever the model would say."""
    given = cache_argument(model, cache)
    logits, times = [], []
    for part in (ids[:, :prompt], *(ids[:, i : i + 1] for i in range(prompt, ids.shape[1]))):
        begin = time.perf_counter()
        logits.append(model(part, **given, use_cache=True, logits_to_keep=1).logits[0, -1].float())
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    steps = sorted(times[1:])
    return Followed(torch.stack(logits), times[0], steps[len(steps) // 2] if steps else 0.0)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits, in units of their spread."""
    return float((a - b).abs().max() / b.std())


def top_gap(logits: Tensor) -> Tensor:
    """[n]: how far the best logit is ahead of the second."""
    best = logits.topk(2, -1).values
    return best[..., 0] - best[..., 1]
