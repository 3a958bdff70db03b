"""A short name for "this very model", so that codebooks made for another one are refused."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 256
"""Weights looked at per parameter."""

FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "rope_local_base_freq",
)
"""What shapes keys and values; a field that a model kind does not have counts as None."""


def fingerprint(model: PreTrainedModel) -> str:
    """Stable short name of a model: its architecture fields and the signs of 256 weights of every matrix.

    Signs, because a cast between float32, bfloat16 and float16 keeps them (zero keeps its sign bit too), so that the
    same checkpoint has one fingerprint in every dtype and on every device. A fine-tuned model flips some of the tens
    of thousands of signs; so does a merged adapter. The head that maps to the vocabulary is left out: it shapes no
    keys and values, and some checkpoints tie it while others store it.
    """
    config = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256()
    fields = {name: getattr(config, name, None) for name in FIELDS}
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    base = model.base_model
    for name, parameter in sorted(base.named_parameters()):
        if parameter.ndim < 2:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        signs = torch.signbit(flat[::step][:SAMPLES]).cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(signs.tobytes())
    return f"{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}-{digest.hexdigest()[:12]}"
