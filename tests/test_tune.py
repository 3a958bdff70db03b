"""The search: the report's grid first, limits, resuming, sharing a storage; and what a setting is measured by."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from math import nan
from pathlib import Path

import pandas as pd
import pytest
import torch

from pqlab import CacheConfig, Codebooks, ConfigError, PQConfig, cli
from pqlab.cost import CacheCost
from pqlab.evaluation.continuation import Continuation
from pqlab.evaluation.fidelity import compare
from pqlab.evaluation.teacher_forced import from_codebooks
from pqlab.model_runs import attention
from pqlab.presets import Preset
from pqlab.transformers_api import cache_argument
from pqlab.tune import Measurement, Search, Setting, Space, Workload, command, preset_of
from pqlab.tune.choice import choose, finalists, not_beaten, price, with_times

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[1]
SPACE = Space((16, 32, 64), (32, 64, 128), (8, 16), (4, 8), ("lifo", "fifo"))


def measure(setting: Setting) -> Measurement:
    """More pages cost time, more exact tokens and bits cost bytes and save divergence; no ties."""
    bits = setting.M * setting.nbits
    time = 10 + 100 / setting.page_size + bits / 50 + (setting.policy == "fifo")
    return Measurement(time, 0.1, 0.0, 1.0 / (setting.residual_length + bits), needed(setting))


def needed(setting: Setting) -> int:
    return 1000 * setting.M * setting.nbits + setting.residual_length


def search(**options) -> Search:
    return Search(measure, SPACE, {"model": "m"}, seed=1, needed=needed, **options)


# -- the space -------------------------------------------------------------------------------------------------------


def test_the_space_of_a_model(make_model):
    space = Space.of(make_model("llama"))  # heads of 16
    assert space.page_size == (16, 32, 64, 128, 256) and space.residual_length == (32, 64, 128, 256, 512, 1024)
    assert space.M == (4, 8) and space.policy[0] == "lifo" and space.size == 5 * 6 * 2 * 3 * len(space.policy)
    grid = [(setting.page_size, setting.residual_length) for setting in space.report_grid()]
    assert grid == [(page, times * page) for page in (16, 32, 64, 128, 256) for times in (2, 4)]
    assert {(s.M, s.nbits) for s in space.report_grid()} == {(8, 8)}
    assert list(Space.of(make_model("llama"), page_size=[48]).report_grid()) == []
    for wrong, says in (({"M": [5]}, "does not divide"), ({"page_size": [20]}, "page_size = 20"),
                        ({"policy": ["x"]}, "policy = 'x'"), ({"nbits": [9]}, "nbits = 9")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            Space.of(make_model("llama"), **wrong)


# -- the search ------------------------------------------------------------------------------------------------------


def test_the_grid_comes_first_and_the_front_is_not_beaten():
    found = search()
    found.run(trials=20)
    frame = found.frame()
    grid = list(SPACE.report_grid())
    assert len(frame) == 20 and len(grid) == 5
    assert [
        Setting(*row) for row in frame[frame.grid][list(SPACE.__dataclass_fields__)].itertuples(index=False)
    ] == grid
    assert list(frame.number[: len(grid)]) == list(range(len(grid)))
    assert len(frame.drop_duplicates(["page_size", "residual_length", "M", "nbits", "policy"])) == 20
    for row in frame.itertuples():
        beaten = ((frame.milliseconds <= row.milliseconds) & (frame.kl <= row.kl) & (frame.number != row.number)).any()
        assert row.best == (not beaten)


def test_a_limit_of_memory_is_never_passed():
    found = search(memory=70_000)
    found.run(trials=12)
    assert found.frame().bytes.max() <= 70_000
    over = found.pruned()
    assert len(over) and over.why.str.contains("needs more than 68.4 KiB").any()
    assert found.study.get_trials()[0].constraints["memory"] > 0, "the grid has the most bits: it is above the limit"
    impossible = search(memory=10)
    impossible.run(trials=3)
    with pytest.raises(ConfigError, match="no setting was measured.*needs more than 10 B.*raise the limits"):
        impossible.chosen()


def test_what_is_chosen():
    found = search()
    found.run(trials=30)
    front = found.front()
    assert found.chosen() in {Setting(*row) for row in front[list(SPACE.__dataclass_fields__)].itertuples(index=False)}
    limit = front.kl.median()
    fastest = front[front.kl <= limit].milliseconds.min()
    assert measure(found.chosen(limit)).milliseconds == fastest and measure(found.chosen(limit)).kl <= limit
    with pytest.raises(ConfigError, match="no setting reaches KL 1e-09; the best is"):
        found.chosen(1e-9)


def timings(*rows: tuple[float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["milliseconds", "milliseconds_error", "kl"])


def test_what_may_be_the_best_comes_into_the_last_round():
    frame = timings(
        (10.0, 0.1, 0.1),  # 0: not beaten
        (10.3, 0.1, 0.1),  # 1: beaten by 0, but within the error of both
        (10.5, 0.1, 0.1),  # 2: surely beaten by 0
        (12.0, 0.1, 0.01),  # 3: not beaten
        (30.0, 0.1, 0.009),  # 4: not beaten, and dear
    )
    assert set(not_beaten(frame).index) == {0, 3, 4} and choose(frame).name == 3
    assert list(finalists(frame).index) == [3, 4, 0, 1, 2], "what was surely beaten comes last"
    assert list(finalists(frame, count=4).index) == [3, 4, 0, 1]
    assert list(finalists(frame, max_kl=0.1, count=3).index) == [0, 1, 3], "the fastest that are allowed"
    assert list(finalists(frame, max_kl=0.05).index) == [3, 4]
    with pytest.raises(ConfigError, match="no setting reaches KL 0.001; the best is 0.009"):
        finalists(frame, max_kl=0.001)
    alike = timings((1.0, 0.0, 0.5), (1.0, 0.0, 0.5))
    assert len(not_beaten(alike)) == 2, "neither beats the other"


def test_without_a_divergence_bytes_are_the_price():
    frame = timings((10.0, 0.1, nan), (12.0, 0.1, nan), (13.0, 0.1, nan)).assign(bytes=[900, 100, 500])
    assert price(frame) == "bytes" and list(not_beaten(frame).index) == [0, 1] and choose(frame).name in (0, 1)
    with pytest.raises(ConfigError, match="no KL is measured of random weights"):
        choose(frame, max_kl=0.1)
    found = Search(
        lambda setting: replace(measure(setting), kl=nan), SPACE, {}, seed=1, needed=needed, say=(said := []).append
    )
    found.run(trials=8)
    front = found.front()
    assert front.bytes.is_monotonic_decreasing and len(front) > 1, "the faster, the larger"
    assert not any("KL" in line for line in said)


def test_the_picture_shows_the_times_that_decided():
    frame = timings((10.0, 0.1, 0.1), (10.1, 0.1, 0.1), (20.0, 0.1, 0.2)).assign(
        number=[4, 5, 6], best=[True, False, 0]
    )
    again = frame[:2].assign(milliseconds=[12.0, 11.0])
    shown = with_times(frame, again)
    assert list(shown.milliseconds) == [12.0, 11.0, 20.0] and list(shown.again) == [True, True, False]
    assert list(shown.best) == [False, True, False] and list(frame.milliseconds) == [10.0, 10.1, 20.0]


def test_times_that_were_taken_in_turns_decide():
    frame = timings((10.0, 0.5, 0.1), (10.3, 0.5, 0.05), (11.0, 0.5, 0.045), (20.0, 0.5, 0.001))
    again = finalists(frame).assign(milliseconds=lambda rows: rows.milliseconds + 5)
    assert choose(again, scale=frame).name == choose(frame).name, "a machine that is slower for all changes nothing"
    again.loc[choose(frame).name, "milliseconds"] += 20
    assert choose(again, scale=frame).name != choose(frame).name
    assert choose(again, 0.05).name == again[again.kl <= 0.05].milliseconds.idxmin()


def test_a_small_space_ends_when_all_of_it_is_measured():
    small = Space((16,), (32, 64), (8,), (8,))
    found = Search(measure, small, {}, seed=0)
    found.run(trials=50)
    assert len(found.frame()) == small.size == 2


def test_a_setting_that_fails_is_passed_over():
    def fails(setting: Setting) -> Measurement:
        if setting.page_size == 32:
            raise ConfigError("not this one")
        return measure(setting)

    said: list[str] = []
    found = Search(fails, SPACE, {}, seed=0, say=said.append)
    found.run(trials=8)
    assert len(found.frame()) == 8 and 32 not in set(found.frame().page_size)
    failed = [line for line in said if "not this one" in line]
    assert found.pruned().why.str.contains("ConfigError: not this one").any() and failed
    found.run(trials=28)
    tried = [line.partition(": ")[2] for line in said if "not this one" in line]
    assert len(tried) == len(set(tried)) < 24, "none is tried twice, and not all: the sampler learns"


@pytest.mark.parametrize("file", ["study.db", "study.journal"])
def test_a_search_goes_on_where_it_was_stopped(file, tmp_path):
    first = search(storage=tmp_path / file)
    first.run(trials=7)
    again = search(storage=tmp_path / file)
    assert len(again.frame()) == 7
    again.run(trials=7)
    assert len(again.frame()) == 7, "nothing is left to do"
    again.run(trials=11)
    assert len(search(storage=tmp_path / file).frame()) == 11
    assert len(again.frame().drop_duplicates(["page_size", "residual_length", "M", "nbits", "policy"])) == 11


def test_measurements_of_something_else_are_refused(tmp_path):
    search(storage=tmp_path / "a.journal").run(trials=1)
    with pytest.raises(ConfigError, match="model 'm' there, 'other' here.*--study"):
        Search(measure, SPACE, {"model": "other"}, storage=tmp_path / "a.journal")
    with pytest.raises(ConfigError, match="memory None there, 5 here"):
        search(storage=tmp_path / "a.journal", memory=5)
    with pytest.raises(ConfigError, match="there is no folder"):
        search(storage=tmp_path / "none" / "a.journal")


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_tune import SPACE, measure
from pqlab.tune import Search

left, here = int(sys.argv[3]), Path(sys.argv[4])
(here / f"started-{os.getpid()}").touch()
while len(list(here.glob("started-*"))) < 2:  # or one might be done before the other has imported torch
    time.sleep(0.01)

def slow(setting):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    time.sleep(0.2)
    return measure(setting)

Search(slow, SPACE, {"model": "m"}, storage=sys.argv[1], seed=int(sys.argv[2])).run(trials=10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["{}/shared.journal", "sqlite:///{}/shared.db"])
def test_processes_share_a_storage_and_one_that_is_killed_loses_nothing(place, tmp_path):
    place = place.format(tmp_path)

    def start(seed: int, lives_for: int) -> subprocess.Popen:
        typed = [sys.executable, "-c", WORKER, place, str(seed), str(lives_for), str(tmp_path)]
        return subprocess.Popen(typed, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    both = [start(1, 2), start(2, 1000)]  # the first is killed in its third trial
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [-9, 0], errors
    before = Search(measure, SPACE, {"model": "m"}, storage=place)
    names = before.frame().worker.str.rpartition(":")[2]
    assert (names == str(both[0].pid)).sum() == 2 and (names == str(both[1].pid)).sum() >= 8
    before.run(trials=14)
    frame = before.frame()
    measured = {Setting(*row) for row in frame[list(SPACE.__dataclass_fields__)].itertuples(index=False)}
    assert len(measured) == 14 and set(SPACE.report_grid()) <= measured
    states = [trial.state.name for trial in before.study.get_trials()]
    assert states.count("FAIL") == 1 and "RUNNING" not in states, "whichever process came next has found it out"


def test_a_setting_that_was_left_is_tried_again_though_another_trial_passed_it_over(tmp_path):
    """Two processes that begin together may both have queued it."""
    place = str(tmp_path / "study.journal")
    search = Search(measure, SPACE, {"model": "m"}, storage=place)
    left = search.study.ask()  # the first of the grid, by a process that is no more
    left.set_user_attr("worker", f"{socket.gethostname()}:99999999")
    setting = Setting(**{name: left.suggest_categorical(name, values) for name, values in asdict(SPACE).items()})
    search.study.enqueue_trial(setting.params())
    grid = len(list(SPACE.report_grid()))
    search._wanted = grid
    search.study.optimize(search._try, n_trials=grid)  # the others, and the second of this one
    assert search.pruned().why.tolist() == ["measured before, or another process is at it"]
    after = Search(measure, SPACE, {"model": "m"}, storage=place)
    after.run(trials=grid)
    assert setting in {Setting.of_row(row) for row in after.frame().to_dict("records")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.db", b"no database" * 50, "file is not a database"),
        ("a.journal", b"\xff\xfe", "is no journal of Optuna;"),
        ("a.journal", b'{"a": 1}\n', "is no journal of Optuna .KeyError"),
        ("folder", None, "is a folder; name a file for the study"),
    ],
)
def test_a_place_that_is_no_storage(name, content, said, tmp_path, monkeypatch):
    monkeypatch.setattr("pqlab.tune.storage.time.sleep", lambda seconds: None)
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        search(storage=tmp_path / name)


# -- what a setting is measured by -----------------------------------------------------------------------------------


@pytest.fixture(params=[0, 64], ids=["no anchors", "anchors"])
def text(make_model, request):
    """A random model, its codebooks, and a continuation of 60 tokens behind 200."""
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=4), maps=True, span=request.param)
    ids = torch.randint(0, 256, (1, 260), generator=torch.Generator().manual_seed(3))
    return model, books, Continuation(model, ids, 200)


@pytest.mark.parametrize(("page_size", "residual"), [(16, 20), (64, 40), (32, 500)])
def test_a_continuation_is_the_decode_path(text, page_size, residual):
    """Behind the prompt it has what a run over the whole text has, and exact storage is exact."""
    model, books, continuation = text
    config = CacheConfig(page_size=page_size, residual_length=residual)
    frame = continuation.frame(from_codebooks(books), config)
    whole = compare(model, [continuation.ids], {"pq": from_codebooks(books)}, config, prompt=200)
    assert list(frame.position) == list(whole.position) == list(range(200, 259))
    assert torch.allclose(torch.tensor(frame.kl), torch.tensor(whole.kl), atol=1e-5)
    assert (frame.kl.max() > 0.01) == (residual < 200)
    assert continuation.frame(from_codebooks(Codebooks.identity(model)), config).kl.max() < 1e-6


def test_a_cache_filled_from_a_prompt_is_one_that_has_run_it(text):
    model, books, continuation = text
    config = CacheConfig(page_size=16, residual_length=20)
    filled = continuation.cache(books, config, 150, room=40)
    run = type(filled)(model, books, config, context=190)
    with attention(model, "pqlab"), torch.inference_mode():
        model(continuation.ids[:, :150], **cache_argument(model, run), use_cache=True)
        after = [model(continuation.ids[:, 150:151], **cache_argument(model, c), use_cache=True).logits
                 for c in (filled, run)]  # fmt: skip
    assert torch.equal(filled.lengths, run.lengths) and filled.get_seq_length() == 151
    assert all(torch.equal(a, b) for x, y in zip(filled.quantized_layers, run.quantized_layers, strict=True)
               for a, b in zip(x.codes(0), y.codes(0), strict=True))  # fmt: skip
    assert torch.allclose(*after, atol=1e-4)


def workload(make_model, tiny_tokenizer, kind="llama", **options) -> Workload:
    model = make_model(kind)
    found = Workload(model, tiny_tokenizer, "It was a dark and stormy night. " * 40, **options)
    for m, nbits in ((4, 4), (8, 4), (8, 8)):
        found._books[m, nbits] = Codebooks.random(model, pq=PQConfig(M=m, nbits=nbits))
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_setting_is_measured(kind, make_model, tiny_tokenizer):
    found = workload(make_model, tiny_tokenizer, kind, context=300, positions=80, rounds=2)
    near = found.measure(Setting(16, 32, 8, 4))
    assert near.milliseconds > 0 and near.flush_milliseconds >= 0 and near.milliseconds_error >= 0
    assert near.kl > found.kl(Setting(16, 128, 8, 4)) > 0
    cache = found.text.cache(found.codebooks(Setting(16, 32, 8, 4)), CacheConfig(16, 32), 300, room=0)
    parts = cache.nbytes()
    assert near.bytes - found.bytes(Setting(16, 32, 4, 4)) > 0
    if kind == "llama":
        cost = CacheCost(found._shape, PQConfig(M=8, nbits=4), CacheConfig(16, 32), 300)
        held = parts["codes"] + parts["free_pages"] + parts["exact_tokens"] + parts["page_table"]
        made = cost.constant_bytes + cost.fit_bytes
        assert abs(near.bytes - held - made) < 64, "and the centroids, maps and fits that calibration makes"
    assert found.measure(Setting(256, 1024, 8, 4)).kl == 0, "such a window holds the whole text"
    again = found.in_turns([Setting(16, 32, 8, 4)], rounds=1)
    assert list(again.setting) == ["exact", "page 16, R 32, M 8, 4 bits, lifo"]


def test_anchors_are_those_of_every_codebook(make_model, tiny_tokenizer, monkeypatch, tmp_path):
    from test_model_kinds import make

    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path))
    text, options = "It was a dark and stormy night. " * 40, {"context": 300, "positions": 80, "rounds": 1}
    plain, found = (Workload(make_model("llama"), tiny_tokenizer, text, span=span, **options) for span in (0, 64))
    assert found.about() == {**plain.about(), "span": 64}, "studies of before had no span"
    setting = Setting(16, 32, 8, 4)
    assert (plain.codebooks(setting).span, found.codebooks(setting).span) == (0, 64)
    assert found.kl(setting) > 0 and found.kl(setting) != plain.kl(setting)
    assert found.bytes(setting) - plain.bytes(setting) == 5 * 16 * 4, "a cosine and a sine a pair and span"
    measured = found.measure(setting)
    preset = preset_of(found, setting, {"kl": measured.kl})
    assert preset.measured["span"] == 64 and "anchored every 64 tokens" in preset.about
    assert preset_of(plain, setting).measured["span"] == 0
    with pytest.raises(ConfigError, match="gpt2 has no rotary embedding"):
        Workload(make("gpt2"), tiny_tokenizer, text, span=64, **options)
    random = Workload(make("gpt2"), tiny_tokenizer, text, span=64, random_weights=True, **options)
    assert random.codebooks(setting).span == 64, "for time and memory"


def test_a_context_that_the_model_has_not(make_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match="context = 4096 and 256 positions are more than the model's 4096"):
        Workload(make_model("llama"), tiny_tokenizer, "x" * 9000, context=4096)


@pytest.mark.gpu
def test_a_setting_is_measured_on_a_gpu(make_model, tiny_tokenizer):
    model = make_model("llama", head_dim=64, hidden_size=384).to("cuda", torch.float16)
    found = Workload(model, tiny_tokenizer, "It was a dark and stormy night. " * 60, context=600, positions=80)
    for m, nbits in ((32, 8),):
        found._books[m, nbits] = Codebooks.random(model, pq=PQConfig(M=m, nbits=nbits)).to("cuda")
    one = found.measure(Setting(64, 128, 32, 8))
    assert one.milliseconds > 0 and one.kl > 0
    assert found.in_turns([Setting(64, 128, 32, 8)], rounds=2).milliseconds.min() > 0


# -- the command and its files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A model in a folder, as one would have one, and a cache of its own for its codebooks."""
    make_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "model"


def test_the_command(folder, tmp_path, capsys):
    typed = ["tune", "--model", str(folder), "--context", "400", "--positions", "40", "--trials", "3", "--seed", "1",
             "--page-size", "16", "32", "--residual", "32", "64", "-M", "8", "--nbits", "4", "--policy", "lifo",
             "--storage", str(tmp_path / "t.db"), "--out", str(tmp_path), "--json"]  # fmt: skip
    assert cli.main(typed) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert len(result["settings"]) == 3 and "[3/3]" in said and "timed again, in turns; the exact cache: " in said
    assert 1 <= len(result["timed_again"]) <= 3 and result["exact_milliseconds"] > 0
    preset = Preset.load(tmp_path / "tune-pqlab.json")
    assert str(result["chosen"]).startswith(f"page {preset.cache.page_size}, R {preset.cache.residual_length}, M 8")
    assert preset.measured["kl"] > 0 and preset.measured["exact_milliseconds"] > 0 and preset.measured["context"] == 400
    page = (tmp_path / "tune-pqlab.html").read_text()
    assert "plotly" in page and 'src="http' not in page and "page size" in page
    assert cli.main(typed) == 0
    assert "[1/" not in capsys.readouterr().out, "the same again has nothing to measure"
    assert cli.main([*typed, "--max-kl", "1e-12"]) == 1
    assert "no setting reaches KL" in capsys.readouterr().err
    assert cli.main([*typed, "--memory", "1KiB", "--study", "small"]) == 1
    assert "no setting was measured" in capsys.readouterr().err
    assert cli.main([*typed, "--context", "300"]) == 2
    assert "context 400 there, 300 here" in capsys.readouterr().err
    assert cli.main([*typed, "--span", "64"]) == 2
    assert "span None there, 64 here. Give this one another name (--study)" in capsys.readouterr().err
    assert cli.main([*typed, "--span", "64", "--study", "turned", "--no-confirm"]) == 0
    said = capsys.readouterr().out
    turned = json.loads(said.splitlines()[-1])
    assert (result["span"], turned["span"], turned["about"]["span"]) == (0, 64, 64)
    assert "keys anchored every 64 tokens" in said and Preset.load(tmp_path / "tune-turned.json").measured["span"] == 64
    assert {row["kl"] for row in turned["settings"]}.isdisjoint(row["kl"] for row in result["settings"])
    assert list((tmp_path / "cache").glob("codebooks/*-span64-*"))


def test_random_weights_are_weighed_by_time_and_bytes(tmp_path, capsys):
    typed = ["tune", "-f", "debug-model", "--context", "200", "--positions", "16", "--trials", "2", "--device", "cpu",
             "--page-size", "16", "--residual", "32", "64", "-M", "16", "--nbits", "8", "--policy", "lifo",
             "--storage", str(tmp_path / "t.journal"), "--out", str(tmp_path), "--json"]  # fmt: skip
    assert cli.main(typed) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["kl"] for row in result["settings"]] == [None, None] and result["about"]["weights"] == "random"
    preset = Preset.load(tmp_path / "tune-pqlab.json")
    assert preset.measured["kl"] is None and preset.measured["milliseconds"] > 0
    assert "MiB of the cache" in (tmp_path / "tune-pqlab.html").read_text()
    assert cli.main([*typed, "--max-kl", "0.1"]) == 2
    assert "random weights do not have" in capsys.readouterr().err


def test_the_last_round_decides(folder, tmp_path, capsys, monkeypatch):
    """Of two settings of one KL, the command takes that which is faster in turns, whatever came out first."""
    first = {Setting(16, 64, 8, 4, policy): 10.0 + i / 10 for i, policy in enumerate(("lifo", "fifo"))}
    monkeypatch.setattr(
        Workload, "measure", lambda self, setting: Measurement(first[setting], 0.5, 0.0, 0.1, self.bytes(setting))
    )
    turns = [("exact", 9.0, 0.1), *((str(setting), 30.0 - ms, 0.1) for setting, ms in first.items())]
    columns = ["setting", "milliseconds", "milliseconds_error"]
    monkeypatch.setattr(Workload, "in_turns", lambda self, settings, rounds: pd.DataFrame(turns, columns=columns))
    typed = ["tune", "--model", str(folder), "--context", "400", "--positions", "40", "--page-size", "16",
             "--residual", "64", "-M", "8", "--nbits", "4", "--policy", "lifo", "fifo",
             "--storage", str(tmp_path / "t.journal"), "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*typed, "--no-confirm"]) == 0
    assert Preset.load(tmp_path / "tune-pqlab.json").cache.policy == "lifo"
    assert cli.main(typed) == 0
    preset = Preset.load(tmp_path / "tune-pqlab.json")
    assert preset.cache.policy == "fifo" and preset.measured["milliseconds"] == 19.9
    assert "the best 2 timed again, in turns; the exact cache: 9.00 ms" in capsys.readouterr().out


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["tune"]) == 2
    assert "pip install 'pqlab[tune]'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("64MiB", 2**26), ("1.5 GiB", 3 * 2**29), ("2g", 2**31), ("1000", 1000)])
def test_sizes(text, size):
    assert command.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "5 TB", "1.2.3M"])
def test_what_is_no_size(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--memory", text])
    assert "type e.g. 64MiB" in capsys.readouterr().err


def test_a_preset_comes_back(tmp_path, make_model):
    preset = Preset("mine", "for me", CacheConfig(32, 64, max_pages=9, policy="fifo"), PQConfig(8, 6), {"kl": 0.5})
    preset.save(tmp_path / "p.json")
    assert Preset.load(tmp_path / "p.json", make_model("llama")) == preset
    assert Preset.load(tmp_path / "p.json").measured == {"kl": 0.5}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=9), "preset of version 9, this pqlab reads version 1"),
        (lambda c: c.pop("schema"), "is no preset"),
        (lambda c: c.pop("pq"), '"pq" is missing'),
        (lambda c: c["cache"].update(page_size=40), "page_size = 40 is out of range"),
        (lambda c: c["cache"].update(pages=1), "unknown setting 'pages'; a CacheConfig has page_size"),
        (lambda c: c["cache"].update(policy="best"), "policy = 'best' is unknown"),
        (lambda c: c["pq"].update(nbits="8"), "nbits = '8' is not a whole number"),
        (lambda c: c["pq"].update(M=5), "M = 5 does not divide the head size 16"),
    ],
)
def test_a_preset_that_does_not_fit_says_what(change, says, tmp_path, make_model):
    path = tmp_path / "p.json"
    Preset("mine", "", CacheConfig(), PQConfig(8)).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="p.json") as caught:
        Preset.load(path, make_model("llama"))
    assert says in str(caught.value)
    for name, text in (("none.json", None), ("bad.json", "{")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            Preset.load(tmp_path / name)
