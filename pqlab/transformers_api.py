"""Where the transformers releases that pqlab supports differ."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def cache_argument(model: PreTrainedModel, cache: Cache | None) -> dict[str, Any]:
    """`cache` under the name that this model's `forward` and `generate` give it: `model(ids, **cache_argument(...))`.

    transformers 5.24 renamed `past_key_values` to `cache`; models with code of their own may keep the old name.
    """
    return {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": cache}
