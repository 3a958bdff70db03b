"""FP8 (e4m3): eight bits an element and a float32 scale for every page and kv head.

Micikevicius et al.: FP8 Formats for Deep Learning. 2022 (e4m3: largest value 448). The scale of a page and head is its
largest magnitude / 448, so nothing saturates. Serving engines and transformers keep one scale for a whole tensor, set
before most tokens are seen; this one is never coarser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import Method, Setting, register
from ..storage import Storage, from_storage

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class FP8(Storage):
    def store(self, side: str, pages: Tensor) -> tuple[Tensor, ...]:
        """Values float8 [H, p, P, d] and scales float32 [H, p, 1, 1]."""
        scale = pages.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        # the clamp: x / scale may round above the largest value, which torch would turn into NaN
        return (pages / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale

    def load(self, side: str, stored: tuple[Tensor, ...]) -> Tensor:
        values, scale = stored
        return values.float() * scale


@register("fp8")
def make(setting: Setting) -> Method:
    return from_storage("fp8", FP8(), setting, "e4m3, a scale per page and kv head")
