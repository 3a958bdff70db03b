"""What holds for every command."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pqlab import cli
from pqlab.arguments import CACHE_FLAGS
from pqlab.benchmarks.bench import BENCHMARKS
from pqlab.claims.reported import CLAIMS
from pqlab.config import DEFAULTS, CacheConfig

EVERY = [(name,) for name in cli.COMMANDS if name != "bench"] + [("bench", name) for name in BENCHMARKS]
NEEDED = {("run",): ("-p", "baseline")}
"""What has to be typed behind a command."""

FOLDER = Path(__file__).parents[1]


def parser_of(command: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser of a command, with its options."""
    top = cli.Parser(prog="pqlab")
    names = top.add_subparsers()
    made = names.add_parser(command[0], description="about it")
    cli.import_module(cli.COMMANDS[command[0]][0]).configure(made)
    for name in command[1:]:
        (choices,) = (action.choices for action in made._actions if isinstance(action, argparse._SubParsersAction))
        made = choices[name]
    return made


def options_of(command: tuple[str, ...]) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser_of(command)._actions}


def typed(*words: str) -> argparse.Namespace:
    return cli.parsed(words)[1]


def wrong(capsys, *words: str) -> str:
    """What a command that cannot be run says: one line, and on standard error alone."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, ""), said
    (line,) = said.err.splitlines()
    return line


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
@pytest.mark.parametrize(("words", "status"), [(["claims"], cli.BROKEN_PIPE), (["claims", "--help"], 0)])
def test_a_pipe_that_nobody_reads_ends_it_quietly(words, status):
    """As in `pqlab claims | head`: the reader goes before anything is written. (argparse minds no pipe.)"""
    command = [sys.executable, "-m", "pqlab", *words]
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


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_help_says_what_an_option_is_and_its_default(command):
    parser = parser_of(command)
    said = cli.Help("pqlab")
    for action in parser._actions:
        text = said._expand_help(action)
        assert text, action.option_strings
        if action.option_strings and action.nargs != 0 and not action.required:  # those that take a value
            assert "(default: " in text and "None" not in text and "[]" not in text, (action.option_strings, text)
    assert all(len(line) <= 120 for line in (parser.description or "").splitlines())


def test_defaults_are_shown_as_they_are_typed():
    parser = cli.Parser(prog="it", add_help=False)
    parser.add_argument("--sizes", nargs="+", default=[1, 2], help="sizes")
    parser.add_argument("--share", default="5%", help="a share")
    parser.add_argument("--all", action="store_true", help="all of them")
    said = " ".join(parser.format_help().split())
    assert "sizes (default: 1 2)" in said and "a share (default: 5%)" in said and said.endswith("all of them")


# -- one name, one default --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there_is_one", [True, False])
def test_the_device_is_a_gpu_where_there_is_one(there_is_one, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    defaults = {" ".join(c): options_of(c)["device"].default for c in EVERY if "device" in options_of(c)}
    assert set(defaults.values()) == {"cuda" if there_is_one else "cpu"}
    assert {"eval", "plan", "presets", "run", "tune", "bench passkey", "bench kv", "bench texts"} < set(defaults)


def test_a_model_is_named_alike_everywhere():
    for command in EVERY:
        model = options_of(command).get("model")
        assert model is None or model.option_strings == ["-f", "--model"], command
    named = [command for command in EVERY if "model" in options_of(command)]
    assert len(named) == 13
    for command in named:
        args = typed(*command, *NEEDED.get(command, ()), "-f", "gemma")
        assert args.model == ("gemma" if "random_weights" in options_of(command) else "gemma3-270m")
        assert args.random_weights is False


@pytest.mark.parametrize("command", [c for c in EVERY if CACHE_FLAGS.keys() & options_of(c).keys()], ids=" ".join)
def test_both_spellings_of_a_setting(command):
    options = options_of(command)
    values = {"page_size": "32", "residual": "64", "max_pages": "100"}
    for name in values.keys() & options.keys():
        for flag in CACHE_FLAGS[name]:
            found = getattr(typed(*command, *NEEDED.get(command, ()), flag, values[name]), name)
            assert found in (int(values[name]), [int(values[name])]), flag
    of_library = {"page_size": CacheConfig().page_size, "residual": CacheConfig().residual_length, "sinks": 4}
    of_report = {**of_library, "page_size": DEFAULTS["page_size"], "residual": DEFAULTS["extended_residual"]}
    for name in of_library.keys() & options.keys():
        assert options[name].default in (None, (of_report if command == ("run",) else of_library)[name])


def test_the_reports_command_line():
    words = (
        "run -f default --dataset pride -p baseline sampling training evaluation --paged --page_size 32 "
        "--extended_residual 64 --max_pages 500 -M 16 --nbits 6 -m --half --breakdown --new_tokens 9"
    )
    args = typed(*words.split())
    assert (args.page_size, args.residual, args.max_pages, args.M, args.nbits) == (32, 64, 500, 16, 6)
    assert args.merged and args.half and args.breakdown and args.paged and args.new_tokens == 9
    assert args.pipeline == ["baseline", "sampling", "training", "evaluation"]


def test_commands_that_are_written_down_can_be_typed(monkeypatch, tmp_path):
    """Those of the README, the notebooks and the claims."""
    sources = [FOLDER / "README.md", *sorted((FOLDER / "notebooks").glob("*.ipynb"))]
    text = "\n".join(path.read_text(encoding="utf-8").replace("\\n", "\n") for path in sources)
    text += "\n" + "\n".join(f"`{claim.command}`" for claim in CLAIMS)
    found = {match.split("#")[0].strip() for match in re.findall(r"python -m pqlab ([^`\n\"]*)", text)}
    monkeypatch.chdir(tmp_path)
    Path("plan-bits-2.25-span256.safetensors").touch()
    tried = 0
    for command in sorted(found):
        words = ["8192" if word == "{}" else word for word in shlex.split(command)]
        if words == ["bench"] or "shuffled" in words:  # at the end of a line; a policy that a reader is to write
            continue
        cli.parsed(words)
        tried += 1
    assert tried > 25


# -- what is wrong is said in a line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evl", "pqlab: argument COMMAND: invalid choice: 'evl'"),
        ("eval --nonsense", "pqlab eval: unrecognized arguments: --nonsense"),
        ("eval --device nonsense", "device = nonsense cannot be used (torch knows no such device)"),
        ("eval --device meta", "device = meta cannot be used"),
        ("eval --text nowhere.txt", "there is no text file nowhere.txt"),
        ("eval --calibration nowhere.txt", "there is no text file nowhere.txt"),
        ("eval --codebooks nowhere", "there is no file nowhere"),
        ("eval --windows 0", "0 is out of range (at least 1)"),
        ("eval --out no/where.json", "there is no folder for no/where.json"),
        ("eval --model debug-model", "debug-model has random weights"),
        ("plan --bits 2 --device nonsense", "pqlab plan: device = nonsense"),
        ("plan --bits 2 --span 100", "the nearest good value is 128"),
        ("plan --bits 2 --choices 3", "invalid choice: 3"),
        ("plan --bits 0", "0 is out of range (above 0)"),
        (f"plan --bits 2 --out {__file__}", "is a file; name a folder"),
        ("presets --device nonsense", "pqlab presets: device = nonsense"),
        ("presets --parameters -1", "-1 is out of range (above 0)"),
        ("tune --device nonsense", "pqlab tune: device = nonsense"),
        ("tune --span x", "'x' is no whole number"),
        ("tune --storage no/where", "there is no folder for no/where"),
        ("tune --storage foo://bar", "the storage foo://bar cannot be opened"),
        (f"tune --storage {Path(__file__).parent}", "is a folder; name a file for the study"),
        ("run -p baseline --device nonsense", "pqlab run: device = nonsense"),
        (f"run -p baseline --out {__file__}", "is a file; name a folder"),
        ("run -p training -m --span 256 -f debug-model", "leave -m or --span out"),
        ("claims --results nowhere", "pqlab claims: there is no folder nowhere"),
        ("setup --list /", "pqlab setup: --list / is a folder"),
        ("bench kv --codebooks nowhere", "pqlab bench kv: argument --codebooks: there is no file nowhere"),
        ("bench baseline --new-tokens 1 -f debug-model --device cpu", "new_tokens = 1 is out of range (at least 2)"),
        ("bench breakdown --device nonsense", "pqlab bench breakdown: device = nonsense"),
        ("bench calibration --device nonsense", "pqlab bench calibration: device = nonsense"),
        ("bench texts --device nonsense", "pqlab bench texts: device = nonsense"),
        ("bench cpu --only nothing", "--only nothing: no case is called so"),
        ("bench layout --device nonsense", "invalid choice: 'nonsense'"),
        ("bench memory --shape tiny --model default --device cpu", "give --model or --shape, not both"),
        ("bench memory --device nonsense", "pqlab bench memory: device = nonsense"),
        ("bench memory --csv no/where", "there is no folder for no/where"),
        ("bench memory -f debug-model --context 9999 --device cpu", "more than the model's 4096 positions"),
        ("bench model --plan nowhere", "there is no file nowhere"),
        (f"bench model --device cpu --plan {__file__}", "cannot be read as a safetensors file"),
        ("bench pool --sizes 10", "10 is out of range (at least 100)"),
        ("bench rotary --device nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_what_is_wrong_is_one_line(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = wrong(capsys, *words.split())
    assert line.startswith("pqlab") and said in line


def test_files_that_are_no_text(tmp_path, capsys):
    (tmp_path / "junk.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "junk.xz").write_bytes(b"\xff\xfe\xfd")
    for name in ("junk.txt", "junk.xz"):
        words = ["bench", "baseline", "-f", "debug-model", "--device", "cpu", "--text", str(tmp_path / name)]
        assert f"{name} is no text in UTF-8" in wrong(capsys, *words)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch, capsys):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr("pqlab.models.hub.hub_answers", lambda: False)
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained",
        lambda *args: asked.append(constants.HF_HUB_OFFLINE) or (_ for _ in ()).throw(OSError("no route")),
    )
    assert "could not be read from the Hugging Face hub: no route" in wrong(capsys, "eval", "-f", "some/model")
    assert asked == [True] and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), AssertionError("a bug")])
def test_a_fault_of_pqlab_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr("pqlab.claims.run", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["claims"])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_says_what_to_lower(error, monkeypatch, capsys):
    monkeypatch.setattr("pqlab.claims.run", lambda args: (_ for _ in ()).throw(error))
    assert cli.main(["claims"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"pqlab claims: {error}" and "--device cpu" in second
