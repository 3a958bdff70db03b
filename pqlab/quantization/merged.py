"""One codebook a side for all layers and heads, as MILLION trains it (Wang, Xu, Liu et al., DAC 2025)."""

from __future__ import annotations

from ..config import PQConfig
from ..errors import ConfigError
from .calibrate import train
from .codebook import LayerCodec
from .geometry import Geometry
from .samples import Samples


def train_merged(samples: Samples, pq: PQConfig, *, seed: int = 0) -> dict[int, LayerCodec]:
    """Codecs of every layer that share one codebook for K and one for V, without maps and weights.

    The codebooks are expanded, not copied: all heads of all layers share one tensor, and its bytes count once.

    Raises:
        ConfigError: layers of unequal head size have no common codebook, or M does not divide the head size.
    """
    pq.num_subspaces(merged_head_dim({i: (k.shape[0], k.shape[-1]) for i, k in samples.keys.items()}))
    return train(samples, pq, maps=False, weighted=False, scope="model", seed=seed)


def merged_head_dim(geometry: Geometry) -> int:
    """The head size that all layers have; raises `ConfigError` where there are several."""
    sizes = {head_dim for _, head_dim in geometry.values()}
    if len(sizes) > 1:
        raise ConfigError(f"one codebook for all layers needs one head size; this model has {sorted(sizes)}")
    return sizes.pop()
