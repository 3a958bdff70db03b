"""The sizes of a model that its KV cache depends on, and those of a few well-known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """What the KV cache of a decoder costs is decided by these.

    Args:
        num_layers: full-attention layers, the ones that are quantized.
        num_heads: query heads of a layer.
        num_kv_heads: kv heads of a layer; divides num_heads.
        head_dim: d, elements of one K or V vector.
        name: for people.
        max_context: tokens the model was made for; 0 where unknown.
        num_sliding_layers: layers with a sliding window; they stay exact.
        sliding_window: tokens that such a layer keeps.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    name: str = "model"
    max_context: int = 0
    num_sliding_layers: int = 0
    sliding_window: int = 0

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} = {getattr(self, field)} is out of range (at least 1); set it to 1 or more")
        if self.num_heads % self.num_kv_heads:
            good = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            nearest = min(good, key=lambda n: abs(n - self.num_kv_heads))
            raise ConfigError(
                f"num_kv_heads = {self.num_kv_heads} does not divide the {self.num_heads} query heads; "
                f"the nearest number that does is {nearest}"
            )

    @classmethod
    def from_config(cls, model_or_config: Any, name: str | None = None) -> ModelShape:
        """The shape of a transformers model or configuration.

        Raises:
            UnsupportedModelError: no full-attention layer, or layers of unequal heads.
        """
        from .quantization.geometry import attention_geometry, describe, text_config

        geometry = attention_geometry(model_or_config)
        if len(set(geometry.values())) > 1:
            raise UnsupportedModelError(f"a ModelShape has one head size for all layers, not {describe(geometry)}")
        config = text_config(model_or_config)
        heads, dim = next(iter(geometry.values()))
        sliding = sum(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ())
        return cls(
            num_layers=len(geometry),
            num_heads=config.num_attention_heads,
            num_kv_heads=heads,
            head_dim=dim,
            name=name or getattr(config, "_name_or_path", "") or config.model_type,
            max_context=getattr(config, "max_position_embeddings", None) or 0,
            num_sliding_layers=sliding,
            sliding_window=(getattr(config, "sliding_window", None) or 0) if sliding else 0,
        )

    def token_bytes(self, element_bytes: int = 2) -> int:
        """Bytes of one exact token in all full-attention layers, K and V."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * element_bytes

    def sliding_bytes(self, context: int, element_bytes: int = 2) -> int:
        """Bytes of one sequence in all sliding-window layers, K and V."""
        tokens = min(context, self.sliding_window)
        return self.num_sliding_layers * self.num_kv_heads * 2 * self.head_dim * element_bytes * tokens


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape(30, 9, 3, 64, "SmolLM2-135M", 8192),
            ModelShape(32, 15, 5, 64, "SmolLM2-360M", 8192),
            ModelShape(24, 32, 32, 64, "SmolLM2-1.7B", 8192),
            ModelShape(3, 4, 1, 256, "Gemma-3-270M", 32768, num_sliding_layers=15, sliding_window=512),
            ModelShape(28, 16, 8, 128, "Qwen3-0.6B", 40960),
            ModelShape(16, 32, 8, 64, "Llama-3.2-1B", 131072),
            ModelShape(32, 32, 32, 128, "Llama-2-7B", 4096),
            ModelShape(32, 32, 32, 128, "LongChat-7B-32K", 32768),
            ModelShape(32, 32, 8, 128, "Mistral-7B-v0.3", 32768),
            ModelShape(32, 32, 8, 128, "Llama-3.1-8B", 131072),
            ModelShape(80, 64, 8, 128, "Llama-3.1-70B", 131072),
        )
    }
)
"""Shapes by name, read from the models' published configurations."""
