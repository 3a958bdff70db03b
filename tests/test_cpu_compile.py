"""The C++ of the CPU compiles for every set of vector instructions it has loops for, not just this machine's."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from pqlab.kernels.cpu import SOURCES, compile_flags

COMPILER = shutil.which("c++")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.skipif(COMPILER is None or not ON_X86, reason="needs a C++ compiler for x86")
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cpp")), ids=lambda path: path.stem)
@pytest.mark.parametrize("machine", ["x86-64-v2", "x86-64-v3", "icelake-server"])
def test_a_source_compiles_for_a_machine(source, machine):
    flags = [*compile_flags(machine), "-Wall", "-Werror=unused"]
    done = subprocess.run([COMPILER, *flags, "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
