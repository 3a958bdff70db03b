"""transformers' `QuantizedCache` with the backends optimum-quanto and HQQ, through transformers' own layer classes.

Functions and group size (64) are those of transformers/cache_utils.py. Tensors are fp16, as in a model that is served,
so scales and zero points are stored in fp16. `QuantizedCache` differs in when it quantizes: its exact window runs from
0 to R tokens, and each time that it is full the whole cache is dequantized and quantized again. Here every page is
quantized once, when it is flushed, with the window and sinks of the other methods; that is in its favour.

Axes: quanto's 0, the default, groups 64 neighbouring elements of a head vector. HQQ's 0 groups elements that lie a 64th
of the *whole* tensor apart, across heads and tokens, so that groups depend on the length. transformers' guide ("Best
practices for generation with cache") recommends 1 for HQQ, neighbouring elements again: these are `hf-hqq-4` and
`hf-hqq-2`. `hf-hqq-4-axis0` is HQQ at the default axis, a page at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers.cache_utils
from torch import Tensor

from ..methods import Method, Setting, register
from ..storage import Storage, from_storage

BACKENDS = {"quanto": ("QuantoQuantizedLayer", "optimum-quanto"), "hqq": ("HQQQuantizedLayer", "hqq")}
"""backend -> class in transformers.cache_utils, package on PyPI."""


class HuggingFace(Storage):
    """Args: backend "quanto" or "hqq", bits 2 or 4, axis as the backend counts it.

    Raises ImportError, with the package to install, when the backend is missing or older than transformers takes.
    """

    def __init__(self, backend: str, bits: int, axis: int) -> None:
        name, package = BACKENDS[backend]
        self.backend = backend
        try:
            self.layer = getattr(transformers.cache_utils, name)(nbits=bits, axis_key=axis, axis_value=axis)
        except ImportError as error:
            said = " ".join(str(error).split())
            raise ImportError(f"not installed: pip install {package} (transformers said: {said})") from error

    def store(self, side: str, pages: Tensor) -> list[Any]:
        """A quantized tensor of the backend for every page, in the model's shape [1, H, P, d]."""
        axis = self.layer.axis_key if side == "k" else self.layer.axis_value
        half = pages.half()
        self.layer.lazy_initialization(half[:1, 0], half[:1, 0])  # tells the layer its dtype and device
        return [self.layer._quantize(half[None, :, i].contiguous(), axis=axis) for i in range(half.shape[1])]

    def load(self, side: str, stored: list[Any]) -> Tensor:
        return torch.stack([self.layer._dequantize(page)[0] for page in stored], 1)

    def tensors(self, stored: list[Any]) -> list[Tensor]:
        found = []
        for page in stored:
            if self.backend == "quanto":
                found += [page._data._data, page._scale, page._shift]
            else:
                codes, meta = page
                found += [codes, meta["scale"], meta["zero"]]
        return found


def make(setting: Setting, name: str, backend: str, bits: int, axis: int) -> Method:
    note = "each page quantized once, when flushed"
    return from_storage(name, HuggingFace(backend, bits, axis), setting, note)


for _name, _backend, _bits, _axis in (
    ("hf-quanto-4", "quanto", 4, 0),
    ("hf-quanto-2", "quanto", 2, 0),
    ("hf-hqq-4", "hqq", 4, 1),
    ("hf-hqq-2", "hqq", 2, 1),
    ("hf-hqq-4-axis0", "hqq", 4, 0),
):
    register(_name)(partial(make, name=_name, backend=_backend, bits=_bits, axis=_axis))
