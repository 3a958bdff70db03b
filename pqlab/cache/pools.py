"""The pool of a cache: one of its own, sized for what will come, or a given one that has to fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import CacheConfig
from ..cost import fit_max_pages
from ..errors import ConfigError
from ..paging import PagePool
from ..paging.layout import PoolLayout
from ..quantization import Codebooks


def make_pool(
    codebooks: Codebooks, config: CacheConfig, *, context: int, batch: int, device: torch.device, shrink: bool
) -> PagePool:
    """A pool of `config.max_pages`, or of as many as `batch` sequences of `context` tokens take.

    Args:
        shrink: take fewer where memory is short, since the context is only what the model allows.

    Raises:
        OutOfMemoryError: PQC004, the pages do not fit; the message says which setting would.
    """
    layouts = codebooks.layouts(config.page_size)
    pages = config.max_pages
    if pages is None:
        pages = fit_max_pages(layouts, config, context=context, batch=batch, device=device, shrink=shrink)
    sparse = shrink or config.max_pages is not None  # not made for just the tokens that will come
    return PagePool(pages, PoolLayout(layouts, pages), device=device, policy=config.policy, sparse=sparse)


def config_of_pool(pool: PagePool, config: CacheConfig) -> CacheConfig:
    """The config with what a given pool decides: its pages and their order. Raises ConfigError for other max_pages."""
    if config.max_pages not in (None, pool.max_pages):
        raise ConfigError(
            f"max_pages = {config.max_pages}, but the given pool has {pool.max_pages} pages; leave max_pages out"
        )
    return replace(config, max_pages=pool.max_pages, policy=pool.policy)


def require_layout(pool: PagePool, codebooks: Codebooks, config: CacheConfig) -> None:
    """Raise ValueError where a given pool's pages are laid out for something else."""
    if pool.layout is None or pool.layout.layers != codebooks.layouts(config.page_size):
        raise ValueError(
            "the given pool's pages are laid out for other codebooks or another page size; "
            "share pools only among caches of one model, one set of codebooks and one page_size"
        )
