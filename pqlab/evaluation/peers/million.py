"""MILLION as its authors run it: one codebook a side for all layers and heads, no sinks, in the cache or the samples.

Wang, Xu, Liu et al.: MILLION. DAC 2025. Product quantization with 8-bit codes (M = d/2 subspaces at 4 bits, d/4 at 2),
trained here by pqlab's k-means on the calibration text, so that what differs from pqlab's default is the scope of a
codebook and the sinks, not the quality of the training. Its residual window is the harness's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...config import PQConfig
from ...errors import ConfigError
from ...models import load_text
from ...quantization import Codebooks, LayerCodec, PQCodec, collect_kv, product_kmeans
from ..methods import Method, Setting, from_codebooks, register

NUM_VECTORS = 2**17
"""Vectors a side that a merged codebook is trained on, spread evenly over layers, heads and tokens: 512 a centroid."""


def merged_codebooks(setting: Setting, pq: PQConfig, *, num_tokens: int = 8192, seed: int = 0) -> Codebooks:
    """One codebook for K and one for V, shared by every layer and kv head.

    Args:
        setting: model, tokenizer and calibration text.
        pq: M and nbits.
        num_tokens: tokens of the text that are run through the model; none of them counts as a sink.

    Raises:
        ConfigError: layers of unequal head size have no common codebook, or M does not divide the head size.
    """
    sizes = {head_dim for _, head_dim in setting.geometry.values()}
    if len(sizes) > 1:
        raise ConfigError(f"one codebook for all layers needs one head size; this model has {sorted(sizes)}")
    m = pq.num_subspaces(sizes.pop())
    samples = collect_kv(
        setting.model, setting.tokenizer, load_text(setting.calibration), num_tokens=num_tokens, num_sinks=0
    )
    merged = [
        product_kmeans(_spread(side)[None], m, 2**pq.nbits, seed=seed)[0] for side in (samples.keys, samples.values)
    ]
    # expanded, not copied: all heads of all layers share one tensor, and its bytes count once
    return Codebooks(
        {
            i: LayerCodec(*(PQCodec(book.expand(heads, *book.shape)) for book in merged))
            for i, (heads, _) in setting.geometry.items()
        }
    )


def _spread(layers: dict[int, Tensor]) -> Tensor:
    """[n, d]: at most `NUM_VECTORS` vectors of all layers [H, n, d], equally many of each layer."""
    most = NUM_VECTORS // len(layers)
    parts = []
    for x in layers.values():
        vectors = x.flatten(0, 1)
        count = min(most, len(vectors))
        parts.append(vectors[torch.arange(count, device=x.device) * len(vectors) // count])
    return torch.cat(parts)


def make(setting: Setting, bits: int) -> Method:
    from ... import kernels

    kernels.wait(300)  # without compiled kernels training takes many times longer
    head_dim = max(head_dim for _, head_dim in setting.geometry.values())
    books = merged_codebooks(setting, PQConfig(M=head_dim * bits // 8))
    own = replace(setting.config, num_sinks=0)
    note = "one codebook for all layers and heads, no sinks"
    return from_codebooks(f"million-{bits}", books, setting, config=own, note=note)


for _bits in (4, 2):
    register(f"million-{_bits}")(partial(make, bits=_bits))
