"""Caches that hold a context of random tokens: what a step costs does not depend on what they say."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..cost import coded_tokens
from ..errors import UnsupportedModelError
from ..quantization import Codebooks, attention_geometry
from ..quantization.geometry import num_layers

ROOM = 256
"""Tokens of capacity behind the context: every timed step adds one."""


def filled_paged(
    model: PreTrainedModel,
    context: int,
    config: CacheConfig | None = None,
    *,
    codebooks: Codebooks | None = None,
    room: int = ROOM,
) -> PagedPQCache:
    """A paged cache that holds `context` random tokens: random codes in shuffled pages, random exact tokens.

    Args:
        codebooks: default: random ones of 4 bits an element, with maps as calibrated ones have.
        room: tokens that can be added.
    """
    geometry = checked_geometry(model)
    config = config or CacheConfig()
    books = codebooks or Codebooks.random(model.config, pq=PQConfig(), maps=True)
    cache = PagedPQCache(model, books, config, context=context + room)
    coded = coded_tokens(context, config)
    group = cache.group
    with torch.inference_mode(False), torch.no_grad():
        group._add_rows(1)
        group._record_columns(None, context)
        group._extend([coded])
        group.tokens, group.columns = [context], context
        group._refresh_lengths()
        cache.pool.buffer.random_(0, 256)
        for layer in cache.quantized_layers:
            heads, d = geometry[layer.index]
            new = torch.zeros(1, heads, 1, d, dtype=model.dtype, device=model.device)
            layer.lazy_initialization(new, new)
            layer.columns = context
            for tensor in (layer.sink_k, layer.sink_v, layer.window_k, layer.window_v):
                tensor.normal_()
    return cache


def filled_dynamic(model: PreTrainedModel, context: int) -> DynamicCache:
    """transformers' own cache with `context` random tokens."""
    cache = DynamicCache(config=model.config)
    for layer, (heads, d) in checked_geometry(model).items():
        k, v = (torch.randn(1, heads, context, d, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(k, v, layer)
    return cache


def filled_buffers(model: PreTrainedModel, context: int) -> Cache:
    """K and V of exactly `context` tokens and the new one, in buffers: the least an exact cache can do.

    Without context the new token is written all the same, or a compiler would leave out the projections that make it.
    """
    made = [
        _ExactBuffers((1, heads, context + 1, d), model.dtype, model.device)
        for heads, d in checked_geometry(model).values()
    ]
    return Cache(layers=made)


def checked_geometry(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """{layer: (kv heads, head size)}; raises `UnsupportedModelError` where some layers are no full attention."""
    geometry = attention_geometry(model)
    if len(geometry) != num_layers(model):
        raise UnsupportedModelError(
            f"{model.config.model_type} has layers that are no full attention: a cache for it is filled by running a "
            "prompt, not with random tokens"
        )
    return geometry


class _ExactBuffers(CacheLayerMixin):
    """Every step writes the last token of the buffers."""

    is_compileable = True

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.keys, self.values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int):
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]
