"""How checks are run and what they say: every check for itself, a line each, a table and a verdict at the end."""

from __future__ import annotations

import logging
import random
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

import torch

from .. import kernels
from ..errors import PQCacheError
from ..results.provenance import commit, device_name, today, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.named import FoundModel
    from ..quantization import Codebooks

DETAILS = logging.getLogger("pqlab.check")


class Disagreement(AssertionError):
    """Two computations of the same thing differ, or one could not be made; `remedy` says what to do, if it is known."""

    def __init__(self, what: str, remedy: str = "") -> None:
        self.remedy = remedy
        super().__init__(what)


def expect(condition: object, what: str, remedy: str = "") -> None:
    """Raise `Disagreement` unless the condition holds; an assertion that `python -O` keeps."""
    if not condition:
        raise Disagreement(what, remedy)


Check = tuple[str, Callable[[], str]]
"""A name, and a function that returns what was compared, with its figure, and raises when it does not agree."""


@dataclass(frozen=True)
class Phase:
    """A group of checks.

    Args:
        name: as it is typed on the command line.
        title: what it looks at.
        checks: gives the checks of a session.
        remedy: what to do when one fails and does not say so itself.
    """

    name: str
    title: str
    checks: Callable[[Session], Iterable[Check]]
    remedy: str


@dataclass(frozen=True)
class Result:
    """What a check found: `said` is what it compared, with the figure, or what is wrong; `remedy` is for the latter."""

    phase: str
    check: str
    passed: bool
    said: str
    seconds: float
    remedy: str = ""


class Console:
    """Lines for a person; with a log file every line goes there too, and details go there only.

    Args:
        log: an open text file, or None.
    """

    def __init__(self, log: TextIO | None = None) -> None:
        self.log = log

    def header(self, title: str) -> None:
        self._line(f"\n== {title} ==")

    def info(self, text: str) -> None:
        self._line(f"[INFO] {text}")

    def success(self, text: str) -> None:
        self._line(f"[SUCCESS] {text}")

    def error(self, text: str) -> None:
        self._line(f"[ERROR] {text}")

    def plain(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)  # any terminal can show it
        if self.log is not None:
            self.log.write(text + "\n")
            self.log.flush()  # a crash in a kernel must not take the log away


class Session:
    """What the checks of one run share: the seed, the amount, the device, the model (loaded when first asked for)."""

    def __init__(
        self, console: Console, *, seed: int, full: bool = False, model: str = "default", random_weights: bool = False
    ) -> None:
        self.console = console
        self.seed = seed
        self.full = full
        self.model, self.random_weights = model, random_weights
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def amount(self, quick: int, full: int) -> int:
        return full if self.full else quick

    def generator(self, name: str) -> torch.Generator:
        """Randomness of one check, on the CPU: the same for a seed whatever else runs, on every device."""
        return torch.Generator().manual_seed(self._seed_of(name))

    def random(self, name: str) -> random.Random:
        return random.Random(self._seed_of(name))

    def _seed_of(self, name: str) -> int:
        return zlib.crc32(f"{self.seed} {name}".encode())  # 32 bits: torch's CPU generator takes no more

    @cached_property
    def found(self) -> FoundModel:
        from ..models.named import find_model

        return find_model(self.model, random=self.random_weights)

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        begin = time.perf_counter()
        model, tokenizer = self.found.load(torch.float32, self.device)
        size = sum(parameter.numel() for parameter in model.parameters())
        took = time.perf_counter() - begin
        kind = " of random weights" * self.found.random
        self.console.info(f"model {self.model}: {size / 1e6:,.0f} M parameters{kind} on {self.device}, {took:.1f} s")
        return model, tokenizer

    @cached_property
    def codebooks(self) -> Codebooks:
        from ..quantization import Codebooks, default_codebooks, default_codebooks_path

        if self.found.random:
            return Codebooks.random(self.loaded[0], maps=True)
        begin = time.perf_counter()
        if not default_codebooks_path(self.loaded[0]).exists():
            self.console.info("codebooks: none for this model yet, calibrating them once; this takes minutes on a CPU")
        books = default_codebooks(*self.loaded, progress=False)
        self.console.info(f"codebooks: {books}, {time.perf_counter() - begin:.1f} s")
        return books

    def prompt(self, tokens: int, name: str) -> torch.Tensor:
        """int64 [1, tokens]: a passage of the shipped novel, another at every seed."""
        from ..models import load_text

        text = load_text()
        start = self.random(name).randrange(len(text) - 12 * tokens)
        ids = self.loaded[1](text[start : start + 12 * tokens], return_tensors="pt").input_ids
        expect(ids.shape[1] >= tokens, f"{12 * tokens} characters gave {ids.shape[1]} tokens, not {tokens}")
        return ids[:, :tokens].to(self.device)


def run_phases(phases: Sequence[Phase], session: Session) -> list[Result]:
    """Run every check of every phase; one that fails does not keep the others from running."""
    console = session.console
    amount = "full" if session.full else "quick"
    with _logging_to(console):
        console.info(f"seed {session.seed} ({amount}); the same inputs again: --seed {session.seed}")
        kernels.wait()
        results: list[Result] = []
        for phase in phases:
            console.header(phase.title)
            try:
                checks = list(phase.checks(session))
            except Exception as error:
                checks = [("preparation", _raising(error))]
            results += [_run_check(phase, name, check, session) for name, check in checks]
    return results


def verdict(results: Sequence[Result], session: Session) -> int:
    """Print the table and the verdict; the exit code."""
    console = session.console
    console.header("Summary")
    width = max((len(r.check) for r in results), default=0)
    for r in results:
        console.plain(f"{r.phase:<12} {r.check:<{width}}  {'passed' if r.passed else 'FAILED'}  {r.seconds:6.1f} s")
    failed = [r for r in results if not r.passed]
    total = sum(r.seconds for r in results)
    if not results:
        console.error("Nothing was checked.")
        return 1
    if not failed:
        console.success(f"Verdict: all {len(results)} checks passed in {total:.0f} s.")
        return 0
    console.error(f"Verdict: {len(failed)} of {len(results)} checks failed in {total:.0f} s.")
    phases = " ".join(dict.fromkeys(f"--{r.phase}" for r in failed if r.phase != "environment"))
    for remedy in dict.fromkeys(r.remedy for r in failed):
        console.plain(f"  {', '.join(r.check for r in failed if r.remedy == remedy)}: {remedy}")
    again = f"python -m pqlab check {phases} --seed {session.seed} --debug pqlab-check".replace("  ", " ")
    console.plain(f"  The same checks with every detail in a file: {again}")
    return 1


def record(results: Sequence[Result], session: Session) -> dict[str, Any]:
    """A run as JSON types: what it ran on and with, whether all passed, and every check's `Result`."""
    looked_up = "found" in vars(session)  # no check may have asked for the model
    return {
        "command": "check", "device": device_name(session.device), "date": today(), "commit": commit(),
        "versions": versions(), "threads": torch.get_num_threads(), "model": session.model,
        "random_weights": session.found.random if looked_up else session.random_weights,
        "seed": session.seed, "full": session.full,
        "passed": bool(results) and all(r.passed for r in results),
        "checks": [asdict(r) | {"seconds": round(r.seconds, 3)} for r in results],
    }  # fmt: skip


def _run_check(phase: Phase, name: str, check: Callable[[], str], session: Session) -> Result:
    console, begin = session.console, time.perf_counter()
    DETAILS.debug("check %s", name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said, passed, remedy = check(), True, ""
        except Exception as error:
            DETAILS.debug("%s", traceback.format_exc())
            said, passed = " ".join(str(error).split())[:600], False
            if not isinstance(error, (Disagreement, PQCacheError)):  # their messages speak for themselves
                said = f"{type(error).__name__}: {said}"
            remedy = getattr(error, "remedy", "") or phase.remedy
    seconds = time.perf_counter() - begin
    for text in dict.fromkeys(" ".join(str(w.message).split()) for w in caught):
        console.info(f"{name} warned: {text[:200]}")
    if passed:
        console.success(f"{name}: {said} ({seconds:.1f} s)")
    else:
        console.error(f"{name}: {said} What to do: {remedy}")
    DETAILS.debug("check %s took %.3f s", name, seconds)
    return Result(phase.name, name, passed, said, seconds, remedy)


def _raising(error: Exception) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


class _Lines(logging.Handler):
    """What pqlab logs: warnings become lines for a person, everything goes to the log file."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("[DEBUG] %(asctime)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.console.info(record.getMessage())
        elif self.console.log is not None:
            self.console.log.write(self.format(record) + "\n")
            self.console.log.flush()


@contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    logger, handler = logging.getLogger("pqlab"), _Lines(console)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if console.log is not None else logging.WARNING)
    try:
        DETAILS.debug("%r", kernels.backend_report())
        yield
        DETAILS.debug("%r", kernels.backend_report())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
