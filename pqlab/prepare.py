"""`python -m pqlab setup`: everything a notebook needs, made before it is opened. What is there already stays."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError
from .store import cache_dir


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", type=Path, metavar="FILE", help="write the paths of what was made, one a line "
                        "(default: none)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.list:  # what cannot be written is said before the long work
        if args.list.is_dir():
            raise ConfigError(f"--list {args.list} is a folder; name a file")
        args.list.parent.mkdir(parents=True, exist_ok=True)
    print(f"pqlab: preparing {cache_dir()}", flush=True)
    try:
        made = prepare()
    except OSError as error:  # no network, no space, no right to write: the message says what to do, a trace does not
        print(f"pqlab: {error}", file=sys.stderr)
        return 1
    if args.list:
        args.list.write_text("".join(f"{path}\n" for path in made))
    return 0


def prepare() -> list[Path]:
    """Make what is missing: model, kernels, codebooks. Returns the files and folders that are kept."""
    from . import models, quantization

    made: list[Path] = []

    def step(name: str, make: Callable[[], tuple[str, list[Path]]]) -> None:
        start = time.perf_counter()
        said, paths = make()
        made.extend(paths)
        print(f"pqlab: {name}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)

    def model() -> tuple[str, list[Path]]:
        path = models.ensure_default_model()
        return f"{models.PACKAGED['default'].name}, {_megabytes(path)}, {path}", [path]

    def text() -> tuple[str, list[Path]]:
        return f"{len(models.load_text()):,} characters of {models.texts()['pride'].title}", []

    def codebooks() -> tuple[str, list[Path]]:
        loaded, tokenizer = models.load_model("default")
        quantization.default_codebooks(loaded, tokenizer)
        path = quantization.default_codebooks_path(loaded)
        return f"{_megabytes(path)}, {path}", [path]

    step("model", model)
    step("text", text)
    step("kernels", _kernels)  # before the codebooks: calibration may use them
    step("codebooks", codebooks)
    return made


def _kernels() -> tuple[str, list[Path]]:
    from . import kernels

    kernels.wait()
    report = kernels.backend_report().as_dict()
    for name, build in report["builds"].items():
        if build["state"] == "failed":  # no reason to stop: what runs instead does the same, slower
            print(f"pqlab: the build of {name} failed; {build['instead']}.\n{build['error']}", flush=True)
    paths = [Path(build["path"]) for build in report["builds"].values() if build["state"] == "ready" and build["path"]]
    return "; ".join(f"{c['op']} on {c['device']}: {c['backend']}" for c in report["choices"]), paths


def _megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.0f} MB"
