"""What holds for every command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pqlab import cli


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
@pytest.mark.parametrize(("typed", "status"), [(["claims"], cli.BROKEN_PIPE), (["claims", "--help"], 0)])
def test_a_pipe_that_nobody_reads_ends_it_quietly(typed, status):
    """As in `pqlab claims | head`: the reader goes before anything is written. (argparse minds no pipe.)"""
    command = [sys.executable, "-m", "pqlab", *typed]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (status, "")


def test_another_pipe_that_breaks_is_no_matter_of_the_output(monkeypatch):
    def broken(argv):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(BrokenPipeError, match="a worker has gone"):
        cli.main(["claims"])
