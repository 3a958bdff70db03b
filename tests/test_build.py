"""Building kernels: whatever happens to a build, the next import works and says what it did.

A trial source of one line goes the same way as the kernels; each test has a cache folder of its own.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pqlab.compiler import compiler_command
from pqlab.kernels import build
from pqlab.kernels.build import Extension
from pqlab.kernels.progress import ProgressLine

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    shutil.which(compiler_command()[0]) is None, reason="there is no C++ compiler to build with"
)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A cache folder, a fallback folder and a source folder of this test's own."""
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PQLAB_BUILD", raising=False)
    source = tmp_path / "source" / "trial.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }\n')
    return tmp_path


def trial(tmp_path: Path, **options) -> tuple[Extension, list[int]]:
    answers: list[int] = []

    def load(path: Path) -> None:
        answers.append(ctypes.CDLL(str(path)).answer())

    return Extension("trial", [tmp_path / "source" / "trial.cpp"], load, **options), answers


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob("trial-*/trial*.so"))


def leftovers(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob(".trial-*"))


def slow_compiler(tmp_path: Path, monkeypatch) -> Path:
    """Makes compiling wait as long as the returned file exists."""
    switch, compiler = tmp_path / "slow", tmp_path / "g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *trial.cpp*) while [ -e {switch} ]; do sleep 0.05; done;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    switch.touch()
    monkeypatch.setenv("CXX", str(compiler))
    return switch


@needs_compiler
def test_a_build_is_loaded_from_the_cache_afterwards(folders):
    first, answers = trial(folders)
    first.start("eager")
    assert (first.status.state, first.status.cached, answers) == ("ready", False, [42]), first.status.error
    again, answers = trial(folders)
    again.start("off")  # nothing may be built, and nothing has to be
    assert (again.status.state, again.status.cached, answers) == ("ready", True, [42])
    assert again.status.seconds < 0.5
    assert leftovers(folders) == []
    assert {file.name for file in libraries(folders)[0].parent.iterdir()} == {"trial.so", "build.json"}


@needs_compiler
def test_a_background_build_runs_beside_the_import(folders, monkeypatch):
    switch = slow_compiler(folders, monkeypatch)
    extension, answers = trial(folders)
    extension.start("background")
    assert extension.status.state == "building"
    assert "pqlab.kernels.wait()" in extension.status.detail
    assert not extension.wait(0.01)
    switch.unlink()
    assert extension.wait(60)
    assert (extension.status.state, answers) == ("ready", [42]), extension.status.error


@needs_compiler
def test_the_key_follows_sources_and_flags(folders):
    keys = {trial(folders)[0]._key(), trial(folders, cflags=["-O1"])[0]._key()}
    (folders / "source" / "helper.h").write_text("#define X 1\n")  # a header counts although nothing names it
    keys.add(trial(folders)[0]._key())
    (folders / "source" / "trial.cpp").write_text('extern "C" int answer() { return 43; }\n')
    keys.add(trial(folders)[0]._key())
    assert len(keys) == 4


@needs_compiler
def test_the_key_follows_headers_of_other_folders(folders):
    header = folders / "struct.h"
    keys = set()
    for text in ("#define SIZE 1\n", "#define SIZE 2\n"):
        header.write_text(text)
        keys |= {trial(folders, headers=[header])[0]._key(), trial(folders)[0]._key()}
    assert len(keys) == 3


@needs_compiler
def test_what_comes_next_begins_when_a_library_is_there(folders):
    begun: list[str] = []
    for _ in ("built", "cached"):
        extension, answers = trial(folders, then=begun.append)
        extension.start("eager")
        assert (extension.status.state, answers, begun) == ("ready", [42], ["eager"])
        begun.clear()
    (folders / "source" / "trial.cpp").write_text("no\n")
    extension, _ = trial(folders, then=begun.append)
    extension.start("eager")
    assert extension.status.state == "failed" and not begun


@needs_compiler
def test_a_killed_build_leaves_nothing_in_the_way(folders, monkeypatch):
    switch = slow_compiler(folders, monkeypatch)
    script = (
        "import sys, time; from pathlib import Path; from pqlab.kernels.build import Extension\n"
        "Extension('trial', [Path(sys.argv[1])], print).start('background'); time.sleep(60)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", script, str(folders / "source" / "trial.cpp")], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not any((left / "build.ninja").exists() for left in leftovers(folders)):
            assert time.monotonic() < deadline, "the build did not begin"
            time.sleep(0.02)
        time.sleep(0.2)  # ninja runs; it will outlive its parent
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    (left,) = leftovers(folders)
    (left / "lock").touch()  # cpp_extension's own lock, for ever
    switch.unlink()
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("ready", [42]), extension.status.error
    assert leftovers(folders) == []


EIGHT = """
import ctypes, os, sys
from pathlib import Path
from pqlab.kernels.build import Extension
import torch.utils.cpp_extension  # once, before the processes part

def child():
    answers = []
    extension = Extension("trial", [Path(sys.argv[1])], lambda path: answers.append(ctypes.CDLL(str(path)).answer()))
    extension.start("eager")
    assert extension.status.state == "ready" and answers == [42], extension.status
    return extension.status.cached

read, write = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        code = b"x"
        try:
            code = b"c" if child() else b"b"
        finally:
            os.write(write, code)
            os._exit(0)
os.close(write)
for _ in range(8):
    os.wait()
print(os.read(read, 100).decode())
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the eight processes")
def test_eight_processes_at_once_build_once(folders):
    command = [sys.executable, "-W", "ignore", "-c", EIGHT, str(folders / "source" / "trial.cpp")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.strip()) == ["b"] + ["c"] * 7, done.stdout + done.stderr
    assert len(libraries(folders)) == 1
    assert leftovers(folders) == []


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "no record", "folder only"])
def test_a_damaged_build_is_replaced(folders, damage):
    trial(folders)[0].start("eager")
    (library,) = libraries(folders)
    if damage == "truncated":
        shutil.copy(library, folders / "copy")  # a library that is in use must not be cut short in place
        library.unlink()
        library.write_bytes((folders / "copy").read_bytes()[:1000])
    elif damage == "no record":
        (library.parent / "build.json").unlink()
    else:
        shutil.rmtree(library.parent)
        library.parent.mkdir()
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, extension.status.cached, answers) == ("ready", False, [42]), extension.status.error
    again, _ = trial(folders)
    again.start("off")
    assert again.status.state == "ready"


@needs_compiler
def test_a_compile_error_is_kept_for_the_report(folders):
    (folders / "source" / "trial.cpp").write_text("int answer() { return nonsense; }\n")
    extension, _ = trial(folders)
    extension.start("eager")
    assert extension.status.state == "failed"
    assert "error:" in extension.status.detail and "nonsense" in extension.status.detail
    assert "return nonsense" in extension.status.error  # the compiler's whole output
    assert leftovers(folders) == []
    assert extension.wait(0)


@needs_compiler
def test_a_full_disk_fails_the_build_only(folders, monkeypatch):
    compiler = folders / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *trial.cpp*) echo "fatal error: No space left on device" >&2; exit 1;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    extension, _ = trial(folders)
    extension.start("eager")
    assert extension.status.state == "failed"
    assert "No space left on device" in extension.status.detail
    assert leftovers(folders) == []


@needs_compiler
def test_a_read_only_cache_falls_back_and_says_so(folders, monkeypatch):
    monkeypatch.setenv("PQLAB_CACHE", "/proc/pqlab")  # nobody can make a folder there, not even root
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("ready", [42]), extension.status.error
    assert "/proc/pqlab/kernels cannot be written" in extension.status.detail
    again, _ = trial(folders)
    again.start("off")
    assert (again.status.state, again.status.cached) == ("ready", True)


@needs_compiler
def test_a_fallback_folder_of_somebody_else_is_not_trusted(folders, monkeypatch):
    monkeypatch.setenv("PQLAB_CACHE", "/proc/pqlab")
    trial(folders)[0].start("eager")
    monkeypatch.setattr(build, "_is_ours", lambda folder: False)
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("failed", [])
    assert "belongs to somebody else" in extension.status.detail


class Slow:
    """A build that ends a twentieth of a second after it is waited for."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def wait(self, timeout: float) -> bool:
        self.given.append(timeout)
        time.sleep(min(timeout, 0.05))
        return timeout >= 0.05


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_all_builds_of_a_backend_share_one_time(name):
    """Each kernel of a GPU was waited for as long as all together might take."""
    from pqlab.kernels.cpu import CpuBackend
    from pqlab.kernels.cuda import CudaBackend

    builds = [Slow(), Slow()]
    backend = {"cpu": CpuBackend, "cuda": CudaBackend}[name]()
    if name == "cuda":
        backend._kernels = {build: SimpleNamespace(extension=build) for build in builds}
    else:
        backend.extension, backend.caller = builds[0], SimpleNamespace(extension=builds[1])
    assert backend.wait(10)
    assert builds[0].given[0] <= 10 and builds[1].given[0] <= 10 - 0.05
    assert not backend.wait(0.07), "enough for either of them, not for both"


def test_without_ninja(folders, monkeypatch):
    tools = folders / "tools"
    tools.mkdir()
    (tools / "c++").symlink_to(sys.executable)  # never run
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "_scripts_folder", lambda: str(folders))
    extension, _ = trial(folders)
    extension.start()
    assert (extension.status.state, extension.status.detail) == ("failed", "ninja was not found; pip install ninja")


@needs_compiler
def test_ninja_of_a_virtual_environment_that_is_not_activated(folders, monkeypatch):
    ninja = shutil.which("ninja") or shutil.which("ninja", path=build._scripts_folder())
    if ninja is None:
        pytest.skip("there is no ninja")
    tools, scripts = folders / "tools", folders / "scripts"
    tools.mkdir(), scripts.mkdir()
    for tool in ("c++", "g++", "gcc", "cc", "as", "ld", "sh", "which"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    (scripts / "ninja").symlink_to(ninja)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "_scripts_folder", lambda: str(scripts))
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("ready", [42]), extension.status.error
    assert os.environ["PATH"] == str(tools)


def test_without_a_compiler(folders, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    extension, _ = trial(folders)
    extension.start()
    assert extension.status.state == "failed"
    assert extension.status.detail == "no C++ compiler (no-such-compiler) was found; install g++ or set CXX"


@needs_compiler
def test_a_compiler_behind_a_wrapper_with_options(folders, monkeypatch):
    """What the doctor calls a compiler is one; torch's cpp_extension takes the name of one program only."""
    from pqlab.doctor import PROBES

    log, wrapper = folders / "log", folders / "my wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec "$@"\n')
    wrapper.chmod(0o755)
    command = f"'{wrapper}' {shutil.which('c++')} -DANSWER=43"
    monkeypatch.setenv("CXX", command)
    assert not PROBES["compiler"]().problem
    (folders / "source" / "trial.cpp").write_text('extern "C" int answer() { return ANSWER; }\n')
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("ready", [43]), extension.status.error
    assert "-DANSWER=43" in log.read_text() and "trial.cpp" in log.read_text()
    assert os.environ["CXX"] == command and "TORCH_NO_COMPILER_WRAPPER" not in os.environ
    key = trial(folders)[0]._key()
    monkeypatch.setenv("CXX", command.replace("43", "44"))
    assert trial(folders)[0]._key() != key, "another option is another library"


@needs_compiler
def test_an_empty_name_is_the_default_compiler(folders, monkeypatch):
    from pqlab.doctor import PROBES

    monkeypatch.setenv("CXX", "")
    assert compiler_command() == ["c++"] and not PROBES["compiler"]().problem
    extension, answers = trial(folders)
    extension.start("eager")
    assert (extension.status.state, answers) == ("ready", [42]), extension.status.error
    assert os.environ["CXX"] == ""


@needs_compiler
def test_builds_side_by_side_give_the_environment_back(folders, monkeypatch):
    """The first to end must not take away what the other one still needs, and no key is that of the script."""
    switch = slow_compiler(folders, monkeypatch)
    command = f"env {os.environ['CXX']}"
    monkeypatch.setenv("CXX", command)
    path = os.environ["PATH"]
    key = trial(folders)[0]._key()
    slow, answers = trial(folders)
    slow.start("background")
    deadline = time.monotonic() + 60
    while os.environ["CXX"] == command and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.environ["CXX"] != command and trial(folders)[0]._key() == key
    (folders / "quick").mkdir()
    (folders / "quick" / "other.cpp").write_text('extern "C" int answer() { return 41; }\n')
    quick = Extension("other", [folders / "quick" / "other.cpp"], lambda path: None)
    quick.start("eager")
    assert quick.status.state == "ready", quick.status.error
    assert os.environ["CXX"] != command, "the slow one still builds"
    switch.unlink()
    assert slow.wait(60) and (slow.status.state, answers) == ("ready", [42]), slow.status.error
    assert (os.environ["CXX"], os.environ["PATH"]) == (command, path)


def test_a_wrapper_without_its_compiler_is_a_problem(folders, monkeypatch):
    from pqlab.doctor import PROBES

    monkeypatch.setenv("CXX", "env no-such-compiler")
    assert "env no-such-compiler --version fails" in PROBES["compiler"]().problem


@needs_compiler
def test_a_cached_build_outlives_its_compiler(folders, monkeypatch):
    trial(folders)[0].start("eager")
    monkeypatch.setenv("CXX", "no-such-compiler")
    extension, answers = trial(folders)
    extension.start()
    assert (extension.status.state, answers) == ("ready", [42])


def test_building_turned_off(folders, monkeypatch):
    monkeypatch.setenv("PQLAB_BUILD", "off")
    extension, _ = trial(folders)
    extension.start()
    assert extension.status.state == "off"
    assert "PQLAB_BUILD=off" in extension.status.detail
    assert extension.wait(0)
    monkeypatch.setenv("PQLAB_BUILD", "sometimes")
    with pytest.raises(ValueError, match="PQLAB_BUILD = 'sometimes' is unknown; set one of background, eager, off"):
        extension.start()


def test_progress_is_one_line_in_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    line = ProgressLine("pqlab: building trial")
    time.sleep(1.2)
    line.finish("ready in 1.2 s")
    line.finish("never")
    shown = sys.stderr.getvalue()
    assert shown.endswith("\r\x1b[Kpqlab: building trial: ready in 1.2 s\n")
    assert "pqlab: building trial ... 1 s" in shown
    assert shown.count("\n") == 1
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    ProgressLine("quiet").finish("done")
    assert sys.stderr.getvalue() == ""


REPORT = """
import json, time
import pqlab.kernels as kernels
kernels.start()
kernels.wait()
import torch
codes = kernels.ops.encode(torch.eye(4)[None], torch.eye(4).view(1, 1, 4, 4))
print(json.dumps({"codes": codes.flatten().tolist(), **kernels.backend_report().as_dict()}))
"""


def run_import(**environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@needs_compiler
def test_the_real_kernels_are_built_once_and_loaded_in_less_than_half_a_second(folders):
    report = run_import(PQLAB_BUILD="eager")
    assert report["builds"]["cpu"]["state"] == "ready", report["builds"]["cpu"]["error"]
    assert not report["builds"]["cpu"]["cached"]
    assert "-O3" in report["builds"]["cpu"]["flags"]
    again = run_import()
    assert again["builds"]["cpu"]["cached"]
    assert again["builds"]["cpu"]["seconds"] < 0.5
    assert again["codes"] == [0, 1, 2, 3]


def test_import_without_compiler_ninja_or_cache_runs_on_the_reference(folders):
    report = run_import(PATH=str(folders), CXX="no-such-compiler", PQLAB_CACHE="/proc/pqlab")
    assert report["builds"]["cpu"]["state"] == "failed"
    assert {choice["backend"] for choice in report["choices"] if choice["device"] == "cpu"} == {"reference"}
    assert report["codes"] == [0, 1, 2, 3]
    assert "no C++ compiler (no-such-compiler) was found" in report["choices"][0]["reason"]
