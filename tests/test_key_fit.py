"""Keys fitted to their sequence: the same storage whichever way tokens come, and less lost where it should be less."""

from __future__ import annotations

import pytest
import torch

from pqlab import CacheConfig, PagedPQCache, PQConfig
from pqlab.cache.contiguous import contiguous_cache
from pqlab.cache.key_fit import KeyFit
from pqlab.evaluation.teacher_forced import through_codes
from pqlab.quantization import Codebooks, PQCodec, product_kmeans
from pqlab.quantization.codec import LEAST_SCALE
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)


def random(model, **options) -> Codebooks:
    return Codebooks.random(model, pq=PQConfig(M=8, nbits=6), maps=True, **options)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def fed(model, cache, tokens: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, n, vocabulary] of tokens that come in chunks."""
    out, done = [], 0
    for size in chunks:
        part = {}
        if mask is not None:
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, done : done + size]
            part = {"attention_mask": mask[:, : done + size], "position_ids": places}
        out.append(model(tokens[:, done : done + size], **part, **cache_argument(model, cache)).logits)
        done += size
    return torch.cat(out, 1)


def test_a_scale_is_the_spread_that_was_over_the_spread_that_is():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, 500, 8, generator=generator) * torch.tensor([0.5, 1, 1.5, 8] * 2) + 3
    eye = torch.eye(8).expand(3, 8, 8)
    codec = PQCodec(torch.zeros(3, 4, 2, 2), eye, eye, mean=torch.full((3, 8), 3.0), spread=torch.ones(3, 8))
    scale, shift = codec.fit(y)
    assert scale.shape == shift.shape == (2, 3, 8)
    spread = (y.double() - 3).square().mean(2).sqrt()
    torch.testing.assert_close(scale.double(), (1 / spread).clamp(LEAST_SCALE, 1), rtol=1e-5, atol=0)
    assert (scale[..., 0] == 1).all() and (scale[..., 3] == LEAST_SCALE).all() and (scale[..., 2] < 0.8).all()
    there = torch.full((2, 3, 1, 8), 3.0)
    fit = KeyFit(codec, 2, y.device)
    for row in range(2):
        fit.take(row, y[row])
    torch.testing.assert_close(fit.apply(there), there)  # the calibration's mean stays where it is
    torch.testing.assert_close(fit.undo(fit.apply(y)), y)


@pytest.mark.parametrize("parts", [("mean",), ("spread",), ("mean", "spread")])
def test_half_a_fit_is_refused(parts):
    moments = dict.fromkeys(parts, torch.ones(3, 8))
    with pytest.raises(ValueError, match="a fit needs mean, spread and a map"):
        PQCodec(torch.zeros(3, 4, 2, 2), **moments)


def test_codebooks_keep_what_keys_are_fitted_by(make_model, tmp_path):
    books = random(make_model("llama"))
    books.save(tmp_path / "books.safetensors")
    back = Codebooks.load(tmp_path / "books.safetensors")
    assert all(torch.equal(t, back.tensors()[name]) for name, t in books.tensors().items())
    assert all(layer.k.can_fit and not layer.v.can_fit for layer in back.layers.values())
    assert not any(layer.k.can_fit for layer in back.unfitted().layers.values())
    assert back.unfitted().nbytes < back.nbytes


@pytest.mark.parametrize("chunks", [[1] * 150, [90] + [1] * 60, [38] + [1] * 112, [10, 33, 2, 20] + [1] * 85])
def test_it_gives_the_logits_of_contiguous_pq(make_model, chunks):
    """However the first coded tokens come: as steps, in one chunk, or waiting in the window in part."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = random(model), ids(2, sum(chunks))
    cache = PagedPQCache(model, books, SMALL)
    paged = fed(model, cache, tokens, chunks)
    assert all((layer.fit.scale < 1).any() for layer in cache.quantized_layers)
    model.set_attn_implementation("sdpa")
    plain = fed(model, contiguous_cache(model, books, SMALL), tokens, chunks)
    unfitted = fed(model, contiguous_cache(model, books.unfitted(), SMALL), tokens, chunks)
    differs = float((plain - unfitted).abs().max())
    assert differs > 0.1
    torch.testing.assert_close(paged, plain, rtol=0, atol=0.02 * differs)
    with pytest.warns(UserWarning, match="Falling back"):
        dequantized = fed(model, PagedPQCache(model, books, SMALL), tokens, chunks)
    torch.testing.assert_close(dequantized, plain, rtol=0, atol=0.02 * differs)


def test_rows_are_fitted_each_to_its_own(make_model):
    """Padded rows that reach their first page at different steps, then swapped, give what they give alone."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = random(model), ids(2, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :30] = 0
    cache = PagedPQCache(model, books, SMALL)
    both = fed(model, cache, tokens, [40] + [1] * 60, mask)
    alone = fed(model, PagedPQCache(model, books, SMALL), tokens[1:, 30:], [10] + [1] * 60)
    torch.testing.assert_close(both[1:, 30:], alone, rtol=0, atol=1e-3)
    scales = [layer.fit.scale.clone() for layer in cache.quantized_layers]
    assert all(not torch.equal(*scale) for scale in scales)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(
        torch.equal(layer.fit.scale, scale.flip(0)) for layer, scale in zip(cache.quantized_layers, scales, strict=True)
    )
    cache.reset()
    again = fed(model, cache, tokens, [40] + [1] * 60, mask)
    torch.testing.assert_close(again, both, rtol=0, atol=1e-5)


def test_a_cropped_cache_is_fitted_anew(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = random(model), ids(1, 120)
    cache = PagedPQCache(model, books, SMALL)
    fed(model, cache, ids(1, 100).flip(1), [100])
    cache.crop(-98)
    other = tokens.clone()
    other[:, :2] = ids(1, 100).flip(1)[:, :2]
    got = fed(model, cache, other[:, 2:], [1] * 100)
    wanted = fed(model, PagedPQCache(model, books, SMALL), other, [2] + [1] * 100)[:, 2:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_a_static_cache_is_fitted_by_its_prompt(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = random(model), ids(2, 120)
    static = PagedPQCache(model, books, CacheConfig(16, 20, num_sinks=3, mode="static"), context=130, max_batch=2)
    for _ in range(2):
        got = fed(model, static, tokens, [60] + [1] * 60)
        torch.testing.assert_close(
            got, fed(model, PagedPQCache(model, books, SMALL), tokens, [60] + [1] * 60), rtol=0, atol=1e-3
        )
        static.reset()
        assert all((layer.fit.scale == 1).all() for layer in static.quantized_layers)


def test_a_static_cache_says_what_it_cannot_fit(make_model, caplog):
    """59 tokens: 3 sinks, R of 20, a page of 16, and steps that are the first to code a page."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    config = CacheConfig(16, 20, num_sinks=3, mode="static")
    for prompt, said in ((38, 1), (39, 0)):
        caplog.clear()
        cache = PagedPQCache(model, random(model), config, context=130)
        fed(model, cache, ids(1, 59), [prompt] + [1] * (59 - prompt))
        assert caplog.text.count("39 tokens are enough") == said
        assert all((layer.fit.scale == 1).all() == bool(said) for layer in cache.quantized_layers)
        assert int(cache.lengths[0, 1]) == 32


def test_wide_keys_lose_less():
    """Nearly twice as wide as those that centroids were made for: what a fit is for."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 4096, 8, generator=generator)
    eye = torch.eye(8).expand(2, 8, 8)
    centroids = product_kmeans(y, 4, 256, iterations=4, seed=0)
    codec = PQCodec(centroids, eye, eye, mean=y.mean(1), spread=y.std(1))
    wide = 1.8 * torch.randn(2, 640, 8, generator=generator)
    fitted, unfitted = (through_codes(c, wide, page_size=64) for c in (codec, PQCodec(centroids, eye, eye)))
    assert (fitted - wide).square().mean() < 0.8 * (unfitted - wide).square().mean()
