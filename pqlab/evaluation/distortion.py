"""How far codes are from the vectors they stand for: by layer, side and head, and of one vector, step by step."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from ..paging.layout import SIDES
from ..quantization import Codebooks, Codec, Samples


def distortions(codebooks: Codebooks, samples: Samples) -> pd.DataFrame:
    """What share of the variance of K and V the codes lose, in every head.

    Args:
        samples: of a text that the codebooks were not trained on (`collect_kv`), of the layers that are looked at;
            those that the codebooks leave exact lose nothing and have no rows.

    Returns:
        DataFrame: layer, side, head, bits (per element), head_space (the mean squared error of the vectors over their
        variance), code_space (the same behind the map, where distance is what attention feels).
    """
    rows = []
    for i in (i for i in samples.keys if i not in codebooks.exact):
        for side, x in zip(SIDES, (samples.keys[i], samples.values[i]), strict=True):
            codec = getattr(codebooks.layer(i), side)
            x = x.float()
            y = codec.to_code_space(x)
            seen = codec.dequantize(codec.quantize(y))
            spaces = (_lost(x, codec.from_code_space(seen)), _lost(y, seen))
            bits = codec.num_subspaces * codec.nbits / codec.head_dim
            for head in range(codec.num_heads):
                rows.append((i, side, head, bits, *(float(lost[head]) for lost in spaces)))
    return pd.DataFrame(rows, columns=["layer", "side", "head", "bits", "head_space", "code_space"])


def _lost(x: Tensor, seen: Tensor) -> Tensor:
    """[H]: squared error of [H, n, d] over the variance."""
    variance = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    return (x - seen).square().sum((1, 2)) / variance


def one_vector(codec: Codec, x: Tensor, head: int = 0) -> pd.DataFrame:
    """Encoding and decoding of one vector, a row a dimension.

    Args:
        x: [d] in head space, of kv head `head`.

    Returns:
        DataFrame: dimension; x; mapped (y = x forward); subspace and code of that dimension; centroid (of that code);
        decoded (centroids backward); error (decoded - x).
    """
    heads, d = codec.num_heads, codec.head_dim
    every = x.float().expand(heads, 1, d)  # codecs take all heads at once
    y = codec.to_code_space(every)
    codes = codec.quantize(y)
    seen = codec.dequantize(codes)
    back = codec.from_code_space(seen)[head, 0]
    subspace = torch.arange(d) // (d // codec.num_subspaces)
    return pd.DataFrame(
        {
            "dimension": range(d),
            "x": every[head, 0].numpy(),
            "mapped": y[head, 0].numpy(),
            "subspace": subspace.numpy(),
            "code": codes[head, 0][subspace].numpy(),
            "centroid": seen[head, 0].numpy(),
            "decoded": back.numpy(),
            "error": (back - every[head, 0]).numpy(),
        }
    )
