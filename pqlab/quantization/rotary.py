"""The rotary embedding of a model, undone and done again: keys as they were before it turned them by their position.

Su, Lu, Pan et al.: RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021. In the layout of transformers a
pair is (i, i + d/2), and with R(x) = (-x[d/2:], x[:d/2])::

    turned = x cos + R(x) sin            x = (turned cos - R(turned) sin) / (cos² + sin²)

cos² + sin² is 1, or the square of an attention scaling (YaRN), which the cosines and sines hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .geometry import attention_geometry, text_config
from .samples import MAX_POSITION, record_kv

_PROBED = 8  # tokens
_ALIKE = 0.1  # of a layer's keys: rounding of 16 bits gives far less, another rotary embedding far more
_CHOOSE = "leave its keys as the cache sees them: no span, or a method such as pq-4"


class Rotary:
    """Turns keys of a model's full-attention layers.

    Raises:
        ConfigError: the model has no rotary embedding that is the same for a position in every text and turns whole
            heads, in pairs (i, i + d/2), in every one of these layers. That is tried: a few tokens are run at two
            positions, and their keys, turned back, have to be the same.
    """

    def __init__(self, model: Any) -> None:
        config = text_config(model)
        rope = getattr(config, "rope_parameters", None) or {}
        self._kind = ("full_attention",) if isinstance(rope.get("full_attention"), dict) else ()  # Gemma-3 has two
        self._embedding = getattr(model.base_model, "rotary_emb", None)
        kind = (rope["full_attention"] if self._kind else rope).get("rope_type", "default")
        if self._embedding is None or not rope:
            raise ConfigError(f"{config.model_type} has no rotary embedding that pqlab finds; {_CHOOSE}")
        if kind in ("dynamic", "longrope"):
            raise ConfigError(f"the rotary embedding of {config.model_type} ({kind}) depends on the length; {_CHOOSE}")
        sizes = {head_dim for _, head_dim in attention_geometry(model).values()}
        self._device = model.device
        width = self._cos_sin(torch.zeros(1, dtype=torch.int64, device=model.device))[0].shape[-1]
        if sizes != {width}:
            heads = " or ".join(map(str, sorted(sizes)))
            raise ConfigError(
                f"the rotary embedding of {config.model_type} turns {width} of the {heads} elements of a head, not "
                f"whole heads; {_CHOOSE}"
            )
        self._check(model, config)

    @property
    def frequencies(self) -> Tensor:
        """float32 [d/2]: radians a position by which each pair is turned."""
        cos, sin = self._cos_sin(torch.ones(1, dtype=torch.int64, device=self._device))
        half = cos.shape[-1] // 2
        return torch.atan2(sin[0, :half].double(), cos[0, :half].double()).float()

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., n, d] as they are at positions [n], in float32."""
        cos, sin = self._cos_sin(positions.to(x.device))
        return x.float() * cos + _turned_by_90_degrees(x.float()) * sin

    def back(self, turned: Tensor, positions: Tensor) -> Tensor:
        """Inverse of `turn`."""
        cos, sin = self._cos_sin(positions.to(turned.device))
        x = turned.float() * cos - _turned_by_90_degrees(turned.float()) * sin
        return x / (cos.square() + sin.square())

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [n, d] each."""
        like = torch.empty(0, device=positions.device)  # tells the embedding device and dtype
        cos, sin = self._embedding(like, positions[None], *self._kind)
        return cos[0], sin[0]

    def _check(self, model: Any, config: Any) -> None:
        """Attention sees distances only, so what a layer's keys are before they are turned is the same anywhere."""
        ids = torch.arange(_PROBED)[None] % config.vocab_size
        far = min(getattr(config, "max_position_embeddings", MAX_POSITION), MAX_POSITION) - _PROBED
        near, moved = (record_kv(model, ids, num_sinks=0, first_position=first) for first in (0, far))
        for i, keys in near.keys.items():
            x, y = (self.back(k, part.positions) for part, k in ((near, keys), (moved, moved.keys[i])))
            error = float((x - y).norm() / x.norm())
            if not error < _ALIKE:
                raise ConfigError(
                    f"layer {i} of {config.model_type} does not turn its keys by its rotary embedding in pairs "
                    f"(i, i + d/2): turned back, those of one text differ by {error:.0%} between two places; {_CHOOSE}"
                )


def _turned_by_90_degrees(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)
