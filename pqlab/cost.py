"""Bytes: what a cache needs, what it holds, what it wastes, and how many pages fit.

A sequence of n tokens lies as (R = residual_length, P = page_size, s = num_sinks)::

    [0, s) exact | [s, s + coded) codes in pages | [s + coded, n) exact window        coded = P * floor((n - s - R) / P)

so that between R and R + P - 1 newest tokens are exact. Everything that panels show of bytes is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .config import CacheConfig, PQConfig
from .errors import ConfigError, OutOfMemoryError
from .memory import MIB, free_memory
from .paging.layout import PageLayout, PoolLayout
from .shapes import SHAPES, ModelShape

__all__ = ["SHAPES", "CacheCost", "ModelShape", "coded_tokens", "fit_max_pages", "free_memory", "max_pages_for"]

EXACT_BYTES = 2
"""Bytes of an element that is kept exact, and of the baseline's: fp16."""

SHARE_OF_DEFAULT = 0.7
"""Part of free memory that a pool of default size may take: prompts and other programs need some, too."""

INT32 = FLOAT32 = 4


def coded_tokens(context: int, cache: CacheConfig) -> int:
    """Tokens of a sequence of `context` tokens that lie in pages, however they came."""
    return cache.flush_count(0, max(0, context - cache.num_sinks))


def max_pages_for(context: int, batch: int, cache: CacheConfig) -> int:
    """Pages with which each of `batch` sequences reaches `context` tokens; one each at least: static mode takes it."""
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name} = {value} is out of range (at least 1); the nearest good value is 1")
    return batch * max(1, coded_tokens(context, cache) // cache.page_size)


def max_context_for(max_pages: int, batch: int, cache: CacheConfig) -> int:
    """Inverse of `max_pages_for`: tokens that each of `batch` sequences may reach with so many pages."""
    pages = max_pages // batch
    return cache.num_sinks + cache.residual_length + (pages + 1) * cache.page_size - 1


def fit_max_pages(
    layers: Sequence[tuple[PageLayout, PageLayout]],
    cache: CacheConfig,
    *,
    context: int,
    batch: int = 1,
    free_bytes: int | None = None,
    device: str | torch.device = "cpu",
    shrink: bool = False,
) -> int:
    """`max_pages` of a pool for context × batch that fits into memory.

    Args:
        layers: page layouts (K, V) of every quantized layer, as `Codebooks.layouts` gives them.
        free_bytes: what may be used; None asks the device.
        shrink: for a size that nobody asked for: take at most 70 % of what is free, as many pages as fit into that,
            instead of raising.

    Raises:
        OutOfMemoryError: PQC004, with the context, the batch and the max_pages that would fit.
    """
    pages = max_pages_for(context, batch, cache)
    page_bytes = PoolLayout(tuple(layers), 1).page_bytes
    free = free_memory(device) if free_bytes is None else free_bytes
    if free is not None and shrink:
        free = int(free * SHARE_OF_DEFAULT)
    if free is None or pages * page_bytes <= free:
        return pages
    fitting = free // page_bytes
    if shrink and fitting:
        return fitting
    remedy = "Set a smaller page_size, or lower M or nbits."
    if fitting:
        settings = {"max_pages": fitting}
        if batch > 1 and fitting * batch >= pages:
            settings = {"max_batch": fitting * batch // pages} | settings
        if fitting >= batch:
            settings = {"context": max_context_for(fitting, batch, cache)} | settings
        *most, last = (f"{name} to at most {value}" for name, value in settings.items())
        remedy = f"Set {', '.join(most)}{' or ' if most else ''}{last}, or lower M or nbits."
    raise OutOfMemoryError(
        f"{batch} × {context:,} tokens need {pages:,} pages of {page_bytes:,} bytes = "
        f"{pages * page_bytes / MIB:,.1f} MiB, {free / MIB:,.1f} MiB are free on {device}.",
        remedy,
    )


@dataclass(frozen=True)
class CacheCost:
    """What a paged PQ cache costs for a model, and what the same tokens cost in exact fp16.

    Args:
        shape: the model.
        pq: quantization of K and V alike.
        cache: pages and exact tokens; `max_pages` None sizes the pool for context × batch.
        context: tokens of each sequence.
        batch: sequences.
        exact_bytes: bytes of an exact element, in the window as in the baseline (2: fp16 or bf16).
        maps: the codebooks have a d × d map, forward and backward, per head and side, and keys are fitted to their
            sequence, as `calibrate` makes them.

    All sizes are bytes unless a name says otherwise; `stored` is what the tokens occupy, `reserved` includes free
    pages. Raises `ConfigError` when M does not divide the head size or context or batch is below 1.
    """

    shape: ModelShape
    pq: PQConfig
    cache: CacheConfig
    context: int
    batch: int = 1
    exact_bytes: int = EXACT_BYTES
    maps: bool = True

    def __post_init__(self) -> None:
        max_pages_for(self.context, self.batch, self.cache)
        self.pq.num_subspaces(self.shape.head_dim)

    @cached_property
    def layout(self) -> PoolLayout:
        m = self.pq.num_subspaces(self.shape.head_dim)
        page = PageLayout(self.cache.page_size, self.shape.num_kv_heads, m, self.pq.nbits)
        return PoolLayout(((page, page),) * self.shape.num_layers, self.max_pages)

    # tokens, slots, pages

    @property
    def max_pages(self) -> int:
        return self.cache.max_pages or max_pages_for(self.context, self.batch, self.cache)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(sinks, coded, window) tokens of one sequence."""
        sinks = min(self.context, self.cache.num_sinks)
        coded = coded_tokens(self.context, self.cache)
        return sinks, coded, self.context - sinks - coded

    @property
    def pages_used(self) -> int:
        return self.batch * -(-self.lengths[1] // self.cache.page_size)

    @property
    def pages_missing(self) -> int:
        """Pages that the context × batch needs and the pool does not have; above 0 the cache would raise PQC001."""
        return max(0, self.pages_used - self.max_pages)

    @property
    def capacity(self) -> int:
        """Coded tokens that the pool holds over all sequences."""
        return self.max_pages * self.cache.page_size

    @property
    def max_context(self) -> int:
        """Tokens that each sequence may reach, exact ones included."""
        return max_context_for(self.max_pages, self.batch, self.cache)

    @property
    def wasted_slots(self) -> int:
        """Slots that the batch's sequences have for themselves and do not fill: of pages, windows and sinks."""
        sinks, coded, window = self.lengths
        in_pages = self.pages_used * self.cache.page_size - self.batch * coded
        exact = self.cache.num_sinks - sinks + self.cache.window_length - window
        return in_pages + self.batch * exact

    @property
    def free_slots(self) -> int:
        """Slots of free pages: reserved, and there for any sequence."""
        return max(0, self.max_pages - self.pages_used) * self.cache.page_size

    # bits

    @property
    def token_bits(self) -> float:
        """Bits per element of a coded token: M * nbits / d."""
        return self.pq.bits_per_element(self.shape.head_dim)

    @property
    def bits_per_element(self) -> float:
        """Bits per element over all tokens of the full-attention layers, exact ones and page table included."""
        elements = self.shape.token_bytes(1) * self.context * self.batch
        return 8 * (self.stored_bytes - self.sliding_bytes) / elements

    # bytes

    @property
    def code_bytes(self) -> int:
        """Codes in used pages."""
        return self.pages_used * self.layout.page_bytes

    @property
    def pool_bytes(self) -> int:
        """All pages, allocated at the start."""
        return self.layout.num_bytes

    @property
    def sink_bytes(self) -> int:
        return self.batch * self.cache.num_sinks * self.shape.token_bytes(self.exact_bytes)

    @property
    def window_bytes(self) -> int:
        """The ring of R + P exact tokens, full or not."""
        return self.batch * self.cache.window_length * self.shape.token_bytes(self.exact_bytes)

    @property
    def fit_bytes(self) -> int:
        """A scale and a shift for every dimension of the keys of a sequence."""
        heads = self.shape.num_layers * self.shape.num_kv_heads
        return self.batch * heads * self.shape.head_dim * 2 * FLOAT32 if self.maps else 0

    @property
    def table_bytes(self) -> int:
        """Page table (int32 per page) and the three lengths of each sequence."""
        return INT32 * (self.pages_used + 3 * self.batch)

    @property
    def sliding_bytes(self) -> int:
        """Layers with a sliding window, which stay as they are."""
        return self.batch * self.shape.sliding_bytes(self.context, self.exact_bytes)

    @property
    def constant_bytes(self) -> int:
        """Model constants, shared by all sequences and independent of their length: centroids in two bytes, of maps one
        direction in a byte an entry, the other in two, and two numbers of two bytes for every dimension of the keys.
        (On a GPU the kernels hold them in float32.)"""
        d = self.shape.head_dim
        per_head = 2 * (2 * d * 2**self.pq.nbits)
        if self.maps:
            per_head += 2 * 3 * d * d + 2 * 2 * d
        return self.shape.num_layers * self.shape.num_kv_heads * per_head

    @property
    def stored_bytes(self) -> int:
        """What the tokens occupy, without free pages and model constants."""
        exact = self.sink_bytes + self.window_bytes + self.sliding_bytes
        return self.code_bytes + exact + self.fit_bytes + self.table_bytes

    @property
    def reserved_bytes(self) -> int:
        """What is allocated, without model constants."""
        return self.stored_bytes - self.code_bytes + self.pool_bytes

    @property
    def baseline_bytes(self) -> int:
        """The same tokens in an exact contiguous cache."""
        full = self.shape.token_bytes(self.exact_bytes) * self.context * self.batch
        return full + self.sliding_bytes

    @property
    def compression(self) -> float:
        """How many times smaller what is stored is than the exact cache."""
        return self.baseline_bytes / self.stored_bytes

    def parts(self) -> list[dict[str, str | int]]:
        """One record per part of the memory: part, bytes, and what it grows with. They add up to all that is taken."""
        table = [
            ("codes", self.code_bytes, "tokens"),
            ("free pages", max(0, self.pool_bytes - self.code_bytes), "max_pages"),
            ("exact window", self.window_bytes, "sequences"),
            ("exact sinks", self.sink_bytes, "sequences"),
            ("key fits", self.fit_bytes, "sequences"),
            ("page table", self.table_bytes, "pages"),
            ("sliding layers", self.sliding_bytes, "sequences"),
            ("model constants", self.constant_bytes, "the model"),
        ]
        return [{"part": part, "bytes": size, "grows with": grows} for part, size, grows in table]
