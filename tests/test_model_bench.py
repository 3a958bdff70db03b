"""`bench model`: every case of a tiny shape runs and ends in a record, prefill too."""

from __future__ import annotations

import json

from pqlab import cli, kernels


def records(capsys, *options: str) -> dict[str, dict]:
    assert (
        cli.main(["bench", "model", "--shape", "tiny", "--context", "200", "--device", "cpu", "--json", *options]) == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dtype"] == "float32" and found["versions"]["torch"]
    return {r["case"]: r for r in found["records"]}


def test_every_case_of_a_step_has_a_time(capsys):
    kernels.wait()
    found = records(capsys, "--no-compiled")
    assert set(found) == {
        "none", "exact flash", "exact math", "paged", "paged, no maps", "exact eager", "paged eager",
    }  # fmt: skip
    for case, r in found.items():
        assert r["milliseconds"] and r["milliseconds"] > 0, (case, r["note"])


def test_time_to_the_first_token(capsys):
    found = records(capsys, "--prefill")
    assert set(found) == {"prefill exact", "prefill paged", "prefill paged static"}
    exact = found["prefill exact"]["milliseconds"]
    over = found["prefill paged"]["milliseconds"] / exact - 1
    assert found["prefill paged"]["note"].startswith(f"{over:+.1%} beside exact")
