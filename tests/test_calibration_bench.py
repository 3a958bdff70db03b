"""What calibrations differ in is measured: variants on one text, texts on each other."""

from __future__ import annotations

import json

import pytest

from pqlab import CacheConfig, PQConfig
from pqlab.evaluation import calibration_bench, texts_bench
from pqlab.evaluation.calibration_bench import calibrations
from pqlab.evaluation.texts_bench import texts, transfer
from pqlab.models import CODE_OPENINGS
from pqlab.results.provenance import device_name

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
DIGITS = " ".join(str(i * 7919 % 9973) for i in range(900))
WORDS = "the whale sang of the sea, and the sea sang of the whale. " * 80


def test_variants_are_measured_side_by_side(make_model, tiny_tokenizer):
    model = make_model("llama")
    variants = {
        "more": {"num_tokens": 1200, "window": 300},
        "fewer": {"num_tokens": 120, "window": 120},
        "one for all": {"num_tokens": 1200, "window": 300, "scope": "model", "maps": False},
    }
    options = {"windows": 2, "length": 150, "config": SMALL}
    table = calibrations(model, tiny_tokenizer, DIGITS, DIGITS[::-1], variants, PQConfig(8, 5), **options)
    assert list(table.variant) == list(variants) and table.samples.tolist() == [1200 - 4 * 4, 116, 1200 - 4 * 4]
    assert table.ratio[0] == 1 and table.kl[0] < table.kl[2] and (table.kl_error > 0).all()
    assert table.constants_mib[0] > 5 * table.constants_mib[2]


def test_every_calibration_meets_every_text(make_model, tiny_tokenizer):
    model = make_model("llama")
    calibration = {"digits": DIGITS[: len(DIGITS) // 2], "words": WORDS}
    calibration["both"] = list(calibration.values())
    measured = {"digits": DIGITS[len(DIGITS) // 2 :], "words": WORDS}
    options = {"num_tokens": 1000, "windows": 1, "length": 150, "config": SMALL}
    table = transfer(model, tiny_tokenizer, calibration, measured, PQConfig(8, 5), **options)
    assert table[["calibration", "text"]].values.tolist() == [[c, t] for t in measured for c in calibration]
    kl = table.pivot(index="calibration", columns="text", values="kl")
    assert kl.digits["digits"] < kl.digits["words"] and kl.words["words"] < kl.words["digits"]
    ratio = table.set_index(["calibration", "text"]).ratio
    assert ratio["words", "words"] == pytest.approx(kl.words["words"] / kl.digits["words"])


def test_no_text_is_calibrated_and_measured_on():
    calibration, measured = texts()
    for name, text in measured.items():
        assert text[:2000] not in calibration[name] and text[-2000:] not in calibration[name]
    assert calibration["all three"] == [calibration[name] for name in measured]


def test_commands(make_model, tiny_tokenizer, monkeypatch, capsys):
    from pqlab.cli import main

    for module in (calibration_bench, texts_bench):
        monkeypatch.setattr(module, "load", lambda args: (None, make_model("llama"), tiny_tokenizer))
    variants = {"default": {"num_tokens": 600, "window": 300}, "no map": {"num_tokens": 600, "maps": False}}
    monkeypatch.setattr(calibration_bench, "VARIANTS", variants)
    options = ["--windows", "1", "--length", "300", "--json"]
    assert main(["bench", "calibration", "--bits", "2", *options]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["variant"] for row in record["records"]] == list(variants) and record["bits"] == 2
    assert record["device"] == device_name("cpu") and record["half"] is False
    assert main(["bench", "calibration", "--variants", "maps"]) == 2
    assert "there is no variant 'maps'; there are default; no map" in capsys.readouterr().err
    monkeypatch.setattr(texts_bench, "texts", lambda: ({"words": WORDS}, {"digits": DIGITS, "words": WORDS}))
    assert main(["bench", "texts", "--tokens", "600", *options]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [(row["calibration"], row["text"]) for row in record["records"]] == [("words", "digits"), ("words", "words")]
    assert record["device"] == device_name("cpu")
    monkeypatch.setattr(texts_bench, "load_text", lambda name: WORDS)
    more = ["--own-code", "2", "--bits", "2"]
    written = []

    def sampled(*pair, count, openings):
        written.append((count, openings))
        return [DIGITS] * count

    monkeypatch.setattr(texts_bench, "sampled_text", sampled)
    assert main(["bench", "texts", "--tokens", "600", *more, *options]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["calibration"] for row in record["records"]] == ["words", "novel, own code"] * 2
    assert written == [(2, CODE_OPENINGS)] and record["bits"] == 2 and record["own_code"] == 2
    assert main(["bench", "texts", "--tokens", "600", "--windows", "99"]) == 2
    assert "not 99" in capsys.readouterr().err
    for bench in ("texts", "calibration"):
        assert main(["bench", bench, "--length", "100"]) == 2
        assert "length = 100 quantizes nothing" in capsys.readouterr().err
