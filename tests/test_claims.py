"""The claims table: every figure comes from a file, and the verdict follows the figure."""

from __future__ import annotations

import json

import pytest

from pqlab import cli
from pqlab.claims import CLAIMS, Results, judge, table
from pqlab.claims.verdict import Claim, Measured

CLAIM = {claim.name: claim for claim in CLAIMS}
MODEL, BANDWIDTH = "speed-up, whole model at 32K", "memory bandwidth, paged"


@pytest.fixture
def write(tmp_path):
    """`write(name, benchmark, records, ...)` puts a result into a folder; `write.row(claim)` judges a claim by it."""

    def write(name, benchmark, records, **more):
        content = {"benchmark": benchmark, "device": "NVIDIA H200", "date": "2026-11-01", "commit": "abc", **more}
        (tmp_path / name).write_text(json.dumps({**content, "records": records}))

    write.folder = tmp_path
    write.row = lambda claim: judge(CLAIM[claim], Results(tmp_path))
    return write


def times(exact: float, paged: float, context: int = 32768) -> list[dict]:
    rows = [("exact flash", exact + 1), ("exact cudnn", exact), ("exact math", None), ("paged", paged), ("none", 1.0),
            ("exact eager", 100.0), ("paged eager", 50.0)]  # fmt: skip
    return [{"shape": "7b", "context": context, "case": case, "milliseconds": ms} for case, ms in rows]


def shares(*found: tuple[int, float]) -> list[dict]:
    heads = {"heads": 32, "kv_heads": 32, "head_dim": 128, "m": 64, "exact": "cudnn", "speedup": 2.5}
    return [{**heads, "tokens": [n], "share_of_read_rate": share} for n, share in found]


def test_a_speed_up_holds_when_the_times_say_so(write):
    write("a.json", "model", times(10.0, 8.0))
    row = write.row(MODEL)
    assert (row.verdict, row.value) == ("does not hold (other hardware, random weights of this shape)", 1.25)
    assert "10.0 -> 8.0 ms" in row.measured and "exact cudnn" in row.measured and row.commit == "abc"
    assert write.row("speed-up, whole model at 32K, without graphs").value == 2
    write("a.json", "model", times(10.0, 4.0))
    assert write.row(MODEL).verdict == "holds (other hardware, random weights of this shape)"
    write("a.json", "model", times(10.0, 4.0), device="NVIDIA A100-SXM4-80GB")
    assert write.row(MODEL).verdict == "holds (random weights of this shape)"
    assert write.row("LLaMA-2-7B at 32K, latency").verdict.startswith("does not hold"), "2.96x is claimed there"
    assert write.row("LLaMA-2-7B at 8K, latency").verdict == "not measured"


def test_without_graphs_the_faster_exact_row_counts(write):
    eager = "speed-up, whole model at 32K, without graphs"
    write("a.json", "model", times(10.0, 8.0))
    assert "builds a cuDNN plan for every new length" in write.row(eager).verdict, "the only row there is"
    fair = {"shape": "7b", "context": 32768, "case": "exact eager, no cuDNN", "milliseconds": 25.0}
    write("a.json", "model", [*times(10.0, 8.0), fair])
    row = write.row(eager)
    assert (row.value, row.verdict) == (0.5, "does not hold (other hardware, random weights of this shape)")
    assert "exact eager, no cuDNN" in row.measured and write.row(MODEL).value == 1.25, "graphs are a row of their own"


def test_bandwidth_follows_the_best_share(write):
    write("a.json", "decode", shares((32768, 0.76), (131072, 0.9)))
    assert write.row(BANDWIDTH).verdict.startswith("does not hold") and "76% at 32,768" in write.row(BANDWIDTH).measured
    write("a.json", "decode", shares((32768, 0.76), (131072, 0.951)))
    assert write.row(BANDWIDTH).verdict.startswith("holds") and "95% of the rate" in write.row(BANDWIDTH).measured


def test_accuracy_is_the_worse_of_all_results(write):
    def result(name, change):
        row = {"method": "pq-4", "change": change, "token_bits": 4, "agreement": 0.98}
        about = {"model": {"name": "m"}, "text": {"name": "t"}, "length": 9}
        write(name, "", [], command="eval", methods=[row], **about)

    result("a.json", 0.001)
    assert write.row("loss of accuracy").verdict == "holds (another model)"
    result("b.json", -0.02)
    assert write.row("loss of accuracy").verdict == "does not hold (another model)"
    assert write.row("loss of accuracy").file == "b.json"


def test_memory_is_measured_where_a_result_has_it(write):
    name = "LLaMA-2-7B at 8K, memory saved"
    assert write.row(name).verdict == "holds" and write.row(name).device == "computed from the layout"
    sizes = {"paged_bytes": 40, "exact_bytes": 100, "paged_peak_bytes": 60, "exact_peak_bytes": 120}
    record = {"shape": "7b", "context": 8192, **sizes}
    write("memory.json", "memory", [record], device="NVIDIA A100")
    row = write.row(name)
    assert (row.verdict, row.value) == ("does not hold (random weights of this shape)", 60)
    assert row.file == "memory.json" and "50.0 % less at a step's peak" in row.measured


def test_the_reports_gpu_comes_first_then_the_newest(write):
    write("old.json", "model", times(10, 5))
    write("new.json", "model", times(10, 4), date="2030-01-01")
    assert write.row(MODEL).file == "new.json"
    write("a100.json", "model", times(10, 3), date="2020-01-01", device="NVIDIA A100")
    assert write.row(MODEL).file == "a100.json"


def test_a_cpu_says_nothing_about_a_gpu(write):
    write("a.json", "model", times(10, 4), device="AMD EPYC 9654")
    assert write.row(MODEL).verdict == "not measured"


def test_what_is_missing_is_said_with_its_command(write, capsys):
    write("a.json", "decode", [{k: v for k, v in row.items() if k != "share_of_read_rate"} for row in shares((9, 1))])
    assert write.row(BANDWIDTH).verdict == "not measured (a result has no field 'share_of_read_rate')"
    assert cli.main(["claims", "--results", str(write.folder)]) == 0
    missing = capsys.readouterr().out.split("Not measured yet:")[1].split("Measured with:")[0]
    assert "python -m pqlab bench model --shape 7b --context 32768 --json" in missing
    assert "python -m pqlab bench decode --json" in missing


def test_no_figure_of_pqlab_is_typed(tmp_path):
    """With no results at all nothing is left but what the layout alone gives."""
    found = table(CLAIMS, Results(tmp_path))
    left = found[found.verdict != "not measured"]
    assert set(left.device) == {"computed from the layout"} and left.claim.str.contains("memory saved").all()
    assert found.value.notna().sum() == len(left) == 4


def test_the_packages_own_results_are_read():
    results = Results()
    found = table(CLAIMS, results)
    assert set(found.file) - {""} <= set(results.files)
    cited = found[found.file != ""]
    assert len(cited) >= 7 and (cited.date != "").all() and (cited.commit != "").all()


@pytest.mark.parametrize(("better", "value", "word"), [("more", 2, "holds"), ("more", 1, "does not hold"),
                                                       ("less", 2, "does not hold"), ("less", 1, "holds")])  # fmt: skip
def test_the_word_follows_the_direction(better, value, word):
    claim = Claim("x", "2", 2 if better == "more" else 1, lambda results: Measured(value, "", None), "", better)
    assert judge(claim, None).verdict == word


def test_the_command(capsys, tmp_path):
    assert cli.main(["claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["claims"]
    assert [row["claim"] for row in rows] == list(CLAIM) and all(row["command"] for row in rows)
    assert cli.main(["claims", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CLAIMS) + 2 and all(line.count("|") == 6 for line in lines)
    assert cli.main(["claims"]) == 0
    assert all(len(line) < 160 for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert cli.main(["claims", "--results", str(tmp_path / "none")]) == 2
    (tmp_path / "broken.json").write_text("{")
    assert cli.main(["claims", "--results", str(tmp_path)]) == 2
    assert "broken.json is no JSON" in capsys.readouterr().err
