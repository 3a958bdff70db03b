"""Anchored keys in codecs, calibration and caches: what is turned, that it comes home, and that all caches agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_key_fit import fed, ids
from test_static_cache import STATIC, assert_compiled_is_stepped
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, PagedPQCache, PQConfig
from pqlab.cache.contiguous import contiguous_cache
from pqlab.errors import ConfigError
from pqlab.evaluation.teacher_forced import TeacherForcedCache, from_codebooks
from pqlab.kernels import use_backend
from pqlab.panels import key_anchors
from pqlab.quantization import (
    Anchors,
    CodebookError,
    Codebooks,
    LayerCodec,
    PQCodec,
    Samples,
    calibrate,
    codebook_file,
    collect_kv,
    default_codebooks_path,
    record_kv,
    train,
)
from pqlab.quantization.rotary import Rotary
from pqlab.quantization.turned_keys import spread_by_span, turned
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=200)


def books_for(model, **options) -> Codebooks:
    return Codebooks.random(model, pq=PQConfig(M=8, nbits=6), maps=True, **{"span": 64, **options})


def anchors_for(model, span: int = 64) -> Anchors:
    return Anchors(span, Rotary(model).frequencies)


def test_keys_turned_back_are_as_if_their_span_began_at_the_first_position(make_model):
    """The same tokens in the fourth span and in the first: turned back, their keys are the same."""
    model = make_model("llama")
    anchors, rotary = anchors_for(model), Rotary(model)
    x = torch.randn(3, 50, 16)
    late = rotary.turn(x, torch.arange(50) + 3 * 64 + 9)
    early = rotary.turn(x, torch.arange(50) + 9)
    index = torch.arange(50) + 3 * 64 + 9
    torch.testing.assert_close(anchors.back(late, index), early, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(anchors.forth(anchors.back(late, index), index), late, atol=1e-5, rtol=1e-5)
    assert torch.equal(anchors.back(x, torch.arange(50)), x), "the first span stays as it is"
    assert torch.equal(anchors.back(x, torch.arange(50) - 50), x), "and so do sinks"


def test_a_table_of_turns_grows_and_is_shared():
    anchors = Anchors(256, torch.tensor([1.0, 0.1]))
    first = anchors.turns(3)
    assert len(first) == 8 and anchors.turns(8) is first
    assert len(anchors.turns(9)) == 16 and torch.equal(anchors.turns(9)[:8], first)
    angles = 256.0 * torch.tensor([1.0, 0.1]).double()
    torch.testing.assert_close(first[1], torch.stack([angles.cos(), angles.sin()]).float())
    assert torch.equal(first[0], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("span, near", [(0, 64), (63, 64), (96, 128), (257, 512)])
def test_a_span_that_is_none_is_refused(span, near):
    with pytest.raises(ConfigError, match=f"nearest good value is {near}"):
        Anchors(span, torch.ones(4))


@pytest.mark.parametrize("span", [1.5, 2**70])
def test_a_span_that_is_no_number_of_tokens_is_refused(make_model, tiny_tokenizer, span):
    with pytest.raises(ConfigError, match="span = "):
        calibrate(make_model("llama"), tiny_tokenizer, "text", span=span)


def test_codebooks_have_one_span(make_model, tmp_path):
    """In all layers, of keys alone, and in the file as its header says."""
    books = books_for(make_model("llama"))
    plain, turned = (replace(books.layer(0).k, anchors=anchors) for anchors in (None, books.layer(0).k.anchors))
    with pytest.raises(ValueError, match="share one span"):
        replace(books, layers={**books.layers, 0: LayerCodec(plain, books.layer(0).v)})
    with pytest.raises(ValueError, match="values are not turned"):
        replace(books, layers={**books.layers, 0: LayerCodec(turned, turned)})
    with pytest.raises(ConfigError, match="goes with maps only"):
        Codebooks.random(make_model("llama"), pq=PQConfig(M=8, nbits=6), span=64)
    assert "anchored every 64 tokens" in repr(books) and books.origin.span == 64
    without = {name: tensor for name, tensor in books.tensors().items() if "frequencies" not in name}
    codebook_file.write(tmp_path / "books", books.header(), without)
    with pytest.raises(CodebookError, match="header says .* 64\\), tensors say .* 0\\)"):
        Codebooks.load(tmp_path / "books")


def test_a_codec_with_anchors_needs_a_map_of_their_size(make_model):
    codec = books_for(make_model("llama")).layer(0).k
    with pytest.raises(ValueError, match="need a map, and 16 dimensions"):
        PQCodec(codec.centroids, anchors=codec.anchors)
    with pytest.raises(ValueError, match="need a map, and 8 dimensions"):
        replace(codec, anchors=Anchors(64, torch.ones(4)))


def test_codebooks_keep_their_anchors(make_model, tmp_path):
    books = books_for(make_model("llama"))
    books.save(tmp_path / "books.safetensors")
    back = Codebooks.load(tmp_path / "books.safetensors")
    assert back.span == books.span == 64
    assert books.nbytes - books_for(make_model("llama"), span=0).nbytes == 4 * 8, (
        "one table of frequencies for all layers"
    )
    for i, layer in back.layers.items():
        assert torch.equal(layer.k.anchors.frequencies, books.layer(i).k.anchors.frequencies)
        assert layer.v.anchors is None and layer.k.anchors is back.layers[0].k.anchors
    moved = back.to("cpu")
    assert len({id(layer.k.anchors) for layer in moved.layers.values()}) == 1


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_calibration_trains_on_keys_that_are_turned_back(make_model, tiny_tokenizer, kind):
    model = make_model(kind)
    text = "The whale, the whale! " * 120
    books = calibrate(
        model, tiny_tokenizer, text, PQConfig(M=8, nbits=4), num_tokens=900, window=300, span=64, progress=False
    )
    assert books.origin.span == books.span == 64
    samples = collect_kv(model, tiny_tokenizer, text, num_tokens=900, window=300)
    anchors = anchors_for(model)
    for i, keys in samples.keys.items():
        codec = books.layer(i).k
        torch.testing.assert_close(codec.anchors.frequencies, anchors.frequencies)
        turned = anchors.back(keys, samples.code_indexes())
        seen, as_they_are = (codec.decode(codec.encode(x)) for x in (turned, keys))
        assert (seen - turned).square().sum() < 0.8 * (as_they_are - keys).square().sum()


def test_what_anchors_do_not_go_with_is_named(make_model, tiny_tokenizer):
    model = make_model("llama")
    with pytest.raises(ConfigError, match="goes with maps only"):
        calibrate(model, tiny_tokenizer, "text", span=256, maps=False)
    with pytest.raises(ConfigError, match="nearest good value is 128"):
        calibrate(model, tiny_tokenizer, "text", span=100)
    samples = Samples({0: torch.randn(1, 300, 16)}, {0: torch.randn(1, 300, 16)})
    with pytest.raises(ConfigError, match="goes with maps only"):
        train(samples, PQConfig(M=8, nbits=4), maps=False, anchors=anchors_for(model))
    with pytest.raises(ConfigError, match="collect them again"):
        train(samples, PQConfig(M=8, nbits=4), anchors=anchors_for(model))


def test_a_model_without_a_rotary_embedding_is_named(tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=128)).eval()
    with pytest.raises(ConfigError, match="gpt2 has no rotary embedding"):
        calibrate(model, tiny_tokenizer, "text", span=256)


def test_default_codebooks_of_a_span_have_a_file_of_their_own(make_model):
    model = make_model("llama")
    plain, spans = (default_codebooks_path(model, PQConfig(M=8), span=span) for span in (0, 256))
    assert plain != spans and "-span256-" in spans.name


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chunks", [[1] * 170, [130] + [1] * 60, [38] + [1] * 122, [10, 33, 2, 20, 60] + [1] * 85])
def test_paged_gives_the_logits_of_contiguous_pq(make_model, chunks, backend):
    model = make_model("llama")
    books, tokens = books_for(model), ids(2, sum(chunks))
    model.set_attn_implementation("sdpa")
    plain = fed(model, contiguous_cache(model, books, SMALL), tokens, chunks)
    as_they_are = fed(model, contiguous_cache(model, books_for(model, span=0), SMALL), tokens, chunks)
    differs = float((plain - as_they_are).abs().max())
    assert differs > 0.1
    model.set_attn_implementation("pqlab")
    with use_backend(backend):
        paged = fed(model, PagedPQCache(model, books, SMALL), tokens, chunks)
    torch.testing.assert_close(paged, plain, rtol=0, atol=2e-3)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="Falling back"):
        dequantized = fed(model, PagedPQCache(model, books, SMALL), tokens, chunks)
    torch.testing.assert_close(dequantized, plain, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("prompt", [1, 50, 119])
def test_the_harness_agrees_with_step_by_step_decode(make_model, kind, prompt):
    model = make_model(kind)
    model.set_attn_implementation("pqlab")
    books, tokens = books_for(model), ids(1, 190)
    with torch.no_grad():
        forced = TeacherForcedCache(model, from_codebooks(books, SMALL.page_size), SMALL, prompt)
        at_once = model(tokens, **cache_argument(model, forced)).logits
        exact = model(tokens, **cache_argument(model, DynamicCache(config=model.config))).logits
    steps = fed(model, PagedPQCache(model, books, SMALL), tokens, [prompt] + [1] * (190 - prompt))
    lossy = float((at_once - exact).abs().max())
    assert lossy > 0.1
    torch.testing.assert_close(at_once, steps, rtol=0, atol=0.02 * lossy)


def test_pads_in_front_change_nothing(make_model):
    """A row's spans are counted by its own tokens, so that it is coded as it is alone."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = books_for(model), ids(2, 190)
    mask = torch.ones(2, 190, dtype=torch.long)
    mask[1, :37] = 0
    both = fed(model, PagedPQCache(model, books, SMALL), tokens, [60] + [1] * 130, mask)
    alone = fed(model, PagedPQCache(model, books, SMALL), tokens[1:, 37:], [23] + [1] * 130)
    torch.testing.assert_close(both[1:, 37:], alone, rtol=0, atol=1e-3)


def test_cropped_and_gone_on_from(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = books_for(model), ids(1, 190)
    cache = PagedPQCache(model, books, SMALL)
    fed(model, cache, tokens[:, :150], [150])
    cache.crop(-10)  # of the third span, which begins at token 131, 9 are left; 112 are coded either way
    got = fed(model, cache, tokens[:, 140:], [1] * 50)
    wanted = fed(model, PagedPQCache(model, books, SMALL), tokens, [140] + [1] * 50)[:, 140:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_static_gives_the_logits_of_eager(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books, tokens = books_for(model), ids(2, 190)
    static = PagedPQCache(model, books, replace(STATIC, num_sinks=3), context=200, max_batch=2)
    eager = PagedPQCache(model, books, replace(STATIC, num_sinks=3, mode="eager"), context=200)
    wanted = fed(model, eager, tokens, [60] + [1] * 130)
    for _ in range(2):
        torch.testing.assert_close(fed(model, static, tokens, [60] + [1] * 130), wanted, rtol=0, atol=1e-3)
        static.reset()
    assert len(static.quantized_layers[0].turns) * 64 >= 200, "of all spans that fit"


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_a_compiled_step_is_the_plain_one(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = books_for(model)
    compiled, stepped = (PagedPQCache(model, books, STATIC, context=200) for _ in range(2))
    torch._dynamo.reset()
    assert_compiled_is_stepped(model, torch.compile(model.forward, fullgraph=True), compiled, stepped)


# -- the panel -------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(make_model):
    """Keys of two texts, at the first positions and at late ones."""
    model = make_model("llama", max_position_embeddings=4096)
    parts = [record_kv(model, ids(1, 200), first_position=first) for first in (0, 3000)]
    keys = {i: torch.cat([part.keys[i] for part in parts], 1) for i in parts[0].keys}
    return model, Samples(keys, keys, positions=torch.cat([part.positions for part in parts]))


def test_spread_shrinks_with_the_span(seen):
    model, samples = seen
    table = spread_by_span(samples.keys[0][1], samples.positions, Rotary(model).frequencies, (1, 64, 256)).set_index(
        "span"
    )
    assert table.share[0] == 1 and table.slow[1] == 8 and table.slow[0] == 0
    before = Rotary(model).back(samples.keys[0][1], samples.positions)
    assert table.spread[1] == pytest.approx(float(before.var(0).sum()), rel=1e-3)
    anchored_keys = anchors_for(model).back(samples.keys[0][1], samples.positions)
    assert table.spread[64] == pytest.approx(float(anchored_keys.var(0).sum()), rel=1e-3)


def test_the_panel_follows_its_sliders(seen):
    model, samples = seen
    panel = key_anchors(model, samples, head=1)
    views = [trace.name for trace in panel.figure.data]
    assert views == ["as the model makes them", "turned back to anchors", "before the rotary embedding", "spread"]
    keys, frequencies = samples.keys[0][1], Rotary(model).frequencies
    as_is, back = (turned(keys, samples.positions, frequencies, span).var(0).view(2, 8).sum(0) for span in (0, 256))
    assert panel.pair == int((as_is - back).argmax()), "it begins with the pair that gains most"
    before = panel.figure.data[1].x
    panel.state = {"span": 64}
    assert (panel.figure.data[1].x != before).any() and "Within 64 tokens" in panel.text()
    assert panel.figure.data[3].text[2] == "chosen"
    for bad, message in (
        ({"head": 3}, "head = 3 is out of range \\(0 to 2\\)"),
        ({"pair": 8}, "pair = 8 is out of range \\(0 to 7\\)"),
        ({"layer": 9}, "no samples"),
    ):
        with pytest.raises(ValueError, match=message):
            key_anchors(model, samples, **bad).draw()
    panel.close()


def test_the_panel_takes_what_it_can_draw(seen):
    model, samples = seen
    panel = key_anchors(model, samples)
    slider, entry = panel.widget.children[1].children[0].children
    entry.value = 100
    assert "span = 100 is none of" in panel.status and panel.span == 256
    assert (slider.value, entry.value) == (256, 256), "controls show what is in force"
    fewer = key_anchors(model, Samples({0: samples.keys[0], 1: samples.keys[1][:2]}, {}, positions=samples.positions))
    heads = fewer.widget.children[1].children[3].children[0]
    assert heads.max == 2
    fewer.layer = 1
    assert heads.max == 1 and fewer.error is None
    fewer.close()
    panel.set(layer=9)
    assert "layer = 9 has no samples; there are some of 0, 1" in panel.status and panel.layer == 0
    panel.close()
    short = Samples({0: samples.keys[0][:, :9]}, {}, positions=samples.positions)
    with pytest.raises(ValueError, match="keys of 392 positions"):
        key_anchors(model, short)


def test_the_panel_needs_positions(seen):
    model, samples = seen
    with pytest.raises(ConfigError, match="collect them again"):
        key_anchors(model, Samples(samples.keys, samples.values))
