"""Per-token blocks of 32 with one fp16 scale: llama.cpp's q4_0 (`--cache-type-k q4_0`), and the same rule at 2 bits.

From ggml-quants.c (`quantize_row_q4_0_ref`): of the 32 values the one that is largest in magnitude, with its sign,
becomes the lowest code exactly, d = max / -2**(bits - 1); code = min(2**bits - 1, floor(x / d + 2**(bits - 1) + 0.5)),
value = d * (code - 2**(bits - 1)). The codes come from d as it is before it is rounded to fp16, as there. llama.cpp has
no 2-bit cache of this kind; that row extends the rule.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..methods import Method, Setting, register
from ..storage import Storage, from_storage, groups_of, pack, unpack

BLOCK = 32


class PerToken(Storage):
    """Args: bits of a code, 2 or 4."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.middle = 2 ** (bits - 1)

    def store(self, side: str, pages: Tensor) -> tuple[Tensor, ...]:
        """Codes uint8 [H, p, P, d / 32, 32 * bits / 8] and scales fp16 [H, p, P, d / 32, 1]; K and V alike."""
        blocks = groups_of(pages, -1, BLOCK, "per-token quantization", "elements of a head")
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -self.middle
        steps = torch.where(scale != 0, blocks / scale, 0.0)
        codes = (steps + (self.middle + 0.5)).floor().clamp(0, 2 * self.middle - 1)
        return pack(codes, self.bits), scale.half()

    def load(self, side: str, stored: tuple[Tensor, ...]) -> Tensor:
        packed, scale = stored
        return ((unpack(packed, self.bits).float() - self.middle) * scale.float()).flatten(-2)


def make(setting: Setting, bits: int) -> Method:
    return from_storage(f"per-token-{bits}", PerToken(bits), setting)


for _bits in (4, 2):
    register(f"per-token-{_bits}")(partial(make, bits=_bits))
