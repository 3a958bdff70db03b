"""Keys and values of a real text, as a cache sees them: after the rotary embedding, from every full-attention layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from ..attention import NAME, handed_over
from ..errors import ConfigError, UnsupportedModelError
from ..transformers_api import cache_argument
from .geometry import attention_geometry, describe, text_config
from .kmeans import Progress
from .sensitivity import Sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_TOKENS = 16384
WINDOW, SHORT_WINDOW = 2048, 1024
"""Of one text, and where several share the tokens: each then gives several windows, at several positions."""
NUM_SINKS = 4

MAX_POSITION = 32768
"""Calibration reaches this far into the context of a model: few windows spread over more would lie too far apart."""

_MAX_CHARS = 4_000_000  # of a text that are tokenized to choose windows from; of a longer text evenly spread parts
_CHARS_PER_TOKEN = 16  # more than text has: parts of a longer text are long enough for their windows


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of every full-attention layer, by the model's layer index: keys and values, each [H, n, d], what the
    attention of the text did with them, and the position that a rotary embedding turned each of them by."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    sensitivity: dict[int, Sensitivity] = field(default_factory=dict)  # empty where the model's attention is its own
    positions: Tensor | None = None  # int64 [n]; None where nobody wrote them down

    def of(self, layers: Iterable[int]) -> Samples:
        """Those of some layers."""
        parts = ({i: part[i] for i in layers if i in part} for part in (self.keys, self.values, self.sensitivity))
        return Samples(*parts, self.positions)

    def code_indexes(self) -> Tensor:
        """int64 [n]: where each sample would lie among the codes of one long text, as `anchors` counts."""
        if self.positions is None:
            raise ConfigError(
                "nobody wrote down the positions of these samples, which anchors need; collect them again"
            )
        return self.positions - NUM_SINKS

    @property
    def num_samples(self) -> int:
        """n: vectors per layer, kv head and side."""
        return next(iter(self.keys.values())).shape[1]

    def to(self, device: torch.device | str) -> Samples:
        """The same samples on a device."""
        keys, values = ({i: x.to(device) for i, x in side.items()} for side in (self.keys, self.values))
        positions = None if self.positions is None else self.positions.to(device)
        return Samples(keys, values, {i: seen.to(device) for i, seen in self.sensitivity.items()}, positions)


def collect_kv(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    num_tokens: int = NUM_TOKENS,
    window: int | None = None,
    num_sinks: int = NUM_SINKS,
    progress: Progress | None = None,
) -> Samples:
    """Run text through the model, window by window, and keep the keys and values.

    Each window starts a new sequence; its first `num_sinks` tokens are no samples, since a cache keeps them exact. With
    rotary embeddings, windows start at positions spread over the model's context: its attention sees distances only,
    but keys are turned by their position, and those of a long context would be like none of a short text. (SmolLM2 at 4
    bits, calibrated on positions below 2048: KL .0007 there, .028 at 4000.)

    Args:
        text: one text, of which windows are taken evenly from beginning to end, or several, which share the tokens
            evenly and whose windows take turns, so that each of them is seen at early and at late positions.
        num_tokens: tokens to run through the model, sinks included; fewer if the text is shorter.
        window: tokens of a sequence, at most (the model's own limit holds too); None takes `WINDOW` for one text and
            `SHORT_WINDOW` for several.
        progress: called with (tokens done, tokens to do).

    Raises:
        ValueError: the text gives no sample.
        UnsupportedModelError: the model has no full-attention layer, or its cache does not hold plain keys and values.
    """
    window = window or window_for(text)
    limit = getattr(text_config(model), "max_position_embeddings", None) or window
    windows = split_text(tokenizer, text, num_tokens, min(window, limit))
    if all(len(ids) <= num_sinks for ids in windows):
        have = sum(map(len, windows))
        raise ValueError(
            f"the text gives no sample: {have} tokens, of which the first {num_sinks} of a window do not count"
        )
    parts: list[Samples] = []
    sensitivity: dict[int, Sensitivity] = {}
    starts = _first_positions(text_config(model), len(windows), max(map(len, windows)))
    total = sum(map(len, windows))
    done = 0
    for ids, start in zip(windows, starts, strict=True):
        options = {"num_sinks": num_sinks, "first_position": start, "sensitivity": sensitivity}
        parts.append(record_kv(model, torch.tensor([ids]), **options))
        done += len(ids)
        if progress is not None:
            progress(done, total)
    return Samples(
        {i: torch.cat([part.keys.pop(i) for part in parts], 1) for i in list(parts[0].keys)},
        {i: torch.cat([part.values.pop(i) for part in parts], 1) for i in list(parts[0].values)},
        sensitivity,
        torch.cat([part.positions for part in parts]),
    )


@torch.no_grad()
def record_kv(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_sinks: int = NUM_SINKS,
    first_position: int = 0,
    sensitivity: dict[int, Sensitivity] | None = None,
) -> Samples:
    """Keys and values of one batch of sequences; pads and the first `num_sinks` real tokens of a row are left out.

    Only the body of the model runs, not the projection to the vocabulary.

    Args:
        input_ids: [B, n] token ids; attention_mask: [B, n], 0 where a token is a pad; None means no pads.
        first_position: of every row's first real token.
        sensitivity: of earlier batches, to go on with.
    """
    geometry = attention_geometry(model)
    input_ids = input_ids.to(model.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(model.device)
    place = mask.cumsum(-1) * mask  # 1, 2, .. of the real tokens, 0 at pads
    positions, chosen = (place - 1).clamp_min(0) + first_position, place > num_sinks
    recorder = _Recorder(text_config(model), chosen, geometry, {} if sensitivity is None else sensitivity)
    with _observed(model):
        model.base_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(model.base_model, recorder),
            use_cache=True,
        )
    found = recorder.samples
    shapes = {i: (k.shape[0], k.shape[2]) for i, k in found.keys.items()}
    if shapes != geometry or {i: (v.shape[0], v.shape[2]) for i, v in found.values.items()} != geometry:
        got = describe(shapes) if shapes else "nothing"
        raise UnsupportedModelError(
            f"{describe(geometry)} should reach the cache of this model, but it was given {got}"
        )
    return replace(found, positions=positions[chosen])


@contextmanager
def _observed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and the "pqlab" attention where the model takes one: it hands the queries to the recorder."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    try:
        if model.base_model._supports_attention_backend:
            model.set_attn_implementation(NAME)
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        model.train(was_training)


class _Recorder(DynamicCache):
    """A cache that keeps the chosen tokens of the full-attention layers and forgets the rest.

    It is for one forward call: every layer sees its own new keys and values and nothing before them.
    """

    def __init__(self, config, chosen: Tensor, layer_ids, sensitivity: dict[int, Sensitivity]) -> None:
        super().__init__(config=config)
        self.chosen = chosen  # bool [B, n]
        self.layer_ids = frozenset(layer_ids)
        self.samples = Samples({}, {}, sensitivity)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx not in self.layer_ids:
            return key_states, value_states
        chosen = self.chosen.to(key_states.device)
        for kept, states in ((self.samples.keys, key_states), (self.samples.values, value_states)):
            kept[layer_idx] = states.movedim(1, 0)[:, chosen]  # [H, chosen, d]
        observed = _Observed(self.samples.sensitivity, layer_idx, key_states, value_states, chosen)
        return handed_over(key_states, observed), value_states


@dataclass(frozen=True, eq=False)
class _Observed:
    """One layer's exact attention; what it did is written down. Called by the "pqlab" attention."""

    sensitivity: dict[int, Sensitivity]
    layer: int
    key: Tensor
    value: Tensor
    chosen: Tensor

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.sensitivity.setdefault(self.layer, Sensitivity()).observe(query, self.key, mask, scaling, self.chosen)
        return torch.nn.functional.scaled_dot_product_attention(
            query, self.key, self.value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )


def _first_positions(config, count: int, length: int) -> list[int]:
    """Where each of `count` windows of `length` tokens starts: spread over the context of a model with rotary
    embeddings, at 0 for any other, and where their scaling depends on the length."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in [rope, *rope.values()] if isinstance(part, dict)}
    context = getattr(config, "max_position_embeddings", None) or 0
    if not rope or kinds & {"dynamic", "longrope"}:
        return [0] * count
    room = max(0, min(context, MAX_POSITION) - length)
    return [i * room // max(1, count - 1) for i in range(count)]


def window_for(text: str | Sequence[str]) -> int:
    """Tokens of a window that `collect_kv` takes by default."""
    return WINDOW if isinstance(text, str) else SHORT_WINDOW


def split_text(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], num_tokens: int, window: int
) -> list[list[int]]:
    """Token ids of windows of at most `window` tokens and `num_tokens` together; see `collect_kv`.

    Every window starts with the tokenizer's first special token, if it puts one.
    """
    if not isinstance(text, str):
        parts: list[list[list[int]]] = []
        left = num_tokens
        for i, one in enumerate(text):
            parts.append(split_text(tokenizer, one, left // (len(text) - i), window))
            left -= sum(map(len, parts[-1]))
        return [windows for turn in zip_longest(*parts) for windows in turn if windows]
    first = tokenizer("a")["input_ids"][:1]
    prefix = first if first == [tokenizer.bos_token_id] else []
    size = window - len(prefix)
    count = -(-num_tokens // window)
    read = [
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for part in _parts(text, num_tokens, count)
    ]
    if len(read) == 1 and len(read[0]) <= count * size:  # all of it
        pieces = [read[0][start : start + size] for start in range(0, len(read[0]), size)]
    else:  # evenly: the first at the very beginning, the last up to the very end
        read = read * count if len(read) == 1 else read
        starts = [i * max(0, len(ids) - size) // max(1, count - 1) for i, ids in enumerate(read)]
        pieces = [ids[start : start + size] for start, ids in zip(starts, read, strict=True)]
    out, left = [], num_tokens
    for piece in pieces:
        if left <= len(prefix):
            break
        out.append(prefix + piece[: left - len(prefix)])
        left -= len(out[-1])
    return out


def _parts(text: str, num_tokens: int, count: int) -> list[str]:
    """The text, or of one too long to be tokenized for a few windows `count` parts, evenly from beginning to end."""
    limit = max(_MAX_CHARS, _CHARS_PER_TOKEN * num_tokens)
    if len(text) <= limit:
        return [text]
    length = limit // max(1, count)
    starts = [i * (len(text) - length) // max(1, count - 1) for i in range(count)]
    return [text[start : start + length] for start in starts]
