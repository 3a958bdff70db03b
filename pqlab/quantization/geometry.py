"""Which layers of a model a codebook is for, and the size of their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import PQConfig
from ..errors import UnsupportedModelError

Geometry = dict[int, tuple[int, int]]
"""{layer index in the model: (kv heads, head size)} of the full-attention layers."""

PQSpec = PQConfig | tuple[PQConfig, PQConfig] | Mapping[int, tuple[PQConfig, PQConfig]]
"""One setting for all, one for K and one for V, or such a pair for every layer index."""


def text_config(model_or_config: Any) -> Any:
    """The decoder's configuration of a transformers model or configuration."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def attention_geometry(model_or_config: Any) -> Geometry:
    """The full-attention layers of a transformers model or configuration; sliding and other layers are left out.

    Raises `UnsupportedModelError` when there is none.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    config = text_config(model_or_config)
    types, _ = get_layer_types_and_kwargs(config)
    per_layer = getattr(config, "per_layer_config", None) or [config] * len(types)
    found = {i: _heads(per_layer[i]) for i, kind in enumerate(types) if kind == "full_attention"}
    if not found:
        kinds = ", ".join(sorted(set(types)))
        raise UnsupportedModelError(f"{config.model_type} has no full-attention layer to quantize, only {kinds}")
    return found


def _heads(config: Any) -> tuple[int, int]:
    query_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    if kv_heads := getattr(config, "num_key_value_heads", None):
        return kv_heads, head_dim
    # Falcon: one kv head, or (its newer kind) as many as it repeats them to before they reach the cache
    multi_query = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    return 1 if multi_query else query_heads, head_dim


def num_layers(model_or_config: Any) -> int:
    return text_config(model_or_config).num_hidden_layers


def setting(spec: PQSpec, layer: int) -> tuple[PQConfig, PQConfig]:
    """The (K, V) settings of one layer."""
    if isinstance(spec, PQConfig):
        return spec, spec
    if isinstance(spec, Mapping):
        if layer not in spec:
            raise KeyError(f"no PQConfig for layer {layer}; there are settings for layers {sorted(spec)}")
        return spec[layer]
    k, v = spec
    return k, v


def describe(geometry: Geometry) -> str:
    """Short text for error messages, such as "30 full-attention layers (0..29) of 3 kv heads x 64"."""
    layers = sorted(geometry)
    sizes = " or ".join(sorted({f"{heads} kv heads x {dim}" for heads, dim in geometry.values()}))
    span = f"{layers[0]}..{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else str(layers)
    return f"{len(layers)} full-attention layers ({span}) of {sizes}"
