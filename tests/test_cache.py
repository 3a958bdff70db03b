"""What the cache promises beyond equal tokens: bounds, atomic errors, sharing, refusals, and what it says."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from plain_pq import plain_pq_cache
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, PagedPQCache
from pqlab.cache.contiguous import ContiguousPQLayer, contiguous_cache
from pqlab.errors import PageAllocationError, UnsupportedModelError
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 200, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def feed(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, **cache_argument(model, cache)).logits[:, -1]


def test_window_keeps_between_r_and_r_plus_page_minus_one_tokens(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(3))
    for n in range(4, 150):
        feed(model, cache, tokens(1, seed=n))
        sinks, coded, window = cache.lengths[0].tolist()
        assert sinks == 3 and sinks + coded + window == n
        assert coded % SMALL.page_size == 0
        assert window <= SMALL.residual_length + SMALL.page_size - 1
        assert window >= min(n - 3, SMALL.residual_length)
    cache.group.check_integrity()


def test_tokens_are_encoded_once(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(100))
    layer = cache.quantized_layers[0]
    before = [codes.clone() for codes in layer.codes(0)]
    for n in range(60):
        feed(model, cache, tokens(1, seed=n))
    after = layer.codes(0)
    assert after[0].shape[1] > before[0].shape[1]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, : old.shape[1]], old)


def test_running_out_of_pages_changes_nothing_and_goes_on_after_pages_are_freed(model, books):
    pool_of = PagedPQCache(model, books, CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=6))
    other = PagedPQCache(model, books, pool_of.settings, pool=pool_of.pool)
    free = PagedPQCache(model, books, SMALL)  # enough pages: what should happen
    feed(model, other, tokens(80, seed=9))
    prompt = tokens(60)
    feed(model, pool_of, prompt), feed(model, free, prompt)
    step = 0
    with pytest.raises(PageAllocationError, match="PQC001.*max_pages"):
        for step in range(200):  # noqa: B007
            state = (pool_of.get_seq_length(), pool_of.lengths.tolist(), pool_of.as_frame().to_dict())
            feed(model, pool_of, tokens(1, seed=step))
            feed(model, free, tokens(1, seed=step))
    assert (pool_of.get_seq_length(), pool_of.lengths.tolist(), pool_of.as_frame().to_dict()) == state
    pool_of.pool.check_integrity([pool_of.table, other.table])
    other.reset()
    for again in range(step, step + 20):
        ours, theirs = (feed(model, c, tokens(1, seed=again)) for c in (pool_of, free))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("attention", ["pqlab", "sdpa"])
@pytest.mark.filterwarnings("ignore:Falling back")
def test_a_prompt_that_gets_no_pages_leaves_no_rows_behind(model, books, attention):
    model.set_attn_implementation(attention)
    cache, fresh = PagedPQCache(model, books, replace(SMALL, max_pages=6)), PagedPQCache(model, books, SMALL)
    with pytest.raises(PageAllocationError, match="16 pages are needed, 6 of 6 are free"):
        feed(model, cache, tokens(90, rows=4))
    assert cache.group.num_rows == cache.pool.num_used == 0 and cache.lengths.shape == (0, 3)
    for ids in (tokens(90), tokens(1, seed=1)):
        torch.testing.assert_close(feed(model, cache, ids), feed(model, fresh, ids))
    cache.group.check_integrity()


def test_a_cache_cropped_to_nothing_takes_another_batch(model, books):
    cache, fresh = PagedPQCache(model, books, SMALL), PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(60, rows=3))
    cache.crop(-60)
    assert cache.get_seq_length() == cache.pool.num_used == 0
    for ids in (tokens(60), tokens(1, seed=1)):
        torch.testing.assert_close(feed(model, cache, ids), feed(model, fresh, ids))


def test_two_caches_live_side_by_side_on_one_pool(model, books):
    first = PagedPQCache(model, books, SMALL)
    second = PagedPQCache(model, books, SMALL, pool=first.pool)
    alone = [PagedPQCache(model, books, SMALL) for _ in range(2)]
    for n, (count, ours, theirs) in enumerate(
        [(70, first, alone[0]), (50, second, alone[1])] + [(1, first, alone[0]), (1, second, alone[1])] * 30
    ):
        ids = tokens(count, seed=n)
        torch.testing.assert_close(feed(model, ours, ids), feed(model, theirs, ids))
    first.pool.check_integrity([first.table, second.table])
    assert not set(first.table.pages(0)) & set(second.table.pages(0))


@pytest.mark.parametrize("cut", [1, 15, 37, 60, 97])
def test_crop_takes_the_window_first_then_the_last_page(model, books, cut):
    cache, plain = PagedPQCache(model, books, SMALL), plain_pq_cache(model, books, SMALL)
    ids = tokens(100)
    model.set_attn_implementation("sdpa")
    feed(model, plain, ids)
    model.set_attn_implementation("pqlab")
    feed(model, cache, ids)
    coded = int(cache.lengths[0, 1])
    cache.crop(-cut)
    plain.crop(-cut)
    cache.group.check_integrity()
    assert cache.get_seq_length() == 100 - cut
    sinks, now_coded, window = cache.lengths[0].tolist()
    assert now_coded == min(coded, max(0, 100 - cut - 3))
    for n, count in enumerate([1, 1, 5, 30, 1, 1, 40, 1]):  # grows over the cut again, pages' free slots first
        new = tokens(count, seed=n)
        ours = feed(model, cache, new)
        model.set_attn_implementation("sdpa")
        theirs = feed(model, plain, new)
        model.set_attn_implementation("pqlab")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
        cache.group.check_integrity()


@pytest.mark.parametrize("columns", [0, 60])
def test_crop_does_not_hide_an_interrupted_step(model, books, columns):
    def stop(*args):
        raise KeyboardInterrupt

    cache, fresh = PagedPQCache(model, books, SMALL), PagedPQCache(model, books, SMALL)
    if columns:
        feed(model, cache, tokens(columns))
    hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, tokens(40))
    hook.remove()
    for change in (lambda: cache.crop(-5), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(RuntimeError, match=r"layer 1 stands at column .*interrupted.*cache\.reset\(\)"):
            change()
    cache.crop(-(columns + 40))
    torch.testing.assert_close(feed(model, cache, tokens(50)), feed(model, fresh, tokens(50)))


def test_crop_refuses_a_positive_number_with_the_right_call(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(50))
    with pytest.raises(ValueError, match=r"crop\(-20\) to keep 30"):
        cache.crop(30)
    cache.crop(0)
    assert cache.get_seq_length() == 50


def test_rows_selected_repeated_and_cropped_share_pages_without_corruption(model, books):
    cache = PagedPQCache(model, books, SMALL)
    singles = [PagedPQCache(model, books, SMALL) for _ in range(3)]
    prompt = tokens(90)
    for c in (cache, *singles):
        feed(model, c, prompt)
        c.crop(-30)  # leaves a partial last page, which the rows then share
    cache.batch_repeat_interleave(3)
    assert cache.pool.num_used == singles[0].pool.num_used, "copies should share pages"
    for n in range(45):
        ids = tokens(1, rows=3, seed=n)
        ours = feed(model, cache, ids)
        theirs = torch.cat([feed(model, c, ids[i : i + 1]) for i, c in enumerate(singles)])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    cache.pool.check_integrity([cache.table])
    cache.batch_select_indices(torch.tensor([2, 0]))
    ids = tokens(1, rows=2, seed=99)
    theirs = torch.cat([feed(model, singles[2], ids[:1]), feed(model, singles[0], ids[1:])])
    torch.testing.assert_close(feed(model, cache, ids), theirs, rtol=0, atol=1e-3)
    cache.group.check_integrity()
    cache.reset()
    assert cache.pool.num_free == cache.pool.max_pages


def test_pads_are_never_sinks_nor_codes(model, books):
    """A left-padded row and the same row alone store the same codes and say the same."""
    cache, alone = PagedPQCache(model, books, SMALL), PagedPQCache(model, books, SMALL)
    row = tokens(70, seed=5)
    both = torch.cat([tokens(100), torch.cat([torch.full((1, 30), 256), row], 1)])
    mask = (both != 256).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        logits = model(both, attention_mask=mask, position_ids=positions, **cache_argument(model, cache)).logits
    theirs = feed(model, alone, row)
    torch.testing.assert_close(logits[1, -1:], theirs, rtol=0, atol=1e-4)
    assert cache.lengths[1].tolist() == alone.lengths[0].tolist()
    for ours, single in zip(cache.quantized_layers, alone.quantized_layers, strict=True):
        for a, b in zip(ours.codes(1), single.codes(0), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(cache.quantized_layers[0].codes(0)[0][:, :16], cache.quantized_layers[0].codes(1)[0][:, :16])


@pytest.mark.parametrize("attention", ["pqlab", "sdpa"])
@pytest.mark.filterwarnings("ignore:Falling back")
def test_a_prompt_may_come_in_chunks_of_which_the_first_is_all_pads(model, attention):
    ids = tokens(100, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :70], mask[1, :40] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "prefill_chunk_size": 32}
    model.set_attn_implementation("sdpa")
    theirs = model.generate(ids, **settings, **cache_argument(model, DynamicCache(config=model.config)))
    model.set_attn_implementation(attention)
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    cache.announce_mask(mask)
    assert torch.equal(model.generate(ids, **settings, **cache_argument(model, cache)), theirs)
    assert cache.lengths.sum(1).tolist() == [49, 79]


def test_multi_turn_reuse_goes_on_where_the_cache_stands(model, books):
    cache, plain = PagedPQCache(model, books, SMALL), plain_pq_cache(model, books, SMALL)
    ids = [tokens(70), tokens(25, seed=1)]
    results = []
    for attention, past in (("pqlab", cache), ("sdpa", plain)):
        model.set_attn_implementation(attention)
        settings = {**cache_argument(model, past), "max_new_tokens": 20, "do_sample": False}
        out = model.generate(ids[0], **settings)
        out = model.generate(torch.cat([out, ids[1]], 1), **settings)
        results.append(out)
    assert torch.equal(*results)
    assert cache.get_seq_length() == results[0].shape[1] - 1


def test_nine_query_heads_on_three_kv_heads(make_model):
    model = make_model("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    exact = model.generate(tokens(80), **cache_argument(model, DynamicCache(config=model.config)), max_new_tokens=30)
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    assert torch.equal(model.generate(tokens(80), **cache_argument(model, cache), max_new_tokens=30), exact)


def test_the_fallback_says_that_it_happens_and_why(model, books):
    from pqlab.kernels import dispatch

    model.set_attn_implementation("sdpa")
    cache = PagedPQCache(model, books, SMALL)
    with pytest.warns(UserWarning, match='Falling back to standard implementation.*"sdpa".*set_attn_implementation'):
        feed(model, cache, tokens(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        feed(model, cache, tokens(1))
    assert any(op == "attention" and "sdpa" in reason for op, _, reason in dispatch.runs())


def test_a_fallback_that_begins_later_is_said_too(model, books):
    cache = PagedPQCache(model, books, SMALL)
    model.set_attn_implementation("pqlab")
    feed(model, cache, tokens(40))
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="Falling back"):
        feed(model, cache, tokens(1))


def test_a_reset_forgets_the_announced_mask_and_asks_for_it_again(model):
    ids, mask = tokens(70, rows=2), torch.ones(2, 70, dtype=torch.long)
    mask[0, :40] = 0
    model.set_attn_implementation("sdpa")
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    for _ in range(2):
        with pytest.warns(UserWarning, match="announce_mask"):
            feed(model, cache, ids)
        cache.reset()
    cache.announce_mask(mask)
    with pytest.warns(UserWarning, match="reads the codes directly.$"):
        model(ids, attention_mask=mask, **cache_argument(model, cache))
    assert cache.lengths.sum(1).tolist() == [30, 70]


def test_the_fallback_asks_for_the_mask_of_a_single_padded_row_too(model):
    mask = torch.ones(1, 100, dtype=torch.long)
    mask[:, :60] = 0
    model.set_attn_implementation("sdpa")
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    with pytest.warns(UserWarning, match=r"A prompt with pads also needs cache\.announce_mask\(attention_mask\)"):
        model.generate(tokens(100), attention_mask=mask, **cache_argument(model, cache), max_new_tokens=2)
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    cache.announce_mask(mask)
    with pytest.warns(UserWarning, match="reads the codes directly.$"):
        model.generate(tokens(100), attention_mask=mask, **cache_argument(model, cache), max_new_tokens=2)
    assert cache.lengths.sum() == 41


@pytest.mark.filterwarnings("ignore:Falling back")
def test_an_announced_mask_follows_the_rows(model):
    """A prompt in two parts, rows selected in between, against each row alone."""
    model.set_attn_implementation("sdpa")
    ids = tokens(70, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :40], mask[1, :60] = 0, 0
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    with pytest.raises(ValueError, match=r"takes the tokenizer's mask \[B, columns\], not one of shape \[3, 1, 70\]"):
        cache.announce_mask(mask[:, None])
    cache.announce_mask(mask)
    with torch.inference_mode():
        model(ids[:, :50], attention_mask=mask[:, :50], **cache_argument(model, cache))
        cache.batch_select_indices(torch.tensor([2, 1]))
        rest = {"attention_mask": mask[[2, 1]], "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[[2, 1], 50:]}
        ours = model(ids[[2, 1], 50:], **rest, **cache_argument(model, cache)).logits[:, -1]
    assert cache.lengths.sum(1).tolist() == [70, 10]
    theirs = torch.cat(
        [feed(model, DynamicCache(config=model.config), ids[r : r + 1, s:]) for r, s in ((2, 0), (1, 60))]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Falling back")
def test_an_announced_mask_of_too_few_rows_is_refused_with_the_right_call(model):
    ids, mask = tokens(70, rows=2), torch.ones(2, 70, dtype=torch.long)
    mask[0, :40] = 0
    model.set_attn_implementation("sdpa")
    settings = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "num_beams": 3}
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    cache.announce_mask(mask)
    with pytest.raises(ValueError, match=r"2 rows and the model brings 6.*mask\.repeat_interleave\(3, 0\)"):
        model.generate(ids, **settings, **cache_argument(model, cache))
    assert cache.group.num_rows == 0
    cache.announce_mask(mask.repeat_interleave(3, 0))
    ours = model.generate(ids, **settings, **cache_argument(model, cache))
    theirs = model.generate(ids, **settings, **cache_argument(model, DynamicCache(config=model.config)))
    assert torch.equal(ours, theirs) and sorted(cache.lengths.sum(1).tolist()) == [59, 59, 59, 99, 99, 99]


def test_a_mask_that_hides_stored_tokens_is_refused(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(40))
    mask = torch.ones(1, 1, 5, 45, dtype=torch.bool).tril(40)
    mask[..., :10] = False
    whole = PagedPQCache(model, books, SMALL)
    feed(model, whole, tokens(40))
    for _ in range(2):  # a second try is refused as well
        with pytest.raises(UnsupportedModelError, match="hides stored tokens"), torch.inference_mode():
            model(tokens(5), attention_mask=mask, **cache_argument(model, cache))
    assert cache.get_seq_length() == 40 and cache.lengths.sum() == 40
    torch.testing.assert_close(feed(model, cache, tokens(5)), feed(model, whole, tokens(5)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.Gemma2Config(num_hidden_layers=2), "gemma2 caps its attention scores"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.DeepseekV3Config(num_hidden_layers=2), "MLA"),
        (transformers.GptOssConfig(num_hidden_layers=2), "sinks"),
        (transformers.MistralConfig(num_hidden_layers=2, sliding_window=64), "no full-attention layer"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_what_a_model_needs_and_the_cache_does_not_do_is_named_before_anything_runs(config, says, books):
    with pytest.raises(UnsupportedModelError, match=says):
        PagedPQCache(config, books, SMALL)


def test_layers_that_are_not_quantized_are_labelled(make_model):
    model = make_model("gemma3")
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    assert cache.layer_kinds() == ["exact DynamicSlidingWindowLayer", "paged pq"] * 2


def test_codebooks_of_another_model_are_refused(model, make_model):
    other = make_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="3 full-attention layers.*but the model has 2"):
        PagedPQCache(model, Codebooks.identity(other), SMALL)


def test_the_default_pool_follows_context_and_batch_and_is_checked_before_it_is_allocated(model, books):
    from pqlab.errors import OutOfMemoryError

    cache = PagedPQCache(model, books, CacheConfig(page_size=64), context=1000, max_batch=3)
    assert cache.pool.max_pages == 3 * ((1000 - 4 - 128) // 64)
    with pytest.raises(OutOfMemoryError, match="PQC004.*max_pages"):
        PagedPQCache(model, books, CacheConfig(max_pages=10**10))


def test_bytes_add_up(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(100))
    held = cache.nbytes()
    sinks, coded, window = cache.lengths[0].tolist()
    pages = -(-coded // 16)
    assert (
        held["codes"] == pages * 16 * (8 * 4 // 8) * 3 * 2 * 2
    )  # tokens x bytes of 8 4-bit codes x heads x K,V x layers
    assert held["free_pages"] == (60 - pages) * 16 * 4 * 3 * 2 * 2
    assert held["exact_tokens"] == (3 + 36) * 16 * 3 * 2 * 2 * 4  # (sinks + W) x d x heads x K,V x layers x fp32
    assert cache.stored_bytes + held["free_pages"] == cache.reserved_bytes == sum(held.values()) - books.nbytes
    assert list(cache.as_frame().page) == list(cache.table.pages(0))


def test_a_cache_made_in_inference_mode_can_be_changed_outside_of_it(model, books):
    with torch.inference_mode():
        cache = PagedPQCache(model, books, SMALL)
        model(tokens(80), **cache_argument(model, cache))
    with torch.no_grad():
        cache.crop(-50)
        cache.batch_repeat_interleave(2)
        model(tokens(60, rows=2), **cache_argument(model, cache))
    cache.group.check_integrity()


def test_generation_in_low_precision(make_model, books):
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model("llama").to(dtype)
        model.set_attn_implementation("pqlab")
        cache = PagedPQCache(model, books, SMALL)
        out = model.generate(tokens(80), **cache_argument(model, cache), max_new_tokens=10, do_sample=False)
        assert out.shape[1] == 90 and cache.quantized_layers[0].window_k.dtype == dtype


def test_a_model_cast_or_moved_since_is_named(make_model, books):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(60))
    model.half()
    with pytest.raises(ValueError, match=r"brings torch.float16 on cpu, the cache holds torch.float32.*cache\.reset"):
        feed(model, cache, tokens(1))
    cache.reset()
    assert feed(model, cache, tokens(60)).dtype == torch.float16
    elsewhere = PagedPQCache(model.config, books, SMALL)
    with pytest.raises(ValueError, match=r"keys on meta, the cache's pages are on cpu; .*PagedPQCache\(model"):
        feed(make_model("llama").to("meta"), elsewhere, tokens(60).to("meta"))


def test_a_paged_layer_says_that_it_is_not_offloaded(model, books):
    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(60))
    for move in (lambda: cache.offload(0), cache.quantized_layers[0].prefetch):
        with pytest.raises(NotImplementedError, match="layer 0 is paged.*leave offloading off"):
            move()


def test_a_step_interrupted_before_its_attention_is_named(model, books, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    cache = PagedPQCache(model, books, SMALL)
    feed(model, cache, tokens(60))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.quantized_layers[1], "attend", stop)
        feed(model, cache, tokens(1))
    with pytest.raises(RuntimeError, match="interrupted.*cache.reset"):
        feed(model, cache, tokens(1))
    cache.reset()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.quantized_layers[0], "attend", stop)
        feed(model, cache, tokens(60))
    with pytest.raises(RuntimeError, match=r"twice without an attention.*interrupted.*cache\.reset\(\).*sdpa"):
        feed(model, cache, tokens(60))


def left_exact(books: Codebooks, layer: int) -> Codebooks:
    """The same codebooks, but for a layer that stays as it is."""
    rest = {i: codecs for i, codecs in books.layers.items() if i != layer}
    return Codebooks(rest, books.origin, {layer: books.geometry[layer]})


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("layer", [0, 1])
def test_exact_layers_and_paged_ones_share_a_mask(model, mode, layer):
    """A left-padded batch: transformers makes one mask for all full-attention layers, of the first one's size."""
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :25] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "disable_compile": True}
    books = left_exact(Codebooks.identity(model), layer)
    cache = PagedPQCache(model, books, replace(SMALL, mode=mode), context=200, max_batch=2)
    ours = model.generate(tokens(70, rows=2), **settings, **cache_argument(model, cache))
    model.set_attn_implementation("sdpa")
    theirs = model.generate(tokens(70, rows=2), **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_contiguous_cache_leaves_the_same_layers_exact(model, books, layer):
    books = left_exact(books, layer)
    paged, plain = PagedPQCache(model, books, SMALL), contiguous_cache(model, books, SMALL)
    assert [isinstance(x, ContiguousPQLayer) for x in plain.layers] == [i != layer for i in range(2)]
    with torch.inference_mode():
        for ids in (tokens(60), *tokens(30, seed=1).T[:, None]):
            model.set_attn_implementation("pqlab")
            ours = model(ids, **cache_argument(model, paged)).logits
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(model(ids, **cache_argument(model, plain)).logits, ours, atol=1e-4, rtol=1e-4)
