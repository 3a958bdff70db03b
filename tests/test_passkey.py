"""Passkey retrieval: where the sentence lies, what counts as found, and what codes cost."""

from __future__ import annotations

import argparse

import pytest
import torch

from pqlab import CacheConfig, Codebooks, PQConfig
from pqlab.evaluation import passkey as module
from pqlab.evaluation.passkey import _sequence, passkey
from pqlab.evaluation.teacher_forced import from_codebooks
from pqlab.models import load_text
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_sentence_lies_where_it_is_asked_for(tiny_tokenizer, depth):
    ids = tiny_tokenizer("x" * 500).input_ids
    whole, prompt, answer = _sequence(tiny_tokenizer, ids, 300, depth, "12345")
    text = tiny_tokenizer.decode(whole)
    assert len(whole) == 300 and text.endswith("The pass key is 12345") and answer == len(" 12345")
    assert tiny_tokenizer.decode(whole[:prompt]).count("12345") == 2, "the question is not prefilled"
    before = text.index("\n\nThe pass key")
    assert before == round(depth * text[: text.index("What is")].count("x"))


def test_a_length_that_cannot_be_is_refused(tiny_tokenizer, make_model):
    model = make_model("llama")
    for lengths, says in (([20], "length 20 is out of range"), ([10**6], "the model")):
        with pytest.raises(ValueError, match=says):
            passkey(model, tiny_tokenizer, "x" * 500, {}, SMALL, lengths=lengths)
    assert model.config._attn_implementation == "sdpa"


def test_exact_storage_is_exact_and_codes_are_not(tiny_tokenizer, make_model):
    model = make_model("llama")
    books = Codebooks.random(model, config=PQConfig(M=4, nbits=2))
    methods = {"same": from_codebooks(Codebooks.identity(model)), "codes": from_codebooks(books)}
    frame = passkey(model, tiny_tokenizer, "abc " * 200, methods, SMALL, lengths=[250, 300], depths=[0.2, 0.8])
    assert list(frame.method) == ["exact", "same", "codes"] * 4
    exact, same, codes = (frame[frame.method == name].logp.to_numpy() for name in ("exact", "same", "codes"))
    assert abs(exact - same).max() < 1e-3 and abs(exact - codes).min() > 1e-3
    assert frame.key.nunique() == 4


@pytest.mark.slow
def test_what_counts_is_what_generate_says(default_model):
    """SmolLM2 finds the number in 400 tokens; greedy generation from the same text says it."""
    model, tokenizer = default_model
    frame = passkey(model, tokenizer, load_text("pride"), {}, lengths=[400], depths=[0.5])
    row = frame.iloc[0]
    ids = tokenizer(load_text("pride")[:4800], add_special_tokens=False).input_ids
    whole, _, answer = _sequence(tokenizer, ids, 400, 0.5, row.key)
    asked = torch.tensor([whole[:-answer]])
    from transformers import DynamicCache

    said = model.generate(
        asked, **cache_argument(model, DynamicCache(config=model.config)), max_new_tokens=answer, do_sample=False
    )
    assert row.found == (said[0].tolist() == whole)
    assert row.found, "this model is known to find it"


def test_the_command_says_what_is_wrong(capsys):
    parser = argparse.ArgumentParser()
    module.configure(parser)
    assert module.run(parser.parse_args(["--lengths", "10", "--codebooks"])) in (0, 2)
    assert "length 10 is out of range" in capsys.readouterr().out
