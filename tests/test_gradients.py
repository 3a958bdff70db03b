"""Models whose parameters train: what is generated is the same, what cannot be differentiated says so."""

from __future__ import annotations

import pytest
import torch
from test_cache import SMALL, feed, tokens

from pqlab import CacheConfig, PagedPQCache
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

STATIC = CacheConfig(page_size=16, residual_length=20, num_sinks=3, mode="static")


@pytest.mark.filterwarnings("ignore:Falling back")
@pytest.mark.parametrize(
    ("config", "attention"), [(SMALL, "pqlab"), (SMALL, "sdpa"), (STATIC, "pqlab")], ids=["eager", "fallback", "static"]
)
def test_forward_works_where_gradients_are_on_and_backward_is_refused(model, config, attention):
    books = Codebooks.random(model.config, maps=True)
    model.requires_grad_(True)
    model.set_attn_implementation(attention)
    caches = [PagedPQCache(model, books, config, context=200) for _ in range(2)]
    for ids in (tokens(70), tokens(1), *([tokens(30)] if config is SMALL else []), tokens(1, seed=4)):
        with torch.enable_grad():
            logits = model(ids, **cache_argument(model, caches[0])).logits
        torch.testing.assert_close(logits[:, -1].detach(), feed(model, caches[1], ids))
        assert logits.requires_grad
        with pytest.raises(RuntimeError, match="has no gradients.*DynamicCache"):
            logits.sum().backward()
