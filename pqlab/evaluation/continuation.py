"""The tokens behind a long prompt, under any number of settings: the prompt is run once.

A prompt sees itself exactly whatever the cache does, so its keys and values serve every setting. What a setting changes
is how they are stored, and what the tokens behind them see: one short forward (`kl`), or a real cache that is filled
with them and decodes on (`cache`).
"""

from __future__ import annotations

from copy import deepcopy

import pandas as pd
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cache import PagedPQCache
from ..cache.sequences import plain_state
from ..config import CacheConfig
from ..errors import ConfigError
from ..quantization import Codebooks
from .fidelity import last_hidden, measure
from .teacher_forced import Quantize, TeacherForcedCache


class Continuation:
    """A text [1, n] whose first `context` tokens are the prompt and whose others are measured.

    Args:
        model: a model that `PagedPQCache` supports.
        ids: int64 [1, n].
        context: tokens of the prompt.

    Raises:
        ConfigError: fewer than two tokens are left behind the prompt.
    """

    @torch.inference_mode()
    def __init__(self, model, ids: Tensor, context: int) -> None:
        if not 1 <= context <= ids.shape[1] - 2:
            raise ConfigError(f"context = {context} leaves nothing of {ids.shape[1]} tokens to measure; set 1 to "
                              f"{ids.shape[1] - 2}")  # fmt: skip
        self.model, self.ids, self.context = model, ids.to(model.device), context
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            self.prompt = DynamicCache(config=model.config)
            last_hidden(model, self.ids[:, :context], self.prompt)
            self.whole = deepcopy(self.prompt)
            self.exact = last_hidden(model, self.ids[:, context:], self.whole)  # [n - context, hidden size]
        finally:
            model.set_attn_implementation(before)

    @property
    def is_all_quantized(self) -> bool:
        """Every layer is one that `PagedPQCache` quantizes: the whole prompt's keys and values are at hand."""
        return all(type(layer) is DynamicLayer for layer in self.whole.layers)

    @torch.inference_mode()
    def frame(self, quantize: Quantize, config: CacheConfig) -> pd.DataFrame:
        """position, exact_nll, nll, kl, agree of every token behind the prompt, as a decode with this cache sees it.

        The attention of the model is switched for the run and back.
        """
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("pqlab")
        try:
            cache = TeacherForcedCache(self.model, quantize, config, prefix=self.prompt)
            hidden = last_hidden(self.model, self.ids[:, self.context :], cache)
        finally:
            self.model.set_attn_implementation(before)
        tail = self.ids[:, self.context :]
        frame = measure(self.model, tail, self.exact, {"": hidden})[""]
        return frame.assign(position=frame.position + self.context)

    def cache(self, codebooks: Codebooks, config: CacheConfig, tokens: int, room: int) -> PagedPQCache:
        """A paged cache as it is behind the first `tokens` tokens, with room for `room` more.

        Where the model has only full-attention layers, and the cache is an eager one, their keys and values are stored
        as a prefill stores them, without running the model; else the prompt is run.
        """
        cache = PagedPQCache(self.model, codebooks, config, context=tokens + room)
        if self.is_all_quantized and config.mode == "eager":
            self._store(cache, tokens)
            return cache
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("pqlab")
        try:
            with torch.inference_mode():
                last_hidden(self.model, self.ids[:, :tokens], cache)
        finally:
            self.model.set_attn_implementation(before)
        return cache

    @plain_state
    def _store(self, cache: PagedPQCache, tokens: int) -> None:
        plan = cache.group.plan_step(0, tokens, 1, None)
        for layer in cache.quantized_layers:
            exact = self.whole.layers[layer.index]
            k, v = (x[:, :, :tokens].clone() for x in (exact.keys, exact.values))
            layer.lazy_initialization(k, v)
            layer._store(plan, k, v)
