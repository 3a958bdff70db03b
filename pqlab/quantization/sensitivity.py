"""What attention does with keys and values: how an error weighs, and which tokens it is paid for.

A key's error e changes the scores by q . e, a value's error the layer's output by W_O e: two metrics per kv head. And
attention looks at few tokens: those it weighs little, and those that a cache still holds exactly, may be stored badly.
`maps` uses the first, the weights of `kmeans.product_kmeans` the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import CacheConfig
from .geometry import attention_geometry, text_config

EXACT_WINDOW = CacheConfig().residual_length
"""Attention to the newest tokens does not count: a cache holds them exactly."""

_EVERY = 8  # query of a window is looked at
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_POWER, _FLOOR = 0.5, 0.03


@dataclass
class Sensitivity:
    """Observations of one layer. `importance` is (K, V), float32 [H, n] for the tokens that are samples."""

    query_moment: Tensor | None = None  # sum of q^T q over the queries of a kv head, [H, d, d]
    num_queries: int = 0
    importance: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # per window

    @property
    def key_metric(self) -> Tensor | None:
        """[H, d, d]: E[q q^T]; None when no query was seen."""
        return None if self.query_moment is None else self.query_moment / self.num_queries

    def to(self, device: torch.device | str) -> Sensitivity:
        """The same observations on a device."""
        moment = None if self.query_moment is None else self.query_moment.to(device)
        return Sensitivity(moment, self.num_queries, [(k.to(device), v.to(device)) for k, v in self.importance])

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Weights of the samples (K, V), float32 [H, n] with mean 1 + floor; None when no query was seen.

        Importance is spread too unevenly to be taken as it is (a hundred of 8192 tokens would have all of it, and
        they are not those of the next text), hence its square root and a floor. On SmolLM2 at 2 bits, KL .0097
        without weights, .0092 | .0081 | .0078 with powers .25 | .4 | .6 and a floor of .1, .0073 as it is here.
        """
        if not self.importance:
            return None
        k, v = (torch.cat(parts, 1) for parts in zip(*self.importance, strict=True))
        return _tempered(k), _tempered(v)

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, chosen: Tensor) -> None:
        """One window's attention.

        Args:
            query: [B, Hq, S, d], key: [B, H, S, d], both as attention takes them.
            mask: bool [B, 1, S, S], True where a query may look, or None: causal.
            chosen: bool [B, S], tokens that are samples (neither pads nor sinks).
        """
        batch, heads, length, d = key.shape
        q = query.unflatten(1, (heads, -1))  # [B, H, g, S, d]
        seen = q.permute(1, 0, 3, 2, 4)[:, chosen].flatten(1, 2).float()  # [H, chosen * g, d]
        moment = seen.mT @ seen
        self.query_moment = moment if self.query_moment is None else self.query_moment + moment
        self.num_queries += seen.shape[1]

        place = torch.arange(length, device=key.device)
        rows = place[EXACT_WINDOW::_EVERY]
        far = rows[:, None] - place >= EXACT_WINDOW
        allowed = (place <= rows[:, None]) if mask is None else mask[:, 0, rows, None].movedim(2, 1)
        for_k, for_v = (torch.zeros(batch, heads, length, device=key.device) for _ in range(2))
        for h in range(heads if len(rows) else 0):
            scores = (q[:, h][:, :, rows].float() @ key[:, h, None].float().mT) * scaling  # [B, g, rows, S]
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num_().mul_(far)
            squares = p.square().sum((1, 2))
            for_k[:, h] = p.sum((1, 2)) - squares  # of p (1 - p): how far a score moves the weights
            for_v[:, h] = squares
        self.importance.append(tuple(x.movedim(1, 0)[:, chosen] for x in (for_k, for_v)))


def _tempered(importance: Tensor) -> Tensor:
    mean = importance.mean(1, keepdim=True)
    shares = torch.where(mean > 0, importance / mean, torch.ones_like(importance)) ** _POWER
    return shares / shares.mean(1, keepdim=True) + _FLOOR


def value_metrics(model: nn.Module) -> dict[int, Tensor]:
    """W_O^T W_O of every full-attention layer whose output projection is found, [H, d, d] by layer index.

    The projections of the query heads that share a kv head add up.
    """
    geometry = attention_geometry(model)
    query_heads = text_config(model).num_attention_heads
    found: dict[int, Tensor] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index not in geometry or index in found:
            continue
        heads, d = geometry[index]
        for name in _OUTPUT_NAMES:
            weight = _weight(module, name)
            if weight is not None and weight.shape[1] == query_heads * d:
                grouped = weight.detach().float().unflatten(1, (heads, query_heads // heads, d))
                found[index] = torch.einsum("ohgd,ohge->hde", grouped, grouped)
                break
    return found


def _weight(module: nn.Module, name: str) -> Tensor | None:
    """[out, in] of a plain linear child; None where there is none, or a quantized one."""
    child = getattr(module, name, None)
    if isinstance(child, Conv1D):
        return child.weight.T
    weight = getattr(child, "weight", None)
    return weight if isinstance(child, nn.Linear) and weight.is_floating_point() else None
