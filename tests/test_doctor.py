"""The doctor answers whatever happens, and every problem comes with what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pqlab import cli, doctor
from pqlab.doctor import PROBES, Finding, examine, find_chromium, probes, report


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even a message")


def raising(error: BaseException):
    def probe() -> Finding:
        raise error

    return probe


def test_a_probe_that_fails_becomes_text_and_the_others_answer():
    findings = examine(
        {
            "plain": raising(ValueError("on two\nlines")),
            "mute": raising(Mute()),
            "exits": raising(SystemExit(3)),
            "fine": lambda: Finding("all well"),
        }
    )
    assert findings["plain"].value == "failed (ValueError: on two lines)"
    assert findings["mute"].problem and findings["exits"].problem
    assert findings["fine"] == Finding("all well")
    assert "ValueError: on two lines" in report(findings)


@pytest.mark.parametrize("name", sorted(PROBES))
def test_every_probe_answers_here(name):
    finding = examine({name: PROBES[name]})[name]
    assert finding.value and not finding.value.startswith("failed"), finding


def test_all_probes_failing_still_gives_a_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {name: raising(OSError("gone")) for name in PROBES})
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(PROBES)
    assert all(entry["problem"] and entry["remedy"] for entry in found.values())


def test_what_a_probe_prints_stays_out_of_the_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"loud": lambda: print("building") or Finding("Größe → 3")})
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loud"]["value"] == "Größe → 3"


def test_a_bare_environment(tmp_path):
    """No compiler, no ninja, no browser on the PATH, a cache that is a file, a home that is not there, ASCII only."""
    (tmp_path / "file").touch()
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path / "none"), "PQLAB_CACHE": str(tmp_path / "file/x")}
    bare |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "pqlab", "doctor", "--json"], env=bare, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiler"]["problem"] and "apt-get install g++" in found["compiler"]["remedy"]
    assert found["chromium"]["problem"] and "PQLAB_CHROMIUM" in found["chromium"]["remedy"]
    assert "PQLAB_CACHE" in found["caches"]["remedy"]
    assert all(entry["remedy"] for entry in found.values() if entry["problem"])


def examined(**environment: str) -> dict:
    """What the doctor of a fresh Python says where pqlab cannot be used."""
    environment = dict(os.environ) | environment
    done = subprocess.run([sys.executable, "-c", "import pqlab; pqlab.PQConfig"], env=environment, capture_output=True)
    assert done.returncode and b"python -m pqlab doctor" in done.stderr
    command = [sys.executable, "-m", "pqlab", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_torch_it_still_answers(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    found = examined(PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(doctor.__file__).parents[2]}")
    assert "libcudart.so.13" in found["torch"]["value"] and "--force-reinstall torch" in found["torch"]["remedy"]
    assert "libcudart.so.13" in found["pqlab"]["problem"]
    assert found["python"]["problem"] == "" and found["compiler"]["problem"] == ""


def test_a_setting_that_stops_the_import_is_said():
    found = examined(PQLAB_BUILD="bogus")
    assert "PQLAB_BUILD" in found["pqlab"]["problem"] and "background" in found["pqlab"]["problem"]
    assert found["torch"]["problem"] == ""


def test_packages_that_are_missing_or_old_are_named(monkeypatch):
    wanted = ["torch>=2.9", "pqlab-none>=1", 'plotly>=999; extra == "notebook"', 'pqlab[notebook]; extra == "all"']
    monkeypatch.setattr(probes.importlib.metadata, "requires", lambda name: wanted)
    core, extra = probes.packages()(), probes.packages("notebook", "panels need it")()
    assert core.value.startswith("torch 2.") and core.problem == "pqlab-none is not installed"
    assert extra.problem.endswith("is not >=999 (panels need it)")
    assert "pip install 'pqlab[notebook]'" in extra.remedy


def test_the_report_repeats_problems_with_their_remedy():
    text = report({"a": Finding("fine", details={"models": "1 MB"}), "b": Finding("bad", "it is broken", "Mend it")})
    assert "models: 1 MB" in text
    assert text.splitlines()[-1] == "! b: it is broken. Mend it"
    assert report({"a": Finding("fine")}).endswith("No problems found.")


def test_chromium_is_found_in_playwrights_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PQLAB_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert find_chromium() is None
    for build in ("chromium-900", "chromium-1200"):
        program = tmp_path / build / "chrome-linux" / "chrome"
        program.parent.mkdir(parents=True)
        program.touch()
    assert find_chromium() == str(tmp_path / "chromium-1200/chrome-linux/chrome")
    monkeypatch.setenv("PQLAB_CHROMIUM", "/mine")
    assert find_chromium() == "/mine"


def test_a_reader_that_stops_reading_is_no_error():
    command = f'"{sys.executable}" -m pqlab doctor | head -c 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=os.path.dirname(doctor.__file__))
    assert "BrokenPipe" not in done.stderr
