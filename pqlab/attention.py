"""The "pqlab" attention: transformers calls it, and it asks whoever handed the keys over.

transformers gives an attention the keys and values that a cache's `update` returned, but not the cache. So a cache
layer (or whatever else takes a step's place: a recorder, a probe) returns its keys through `handed_over`, and the
attention passes the queries on to what they come from, which `Attends`::

    update(key, value)  ->  handed_over(key, layer), value          of one layer and step
    pqlab_attention(.., query, key, value, mask)  ->  layer.attend(query, mask, scaling)

Registered on import under the name "pqlab", attention and mask both: without the mask transformers would pass None
and a left-padded batch would go wrong. No model class is patched.
"""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .errors import UnsupportedModelError

NAME = "pqlab"


class Attends(Protocol):
    """What keys can come from: it has the keys and values of the step, and everything before them, itself."""

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention [B, Hq, S, d] of the step whose keys were handed over last; called once for it.

        Args:
            query: [B, Hq, S, d], the step's S new tokens; Hq is a multiple of the kv heads.
            mask: bool [B, 1, S, columns] as transformers' `sdpa_mask` makes it, True where a query may look, columns
                being all tokens so far, the new ones included; None: a prompt without pads (plainly causal), or one
                new token that sees all.
            scaling: factor on the scores.
        """
        ...


def handed_over(key: torch.Tensor, layer: Attends) -> torch.Tensor:
    """Keys for `update` to return: a view of `key` that knows its layer.

    A view made anew is nobody else's: the mark goes with the step. It holds where the model passes the very tensor on
    to its attention, which transformers' models do; one that changes it first loses the mark and gets plain sdpa.
    """
    marked = key.view_as(key)
    marked.pqlab_layer = layer
    return marked


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
    """Attention by the layer that handed the keys over; plain sdpa where none did.

    Args:
        query: [B, Hq, S, d]; key, value: [B, H, S, d], the new tokens as a cache's `update` returned them.
        attention_mask: bool [B, 1, S, columns] of transformers' `sdpa_mask`, or None.

    Returns:
        [B, S, Hq, d] and None (attention weights are never materialized; see `pqlab.trace`).
    """
    layer: Attends | None = getattr(key, "pqlab_layer", None)
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
