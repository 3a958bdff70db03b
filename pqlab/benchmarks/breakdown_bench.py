"""`python -m pqlab bench breakdown`: the parts of a decode step, paged beside exact, by context length."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import pandas as pd
import torch

from ..arguments import add_cache_arguments, add_device, add_json, add_model_name, load, whole
from ..config import CacheConfig
from ..errors import ConfigError
from ..model_runs import check_positions
from ..models.load import check_device
from ..quantization import default_codebooks
from ..results.provenance import commit, device_name, today, versions
from .breakdown import breakdown
from .random_models import SHAPES, random_model
from .step_parts import PARTS

HELP = "One row; a model in fp16 on a GPU, where a step is one CUDA graph, and in fp32 on a CPU."
KINDS = ("exact", "paged")
ROOM = 1024
"""Positions of a model with random weights behind the longest context."""


def breakdowns(
    model, contexts: Iterable[int], kinds: Iterable[str] = KINDS, steps: int | None = None, **options
) -> pd.DataFrame:
    """`breakdown` for every kind and context: its rows with the columns context, kind, and its attributes."""
    frames = []
    for context in contexts:
        for kind in kinds:
            frame = breakdown(model, kind, context, steps, **options)
            about = {name: frame.attrs[name] for name in ("step_milliseconds", "sum_milliseconds", "overhead", "how")}
            frames.append(frame.assign(context=context, kind=kind, **about))
    return pd.concat(frames, ignore_index=True)


def render(frame: pd.DataFrame) -> str:
    """A table with a column for each kind and context: milliseconds of every part, and what they add up to."""
    frame = frame.assign(run=[f"{kind} {context:,}" for kind, context in zip(frame.kind, frame.context, strict=True)])
    runs = list(dict.fromkeys(frame.run))
    wide = frame.pivot(index="part", columns="run", values="milliseconds")[runs]
    wide = wide.loc[[part for part in PARTS if part in wide.index]]
    firsts = frame.drop_duplicates("run").set_index("run")
    lines = {
        "sum of parts": firsts.sum_milliseconds.map("{:.3f}".format),
        "step by itself": firsts.step_milliseconds.map("{:.3f}".format),
        "cost of measuring": firsts.overhead.map("{:+.1%}".format),
    }
    shares = frame.pivot(index="part", columns="run", values="share")
    text = wide.map("{:.3f}".format) + shares.loc[wide.index, runs].map("{:6.1%}".format)
    text = text.where(wide.notna(), "-")
    return pd.concat([text, pd.DataFrame(lines).T[runs]]).rename_axis("ms a token").reset_index().to_string(index=False)


def configure(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    parser.description = f"{parser.description}.\n\n{HELP}"
    add_model_name(parser, default=None, note=" (default: on a CPU the embedded model, on a GPU --shape 8b)")
    add("--shape", choices=list(SHAPES), help="a Llama of this shape with random weights instead of a model (default: "
        "see --model)")  # fmt: skip
    add_device(parser)
    add("--context", nargs="+", type=whole(), default=[8192, 32768] if on_gpu else [1024, 4096], metavar="TOKENS",
        help="tokens that the cache holds")  # fmt: skip
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="caches to measure")
    add("--steps", type=whole(), metavar="COUNT", help="measured steps (default: a page's tokens)")
    add_cache_arguments(parser, "page_size")
    add("--eager", action="store_true", help="on a GPU: no CUDA graph; parts then hold waits for the host")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status. Raises like `load` and `breakdown`."""
    named = args.model or args.random_weights
    if named and args.shape:
        raise ConfigError("--shape has random weights of its own: give --model or --shape, not both")
    check_device(args.device)
    on_gpu = args.device.startswith("cuda")
    shape = args.shape or ("8b" if on_gpu and not named else None)
    config = CacheConfig(page_size=args.page_size)
    options: dict = {"config": config, "graph": False if args.eager or not on_gpu else None}
    if shape:
        dtype = torch.float16 if on_gpu else torch.float32
        name, model = shape, random_model(shape, max(args.context) + ROOM, dtype, args.device)
    else:
        name = args.model = args.model or "default"
        args.half = on_gpu
        found, model, tokenizer = load(args)
        check_positions(model, max(args.context))
        options["codebooks"] = None if found.random else default_codebooks(model, tokenizer)
    frame = breakdowns(model, args.context, args.kind, args.steps, **options)
    device = device_name(args.device)
    print(f"{name} on {device}, batch 1, page {args.page_size}; {frame.how[0]}")
    print(render(frame))
    if args.json:
        about = {"benchmark": "breakdown", "model": name, "device": device, "date": today(), "commit": commit()}
        about |= {"versions": versions(), "threads": torch.get_num_threads(), "page_size": args.page_size}
        print(json.dumps({**about, "records": frame.round(5).to_dict("records")}))
    return 0
