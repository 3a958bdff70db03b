"""transformers' own layers, which a paged cache keeps for what it does not quantize: which, how large, and cropping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from ..errors import UnsupportedModelError
from .layer_states import LayerStates


def exact_layers(whole: PreTrainedConfig, text: PreTrainedConfig) -> list:
    """transformers' own layers for this model, or an error that names what stands in the way."""
    reasons = {
        "is an encoder-decoder": getattr(whole, "is_encoder_decoder", False),
        "compresses its KV into latents (MLA)": getattr(text, "kv_lora_rank", None),
        "caps its attention scores (attn_logit_softcapping)": getattr(text, "attn_logit_softcapping", None),
        "shares K and V among layers (num_kv_shared_layers)": getattr(text, "num_kv_shared_layers", None),
        "adds learned attention sinks to the softmax": text.model_type in ("gpt_oss",),
        "uses position biases in its attention (ALiBi)": getattr(text, "alibi", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"{whole.model_type} {reason}, which PagedPQCache does not do; use DynamicCache"
            )
    return DynamicCache(config=whole).layers


def held_bytes(held: object) -> int:
    """Of the numbers in an exact layer: keys and values, or the states of a layer without attention."""
    if isinstance(held, torch.Tensor):
        return held.nbytes if held.is_floating_point() else 0
    if isinstance(held, Mapping):
        return sum(map(held_bytes, held.values()))
    return sum(map(held_bytes, held)) if isinstance(held, (list, tuple)) else 0


def crop_all(layers: Sequence, chosen: Iterable[int], tokens_to_remove: int) -> None:
    """Crop the layers at these indexes, all or none of them; `tokens_to_remove` has transformers' sign.

    Raises:
        RuntimeError: one of them cannot give tokens back; it is named, and nothing was changed.
    """
    before = LayerStates(layers)
    for index in chosen:
        layer = layers[index]
        try:
            if tokens_to_remove and not layer.is_croppable:
                raise RuntimeError("its state does not tell tokens apart")
            before.keep(index)
            layer.crop(tokens_to_remove)
        except Exception as error:
            before.put_back()
            raise RuntimeError(
                f"layer {index} ({type(layer).__name__}) cannot be cropped, and nothing was changed: {error}"
            ) from error
