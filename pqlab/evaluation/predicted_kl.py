"""The KL of storing one side of one layer with fewer bits, predicted from the model's own predictions.

Storing it badly changes that layer's attention output by delta; to second order the next-token distribution then
diverges by

    KL ~ 1/2 E[(g . delta)^2],    g = d log p(y) / d output, y drawn from the model's distribution

(the Fisher information; Amari 1998). One backward pass gives g for every layer, and delta is local, so every candidate
of every layer costs one attention call and no forward pass. Errors of different layers and sides are taken to add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..attention import NAME, handed_over
from ..config import CacheConfig
from ..paging.layout import SIDES
from ..quantization import LayerCodec, attention_geometry
from .fidelity import CHUNK, last_hidden
from .teacher_forced import attend_decoded, schedule, through_codes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ["layer", "side", "M", "nbits", "bits", "elements", "kl"]
_DRAWS = 2  # labels drawn a position


def predict_kl(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    candidates: Mapping[int, Mapping[int, LayerCodec]],
    config: CacheConfig,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """KL of storing one side of one layer with each candidate, everything else exact; see the module's text.

    Args:
        windows: int64 [1, n] token ids.
        candidates: {bits per element: {layer: codecs}}; not every layer needs every choice.
        config: sinks, residual length and page size: what is exact when.

    Returns:
        DataFrame: layer, side, M, nbits, bits, elements (of one token), kl (nats, mean over positions).
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    totals: dict[tuple[int, str, int], float] = {}
    try:
        for ids in windows:
            layers, gradients = _gradients(model, ids.to(model.device), generator)
            with torch.no_grad():
                for key, value in _local_errors(layers, gradients, candidates, config).items():
                    totals[key] = totals.get(key, 0.0) + value / len(windows)
    finally:
        model.set_attn_implementation(before)
    rows = []
    for (i, side, bits), kl in totals.items():
        codec = getattr(candidates[bits][i], side)
        elements = codec.num_heads * codec.head_dim
        rows.append((i, side, codec.num_subspaces, codec.nbits, bits, elements, kl))
    return pd.DataFrame(rows, columns=COLUMNS)


@dataclass(eq=False)
class _Watched:
    """One layer's exact attention with a handle on the gradient of its output."""

    key: Tensor
    value: Tensor
    query: Tensor | None = None
    nudge: Tensor | None = None  # zeros that are added to the output
    scaling: float = 1.0

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.query, self.scaling = query.detach(), scaling
        out = torch.nn.functional.scaled_dot_product_attention(
            query, self.key, self.value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        self.nudge = torch.zeros_like(out, requires_grad=True)
        return out + self.nudge


class _Watching(DynamicCache):
    def __init__(self, model) -> None:
        super().__init__(config=model.config)
        self.full = attention_geometry(model)
        self.watched: dict[int, _Watched] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx not in self.full:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.watched[layer_idx] = _Watched(key_states, value_states)
        return handed_over(key_states, self.watched[layer_idx]), value_states


@torch.enable_grad()
def _gradients(model, ids: Tensor, generator: torch.Generator) -> tuple[dict[int, _Watched], list[dict[int, Tensor]]]:
    """What every layer attended to, and d log p(y_t) summed over t / d output [1, Hq, n, d] for each draw of labels."""
    cache = _Watching(model)
    hidden = last_hidden(model, ids, cache)
    watched = cache.watched
    nudges = [w.nudge for w in watched.values()]
    gradients = []
    for draw, of_hidden in enumerate(_at_the_head(model.get_output_embeddings(), hidden.detach(), generator)):
        found = torch.autograd.grad(hidden, nudges, of_hidden, retain_graph=draw + 1 < _DRAWS)
        gradients.append(dict(zip(watched, found, strict=True)))
    for w in watched.values():
        w.key, w.value, w.nudge = w.key.detach(), w.value.detach(), None
    return watched, gradients


def _at_the_head(head: nn.Module, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """d log p(y_t) / d hidden_t, y drawn from the model's distribution: [draws, n, hidden size] of hidden [n, hidden
    size]. A few positions at a time, since vocabularies are large."""
    parts = []
    for rows in hidden.split(CHUNK):
        rows = rows.clone().requires_grad_()
        log_p = head(rows).float().log_softmax(-1)
        upto = log_p.detach().exp().cumsum(-1)
        found = []
        for draw in range(_DRAWS):
            # by the inverse of the cumulated distribution: multinomial takes seconds for a quarter of a million words
            at = torch.rand(len(rows), 1, generator=generator, device=rows.device) * upto[:, -1:]
            labels = torch.searchsorted(upto, at).clamp_max(upto.shape[1] - 1)
            found += torch.autograd.grad(log_p.gather(1, labels).sum(), rows, retain_graph=draw + 1 < _DRAWS)
        parts.append(torch.stack(found))
    return torch.cat(parts, 1)


def _local_errors(
    layers: Mapping[int, _Watched],
    gradients: Sequence[Mapping[int, Tensor]],
    candidates: Mapping[int, Mapping[int, LayerCodec]],
    config: CacheConfig,
) -> dict[tuple[int, str, int], float]:
    """KL of every (layer, side, bits), mean over the positions of one window.

    The gradient at position s sums over all later tokens t that read it, while the errors of one position reach those
    tokens together with the errors of the others; positions are taken as independent.
    """
    found: dict[tuple[int, str, int], float] = {}
    for i, w in layers.items():
        segments = schedule(w.key.shape[2], 1, config)
        coded = slice(config.num_sinks, config.num_sinks + segments[-1].coded)

        def attend(seen_k: Tensor, seen_v: Tensor, w=w, segments=segments) -> Tensor:
            return attend_decoded(w.query, (w.key, w.value), (seen_k, seen_v), segments, config.num_sinks, w.scaling)

        exact = attend(w.key, w.value)
        for bits, codecs in candidates.items():
            for side in SIDES if i in codecs else ():
                codec = getattr(codecs[i], side).to(w.key.device)  # trained codecs are half, GPU kernels read float32
                tensors = {"k": w.key.clone(), "v": w.value.clone()}
                stored = tensors[side]
                stored[0, :, coded] = through_codes(codec, stored[0, :, coded], config.page_size)
                delta = attend(tensors["k"], tensors["v"]) - exact  # [1, Hq, n, d]
                change = [(g[i] * delta).sum((1, 3)).double().square().mean() for g in gradients]
                found[i, side, bits] = 0.5 * float(sum(change)) / len(gradients)
    return found
