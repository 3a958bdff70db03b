"""The report's third table: what can be read has numbers, what cannot says why, and nobody waits for an absent hub."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import pytest

from pqlab import CacheConfig, PQConfig
from pqlab.evaluation.corpora_table import corpora_table, longbench_table
from pqlab.figures.accuracy import corpora_figure
from pqlab.models import hub
from pqlab.quantization import Codebooks

CONFIG = CacheConfig(page_size=16, residual_length=32)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no such host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_rows_with_numbers_and_a_row_that_says_why(make_model, tiny_tokenizer, no_hub, tmp_path):
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=8))
    own = tmp_path / "own.txt"
    own.write_text("It is a truth universally acknowledged. " * 20)
    began = time.perf_counter()
    names = ["wikitext-2-raw-v1", "pride", str(own)]
    table = corpora_table(model, tiny_tokenizer, names, codebooks=books, config=CONFIG, length=200)
    assert time.perf_counter() - began < 10  # the hub's client would retry for 23 s
    assert table.corpus.tolist() == names and (table.note != "").tolist() == [True, False, False]
    assert "wikitext-2-raw-v1" in table.note[0] and table.loc[0, "perplexity":"positions"].isna().all()
    assert (table.positions[1:] == 198).all()
    ratio = table.perplexity[1:] / table.exact_perplexity[1:] - 1
    assert table.change[1:].tolist() == pytest.approx(ratio.tolist()) and (table.kl[1:] > 0).all()
    figure = corpora_figure(table)
    assert figure.data[0].x[0] == "wikitext-2-raw-v1<br>(not read)" and figure.data[1].text[1].endswith("%")


def test_longbench_from_a_folder_and_without_one(make_model, tiny_tokenizer, no_hub, tmp_path):
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=8))
    fields = '"context": "Where is it?", "input": "Here.", "answers": ["x"], "all_classes": ["x", "y"], "length": 3'
    (tmp_path / "trec.jsonl").write_text(f'{{{fields}, "dataset": "trec", "language": "en", "_id": "1"}}\n')
    table = longbench_table(model, tiny_tokenizer, ["trec", "qasper"], codebooks=books, config=CONFIG, data=tmp_path)
    assert table.task.tolist() == ["trec", "trec", "qasper"] and table.cache.tolist()[:2] == ["exact", "paged"]
    assert table.examples.tolist()[:2] == [1, 1] and table.note.tolist()[:2] == ["", ""]
    assert "qasper.jsonl" in table.note[2]
    fetched = longbench_table(model, tiny_tokenizer, ["trec"], codebooks=books)
    assert "could not be fetched" in fetched.note[0] and fetched.score.isna().all()


@pytest.mark.parametrize("status", [200, 403])
def test_any_answer_of_the_hub_counts(monkeypatch, status):
    constants = pytest.importorskip("huggingface_hub").constants

    class Answer:
        def __enter__(self): ...
        def __exit__(self, *exc): ...

    def answer(request, timeout):
        assert request.full_url == constants.ENDPOINT and timeout < 10
        if status == 403:
            raise urllib.error.HTTPError(request.full_url, 403, "", None, None)
        return Answer()

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.offline_unless_hub_answers() as answers:
        assert answers and not constants.HF_HUB_OFFLINE


def test_an_absent_hub_is_off_inside_the_block_only(monkeypatch, no_hub):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), hub.offline_unless_hub_answers() as answers:
        assert not answers and constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
