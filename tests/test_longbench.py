"""LongBench: every metric against numbers counted by hand, its files, the cut in the middle, answers of a model."""

from __future__ import annotations

import json
import zipfile

import pytest
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, Codebooks, PagedPQCache, PQConfig
from pqlab.evaluation.corpora import DatasetError
from pqlab.evaluation.longbench import examples, metrics
from pqlab.evaluation.longbench.answers import answer_tasks, middle_cut, prompt_text, scores
from pqlab.evaluation.longbench.examples import Example, read_examples
from pqlab.evaluation.longbench.metrics import METRICS, mark
from pqlab.evaluation.longbench.tasks import TASKS

TYPES = ("Date", "Number", "Number of something", "Other location")


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "score"),
    [
        ("f1", "The cat sat.", "a cat sat down", 0.8),  # cat sat | cat sat down
        ("f1", "cat cat", "cat", 2 / 3),
        ("f1", "dog", "cat", 0),
        ("f1", "", "cat", 0),
        ("f1", "Yes!", "yes", 1),
        ("rouge", "cat sat on mat", "cat is on mat", 3 / 4),  # cat on mat
        ("rouge", "mat on sat cat", "cat sat on mat", 1 / 4),
        ("rouge", "", "cat", 0),
        ("rouge", ".", "cat", 0),
        ("f1_zh", "北京，清华大学。", "清华大学", 2 / 3),
        ("f1_zh", "", "清华大学", 0),
        ("rouge_zh", "我来到北京", "我来到北京清华大学", 2 * 3 / (3 + 4)),
        ("retrieval", "Paragraph 4", "Paragraph 4", 1),
        ("retrieval", "Paragraph 4, not 7", "Paragraph 4", 1 / 2),
        ("retrieval", "Paragraph 14", "Paragraph 4", 0),
        ("retrieval", "none", "Paragraph 4", 0),
        ("retrieval_zh", "段落12", "段落12", 1),
        ("count", "5, or 5, or 3", "5", 2 / 3),
        ("count", "there are 15", "5", 0),
        ("code", "\n```python\n# add one\nreturn x + 1\nother", "return x + 1", 1),
        ("code", "abcd", "abxd", 0.75),  # 2 * 3 of 8 characters
        ("code", "// only a comment", "return x", 0),
    ],
)
def test_metrics_by_hand(metric, answer, accepted, score):
    assert METRICS[metric](answer, accepted, ()) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Date", "Date", 1),
        ("It is a Date or an Other location", "Date", 1 / 2),
        ("Number of something", "Number of something", 1),  # "Number" is part of the right name
        ("Number of something", "Number", 1 / 2),
        ("Other location", "Date", 0),
        ("", "Date", 0),
    ],
)
def test_classification_by_hand(answer, accepted, score):
    assert metrics.classification(answer, accepted, TYPES) == score


def test_an_answer_is_marked_by_its_best_and_some_by_their_first_line():
    assert mark(TASKS["hotpotqa"], "Rome", ["Paris", "Rome"]) == 1
    assert mark(TASKS["hotpotqa"], "Rome\nItaly", ["Rome"]) == pytest.approx(2 / 3)
    assert mark(TASKS["triviaqa"], "\nRome\nPassage: more", ["Rome"]) == 1
    assert mark(TASKS["trec"], "Date\nQuestion: who", ["Date"], TYPES) == 1
    with pytest.raises(ValueError, match="names no paragraph"):
        mark(TASKS["passage_retrieval_en"], "4", ["4"])


def test_the_tasks_are_longbench():
    assert len(TASKS) == 21 and {task.metric for task in TASKS.values()} == set(METRICS)
    for task in TASKS.values():
        assert "{context}" in task.prompt and task.new_tokens in (32, 64, 128, 512)
    assert [name for name, task in TASKS.items() if not task.chat] == [
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    ]  # fmt: skip


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(ImportError, match=r"package rouge: pip install 'pqlab\[data\]'"):
        metrics.rouge("a", "b")


# --- files -----------------------------------------------------------------------------------------------------------

FAMILIES = {
    "hotpotqa": {"input": "Where?", "context": "Rome is in Italy. " * 30, "answers": ["Italy"]},
    "samsum": {"input": "Dialogue: A: hi B: hi", "context": "Dialogue: ...", "answers": ["They greet."]},
    "trec": {"input": "Question: When?", "context": "Question: Who?", "answers": ["Date"], "all_classes": TYPES},
    "passage_retrieval_en": {"input": "cats", "context": "Paragraph 1: cats", "answers": ["Paragraph 1"]},
    "passage_count": {"input": "", "context": "Paragraph 1: cats\n\nParagraph 2: cats", "answers": ["1"]},
    "lcc": {"input": "", "context": "def f(x):\n", "answers": ["    return x"]},
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """A folder with one task of every family of metrics, two examples each."""
    for name, row in FAMILIES.items():
        row = {"all_classes": None, "length": 9, "dataset": name, "language": "en", "_id": "0", **row}
        (tmp_path / f"{name}.jsonl").write_text(2 * (json.dumps(row) + "\n"), encoding="utf-8")
    return tmp_path


def test_examples_come_from_a_folder_or_its_archive(data, tmp_path):
    found = read_examples("trec", data)
    assert found == 2 * [Example("Question: Who?", "Question: When?", ("Date",), TYPES)]
    assert len(read_examples("lcc", data, limit=1)) == 1 and read_examples("lcc", data)[0].classes == ()
    archive = tmp_path / "packed" / "data.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.write(data / "trec.jsonl", "data/trec.jsonl")
    assert read_examples("trec", archive) == read_examples("trec", archive.parent) == found
    (tmp_path / "cloned" / "data").mkdir(parents=True)
    (data / "trec.jsonl").rename(tmp_path / "cloned" / "data" / "trec.jsonl")
    assert read_examples("trec", tmp_path / "cloned") == found


def test_what_is_no_example_says_where(data, monkeypatch):
    with pytest.raises(DatasetError, match="no gov_report.jsonl"):
        read_examples("gov_report", data)
    (data / "lcc.jsonl").write_text('{"context": "x", "input": ""}\n')
    with pytest.raises(DatasetError, match=r"line 1: no LongBench example \(KeyError\('answers'\)\)"):
        read_examples("lcc", data)
    (data / "lcc.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="holds no example"):
        read_examples("lcc", data)
    with pytest.raises(DatasetError, match="neither a folder nor a zip"):
        read_examples("lcc", data / "trec.jsonl")

    def no_hub(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    with pytest.raises(DatasetError, match="--data FOLDER.*--dataset pride.*bench passkey.*no route"):
        read_examples("lcc")


def test_the_hubs_archive_is_read_like_a_folder(data, tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(data / "trec.jsonl", "data/trec.jsonl")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(archive)
    )
    assert read_examples("trec") == read_examples("trec", data)
    assert asked == [((examples.REPOSITORY, "data.zip"), {"repo_type": "dataset"})]


def test_longbenchs_own_prompts_take_the_place_of_ours(data):
    assert examples.prompts(data)["trec"] == TASKS["trec"].prompt
    (data / examples.PROMPTS).write_text(json.dumps({"trec": "{context} | {input}"}))
    assert examples.prompts(data)["trec"] == "{context} | {input}"
    assert examples.prompts(data)["lcc"] == TASKS["lcc"].prompt


# --- a model ---------------------------------------------------------------------------------------------------------


def test_the_middle_is_cut_out(tiny_tokenizer):
    text = "beginning" + 100 * "-" + "end"
    assert middle_cut(tiny_tokenizer, text, 200) == (text, False)
    assert middle_cut(tiny_tokenizer, text, None) == (text, False)
    assert middle_cut(tiny_tokenizer, text, 24) == ("beginning------end"[:12] + "---------end", True)


def test_a_prompt_leaves_room_for_the_answer(make_model, tiny_tokenizer):
    model = make_model("llama", max_position_embeddings=300)
    example = Example("word " * 400, "Where?", ("Italy",), ())
    text, cut = prompt_text(model, tiny_tokenizer, TASKS["hotpotqa"], TASKS["hotpotqa"].prompt, example)
    assert cut and len(tiny_tokenizer(text).input_ids) == 300 - 32
    assert text.startswith("Answer the question") and text.endswith("Where?\nAnswer:")
    with pytest.raises(ValueError, match="tokens are left for a prompt"):
        prompt_text(model, tiny_tokenizer, TASKS["qmsum"], TASKS["qmsum"].prompt, example)


def test_a_chat_model_is_asked_as_a_user(make_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(
        tiny_tokenizer,
        "chat_template",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}",
    )
    model, example = make_model("llama"), Example("def f(x):\n", "", ("x",), ())
    asked = prompt_text(model, tiny_tokenizer, TASKS["passage_count"], "count {context}", example)
    assert asked == ("<user>count def f(x):\n<me>", False)
    assert prompt_text(model, tiny_tokenizer, TASKS["lcc"], "next {context}", example)[0] == "next def f(x):\n"


def test_caches_answer_side_by_side(make_model, tiny_tokenizer, data):
    model = make_model("llama", head_dim=32)
    config = CacheConfig(page_size=16, residual_length=20, num_sinks=2)

    def paged(books):
        return lambda tokens: (PagedPQCache(model, books, config, context=tokens), "pqlab")

    caches = {
        "exact": lambda tokens: (DynamicCache(config=model.config), "sdpa"),
        "same": paged(Codebooks.identity(model)),
        "codes": paged(Codebooks.random(model, pq=PQConfig(M=8, nbits=1))),
    }
    answers = answer_tasks(model, tiny_tokenizer, FAMILIES, caches, data=data, limit=1)
    assert len(answers) == len(FAMILIES) * 3 and model.config._attn_implementation == "sdpa"
    by_cache = answers.pivot(index="task", columns="cache", values="answer")
    assert (by_cache.exact == by_cache.same).all() and (by_cache.exact != by_cache.codes).any()
    for row in answers.itertuples():
        accepted = FAMILIES[row.task]["answers"]
        assert row.score == mark(TASKS[row.task], row.answer, accepted, TYPES if row.task == "trec" else ())
    table = scores(answers)
    assert list(table.cache.unique()) == list(caches) and (table.examples == 1).all()
    assert (table.same_as_first[table.cache != "codes"] == 1).all()
    assert table.same_as_first[table.cache == "codes"].mean() < 1


def test_scores_are_means_in_per_cent():
    import pandas as pd

    answers = pd.DataFrame(
        [("t", "exact", i, 5, i == 1, "x", s) for i, s in enumerate((1.0, 0.5))]
        + [("t", "codes", i, 5, i == 1, a, s) for i, (a, s) in enumerate((("x", 1.0), ("y", 0.0)))],
        columns=["task", "cache", "example", "tokens", "cut", "answer", "score"],
    )
    assert scores(answers).to_dict("records") == [
        {"task": "t", "cache": "exact", "score": 75, "examples": 2, "cut": 1, "same_as_first": 1.0},
        {"task": "t", "cache": "codes", "score": 50, "examples": 2, "cut": 1, "same_as_first": 0.5},
    ]
