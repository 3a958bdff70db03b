"""Stage after stage, a record for each as soon as it is done; an interrupted run goes on with the stage it stopped in.

Nothing is kept of a stage that was interrupted: its files come into the folder whole or not at all, its record when it
is done. Which stages are left follows from the records alone.
"""

from __future__ import annotations

import datetime
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..evaluation.evaluate import plain
from ..results.provenance import commit, device_name, text_record, versions
from .job import Job
from .results import NAME, SCHEMA, Results, settings_key, unfinished
from .stages import STAGES

Say = Callable[[str], None]


def run_stages(job: Job, say: Say) -> list[dict[str, Any]]:
    """Run every stage of the job that is not done, and return the records of all of them, in order.

    Args:
        say: called with a line for a person when something begins, ends or is skipped.

    Raises:
        ConfigError: another run works in the folder.
        Whatever a stage raises; the stages before it are done then, and the next run goes on behind them.
    """
    with _alone(job.folder):
        results = Results(job.folder / NAME)
        about = _about(job)
        names = job.settings.stages
        done = [] if job.force else unfinished(results.read(), about["key"], names)
        run = done[0]["run"] if done else uuid.uuid4().hex[:8]
        found = {record["stage"]: dict(record) for record in done}
        if done:
            say(f"going on with run {run}: {', '.join(found)} done already (--force starts over)")
        for name in names:
            if name in found:
                continue
            say(f"{name} ...")
            started = time.perf_counter()
            result = STAGES[name](job)
            seconds = round(time.perf_counter() - started, 2)
            found[name] = _record(job, about, run, name, seconds, result)
            results.append(found[name])
            say(f"{name}: {_said(result)}{seconds:.1f} s")
        return [found[name] for name in names]


def _about(job: Job) -> dict[str, Any]:
    """What all records of a run share."""
    place = torch.device(job.settings.device)
    device = {"type": place.type, "name": device_name(place), "threads": torch.get_num_threads()}
    return {"key": settings_key(job.settings.typed(), device), "device": device, "settings": job.settings.record()}


def _record(
    job: Job, about: dict[str, Any], run: str, stage: str, seconds: float, result: dict[str, Any]
) -> dict[str, Any]:
    s = job.settings
    model = {
        "name": about["settings"]["model"], "fingerprint": job.fingerprint, "dtype": "float16" if s.half else "float32",
        "random_weights": job.found.random, "M": job.pq.M, "nbits": job.pq.nbits,
    }  # fmt: skip
    libraries = ("datasets", "rouge", "rapidfuzz", "jieba") if s.tasks else ("datasets",) if job.corpus.from_hub else ()
    texts = {}
    if "generation" in result:
        texts["timed_on"] = text_record(job.corpus.name, job.corpus.test_text)
    if "perplexity" in result:
        texts["evaluated_on"] = texts["timed_on"]
    return {
        "schema": SCHEMA, "command": "run", "run": run, **about, "stage": stage, "seed": s.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit(),
        "versions": versions(*libraries), "model": model, "texts": texts, "seconds": seconds, "result": _plain(result),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON types all the way down, with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else plain(value)


def _said(result: dict[str, Any]) -> str:
    if "file" not in result:
        return ""
    return f"{'kept' if result['kept'] else 'wrote'} {result['file']}{' (--force replaces it)' * result['kept']}, "


@contextmanager
def _alone(folder: Path):
    """The folder for this process; the lock goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another run works in {folder}; wait for its end, or choose another --out") from error
    try:
        yield
    finally:
        lock.release()
