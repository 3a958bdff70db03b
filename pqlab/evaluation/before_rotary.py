"""Keys quantized as they were before the rotary embedding turned them: only simulated, there is no such cache.

Keys that are not turned by their position lie closer together, so the same bits lose less. A cache would have to turn
each of them at every decode step, after it was put together from its codes (`bench rotary` says what that costs):

`pq-4-before-rotary`        codebooks as the default's, with the balanced map. A key has to leave code space, by a d × d
                            product, before it can be turned.
`pq-4-before-rotary-pairs`  nothing is mixed but the two numbers of a rotary pair (i, i + d/2): a subspace is one pair
                            or, at 2 bits, two. A kernel could turn a query's pair instead of the key. Pairs are put in
                            order and scaled, which is folded into the centroids.
Between these and keys as the model makes them lie anchored ones (`quantization.anchors`, `pq-4-anchored`), for which
there is a cache: queries, not keys, are turned and mapped there, once a span of tokens.

Values are those of `pq-4` and `pq-2`, and what fits keys to a sequence (`cache.key_fit`) is the same; it could be
folded into the centroids that a sequence is asked by.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import kernels
from ..config import PQConfig
from ..models import calibration_text
from ..quantization import Codebooks, LayerCodec, PQCodec, collect_kv, default_codebooks, product_kmeans
from ..quantization.codec import to_float
from ..quantization.maps import balanced_map, balanced_order, compact_map
from ..quantization.rotary import Rotary
from .methods import Method, Setting, default_pq, from_codebooks, register

_LEAST_EXPONENT = -14  # of a power of two that float16 holds with its inverse


def key_codec(
    x: Tensor, metric: Tensor | None, weights: Tensor | None, pq: PQConfig, *, pairs: bool, seed: int = 0
) -> PQCodec:
    """The codec of a layer's keys before the rotary embedding, trained as `calibrate` trains.

    Args:
        x: [H, n, d] keys, turned back; weights: [H, n] of `Sensitivity.weights`.
        metric: [H, d, d], E[q q^T] of queries that are turned. A key is asked by q turned by the distance to it; what
            the samples recorded are queries turned by their positions, which are spread over the model's context as
            the distances of a long text are. (LOG.md: near the best metric at SmolLM2's whole context, and not at 2048
            tokens; metrics of short distances lose far more where texts are long.)
        pairs: see the module.
    """
    m = pq.num_subspaces(x.shape[-1])
    if pairs:
        forward, backward = pairs_map(x, metric, m)
    else:
        forward, backward = compact_map(balanced_map(x, metric, m)[0], m)
    y = x.float() @ to_float(forward)
    books = product_kmeans(y, m, 2**pq.nbits, weights=weights, seed=seed)
    return PQCodec(books, forward, backward, mean=y.mean(1), spread=y.std(1)).half()


def pairs_map(x: Tensor, metric: Tensor | None, num_subspaces: int) -> tuple[Tensor, Tensor]:
    """A map that only puts rotary pairs in order and scales them: their two dimensions side by side in one subspace.

    A pair is scaled by the size of what asks for it, to a power of two, so that float16 holds the map and its inverse
    exactly; where a subspace has several pairs, they are dealt to it as `balanced_order` deals axes.

    Args:
        x: [H, n, d]; metric: [H, d, d] or None, as for `balanced_map`.
        num_subspaces: M, divides d/2.

    Returns:
        forward, backward: float32 [H, d, d].
    """
    heads, _, d = x.shape
    half = d // 2
    asked = x.new_ones(heads, d) if metric is None else metric.to(x).diagonal(dim1=-2, dim2=-1)
    exponents = asked.unflatten(-1, (2, half)).mean(1).clamp_min(torch.finfo(torch.float32).tiny).log2() / 2  # [H, d/2]
    sizes = (exponents - exponents.amax(-1, keepdim=True)).round().clamp_min(_LEAST_EXPONENT).exp2()
    variances = x.float().var(1).unflatten(-1, (2, half)).mean(1) * sizes.square()
    variances, ranked = variances.sort(-1, descending=True)
    pairs = ranked.gather(-1, balanced_order(variances, num_subspaces))
    dims = torch.stack((pairs, pairs + half), -1).flatten(1)  # [H, d]: which dimension comes where
    scales = sizes.repeat(1, 2).gather(-1, dims)
    forward = x.new_zeros(heads, d, d, dtype=torch.float32).scatter(1, dims[:, None], scales[:, None])
    backward = torch.zeros_like(forward).scatter(2, dims[:, :, None], 1 / scales[:, :, None])
    return forward, backward


def _make(setting: Setting, name: str, bits: int, pairs: bool = False) -> Method:
    pq = default_pq(setting, bits)
    rotary = Rotary(setting.model)
    options = {"text": setting.calibration, "progress": setting.progress}
    values = default_codebooks(setting.model, setting.tokenizer, pq, **options)
    samples = collect_kv(setting.model, setting.tokenizer, calibration_text(setting.calibration))
    kernels.wait(300)  # without compiled kernels training takes many times longer
    layers = {}
    for i, keys in samples.keys.items():
        seen = samples.sensitivity.get(i)
        metric, weights = (seen.key_metric, seen.weights()) if seen else (None, None)
        x = rotary.back(keys, samples.positions)
        codec = key_codec(x, metric, weights and weights[0], pq, pairs=pairs)
        layers[i] = LayerCodec(codec, values.layer(i).v)
    return before_rotary(name, Codebooks(layers), setting, rotary, pairs=pairs)


def before_rotary(name: str, codebooks: Codebooks, setting: Setting, rotary: Rotary, *, pairs: bool = False) -> Method:
    """Product quantization with codebooks whose keys are not turned; simulated.

    Args:
        pairs: maps count two bytes a dimension, an order and an exponent.
    """
    method = from_codebooks(name, codebooks, setting, note="only simulated")

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        positions = setting.config.num_sinks + torch.arange(k.shape[1], device=k.device)
        back, v = method.quantize(layer, rotary.back(k, positions), v)
        return rotary.turn(back, positions).to(k.dtype), v

    constants = method.constant_bytes
    if pairs:
        keys = [layer.k for layer in codebooks.layers.values()]
        constants += sum(2 * k.num_heads * k.head_dim - k.forward.nbytes - k.backward.nbytes for k in keys)
    return replace(method, quantize=quantize, constant_bytes=constants, cache=None)


for _bits in (4, 2):
    for _suffix, _how in (("before-rotary", {}), ("before-rotary-pairs", {"pairs": True})):
        _name = f"pq-{_bits}-{_suffix}"
        register(_name)(partial(_make, name=_name, bits=_bits, **_how))
