from __future__ import annotations

import hashlib

import pytest
import torch
from transformers import DynamicCache

from pqlab.config import CacheConfig, PQConfig
from pqlab.errors import ConfigError, UnsupportedModelError
from pqlab.models import fingerprint
from pqlab.quantization import Codebooks, Samples, calibrate, collect_kv, default_codebooks, record_kv
from pqlab.quantization.calibrate import SCOPES, STAGES
from pqlab.quantization.samples import split_text
from pqlab.transformers_api import cache_argument

TEXT = " ".join(f"Chapter {i}: the {i * 7919 % 997}th whale was {i * 31 % 89} feet long, and sang." for i in range(200))


def cached_kv(model, ids, first_position=0):
    """What transformers' own cache holds after a forward over whole rows: {layer: (K, V)}."""
    cache = DynamicCache(config=model.config)
    positions = first_position + torch.arange(ids.shape[1])[None]
    model(ids, **cache_argument(model, cache), position_ids=positions)
    return {i: (layer.keys, layer.values) for i, layer in enumerate(cache.layers)}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "pqlab"])
def test_samples_are_what_the_cache_sees(tiny_model, attention):
    tiny_model.set_attn_implementation(attention)
    ids = torch.randint(256, (2, 20))
    samples = record_kv(tiny_model, ids, num_sinks=3)
    tiny_model.set_attn_implementation("sdpa")
    full = [1, 3] if tiny_model.config.model_type == "gemma3_text" else [0, 1]
    assert list(samples.keys) == list(samples.values) == full
    expected = cached_kv(tiny_model, ids)
    for i in full:
        for got, cached in zip((samples.keys[i], samples.values[i]), expected[i], strict=True):
            torch.testing.assert_close(got, cached[:, :, 3:].movedim(1, 0).flatten(1, 2), atol=1e-4, rtol=1e-4)


def test_pads_and_the_sinks_after_them_are_no_samples(tiny_model):
    """A left-padded row gives the samples of the row alone; with or without pads, sinks are its first real tokens."""
    rows = [torch.randint(256, (1, n)) for n in (17, 9, 2)]
    pad = tiny_model.config.pad_token_id
    padded = torch.cat([torch.nn.functional.pad(row, (17 - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(17) >= 17 - row.shape[1] for row in rows]).long()
    together = record_kv(tiny_model, padded, mask, num_sinks=4)
    alone = [record_kv(tiny_model, row, num_sinks=4) for row in rows]
    assert together.num_samples == 13 + 5 + 0
    for i in together.keys:
        for side in ("keys", "values"):
            expected = torch.cat([getattr(part, side)[i] for part in alone], 1)
            torch.testing.assert_close(getattr(together, side)[i], expected, atol=1e-4, rtol=1e-4)


def test_only_the_body_runs_and_the_model_is_left_as_it_was(make_model, monkeypatch):
    model = make_model("llama").train()

    def forbidden(*_):
        raise AssertionError("logits over the vocabulary were computed")

    monkeypatch.setattr(model.lm_head, "forward", forbidden)
    samples = record_kv(model, torch.randint(256, (1, 8)))
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not samples.keys[0].requires_grad


def test_windows_start_anew(make_model, tiny_tokenizer):
    model = make_model("llama")
    windows = split_text(tiny_tokenizer, TEXT, 300, 100)
    assert [len(ids) for ids in windows] == [100, 100, 100]
    seen = []
    samples = collect_kv(
        model, tiny_tokenizer, TEXT, num_tokens=300, window=100, num_sinks=4, progress=lambda *x: seen.append(x)
    )
    assert samples.num_samples == 3 * 96 and seen == [(100, 300), (200, 300), (300, 300)]
    end = model.config.max_position_embeddings - 100
    last = cached_kv(model, torch.tensor([windows[2]]), end)[1][0][0, :, 4:]
    torch.testing.assert_close(samples.keys[1][:, -96:], last, atol=1e-4, rtol=1e-4)


def test_windows_reach_the_positions_that_the_model_can():
    """Keys are turned by their position: those of late tokens must be among the samples."""
    from transformers import GPT2Config, LlamaConfig

    from pqlab.quantization.samples import MAX_POSITION, _first_positions

    assert _first_positions(LlamaConfig(max_position_embeddings=8192), 4, 2048) == [0, 2048, 4096, 6144]
    assert _first_positions(LlamaConfig(max_position_embeddings=8192), 1, 2048) == [0]
    assert _first_positions(LlamaConfig(max_position_embeddings=10**6), 4, 2048)[-1] == MAX_POSITION - 2048
    assert _first_positions(LlamaConfig(max_position_embeddings=2048), 4, 2048) == [0] * 4
    assert _first_positions(GPT2Config(), 4, 512) == [0] * 4, "no rotary embedding"
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert _first_positions(LlamaConfig(rope_parameters=scaled), 4, 512) == [0] * 4


@pytest.mark.parametrize(
    ("num_tokens", "window", "lengths"),
    [(100, 40, [40, 40, 20]), (100, 200, [100]), (50, 50, [50]), (40, 7, [7] * 5 + [5]), (10**6, 500, None)],
)
def test_windows_are_spread_over_the_text(tiny_tokenizer, num_tokens, window, lengths):
    text = TEXT[:1100]
    windows = split_text(tiny_tokenizer, text, num_tokens, window)
    whole = tiny_tokenizer(text)["input_ids"]
    if lengths is None:  # more is asked for than there is: all of it, once
        assert sum(windows, []) == whole
    else:
        assert [len(ids) for ids in windows] == lengths
        assert windows[0] == whole[: lengths[0]]
        if len(windows) > 1:
            assert windows[-1] == whole[-window:][: lengths[-1]]


def test_windows_reach_the_end_of_a_text_that_is_too_long_to_be_tokenized(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("pqlab.quantization.samples._MAX_CHARS", 2000)
    text = "".join(letter * 5000 for letter in "abcdefg")
    read = []

    class Counting:
        bos_token_id = None

        def __call__(self, text, **_):
            read.append(len(text))
            return tiny_tokenizer(text)

    windows = split_text(Counting(), text, 80, 20)
    assert windows == [tiny_tokenizer(letter * 20)["input_ids"] for letter in "aceg"] and sum(read) < 2100
    assert split_text(tiny_tokenizer, text, 0, 20) == []
    tail = text[:-9] + "the end!!"
    assert split_text(tiny_tokenizer, tail, 80, 20)[-1] == tiny_tokenizer(tail[-20:])["input_ids"]


def test_several_texts_share_the_tokens_and_take_turns(tiny_tokenizer):
    a, b, c = (tiny_tokenizer(letter)["input_ids"] for letter in "abc")
    windows = split_text(tiny_tokenizer, ["a" * 300, "b" * 300, "c" * 300], 75, 20)
    assert windows == [a * 20, b * 20, c * 20, a * 5, b * 5, c * 5]
    windows = split_text(tiny_tokenizer, ["a" * 8, "b" * 300], 50, 20)
    assert windows == [a * 8, b * 20, b * 20, b * 2], "what one text does not have the next may use"


def test_windows_begin_with_the_special_token_the_tokenizer_puts(tiny_tokenizer):
    class Prefixing:
        bos_token_id = 257

        def __call__(self, text, add_special_tokens=True, **_):
            ids = tiny_tokenizer(text)["input_ids"]
            return {"input_ids": [257, *ids] if add_special_tokens else ids}

    windows = split_text(Prefixing(), TEXT, 250, 100)
    assert [len(ids) for ids in windows] == [100, 100, 50] and all(ids[0] == 257 for ids in windows)
    assert all(257 not in ids[1:] for ids in windows)


def quantized_error(books: Codebooks, samples: Samples) -> float:
    errors = []
    for i, layer in books.layers.items():
        for codec, x in ((layer.k, samples.keys[i]), (layer.v, samples.values[i])):
            variance = (x - x.mean(1, keepdim=True)).square().sum()
            errors.append((codec.decode(codec.encode(x)) - x).square().sum() / variance)
    return float(torch.stack(errors).mean())


def test_calibrated_codebooks_fit_the_model_and_its_vectors(tiny_model, tiny_tokenizer):
    books = calibrate(
        tiny_model, tiny_tokenizer, TEXT, PQConfig(8, 6), num_tokens=1500, window=512, progress=False, text_name="whale"
    )
    books.check_fits(tiny_model)
    origin = books.origin
    assert (origin.text, origin.num_sinks, origin.window, origin.seed) == ("whale", 4, 512, 0)
    assert origin.fingerprint == fingerprint(tiny_model) and origin.num_samples == 1500 - 3 * 4
    assert origin.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert origin.num_layers == tiny_model.config.num_hidden_layers and origin.pqlab_version

    seen = collect_kv(tiny_model, tiny_tokenizer, TEXT, num_tokens=1500, window=512)
    error = quantized_error(books, seen)
    assert error < 0.2
    shuffled = {i: books.layers[j] for i, j in zip(books.layers, reversed(books.layers), strict=True)}
    assert error < 0.7 * quantized_error(Codebooks(shuffled), seen)  # each layer's own codebook is the better one


def test_settings_by_side_and_layer(make_model, tiny_tokenizer, tmp_path):
    model = make_model("llama")
    pq = {0: (PQConfig(4, 5), PQConfig(16, 2)), 1: (PQConfig(8, 3), PQConfig(4, 5))}
    options = {"num_tokens": 400, "window": 200, "progress": False}
    books = calibrate(model, tiny_tokenizer, TEXT, pq, **options)
    assert [(r.M, r.nbits) for r in books.summary().itertuples()] == [(4, 5), (16, 2), (8, 3), (4, 5)]
    books.save(tmp_path / "books")
    Codebooks.load(tmp_path / "books", model)

    pair = calibrate(model, tiny_tokenizer, TEXT, (PQConfig(4, 5), PQConfig(16, 2)), **options)
    assert [(c.k.nbits, c.v.nbits) for c in pair.layers.values()] == [(5, 2)] * 2
    samples = collect_kv(model, tiny_tokenizer, TEXT, num_tokens=400, window=200)
    values = samples.values[1]  # the codec of layer 1's V was trained on layer 1's V
    fitting, foreign = (
        (c.decode(c.encode(values)) - values).square().mean() for c in (books.layer(1).v, books.layer(0).k)
    )
    assert fitting < 0.7 * foreign


def test_calibration_is_reproducible(make_model, tiny_tokenizer):
    model = make_model("qwen3")
    first, again, other = (
        calibrate(model, tiny_tokenizer, TEXT, PQConfig(8, 4), num_tokens=300, progress=False, seed=s)
        for s in (0, 0, 1)
    )
    assert all(torch.equal(t, again.tensors()[name]) for name, t in first.tensors().items())
    assert any(not torch.equal(t, other.tensors()[name]) for name, t in first.tensors().items())


@pytest.mark.parametrize("maps", [True, False])
def test_what_shares_a_codebook(make_model, tiny_tokenizer, maps):
    """Fewer codebooks for the same codes, and maps that stay per head."""
    model = make_model("llama")
    options = {"num_tokens": 1500, "window": 500, "progress": False, "maps": maps}
    books = {scope: calibrate(model, tiny_tokenizer, TEXT, PQConfig(8, 4), scope=scope, **options) for scope in SCOPES}
    per_map = {"head": 3, "layer": 4, "model": 4}  # bytes of an entry, both directions
    heads = 2 * 3  # layers times kv heads
    per_head = {
        s: (2 * 16 * 16 * size + 2 * 16 * 2) * maps for s, size in per_map.items()
    }  # two maps, the keys' moments
    sizes = {s: book.nbytes - heads * per_head[s] for s, book in books.items()}
    one = 8 * 16 * 2 * 2
    assert sizes == {"head": 12 * one, "layer": 4 * one, "model": 2 * one}
    held_out = collect_kv(model, tiny_tokenizer, TEXT[::-1], num_tokens=500)
    errors = [quantized_error(books[scope], held_out) for scope in SCOPES]
    assert errors[0] < errors[1] < errors[2] < 0.6, "codebooks of one's own are the better ones"
    assert books["layer"].origin.scope == "layer"
    with pytest.raises(ConfigError, match="scope = 'heads' is not one of head, layer, model"):
        calibrate(model, tiny_tokenizer, TEXT, PQConfig(8, 4), scope="heads", **options)


def test_progress_names_the_stages(make_model, tiny_tokenizer, capfd):
    model, seen = make_model("llama"), []
    options = {"num_tokens": 300, "window": 100}
    calibrate(model, tiny_tokenizer, TEXT, PQConfig(4, 4), progress=lambda *x: seen.append(x), **options)
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == list(STAGES)
    for stage in STAGES:
        done = [(d, n) for s, d, n in seen if s == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1]
    assert capfd.readouterr() == ("", "")
    calibrate(model, tiny_tokenizer, TEXT, PQConfig(4, 4), **options)
    bars = capfd.readouterr().err
    assert all(stage in bars for stage in STAGES) and "300/300" in bars


def test_what_cannot_be_calibrated_is_refused(make_model, tiny_tokenizer):
    model = make_model("llama")
    with pytest.raises(ValueError, match="gives no sample: 4 tokens"):
        calibrate(model, tiny_tokenizer, "whal", progress=False)
    seen = []
    with pytest.raises(ConfigError, match="M = 5 does not divide the head size 16"):
        calibrate(model, tiny_tokenizer, TEXT, PQConfig(5), num_tokens=50, progress=lambda *x: seen.append(x))
    for call in (calibrate, default_codebooks):
        with pytest.raises(ConfigError, match=r"pq takes PQConfig\(M, nbits\).* was given a CacheConfig"):
            call(model, tiny_tokenizer, *([TEXT] if call is calibrate else []), pq=CacheConfig())
    assert not seen  # said before the text was read
    with pytest.warns(UserWarning, match="46 samples cannot fill 256 centroids"):
        calibrate(model, tiny_tokenizer, TEXT, PQConfig(4, 8), num_tokens=50, progress=False)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, tiny_tokenizer, TEXT, PQConfig(4, 4), num_tokens=50, progress=False)
    sliding = make_model("gemma3", layer_types=["sliding_attention"] * 4)
    with pytest.raises(UnsupportedModelError, match="no full-attention layer"):
        calibrate(sliding, tiny_tokenizer, TEXT, progress=False)


@pytest.mark.slow
def test_the_default_model_keeps_its_keys_and_values(default_model, all_threads):
    """4 bits per element on SmolLM2: errors of held-out vectors, as a share of their variance."""
    from pqlab.models import load_text

    model, tokenizer = default_model
    books = calibrate(model, tokenizer, load_text("emma"), num_tokens=1024, iterations=2, progress=False)
    held_out = collect_kv(model, tokenizer, load_text("pride")[50_000:60_000], num_tokens=256)
    moments = 30 * 3 * 2 * 64 * 2  # of the keys
    assert books.nbytes == 30 * 3 * 2 * (64 * 256 * 2 + 3 * 64 * 64) + moments < 8 * 2**20
    assert quantized_error(books, held_out) < 0.03
