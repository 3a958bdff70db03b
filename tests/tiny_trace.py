"""A traced decode of a tiny random model, made once per test run."""

from __future__ import annotations

from functools import cache

PROMPT = "It is a truth universally acknowledged, that a <single> man in possession of a good fortune & so on"
STEPS = 40


@cache
def tiny_cache_and_trace(tokenizer):
    """(cache with codes in its pages, DecodeTrace) of a lossy codec on 2 layers, 6 query and 3 kv heads."""
    from conftest import make_tiny_model

    from pqlab import CacheConfig, Codebooks, PagedPQCache, PQConfig, trace_decode
    from pqlab.transformers_api import cache_argument

    model = make_tiny_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=5))
    config = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)
    trace = trace_decode(model, tokenizer, PROMPT, STEPS, codebooks=books, config=config)
    held = PagedPQCache(model, books, config)
    model.set_attn_implementation("pqlab")
    model(tokenizer(PROMPT, return_tensors="pt").input_ids, **cache_argument(model, held))
    return held, trace
