"""Which layers of a model a codebook is for, and the size of their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import CacheConfig, PQConfig
from ..errors import ConfigError, UnsupportedModelError

Geometry = dict[int, tuple[int, int]]
"""{layer index in the model: (kv heads, head size)} of the full-attention layers."""

PQSpec = PQConfig | tuple[PQConfig, PQConfig] | Mapping[int, tuple[PQConfig, PQConfig]]
"""One setting for all, one for K and one for V, or such a pair for every layer index."""

_ONE = "PQConfig(M, nbits)"
_SPEC = f"{_ONE}, a pair of them for K and V, or such a pair for every layer"


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


def setting(pq: PQSpec, layer: int) -> tuple[PQConfig, PQConfig]:
    """The (K, V) settings of one layer; raises `ConfigError` where `pq` holds none."""
    pair = pq
    if isinstance(pq, Mapping):
        if layer not in pq:
            raise ConfigError(f"no PQConfig for layer {layer}; there are settings for layers {sorted(pq)}")
        pair = pq[layer]
    elif isinstance(pq, PQConfig):
        return pq, pq
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(one, PQConfig) for one in pair):
        raise ConfigError(_no_setting(pair))
    return pair[0], pair[1]


def one_setting(pq: PQConfig) -> PQConfig:
    """`pq` where one setting has to do for all layers and both sides; raises `ConfigError` where it is none."""
    if not isinstance(pq, PQConfig):
        raise ConfigError(_no_setting(pq, _ONE))
    return pq


def _no_setting(given: object, wanted: str = _SPEC) -> str:
    if isinstance(given, CacheConfig):
        return (
            f"pq takes {wanted}, and was given a CacheConfig, whose pages and window do not concern codebooks; "
            "give that one to PagedPQCache(model, codebooks, config)"
        )
    return f"pq = {given!r} is no setting of a quantizer; give {wanted}"


def describe(geometry: Geometry) -> str:
    """Short text for error messages, such as "30 full-attention layers (0..29) of 3 kv heads x 64"."""
    layers = sorted(geometry)
    sizes = " or ".join(sorted({f"{heads} kv heads x {dim}" for heads, dim in geometry.values()}))
    span = f"{layers[0]}..{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else str(layers)
    return f"{len(layers)} full-attention layers ({span}) of {sizes}"
