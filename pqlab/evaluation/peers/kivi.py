"""KIVI: keys per channel, values per token, asymmetric, in groups of 32.

Liu, Yuan, Jin et al.: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache. ICML 2024, section 3, with the
paper's group size of 32. A group keeps its least value z and a scale s = (max - z) / (2**bits - 1), both in fp16; the
code of x is round((x - z) / s), the value z + s * code.

Groups of K run along tokens, so a group has to be complete when it is flushed: a page holds a multiple of 32 tokens.
The paper keeps R newest tokens exact, and so does every method here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..methods import Method, Setting, register
from ..storage import Storage, from_storage, groups_of, pack, unpack

GROUP = 32


class KIVI(Storage):
    """Args: bits of a code, 1 to 4; the paper has 2 and 4."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def store(self, side: str, pages: Tensor) -> tuple[Tensor, ...]:
        """Codes uint8 [..., groups of 32 codes], scale and zero fp16 [..., groups, 1]."""
        if side == "k":  # [H, p, P / 32, d, 32]: the tokens of a channel
            groups = groups_of(pages, -2, GROUP, "KIVI", "tokens of a page (set another page_size)").mT
        else:  # [H, p, P, d / 32, 32]: channels of a token
            groups = groups_of(pages, -1, GROUP, "KIVI", "elements of a head")
        low = groups.amin(-1, keepdim=True)
        levels = 2**self.bits - 1
        scale, zero = ((groups.amax(-1, keepdim=True) - low) / levels).half(), low.half()
        steps = (groups - zero.float()) / scale.float()
        steps = torch.where(scale > 0, steps, 0.0)  # a constant group, or one whose range fp16 cannot hold
        return pack(steps.round().clamp(0, levels), self.bits), scale, zero

    def load(self, side: str, stored: tuple[Tensor, ...]) -> Tensor:
        packed, scale, zero = stored
        groups = unpack(packed, self.bits) * scale.float() + zero.float()
        return (groups.mT.flatten(-3, -2)) if side == "k" else groups.flatten(-2)


def make(setting: Setting, bits: int) -> Method:
    return from_storage(f"kivi-{bits}", KIVI(bits), setting)


for _bits in (4, 3, 2):
    register(f"kivi-{_bits}")(partial(make, bits=_bits))
