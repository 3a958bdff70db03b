"""One codebook a side for all layers and heads, as MILLION trains it (Wang, Xu, Liu et al., DAC 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PQConfig
from ..errors import ConfigError
from .codebook import LayerCodec
from .codec import PQCodec
from .geometry import Geometry
from .kmeans import Progress, product_kmeans
from .samples import Samples

NUM_VECTORS = 2**17
"""Vectors a side that a merged codebook is trained on, spread evenly over layers, heads and tokens: 512 a centroid."""


def train_merged(
    samples: Samples, pq: PQConfig, *, seed: int = 0, progress: Progress | None = None
) -> dict[int, LayerCodec]:
    """Codecs of every layer that share one codebook for K and one for V, without maps and weights.

    The codebooks are expanded, not copied: all heads of all layers share one tensor, and its bytes count once.

    Raises:
        ConfigError: layers of unequal head size have no common codebook, or M does not divide the head size.
    """
    m = pq.num_subspaces(merged_head_dim({i: (k.shape[0], k.shape[-1]) for i, k in samples.keys.items()}))
    sides = [
        product_kmeans(_spread(side)[None], m, 2**pq.nbits, seed=seed, progress=progress)[0]
        for side in (samples.keys, samples.values)
    ]
    return {
        i: LayerCodec(*(PQCodec(book.expand(keys.shape[0], *book.shape)) for book in sides))
        for i, keys in samples.keys.items()
    }


def merged_head_dim(geometry: Geometry) -> int:
    """The head size that all layers have; raises `ConfigError` where there are several."""
    sizes = {head_dim for _, head_dim in geometry.values()}
    if len(sizes) > 1:
        raise ConfigError(f"one codebook for all layers needs one head size; this model has {sorted(sizes)}")
    return sizes.pop()


def _spread(layers: dict[int, Tensor]) -> Tensor:
    """[n, d]: at most `NUM_VECTORS` vectors of all layers [H, n, d], equally many of each layer."""
    most = NUM_VECTORS // len(layers)
    parts = []
    for x in layers.values():
        vectors = x.flatten(0, 1)
        count = min(most, len(vectors))
        parts.append(vectors[torch.arange(count, device=x.device) * len(vectors) // count])
    return torch.cat(parts)
