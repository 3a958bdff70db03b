"""Llama models of known shapes with random weights: what a step costs does not depend on what they say."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..models.random_weights import random_weights

SHAPES = {
    "7b": {"num_key_value_heads": 32, "intermediate_size": 11008},
    "8b": {"num_key_value_heads": 8, "intermediate_size": 14336},
    "smollm2": {
        "num_key_value_heads": 3, "intermediate_size": 1536, "hidden_size": 576, "num_attention_heads": 9,
        "num_hidden_layers": 30, "vocab_size": 49152, "head_dim": 64,
    },
    "tiny": {
        "num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 16,
    },
}  # fmt: skip
"""Settings that differ from those of a model with 32 layers, 32 heads of 128 and 32,000 tokens."""


def random_model(shape: str, context: int, dtype: torch.dtype, device: str | torch.device) -> LlamaForCausalLM:
    """A Llama of one of `SHAPES` for `context` tokens with small random weights, made on the device."""
    settings = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000}
    config = LlamaConfig(**(settings | SHAPES[shape]), max_position_embeddings=context)
    return random_weights(config, dtype, "sdpa", device=device)
