"""The matrix: model kinds x ways of generating, against transformers' own cache and against a plain model of PQ."""

from __future__ import annotations

import pytest
import torch
from plain_pq import plain_pq_cache
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, PagedPQCache, PQConfig
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=200)
NEW = 40

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 24},
    "padded batch": {},
    "padded beams": {"num_beams": 2},
    "padded chunked prefill": {"prefill_chunk_size": 24},
}


def inputs_for(way: str) -> dict:
    """A repetitive prompt (so that prompt lookup finds something); padded batches have rows of 90, 61 and 3 tokens."""
    generator = torch.Generator().manual_seed(3)
    phrase = torch.randint(0, 200, (1, 30), generator=generator)
    ids = phrase.repeat(1, 3)
    if "padded" not in way:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = torch.cat([ids, torch.randint(0, 200, (2, 90), generator=generator)])
    mask = torch.ones_like(rows)
    for row, length in ((1, 61), (2, 3)):
        rows[row, :-length], mask[row, :-length] = 256, 0
    return {"input_ids": rows, "attention_mask": mask}


def generate(model, cache, way: str, attention: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.set_attn_implementation(attention)
    inputs = inputs_for(way)
    result = model.generate(
        **inputs, **cache_argument(model, cache), max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **WAYS[way],
    )  # fmt: skip
    return result.sequences, [x.float() for x in result.logits]


def assert_same(ours, our_logits, theirs, logits, tolerance: float = 1e-3) -> None:
    """Equal tokens and logits, or different from a step on where the reference's best two logits are within 1e-5."""
    if torch.equal(ours, theirs):
        for step, (a, b) in enumerate(zip(our_logits, logits, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, s=step: f"step {s}: {m}")
        return
    prompt = theirs.shape[1] - len(logits)
    for row in range(len(theirs)):
        differs = (ours[row] != theirs[row]).nonzero().flatten()
        if len(differs):
            best = logits[int(differs[0]) - prompt][row].topk(2).values
            assert float(best[0] - best[1]) < 1e-5, f"row {row} differs at token {int(differs[0])}"


@pytest.mark.parametrize("way", WAYS)
def test_exact_storage_gives_the_tokens_of_dynamic_cache(tiny_model, way):
    exact, logits = generate(tiny_model, DynamicCache(config=tiny_model.config), way, "sdpa")
    cache = PagedPQCache(tiny_model, Codebooks.identity(tiny_model), SMALL)
    ours, our_logits = generate(tiny_model, cache, way, "pqlab")
    assert_same(ours, our_logits, exact, logits)
    assert cache.pool.num_used > 0, "nothing was flushed: the test shows nothing"
    cache.group.check_integrity()
    cache.pool.check_integrity([cache.table])
    cache.reset()
    assert cache.pool.num_used == 0


@pytest.mark.parametrize("maps", [False, True, "anchored"], ids=["plain", "maps", "anchored"])
@pytest.mark.parametrize("way", WAYS)
def test_lossy_storage_gives_the_tokens_of_a_plain_contiguous_model(tiny_model, way, maps):
    span = 64 if maps == "anchored" else 0
    books = Codebooks.random(tiny_model, pq=PQConfig(M=8, nbits=6), maps=bool(maps), span=span)
    mask = inputs_for(way)["attention_mask"].repeat_interleave(WAYS[way].get("num_beams", 1), 0)
    plain, logits = generate(tiny_model, plain_pq_cache(tiny_model, books, SMALL, mask), way, "sdpa")
    cache = PagedPQCache(tiny_model, books, SMALL)
    ours, our_logits = generate(tiny_model, cache, way, "pqlab")
    assert_same(ours, our_logits, plain, logits, tolerance=0.02)  # a near tie may flip a code
    _, exact_logits = generate(tiny_model, DynamicCache(config=tiny_model.config), way, "sdpa")
    change = max(float((a - b).abs().max()) for a, b in zip(exact_logits, logits, strict=False))
    assert change > 0.05, "quantization changed nothing: the test shows nothing"
    cache.group.check_integrity()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Falling back to standard implementation")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_dequantizing_fallback_gives_the_same_tokens(make_model, way, attention):
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    inputs = inputs_for(way)
    mask = inputs["attention_mask"].repeat_interleave(WAYS[way].get("num_beams", 1), 0)
    plain, logits = generate(model, plain_pq_cache(model, books, SMALL, mask), way, attention)
    cache = PagedPQCache(model, books, SMALL)
    cache.announce_mask(mask)
    ours, our_logits = generate(model, cache, way, attention)
    assert_same(ours, our_logits, plain, logits, tolerance=0.02)  # a near tie may flip a code
