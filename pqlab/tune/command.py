"""`python -m pqlab tune`: search, print the front, write the picture and the preset."""

from __future__ import annotations

import argparse
import json
import re
import sys
from math import isnan
from pathlib import Path

import pandas as pd

from ..arguments import (
    above_zero,
    add_cache_choices,
    add_json,
    add_model_arguments,
    add_span,
    add_text,
    load,
    output_folder,
    whole,
)
from ..errors import ConfigError
from ..kernels.cuda_config import NBITS as CUDA_NBITS
from ..memory import readable_bytes
from ..paging.policy import POLICIES
from ..quantization.defaults import CALIBRATION_TEXT
from ..results.provenance import commit, today, versions
from .choice import choose, price, timed_again, with_times
from .space import NBITS, PAGE_SIZES, TIMES, Setting, Space
from .storage import need_optuna, open_storage
from .study import Search
from .workload import CONTEXT, POSITIONS, Workload, preset_of

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

HELP = """\
First the report's grid (page 16 to 256, residual 2x and 4x the page), then settings that Optuna proposes, until the
study holds --trials measured ones or --timeout is over. A setting is measured behind a prompt of --context tokens, run
once: KL over the tokens behind it, on the decode path; time per token by decoding on with the real cache, flushes
counted in; bytes from the layout. Settings above --memory are told to the sampler and not measured, repeated ones are
passed over; neither counts as a trial. Codebooks for a new M and nbits are calibrated once (minutes) and kept; --span
is the same for all of them.
The same command goes on where it was stopped. Several processes, or machines of one kind, may share a --storage.
First timings lie minutes apart, and processes on one machine take each other's cores: at the end the settings that may
be the best are timed again, all in turns, and one is chosen by that (have the last process run alone).
With --random-weights there is no KL to speak of: codebooks are random, and time is weighed against bytes."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}.\n\n{HELP}"
    add = parser.add_argument
    add_model_arguments(parser)
    add_text(parser)
    add_text(parser, CALIBRATION_TEXT, "text that codebooks are made on", "--calibration")
    add("--context", type=whole(), default=CONTEXT, metavar="TOKENS", help="tokens of the prompt")
    add("--positions", type=whole(), default=POSITIONS, metavar="TOKENS", help="tokens behind it that the KL is a mean "
        "of")  # fmt: skip
    add("--memory", type=bytes_of, metavar="SIZE", help="most that a cache may take, e.g. 64MiB (default: no limit)")
    add("--trials", type=whole(), default=40, metavar="COUNT", help="measured settings in the study, all runs and "
        "processes together")  # fmt: skip
    add("--timeout", type=above_zero, metavar="SECONDS", help="begin no trial after this time (default: no limit)")
    residuals = sorted({times * page for times in TIMES for page in PAGE_SIZES})
    add_cache_choices(
        parser,
        page_size=f"tokens of a page, values to try (default: the report's, {' '.join(map(str, PAGE_SIZES))})",
        residual="newest tokens that stay exact, values to try (default: the report's, "
        f"{' '.join(map(str, residuals))})",
        M="subspaces of a head, values to try (default: a quarter and half of the head size)",
        nbits=f"bits of a code, values to try (default: {' '.join(map(str, NBITS))}; on a GPU "
        f"{' '.join(map(str, CUDA_NBITS))})",
        policy=f"page policies to try (default: all, {' '.join(sorted(POLICIES))})",
    )
    add_span(parser)
    add("--storage", default="tune.journal", metavar="PLACE", help="a file (*.db, *.sqlite: SQLite; else a journal, "
        "the better one for several processes) or any Optuna storage URL")  # fmt: skip
    add("--study", default="pqlab", metavar="NAME", help="name in the storage")
    add("--seed", type=int, help="of the sampler; several processes want none or different ones (default: none)")
    add("--max-kl", type=above_zero, metavar="NATS", help="take the fastest setting with at most this KL (default: the "
        "best balance)")  # fmt: skip
    add("--no-confirm", action="store_true", help="choose by the first timings, without timing the best again in turns")
    add("--out", type=output_folder, default=Path("."), metavar="FOLDER", help="for tune-STUDY.html and "
        "tune-STUDY.json; it is made where it is missing")  # fmt: skip
    add_json(parser)


def bytes_of(text: str) -> int:
    """ "64MiB", "1.5 GiB", "2G" or plain bytes as a number of bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?)(?:i?B)?\s*", text, re.IGNORECASE)
    try:
        assert found is not None
        return int(float(found[1]) * _UNITS[found[2].upper()])
    except (AssertionError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; type e.g. 64MiB or 1.5GiB") from None


def run(args: argparse.Namespace) -> int:
    """Search and write; 1 when nothing within the limits was found. Raises like `load`, `Workload` and `Search`."""
    need_optuna()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        workload, search = _prepared(args)
        search.run(trials=args.trials, timeout=args.timeout)
    except KeyboardInterrupt:
        print("pqlab tune: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    try:
        finalists = search.finalists(args.max_kl)
    except ConfigError as error:
        print(f"pqlab tune: {error}", file=sys.stderr)
        return 1
    return _finish(args, workload, search, finalists)


def _prepared(args: argparse.Namespace) -> tuple[Workload, Search]:
    from ..models import load_text

    storage = open_storage(args.storage)  # raises before a model is loaded
    found, model, tokenizer = load(args)
    if found.random and args.max_kl is not None:
        raise ConfigError("--max-kl asks for what random weights do not have; leave it out, or take real weights")
    space = Space.of(
        model, page_size=args.page_size, residual_length=args.residual, M=args.M, nbits=args.nbits, policy=args.policy
    )
    turned = f", keys anchored every {args.span} tokens" if args.span else ""
    print(f"{space.size} settings{turned}; the prompt of {args.context} tokens is run once", flush=True)
    workload = Workload(
        model, tokenizer, load_text(args.text), context=args.context, positions=args.positions,
        calibration=args.calibration, span=args.span, random_weights=found.random, progress=True,
    )  # fmt: skip
    search = Search(
        workload.measure, space, workload.about(), storage=storage, name=args.study, memory=args.memory,
        needed=workload.bytes, seed=args.seed, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    return workload, search


def _finish(args: argparse.Namespace, workload: Workload, search: Search, finalists: pd.DataFrame) -> int:
    frame, front = search.frame(), search.front()
    print(f"\n{len(frame)} settings measured, {len(search.pruned())} proposals passed over; the front:")
    print(render(front))
    timed, exact = frame, None
    if not args.no_confirm:
        timed, exact = timed_again(workload, finalists)
        print(f"\nthe best {len(timed)} timed again, in turns{exact and f'; the exact cache: {exact:.2f} ms' or ''}:")
        print(render(timed))
    best = choose(timed, args.max_kl, scale=frame)
    chosen = Setting.of_row(best)
    measured = {name: _plain(value) for name, value in {**best, "exact_milliseconds": exact}.items()}
    preset = preset_of(workload, chosen, measured)
    path = args.out / f"tune-{args.study}.json"
    preset.save(path)
    print(f"\nchosen: {chosen}\n{path}: pqlab.presets.Preset.load reads it")
    _draw(args, search, frame if timed is frame else with_times(frame, timed), int(best["number"]))
    if args.json:
        rows, again = (json.loads(table.to_json(orient="records", double_precision=6)) for table in (frame, timed))
        again = {} if args.no_confirm else {"timed_again": again, "exact_milliseconds": exact}
        about = {"command": "tune", "date": today(), "commit": commit(), "versions": versions("optuna")}
        about |= {"about": workload.about(), "span": workload.span, "chosen": str(chosen)}
        print(json.dumps({**about, "settings": rows, **again}))
    return 0


def _plain(value):
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return None if isnan(value) else float(f"{value:.6g}")
    return value


def _draw(args: argparse.Namespace, search: Search, frame: pd.DataFrame, number: int) -> None:
    try:
        from ..figures.html_file import write_figure
        from ..figures.tuning import tuning_figure
    except ImportError:
        print("no picture: plotly is not installed (pip install 'pqlab[notebook]')")
        return
    about = {key: value for key, value in search.study.user_attrs["about"].items() if key != "space"}
    shown = frame.drop(columns=["seconds", "worker"]).sort_values("milliseconds")
    path = args.out / f"tune-{args.study}.html"
    figure = tuning_figure(frame, number, against=price(frame))
    write_figure(figure, path, f"Settings of {args.model}", shown, settings=about)
    print(f"{path}: the picture")


def render(rows: pd.DataFrame) -> str:
    """Rows of `Search.frame` as text."""
    return pd.DataFrame(
        {
            "page": rows.page_size,
            "R": rows.residual_length,
            "M": rows.M,
            "nbits": rows.nbits,
            "policy": rows.policy,
            "ms a token": rows.milliseconds.map("{:.2f}".format),
            "+-": rows.milliseconds_error.map("{:.2f}".format),
            "KL": rows.kl.map("{:.5f}".format).replace("nan", "-"),
            "cache": rows.bytes.map(readable_bytes),
            "grid": rows.grid.map(lambda grid: "report" if grid else ""),
        }
    ).to_string(index=False)
