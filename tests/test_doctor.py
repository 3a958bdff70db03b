"""The doctor answers whatever happens, and every problem comes with what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
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


def test_a_folder_that_was_never_installed_is_no_problem(monkeypatch):
    def none(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(importlib.metadata, "requires", none)
    for name in ("pqlab", "packages"):
        finding = examine({name: PROBES[name]})[name]
        assert "not installed" in finding.value and not finding.problem


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


# -- the troubleshooting table of the report -------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def a_gpu(monkeypatch):
    """torch says that it was built with CUDA 13.0 and sees a GPU."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("release", "problem"), [("13.0", ""), ("13.2", ""), ("12.4", "built with CUDA 13.0, the toolkit is 12.4")]
)
def test_a_toolkit_of_another_major_version_is_a_problem(release, problem, a_gpu, monkeypatch, tmp_path):
    program(tmp_path, "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = PROBES["nvcc"]()
    assert f"release {release}" in finding.value
    assert problem in finding.problem and bool(problem) == bool(finding.problem)
    assert "CUDA_HOME" in finding.remedy or not problem


def test_a_compiler_that_nvcc_refuses_is_named(a_gpu, monkeypatch, tmp_path):
    refuses = "echo '#error -- unsupported GNU version! gcc versions later than 12 are not supported!' >&2; exit 1"
    program(tmp_path, "nvcc", refuses)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = PROBES["host compiler"]()
    assert "gcc versions later than 12" in finding.problem and "set CC to it" in finding.remedy
    program(tmp_path, "nvcc", "exit 0")
    assert not PROBES["host compiler"]().problem


def test_nvcc_is_asked_about_the_compiler_that_torch_hands_it(a_gpu, monkeypatch, tmp_path):
    """Builds of kernels pass $CC as nvcc's host compiler, not $CXX."""
    program(tmp_path, "nvcc", 'case "$*" in *"-ccbin my-gcc"*) exit 0;; esac; echo "error: $*" >&2; exit 1')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "my-g++")
    monkeypatch.setenv("CC", "my-gcc")
    finding = PROBES["host compiler"]()
    assert not finding.problem and finding.value.startswith("my-gcc fits")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_real_nvcc_is_really_asked(a_gpu, monkeypatch, tmp_path):
    assert not PROBES["host compiler"]().problem
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", "echo 'error: broken on purpose' >&2; exit 1")))
    assert PROBES["host compiler"]().problem


def test_a_gpu_without_a_toolkit(a_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert "CUDA toolkit" in PROBES["nvcc"]().remedy


def test_a_missing_ninja(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probes.sys, "executable", str(tmp_path / "python"))
    finding = PROBES["ninja"]()
    assert finding.problem and finding.remedy == "pip install ninja"


def test_libraries_of_another_torch_on_the_path(monkeypatch, tmp_path):
    import torch

    own = Path(torch.__file__).parent / "lib"
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{own}{os.pathsep}{other}")
    assert not PROBES["libraries"]().problem
    (other / "libc10.so").touch()
    finding = PROBES["libraries"]()
    assert "libc10.so" in finding.problem and f"LD_LIBRARY_PATH={own}:" in finding.remedy


def test_a_kernel_that_lacks_a_library(monkeypatch, tmp_path):
    """A library that was linked against one that has gone since."""
    from pqlab.kernels import build

    for name, options in (("libgone.so", []), ("kernel.so", ["-L.", "-Wl,--no-as-needed", "-lgone"])):
        (tmp_path / "empty.c").touch()
        command = ["c++", "-shared", "-x", "c", "empty.c", "-x", "none", "-o", name, *options]
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "libgone.so").unlink()
    built = build.FinishedBuild("kernel", tmp_path / "kernel.so", 1.0, "2", ())
    monkeypatch.setattr(build, "finished_builds", lambda: [built])
    finding = PROBES["libraries"]()
    assert "libgone.so" in finding.problem and "LD_LIBRARY_PATH" in finding.remedy


def test_too_little_memory_names_what_to_lower_and_that_really_fits(monkeypatch):
    from pqlab import memory
    from pqlab.config import CacheConfig, PQConfig
    from pqlab.cost import CacheCost
    from pqlab.doctor.cache_memory import cache_memory, needed_bytes, ways_to_fit
    from pqlab.shapes import SHAPES

    cost = CacheCost(SHAPES["Llama-3.1-8B"], PQConfig(), CacheConfig(), context=32768, batch=4)
    assert not cache_memory("Llama-3.1-8B", 1000)().problem
    for share in (0.9, 0.6, 0.3):
        free = int(needed_bytes(cost) * share)
        monkeypatch.setattr(memory, "free_memory", lambda device="cpu", free=free: free)
        finding = cache_memory("Llama-3.1-8B", 32768, 4)()
        ways = dict(ways_to_fit(cost, free))
        assert "PQC004" in finding.problem and ways
        assert all(change in finding.remedy for change in ways)
        assert all(needed_bytes(lower) <= free for lower in ways.values())
        context = next(lower.context for change, lower in ways.items() if change.startswith("context="))
        more = CacheCost(cost.shape, cost.pq, cost.cache, context=context + cost.cache.page_size, batch=4)
        assert needed_bytes(more) > free, "a longer context would have fitted"
    assert any(change.startswith("M=") for change in ways), "at 30 % only M, batch and length are left"
    assert not any(change.startswith("nbits=") for change in ways)


def test_the_command_asks_about_a_cache(capsys):
    assert cli.main(["doctor", "--json", "--shape", "Llama-3.1-70B", "--context", "131072", "--batch", "1000"]) == 0
    finding = json.loads(capsys.readouterr().out)["cache memory"]
    assert "1000 x 131,072 tokens" in finding["problem"] and finding["remedy"]
    assert cli.main(["doctor", "--shape", "Lama"]) == 2
    assert "Llama-3.1-8B" in capsys.readouterr().err
    assert cli.main(["doctor", "--context", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
