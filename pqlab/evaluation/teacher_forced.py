"""The decode path for all positions of a text at once: what token-by-token generation would see, in one forward.

While a model decodes with a paged PQ cache, the token at position t attends to sinks and window exactly and to the
tokens between as codes; which is which follows from t alone (`schedule`). So all positions can run side by side, if
every query reads, for every earlier token, the exact or the quantized vector as it would have at its time::

    rows t with f(t) = f    keys [0, sinks) exact | [sinks, sinks + f) dequantized | [sinks + f, t] exact

f changes once a page, so the rows of one page's worth of positions are one attention call. Hidden states see the
quantized attention of their own position, and the vectors that are quantized come from these hidden states: this is
the real decode, not an exact run with noise added. It agrees with stepping up to rounding (tests): of floats, and where
codecs have maps, of exact tokens, which the cache keeps behind the map and this keeps as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..attention import handed_over
from ..cache.key_fit import KeyFit, fit_tokens
from ..config import CacheConfig
from ..quantization import Codebooks, Codec

Quantize = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer index, K [H, n, d], V [H, n, d]) -> both as they come back from storage."""


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) that see `coded` tokens as codes."""

    start: int
    stop: int
    coded: int


def schedule(length: int, prompt: int, config: CacheConfig) -> list[Segment]:
    """What every position of a decode sees, as runs of equal `coded`.

    Args:
        length: tokens of the text.
        prompt: tokens that are prefilled as one chunk; they see each other exactly. At least 1.
        config: sinks, residual length and page size.
    """
    segments = [Segment(0, prompt, 0)]
    coded = 0
    for position in range(prompt - 1, length):
        window = position + 1 - min(position + 1, config.num_sinks) - coded
        coded += config.flush_count(coded, window)
        if position < prompt:  # the state the prompt leaves; the next token is the first to see it
            continue
        if segments[-1].stop == position and segments[-1].coded == coded and segments[-1].start >= prompt:
            segments[-1] = Segment(segments[-1].start, position + 1, coded)
        else:
            segments.append(Segment(position, position + 1, coded))
    return segments


class TeacherForcedCache(Cache):
    """Give it to one forward over a whole text [1, n] under the "pqlab" attention.

    Args:
        model: a model that `PagedPQCache` supports.
        quantize: what storage does to K and V; `from_codebooks` for product quantization.
        config: sinks, residual length and page size.
        prompt: tokens that count as the prompt.
        prefix: the exact cache of a prompt that was prefilled before, which is left as it is; the forward is then over
            the tokens behind it, and `prompt` is the prefix's length.
    """

    def __init__(
        self, model, quantize: Quantize, config: CacheConfig, prompt: int = 1, *, prefix: DynamicCache | None = None
    ) -> None:
        layers = DynamicCache(config=model.config).layers if prefix is None else list(prefix.layers)
        for i, layer in enumerate(layers):
            if type(layer) is not DynamicLayer:
                layers[i] = deepcopy(layer)
            elif prefix is None:
                layers[i] = _Layer(i, quantize, config, prompt)
            else:
                layers[i] = _Layer(i, quantize, config, prefix.get_seq_length(), (layer.keys, layer.values))
        super().__init__(layers=layers)


def from_codebooks(codebooks: Codebooks, page_size: int = CacheConfig().page_size) -> Quantize:
    """Storage as codes of these codebooks, keys fitted to the text where the codebooks can (`cache.key_fit`)."""

    def quantize(layer: int, k: torch.Tensor, v: torch.Tensor):
        if layer in codebooks.exact:
            return k, v
        codec = codebooks.layer(layer)
        return tuple(through_codes(c, x, page_size) for c, x in ((codec.k, k), (codec.v, v)))

    return quantize


def through_codes(codec: Codec, x: torch.Tensor, page_size: int) -> torch.Tensor:
    """The vectors of one side, [H, n, d] behind the sinks, as they come back from a sequence's pages."""
    dtype, index = x.dtype, torch.arange(x.shape[1], device=x.device)
    if codec.anchors:
        x = codec.anchors.back(x, index)
    if codec.can_fit:
        y = codec.to_code_space(x)
        fit = KeyFit(codec, 1, x.device)
        fit.take(0, y[:, : fit_tokens(page_size)])
        x = codec.from_code_space(fit.undo(codec.dequantize(codec.quantize(fit.apply(y, 0))), 0))
    else:
        x = codec.decode(codec.encode(x))
    return (codec.anchors.forth(x, index) if codec.anchors else x).to(dtype)


def attend_decoded(
    query: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    stored: tuple[torch.Tensor, torch.Tensor],
    segments: list[Segment],
    num_sinks: int,
    scaling: float,
) -> torch.Tensor:
    """Every position's attention over what it would see at its own decode step.

    Args:
        query: [1, Hq, S, d], of the last S positions; exact, stored: K and V [1, H, n, d] as the model made them and as
            they come back.
        segments: `schedule(n, ...)`; those before the queries' positions are passed over.
    """
    groups = query.shape[1] // exact[0].shape[1]
    first = exact[0].shape[2] - query.shape[2]
    out = torch.empty_like(query)
    for segment in segments:
        if segment.stop <= first:
            continue
        edge = num_sinks + segment.coded if segment.coded else 0
        keys, values = (
            torch.cat([s[:, :, :edge], e[:, :, edge : segment.stop]], 2).repeat_interleave(groups, 1)
            for s, e in zip(stored, exact, strict=True)
        )
        start = max(segment.start, first)
        positions = torch.arange(start, segment.stop, device=query.device)
        causal = torch.arange(segment.stop, device=query.device) <= positions[:, None]
        rows = slice(start - first, segment.stop - first)
        out[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows], keys, values, attn_mask=causal, scale=scaling
        )
    return out


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(
        self,
        index: int,
        quantize: Quantize,
        config: CacheConfig,
        prompt: int,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.index, self.quantize, self.config, self.prompt, self.prefix = index, quantize, config, prompt, prefix
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length = 0 if prefix is None else prefix[0].shape[2]
        self.used = False

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        if self.used:
            raise ValueError("a TeacherForcedCache serves one forward over a whole text; make a new one")
        self.used = True
        self.length += key_states.shape[2]
        self.pending = key_states, value_states
        if self.prefix is not None:
            self.pending = tuple(torch.cat(both, 2) for both in zip(self.prefix, self.pending, strict=True))
        return handed_over(key_states, self), value_states

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """[1, Hq, S, d]: every position's attention over what it would see at its own decode step."""
        if query.shape[0] != 1 or (mask is not None and not self._is_causal(mask)):
            raise ValueError("a TeacherForcedCache takes one text without padding")
        (k, v), self.pending = self.pending, None
        sinks = self.config.num_sinks
        segments = schedule(self.length, self.prompt, self.config)
        end = sinks + segments[-1].coded
        seen_k, seen_v = k.clone(), v.clone()
        if end > sinks:
            body = slice(sinks, end)
            seen_k[0, :, body], seen_v[0, :, body] = self.quantize(self.index, k[0, :, body], v[0, :, body])
        return attend_decoded(query, (k, v), (seen_k, seen_v), segments, sinks, scaling)

    def _is_causal(self, mask: torch.Tensor) -> bool:
        """Whether this mask [1, 1, S, n], which transformers makes for text behind a prefix, hides nothing else."""
        steps, n = mask.shape[-2:]
        causal = torch.ones(steps, n, dtype=torch.bool, device=mask.device).tril(n - steps)
        return self.prefix is not None and bool((mask == causal).all())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1
