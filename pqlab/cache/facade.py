"""`PagedPQCache`: a transformers `Cache` whose older tokens are product-quantization codes in pages."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticCache

from ..config import CacheConfig
from ..errors import ConfigError, UnsupportedModelError, in_runs, out_of_range
from ..kernels.backend import EXACT, current_setting
from ..paging import PagePool
from ..paging.layout import read_pages
from ..quantization import Codebooks
from .exact_buffers import ExactBuffers
from .exact_layers import crop_all, exact_layers, held_bytes
from .layer import PagedPQLayer
from .layer_states import LayerStates
from .pools import config_of_pool, make_pool, require_layout
from .sequences import SequenceGroup, plain_state
from .static import StaticPagedPQLayer
from .static_sequences import StaticGroup

log = logging.getLogger("pqlab")

DEFAULT_CONTEXT = 8192
"""Tokens the default pool is sized for where a model's config names no limit."""


class PagedPQCache(Cache):
    """KV cache with paged, product-quantized storage, for `model.generate(..., cache=cache)`.

    Full-attention layers keep their first tokens and the newest ones exact and everything between as codes in pages
    (MILLION, DAC'25; its PagedPQCache extension). Other layers (sliding windows, those that `codebooks.exact` names)
    keep transformers' own exact layer; `layer_kinds()` says which is which. The model should run with
    `model.set_attn_implementation("pqlab")`, which reads the codes; with any other attention the cache dequantizes
    itself at each step (correct, slow, and said).

    Args:
        model: the model, or its config (then the cache lives on the CPU).
        codebooks: from `calibrate`, `Codebooks.load` or `Codebooks.identity`.
        config: page size, residual window, sinks, pages.
        pool: a pool to share with other caches of the same model and codebooks; default: its own. Its pages come back
            by `reset()`, and when the cache is garbage.
        context: tokens a sequence may reach, for the default pool size; default: the model's own limit.
        max_batch: sequences at a time, for the default pool size.

    Raises:
        UnsupportedModelError: the model needs something this cache does not do; raised here, before generation.
        ConfigError: a context below 1, or max_pages that are not those of the given pool.
        OutOfMemoryError: PQC004, the pages do not fit; the message says which setting would.
        PageAllocationError: PQC001, while generating, when the pool runs out; nothing is changed then.

    Before transformers 5.24 the argument of `generate` is called `past_key_values`.

    A cache holds one set of sequences: `reset()` it, or make another, for the next unrelated prompt.
    """

    @plain_state
    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        codebooks: Codebooks,
        config: CacheConfig | None = None,
        *,
        pool: PagePool | None = None,
        context: int | None = None,
        max_batch: int = 1,
    ) -> None:
        whole = getattr(model, "config", model)
        device = getattr(model, "device", torch.device("cpu"))
        text = whole.get_text_config(decoder=True)
        layers = exact_layers(whole, text)
        quantized = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in codebooks.exact]
        if not quantized and not codebooks.exact:
            raise UnsupportedModelError(
                f"{whole.model_type} has no full-attention layer (all have sliding windows or other states): "
                "there is nothing to quantize; use transformers' DynamicCache"
            )
        codebooks.check_fits(model)
        self.codebooks = codebooks.to(device)
        config = config if config is not None else CacheConfig()
        self.settings = config if pool is None else config_of_pool(pool, config)
        static = self.settings.mode == "static"
        if context is not None and context < 1:
            raise ConfigError(f"context = {context} is out of range (at least 1); None takes the model's own limit")
        limit = context or getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
        if pool is None:
            size = {"context": limit, "batch": max_batch, "device": device, "shrink": context is None}
            pool = make_pool(self.codebooks, self.settings, **size)
        require_layout(pool, self.codebooks, self.settings)
        self.pool = pool
        if static:
            layers = StaticCache(config=whole, max_cache_len=limit).layers
            self.group = StaticGroup(self.pool, self.settings, device, limit)
        else:
            self.group = SequenceGroup(self.pool, self.settings, device)
            self.pool.give_back_with(self.group, self.group.table.clear)
        # a compiled step takes every layer's buffers as inputs, which must not be views of each other's memory
        sizes = self.settings.num_sinks, self.settings.window_length
        shared = None if static else ExactBuffers(self.codebooks.geometry, *sizes)
        for position, index in enumerate(quantized):
            views = self.pool.view(position, 0), self.pool.view(position, 1)
            kind = StaticPagedPQLayer if static else PagedPQLayer
            layers[index] = kind(index, self.group, self.codebooks.layer(index), *views, text, shared)
        self._quantized = [layers[index] for index in quantized]
        self._quantized[0].is_first = self._quantized[-1].is_last = True
        # in static mode pages are taken once, by the first prompt
        self._leading = LayerStates([] if static else layers[: quantized[0]])
        self._num_leading = len(self._leading)
        if self._num_leading:
            self._quantized[0].leading = self._leading
        if static:
            self._quantized[0].follows_exact = quantized[0] > 0
            self._allow_capture(getattr(model, "dtype", torch.float32), text.num_attention_heads)
        self._warned = static  # of a fallback, which static mode refuses
        super().__init__(layers=layers)

    # -- what a user looks at -----------------------------------------------------------------------------------

    @property
    def table(self):
        """The page table: which pages each sequence holds, in token order."""
        return self.group.table

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [B, 3]: sinks, coded and window tokens of each sequence."""
        return self.group.lengths

    @property
    def quantized_layers(self) -> list[PagedPQLayer]:
        return list(self._quantized)

    def layer_kinds(self) -> list[str]:
        """For every model layer "paged pq", or the name of the exact layer it keeps."""
        return ["paged pq" if isinstance(x, PagedPQLayer) else f"exact {type(x).__name__}" for x in self.layers]

    def as_frame(self):
        """DataFrame of the pages in use: page, sequence, first token, tokens, fill, bytes, address."""
        return self.group.as_frame(first_token=self.settings.num_sinks)

    def page_codes(self, layer: int, side: int, page: int, head: int) -> torch.Tensor:
        """uint8 [page_size, M] on the CPU: the codes of one page of a layer; side 0 is K, 1 is V. Slots never written
        are zeros.

        Raises:
            ValueError: the layer is not quantized, or the cache stores floats (the identity codec).
            IndexError: the pool has no such page.
        """
        quantized = [each.index for each in self._quantized]
        if layer not in quantized:
            raise ValueError(f"layer {layer} is not quantized in this cache; quantized are {in_runs(quantized)}")
        position = quantized.index(layer)
        nbits = self.pool.layout.layers[position][side].nbits
        if nbits > 8:
            raise ValueError("this cache stores exact floats (the identity codec); codes need a product quantizer")
        if not 0 <= page < self.pool.max_pages:
            raise IndexError(out_of_range("page", page, self.pool.max_pages))
        return read_pages(self.pool.view(position, side), torch.tensor([page]), nbits)[head].cpu()

    def nbytes(self) -> dict[str, int]:
        """Bytes by what they are for, nothing twice: codes (used pages), free pages of the pool, exact buffers, what
        keys are fitted with, turns of anchors (one table for all layers), exact layers, page table, model constants."""
        turns = {layer.turns.data_ptr(): layer.turns.nbytes for layer in self._quantized if layer.turns is not None}
        exact = [x for x in self.layers if not isinstance(x, PagedPQLayer)]
        return {
            "codes": self.pool.num_used * self.pool.layout.page_bytes,
            "free_pages": self.pool.layout.num_bytes - self.pool.num_used * self.pool.layout.page_bytes,
            "exact_tokens": sum(layer.exact_nbytes for layer in self._quantized),
            "key_fits": sum(layer.fit.nbytes for layer in self._quantized if layer.fit is not None),
            "turns": sum(turns.values()),
            "exact_layers": sum(held_bytes(vars(x)) for x in exact),
            "page_table": self.group.page_table().nbytes,
            "model_constants": self.codebooks.nbytes,
        }

    @property
    def stored_bytes(self) -> int:
        """What the tokens take: all of `nbytes()` but free pages and model constants."""
        parts = self.nbytes()
        return sum(parts.values()) - parts["free_pages"] - parts["model_constants"]

    @property
    def reserved_bytes(self) -> int:
        """What is allocated for sequences: all of `nbytes()` but the model constants, which all caches share."""
        parts = self.nbytes()
        return sum(parts.values()) - parts["model_constants"]

    def announce_mask(self, attention_mask: torch.Tensor) -> None:
        """Tell the cache which columns are tokens, [B, columns]; only needed when the attention is not "pqlab".

        The "pqlab" attention sees the mask by itself. Another attention does not pass it on, and pads would then be
        kept as tokens (hidden by the mask, yet among the sinks and the codes). Call it before every prompt (`reset`
        forgets it), with the rows that the model will get (beams repeat them); rows selected later are selected here.

        Raises:
            ValueError: not [B, columns]. At the next step: B is not the model's number of rows.
        """
        self.group.announce_mask(attention_mask)

    # -- transformers' side -------------------------------------------------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        layer = self.layers[layer_idx]
        if not self._warned and layer is self._quantized[0]:
            self._say_fallback(layer)
        if layer_idx < self._num_leading:
            self._leading.keep_before_update(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """State of a linear layer, which reads it before it writes, and may write in place."""
        if layer_idx < self._num_leading:
            self._leading.keep(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As `get_conv_state`."""
        if layer_idx < self._num_leading:
            self._leading.keep(layer_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns, offset) of the mask. One serves all full-attention layers: where some are left exact, theirs.

        A static exact layer gives back its whole buffer already for the first prompt; a paged one does not need that.
        """
        if self.codebooks.exact and layer_idx in self.codebooks.layers:
            layer_idx = next(iter(self.codebooks.exact))
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Forget everything, an announced mask too; the pages go back to the pool, the codebooks stay.

        In static mode rows keep their pages and the cache its batch, since graphs hold the addresses: to have the pages
        back in a shared pool, or another batch, drop the cache (and its graphs) and make another.
        """
        self.group.reset()
        self._leading.forget()
        self._warned = self.settings.mode == "static"
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns (transformers' sign: zero or negative).

        They go from the exact window first, then from the last page. Tokens that were coded stay coded. Removing all of
        them is a `reset`.

        Raises:
            ValueError: a positive number.
            UnsupportedModelError: static mode.
            RuntimeError: an exact layer cannot give tokens back (a sliding window that is full, a linear attention), or
                the last step was interrupted. Nothing was changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, "
                f"here crop({min(0, tokens_to_remove - self.get_seq_length())}) to keep {tokens_to_remove} tokens"
            )
        if not self.group.num_rows:
            return
        if self.settings.mode == "static":
            if tokens_to_remove:
                self.group.crop(-tokens_to_remove)  # refuses
            return
        if -tokens_to_remove >= self.group.columns:
            self.reset()
            return
        self._require_whole_steps()
        exact = (i for i, layer in enumerate(self.layers) if not isinstance(layer, PagedPQLayer))
        chosen = [i for i in exact if tokens_to_remove or self.is_recording_past(i)]
        crop_all(self.layers, chosen, tokens_to_remove)
        self.group.crop(-tokens_to_remove)
        for layer in self._quantized:
            layer.columns, layer.pending = self.group.columns, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i continues what row beam_idx[i] has so far; pages are shared, only exact tokens are copied."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.group.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    @plain_state
    def __deepcopy__(self, memo: dict) -> PagedPQCache:
        """A cache of the same tokens that goes its own way, with a pool of its own: a prompt is read once and continued
        many times. What never changes, codebooks and the model's config, is shared. A recorder stays with the original.
        """
        shared = [self.codebooks, *self.codebooks.layers.values(), *(layer.config for layer in self._quantized)]
        shared += [side for codec in self.codebooks.layers.values() for side in (codec.k, codec.v)]
        memo.update({id(thing): thing for thing in shared})
        copied = memo[id(self)] = type(self).__new__(type(self))
        deepcopy(self.pool, memo)  # first: layers hold views of it
        vars(copied).update(deepcopy(vars(self), memo))
        copied.group.probe = copied.table.listener = None
        return copied

    # -- inside -------------------------------------------------------------------------------------------------

    def _require_whole_steps(self) -> None:
        """All layers have stored the same columns."""
        columns = self.group.columns
        for index, layer in enumerate(self.layers):
            seen = layer.get_seq_length() if hasattr(layer, "get_seq_length") else columns
            if seen != columns:
                raise RuntimeError(
                    f"layer {index} stands at column {seen} while the cache stands at {columns}: the last step was "
                    "interrupted; call cache.reset() before going on"
                )
        self._leading.forget()  # what was only looked at since

    def _select(self, rows: torch.Tensor) -> None:
        """Row i of every layer becomes the old row rows[i]."""
        count = self.group.num_rows
        if not count:
            return
        rows = torch.arange(count)[rows.to("cpu")]  # a wrong index raises here, where nothing is changed yet
        order = rows.tolist()
        if order == list(range(count)):
            return
        if self.settings.mode != "static":  # which refuses below
            self._require_whole_steps()
        self.group.select(order)
        for layer in self.layers:
            if isinstance(layer, PagedPQLayer):
                layer.select_rows(rows)
            else:
                layer.reorder_cache(rows)  # linear layers have it, and no method for repeated or selected rows

    def _say_fallback(self, layer: PagedPQLayer) -> None:
        implementation = layer.config._attn_implementation
        if implementation == "pqlab" or EXACT in current_setting().forbidden:  # what is forbidden raises
            return
        self._warned = True
        pads = ""
        if not self.group.has_announced_mask:
            pads = " A prompt with pads also needs cache.announce_mask(attention_mask) before generation."
        warnings.warn(
            f'Falling back to standard implementation: the model\'s attention is "{implementation}", so every step '
            f'dequantizes the whole cache. model.set_attn_implementation("pqlab") reads the codes directly.{pads}',
            stacklevel=3,
        )

    def _allow_capture(self, dtype: torch.dtype, query_heads: int) -> None:
        found = {layer.index: layer.allow_capture(dtype, query_heads) for layer in self._quantized}
        reasons = {why: index for index, why in reversed(found.items()) if why is not None}
        for why, index in reasons.items():
            log.warning("static mode: steps are neither compiled nor captured; layer %d: %s", index, why)
