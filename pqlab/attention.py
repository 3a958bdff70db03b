"""The "pqlab" attention: transformers calls it, it asks the cache layer that the keys came from.

Registered on import under the name "pqlab", attention and mask both: without the mask transformers would pass None
and a left-padded batch would go wrong. No model class is patched.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .errors import UnsupportedModelError

NAME = "pqlab"


def pqlab_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention over a paged PQ cache; plain sdpa where the keys do not come from one.

    Args:
        query: [B, Hq, S, d]; key, value: [B, H, S, d], the new tokens as `PagedPQLayer.update` returned them.
        attention_mask: bool [B, 1, S, columns] of transformers' `sdpa_mask`, or None.

    Returns:
        [B, S, Hq, d] and None (attention weights are never materialized; see `pqlab.trace`).
    """
    layer = getattr(key, "pqlab_layer", None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which the paged PQ attention does not do; "
                'use model.set_attn_implementation("sdpa") or "eager" with this cache'
            )
    if dropout:
        raise UnsupportedModelError("attention dropout is for training; call model.eval() before using this cache")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise UnsupportedModelError(
            "a float attention mask (biases) reached the paged PQ attention, which takes boolean masks; "
            "pass the 2D attention_mask of the tokenizer"
        )
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layer.attend(query, attention_mask, scaling).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "pqlab" known to transformers; done when pqlab is imported."""
    AttentionInterface.register(NAME, pqlab_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
