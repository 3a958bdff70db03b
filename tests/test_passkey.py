"""Retrieval from long texts: where sentences lie, what counts as found, and what codes cost."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, Codebooks, PQConfig
from pqlab.cli import main
from pqlab.evaluation import retrieval
from pqlab.evaluation.key_values import key_values, pair
from pqlab.evaluation.passkey import needle, passkey
from pqlab.evaluation.retrieval import Haystack, token_ids
from pqlab.evaluation.teacher_forced import from_codebooks
from pqlab.models import fingerprint, load_text
from pqlab.quantization import Origin
from pqlab.results.provenance import device_name
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)


def sequence(tokenizer, ids, length: int, depth: float, key: str) -> tuple[list[int], list[int], list[int]]:
    prompt, [(question, answer)] = token_ids(tokenizer, ids, Haystack(length, 0, (needle(depth, key),)))
    return prompt, question, answer


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_sentence_lies_where_it_is_asked_for(tiny_tokenizer, depth):
    ids = tiny_tokenizer("x" * 500).input_ids
    prompt, question, answer = sequence(tiny_tokenizer, ids, 300, depth, "12345")
    text, asked = tiny_tokenizer.decode(prompt), tiny_tokenizer.decode(question + answer)
    assert len(prompt + question + answer) == 300 and asked.endswith("The pass key is 12345")
    assert text.count("12345") == 2, "the question is not prefilled"
    assert text.index("\n\nThe pass key") == round(depth * text.count("x"))


def test_pairs_lie_at_their_depths_and_each_is_asked_for(tiny_tokenizer):
    ids = tiny_tokenizer("x" * 500).input_ids
    pairs = (pair(0.8, "river", "1234"), pair(0.2, "apple", "5678"))
    prompt, asked = token_ids(tiny_tokenizer, ids, Haystack(400, 0, pairs))
    text = tiny_tokenizer.decode(prompt)
    assert len(prompt) + max(len(q) + len(a) for q, a in asked) == 400
    room = text.count("x")
    assert text.index("\n\nThe code of the apple is 5678.") == round(0.2 * room)
    before = text[: text.index("\n\nThe code of the river is 1234.")]
    assert before.count("x") == round(0.8 * room)
    assert tiny_tokenizer.decode(asked[0][0] + asked[0][1]).endswith("The code of the river is 1234")


def test_methods_are_counted_question_by_question():
    def rows(method, *found):
        return [(method, 512, depth, 0, str(depth), hit, -1.0 - (not hit)) for depth, hit in enumerate(found)]

    hits = [True] * 6 + [False] * 2
    records = rows("exact", *hits) + rows("same", *hits) + rows("worse", *[False] * 6, True, False)
    table = retrieval.beside_exact(pd.DataFrame(records, columns=retrieval.COLUMNS)).set_index("method")
    assert table.loc["same", ["asked", "exact", "found", "lost", "won", "p", "nats"]].tolist() == [8, 6, 6, 0, 0, 1, 0]
    assert table.loc["worse", ["found", "lost", "won"]].tolist() == [1, 6, 1]
    assert table.loc["worse", ["worse", "better"]].tolist() == [6, 1], "a cell is a length and a depth"
    assert table.p["worse"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert table.nats["worse"] == pytest.approx(-5 / 8)


def test_a_length_that_cannot_be_is_refused(tiny_tokenizer, make_model):
    model = make_model("llama")
    for lengths, says in (([20], "length 20 is out of range"), ([10**6], "the model")):
        with pytest.raises(ValueError, match=says):
            passkey(model, tiny_tokenizer, "x" * 500, {}, SMALL, lengths=lengths)
    assert model.config._attn_implementation == "sdpa"


def test_exact_storage_is_exact_and_codes_are_not(tiny_tokenizer, make_model):
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=4, nbits=2))
    methods = {"same": from_codebooks(Codebooks.identity(model)), "codes": from_codebooks(books)}
    frame = passkey(model, tiny_tokenizer, "abc " * 200, methods, SMALL, lengths=[250, 300], depths=[0.2, 0.8])
    assert list(frame.method) == ["exact", "same", "codes"] * 4
    exact, same, codes = (frame[frame.method == name].logp.to_numpy() for name in ("exact", "same", "codes"))
    assert abs(exact - same).max() < 1e-3 and abs(exact - codes).min() > 1e-3
    assert frame.key.nunique() == 4


def test_a_method_with_a_window_of_its_own(tiny_tokenizer, make_model):
    model = make_model("llama")
    codes = from_codebooks(Codebooks.random(model, pq=PQConfig(M=4, nbits=2)))
    own = {"wide": CacheConfig(page_size=16, residual_length=250)}
    options = {"lengths": [250], "depths": [0.5], "own_configs": own}
    frame = passkey(model, tiny_tokenizer, "abc " * 200, {"wide": codes, "small": codes}, SMALL, **options)
    exact, wide, small = frame.logp
    assert wide == pytest.approx(exact, abs=1e-3) and abs(small - exact) > 1e-3, "all of it lies in the wide window"


def test_every_pair_is_asked_for_under_every_method(tiny_tokenizer, make_model):
    """Continuations share the prefill: a question must not see another one's tokens, whatever was flushed meanwhile."""
    model = make_model("gemma3")
    books = Codebooks.random(model, pq=PQConfig(M=4, nbits=2))
    methods = {"same": from_codebooks(Codebooks.identity(model)), "codes": from_codebooks(books)}
    options = {"lengths": [400], "depths": [0.1, 0.5, 0.9]}
    frame = key_values(model, tiny_tokenizer, "abc " * 200, methods, SMALL, **options)
    assert list(frame.method) == ["exact"] * 3 + ["same"] * 3 + ["codes"] * 3 and frame.key.nunique() == 3
    exact, same, codes = (frame[frame.method == name].logp.to_numpy() for name in ("exact", "same", "codes"))
    assert abs(exact - same).max() < 1e-3 and abs(exact - codes).min() > 1e-3
    with pytest.raises(ValueError, match="13 depths are more than the 12 names"):
        key_values(model, tiny_tokenizer, "abc " * 200, {}, SMALL, depths=[0.5] * 13)


@pytest.mark.parametrize(
    "options", [{}, {"maps": True}, {"maps": True, "span": 64}], ids=["plain", "fitted", "anchored"]
)
def test_the_prompt_is_quantized_once(make_model, options):
    books = Codebooks.random(make_model("llama"), pq=PQConfig(M=4, nbits=2), **options)
    asked, whole = [], from_codebooks(books)

    def quantize(layer, k, v):
        asked.append(k.shape[1])
        return whole(layer, k, v)

    once = retrieval._once(quantize, 96)
    k, v = torch.randn(2, 3, 160, 16) * 3
    for tokens in (96, 160, 96):
        for got, want in zip(
            once(1, k[:, :tokens], v[:, :tokens]), whole(1, k[:, :tokens], v[:, :tokens]), strict=True
        ):
            assert torch.equal(got, want)
    assert asked == [96, 160]


@pytest.mark.slow
def test_what_counts_is_what_generate_says(default_model):
    """SmolLM2 finds the number in 400 tokens; greedy generation from the same text says it."""
    model, tokenizer = default_model
    frame = passkey(model, tokenizer, load_text("pride"), {}, lengths=[400], depths=[0.5])
    row = frame.iloc[0]
    ids = tokenizer(load_text("pride")[:4800], add_special_tokens=False).input_ids
    prompt, question, answer = sequence(tokenizer, ids, 400, 0.5, row.key)
    asked = torch.tensor([prompt + question])
    from transformers import DynamicCache

    said = model.generate(
        asked, **cache_argument(model, DynamicCache(config=model.config)), max_new_tokens=len(answer), do_sample=False
    )
    assert row.found == (said[0].tolist() == prompt + question + answer)
    assert row.found, "this model is known to find it"


def test_commands(make_model, tiny_tokenizer, monkeypatch, tmp_path, capsys):
    model = make_model("llama")
    monkeypatch.setattr(retrieval, "load", lambda args: (None, model, tiny_tokenizer))
    books = Codebooks.random(model, pq=PQConfig(M=4, nbits=2))
    Codebooks(books.layers, Origin(fingerprint=fingerprint(model))).save(tmp_path / "two.safetensors")
    options = ["--codebooks", str(tmp_path / "two.safetensors"), "--depths", "0.2", "0.7", "--residual", "32"]
    for name in ("passkey", "kv"):
        assert main(["bench", name, "--lengths", "10", *options]) == 2
        assert "length 10 is out of range" in capsys.readouterr().err
        for wrong, said in (
            (["--depths", "1.5"], "depth 1.5 is out of range"),
            (["--trials", "0"], "0 trials; give at"),
        ):
            assert main(["bench", name, "--lengths", "450", *options, *wrong]) == 2
            assert said in capsys.readouterr().err
        assert main(["bench", name, "--lengths", "450", "--json", *options]) == 0
        printed = capsys.readouterr().out
        record = json.loads(printed.strip().splitlines()[-1])
        cells = {(row["method"], row["depth"]) for row in record["records"]}
        assert cells == {(method, depth) for method in ("exact", "two") for depth in (0.2, 0.7)}
        assert list(record["codebooks"]) == ["two"] and record["device"] == device_name("cpu")
        assert "two: found, by depth and length" in printed
