"""Corpora: files in the hub's formats through the hub's own loading function, names, and what cannot be read."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pandas as pd
import pytest

from pqlab import ConfigError, load_text
from pqlab.evaluation import corpora
from pqlab.evaluation.corpora import Corpus, DatasetError, read_split, synthetic_text

ROWS = {"train": [" = A title = \n", "", "Words to train on .\n"], "test": ["", "Words to test on .\n", "More .\n"]}


def write(folder: Path, column: str, form: str) -> None:
    for split, rows in ROWS.items():
        frame = pd.DataFrame({column: rows})
        if form == "parquet":
            folder.mkdir(parents=True, exist_ok=True)
            frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        elif form == "json":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
        else:  # the layout of the hub's own conversion
            (folder / split).mkdir(parents=True)
            frame.to_parquet(folder / split / "0000.parquet")


@pytest.mark.parametrize("form", ["parquet", "json"])
@pytest.mark.parametrize("nested", [True, False])
def test_wikitext_from_files(tmp_path, form, nested):
    name = "wikitext-2-raw-v1"
    write(tmp_path / name if nested else tmp_path, "text", form)
    assert read_split(name, "test", tmp_path) == "\n\n".join(ROWS["test"])
    corpus = Corpus(name, tmp_path)
    assert corpus.train_text == "\n\n".join(ROWS["train"]) and corpus.test_text == "\n\n".join(ROWS["test"])
    assert corpus.train_name == f"{name} train" and corpus.means_something


def test_penn_treebank_from_files(tmp_path):
    write(tmp_path / "penn_treebank", "sentence", "folders")
    assert read_split("ptb_text_only", "test", tmp_path / "penn_treebank") == " ".join(ROWS["test"])


def test_no_more_is_read_than_is_needed(tmp_path, monkeypatch):
    write(tmp_path, "text", "parquet")
    monkeypatch.setattr(corpora, "MAX_CHARS", 5)
    assert read_split("wikitext-103-v1", "train", tmp_path) == ROWS["train"][0]


def test_what_cannot_be_read_says_how_to_go_on(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="could not be read from the folder .* --dataset pride"):
        read_split("wikitext-2-raw-v1", "test", tmp_path / "nowhere")
    write(tmp_path / "other", "line", "json")
    with pytest.raises(DatasetError, match="columns line, none called text"):
        read_split("wikitext-2-raw-v1", "test", tmp_path / "other")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="could not be read from the folder"):
        read_split("wikitext-2-raw-v1", "test", tmp_path / "damaged")

    def no_hub(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", no_hub)
    with pytest.raises(DatasetError, match=r"from the hub \(Salesforce/wikitext\).*--dataset pride.*no route"):
        read_split("wikitext-2-raw-v1", "test")


def test_without_the_library_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DatasetError, match=r"pip install 'pqlab\[data\]'.*--dataset pride"):
        read_split("wikitext-2-raw-v1", "test")


def test_nothing_is_trained_on_what_is_evaluated():
    assert Corpus("pride").train_name == "mixed" and Corpus("emma").train_name == "pride"
    assert Corpus("emma").train_text == load_text("pride")
    assert Corpus("pride").train_text == [load_text(name) for name in ("emma", "code", "numbers", "sampled")]
    for name, calibration in (("pride", "pride"), ("emma", "mixed")):
        with pytest.raises(ConfigError, match="would flatter"):
            Corpus(name, calibration=calibration)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Meine Seiten.", encoding="utf-8")
    corpus = Corpus(str(path), calibration="moby-dick")
    assert corpus.test_text == "Meine Seiten." and corpus.train_text == load_text("moby-dick")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "wikitext-2"}, 'did you mean "wikitext-2-raw-v1"'),
        (
            {"name": "nowhere.txt"},
            "Names are pride, emma, moby-dick, genesis-es, code, numbers, sampled, wikitext-2-raw",
        ),
        ({"name": "pride", "data": Path(".")}, "leave --data out"),
        ({"name": "pride", "calibration": "nowhere.txt"}, "there is no text nowhere.txt"),
    ],
)
def test_bad_names_say_what_to_type(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Corpus(**arguments)


def test_synthetic_text_is_seeded_and_its_splits_differ():
    text = synthetic_text(3, words=2000)
    assert text == synthetic_text(3, words=2000) != synthetic_text(4, words=2000)
    words = text.lower().replace(".", "").split()
    assert len(words) == 2000
    counts = pd.Series(words).value_counts()
    assert counts.iloc[0] > 5 * counts.iloc[20]  # some come often, as in a language
    corpus = Corpus("_synthetic", seed=3)
    assert not corpus.means_something and corpus.train_text != corpus.test_text == synthetic_text(3)
