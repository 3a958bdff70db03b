"""What a user installs from: pyproject.toml, environment.yml, the wheel, the Makefile and .ci/run."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "playwright": "playwright-python"}
BESIDE_PACKAGES = {"python", "pip", "make", "cxx-compiler"}  # what conda brings and pip cannot


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> dict[str, SpecifierSet]:
    """Every package that pqlab or one of its extras asks for, with its bounds."""
    project = pyproject()
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    parsed = [Requirement(line) for line in lines]
    return {wanted.name: wanted.specifier for wanted in parsed if wanted.name != project["name"]}


def conda_environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def conda_packages() -> dict[str, SpecifierSet]:
    split = (re.fullmatch(r"([a-z0-9-]+)(.*)", line).groups() for line in conda_environment()["dependencies"])
    return {name: SpecifierSet(bounds) for name, bounds in split}


def test_conda_and_pip_ask_for_the_same():
    wanted = {CONDA_NAMES.get(name, name): bounds for name, bounds in requirements().items()}
    packages = conda_packages()
    assert {name: bounds for name, bounds in packages.items() if name not in BESIDE_PACKAGES} == wanted
    assert packages["python"] == SpecifierSet(pyproject()["requires-python"])


def test_conda_has_one_source_of_torch_and_a_compiler():
    environment = conda_environment()
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert all(isinstance(line, str) for line in environment["dependencies"]), (
        "a pip section would bring a second torch"
    )
    assert [name for name in conda_packages() if "torch" in name] == ["pytorch"]
    assert BESIDE_PACKAGES | {"ninja"} <= set(conda_packages())


def test_all_is_every_extra():
    extras = pyproject()["optional-dependencies"]
    (everything,) = extras["all"]
    assert Requirement(everything).extras == set(extras) - {"all"}


def test_the_pinned_torch_is_one_that_pqlab_takes():
    pin = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    assert requirements()["torch"].contains(pin)


def test_every_other_requirement_is_pinned_for_make():
    text = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    wanted = {name: bounds for name, bounds in requirements().items() if name != "torch"}
    assert set(pins) == set(wanted)
    assert [name for name, bounds in wanted.items() if not bounds.contains(pins[name])] == []


def test_wheel_carries_all_that_is_no_python(tmp_path):
    """Kernel sources, texts and scripts have to be in a wheel, not only in a clone."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "pqlab", tmp_path / "pqlab", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("pqlab/")}
    wanted = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pqlab").rglob("*") if path.is_file()}
    assert packed == wanted
    assert {"pqlab/data/pride.txt.xz", "pqlab/__main__.py"} <= packed


def test_import_brings_no_notebook_package_and_needs_no_compiler(tmp_path):
    check = (
        "import sys, pqlab; heavy = {'ipywidgets', 'plotly', 'IPython', 'pandas', 'anywidget', 'jupyterlab'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    nothing = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "PQLAB_CACHE": str(tmp_path / "cache"), "HOME": "/"}
    done = subprocess.run([sys.executable, "-c", check], env=nothing, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def workshop(tmp_path):
    """A copy of the Makefile with a Python that only writes down how it was called; `run(*args)` calls make."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/constraints.txt", tmp_path / ".ci")
    source = tmp_path / "pqlab/kernels/ops.py"
    source.parent.mkdir(parents=True)
    source.touch()
    calls = tmp_path / "calls"
    recorder = (
        f'echo "$@" >> "{calls}"\n'
        f'case "$*" in *"$FAIL_AT"*) test -n "$FAIL_AT" && exit 7;; esac\n'
        f"for last; do :; done\n"
        f'case "$*" in\n'
        f'"-m pqlab setup"*) touch "{tmp_path}/model"; echo "{tmp_path}/model" > "$last";;\n'
        f'"-m venv"*) mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;\n'
        f"esac"
    )
    python = script(tmp_path / "fake-python", recorder)

    def run(*args: str, **environment: str) -> tuple[int, list[str], str]:
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PQLAB"))}
        done = subprocess.run(
            ["make", f"PYTHON={python}", *args], cwd=tmp_path, env=clean | environment, capture_output=True, text=True
        )
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    run.folder = tmp_path
    return run


def test_make_setup_does_everything_once(workshop):
    code, calls, said = workshop("setup")
    assert code == 0, said
    assert calls[:3] == [
        "-m venv .venv",
        "-m pip install torch==2.13.0",
        "-m pip install -c .ci/constraints.txt -e .[all]",
    ]
    assert calls[3].startswith("-m pqlab setup --list")
    assert len(calls) == 4
    assert workshop("setup")[1] == []


def test_make_setup_makes_again_what_is_missing_or_old(workshop):
    workshop("setup")
    (workshop.folder / "model").unlink()
    assert [call.split()[:3] for call in workshop("setup")[1]] == [["-m", "pqlab", "setup"]]
    assert [call.split()[:3] for call in workshop("setup", PQLAB_CACHE="/elsewhere")[1]] == [["-m", "pqlab", "setup"]]
    future = (workshop.folder / ".venv/.pqlab").stat().st_mtime + 10
    os.utime(workshop.folder / "pqlab/kernels/ops.py", (future, future))
    assert [call.split()[:3] for call in workshop("setup")[1]] == [["-m", "pqlab", "setup"]]
    os.utime(workshop.folder / "pyproject.toml", (future, future))
    assert "-m pip install -c .ci/constraints.txt -e .[all]" in workshop("setup")[1]
    assert "-m pip install -e .[all]" in workshop("setup", "CONSTRAINTS=")[1]


@pytest.mark.parametrize("step", ["venv", "torch==", "-e .[all]", "pqlab setup"])
def test_a_failed_step_says_what_to_do_and_is_tried_again(workshop, step):
    code, _, said = workshop("setup", FAIL_AT=step)
    assert code != 0
    assert re.search(r"pqlab: .*(again|apt-get|goes on)", said), said
    code, calls, said = workshop("setup")
    assert code == 0, said
    assert any(step in call for call in calls)


def test_make_without_python_says_so(workshop):
    code, _, said = workshop("setup", "PYTHON=")
    assert code != 0
    assert "no Python >= 3.11 found" in said


def test_make_installs_no_second_torch_into_conda(workshop):
    (workshop.folder / "conda/conda-meta").mkdir(parents=True)
    script(workshop.folder / "conda/bin/python", (workshop.folder / "fake-python").read_text())
    code, calls, said = workshop("setup", "VENV=conda")
    assert code == 0, said
    assert calls[0] == "-m pip install --no-deps --no-build-isolation -e ."
    assert len(calls) == 2


@pytest.fixture
def bare_path(tmp_path):
    """A folder with the few programs that make needs, and no browser; more can be put there with `script`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "make", "mkdir", "touch", "cp", "cksum", "cut", "find", "head", "test", "dirname"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def test_make_takes_the_browser_that_is_there(workshop, bare_path):
    workshop("setup")
    script(bare_path / "google-chrome", "")
    assert workshop("browser", PATH=str(bare_path)) == (0, [], "")


def test_make_gets_a_browser_from_debian_as_root_and_else_from_playwright(workshop, bare_path, tmp_path):
    workshop("setup")
    script(bare_path / "id", "echo 1000")
    script(bare_path / "apt-get", f'echo "$@" >> "{tmp_path}/apt"; exit $APT_FAILS')
    code, calls, said = workshop("browser", PATH=str(bare_path), APT_FAILS="0")
    assert (code, calls) == (0, ["-m playwright install chromium"]), said
    assert not (tmp_path / "apt").exists()
    script(bare_path / "id", "echo 0")
    code, calls, said = workshop("browser", PATH=str(bare_path), APT_FAILS="0")
    assert (code, calls) == (0, []), said
    assert "install -q -y --no-install-recommends chromium" in (tmp_path / "apt").read_text()
    code, calls, said = workshop("browser", PATH=str(bare_path), APT_FAILS="1")
    assert (code, calls) == (0, ["-m playwright install chromium"]), said
    code, _, said = workshop("browser", PATH=str(bare_path), APT_FAILS="1", FAIL_AT="playwright")
    assert code != 0 and "no Chromium for the browser test" in said


@pytest.mark.parametrize(
    ("printed", "make_code", "green"),
    [
        ("3 passed, 1 skipped in 2s", 0, True),
        ("4 skipped in 2s", 0, False),
        ("", 0, False),
        ("3 passed, 1 failed", 2, False),
    ],
)
def test_ci_is_green_only_when_tests_ran(tmp_path, printed, make_code, green):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    script(tmp_path / "bin/make", f'test "$1" = lint && exit 0\necho "{printed}"\nexit {make_code}')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True)
    assert (done.returncode == 0) == green
