"""`python -m pqlab plan`: budgets in, files that `Plan.load`, `Codebooks.load` and `eval --codebooks` take out."""

from __future__ import annotations

import argparse
from math import isnan
from pathlib import Path
from typing import Any

from ..config import CacheConfig
from ..errors import ConfigError, UnsupportedModelError
from ..memory import MIB
from ..models import calibration_text, load_model
from ..quantization import SPAN
from ..quantization.defaults import CALIBRATION_TEXT
from .exact_tokens import RESIDUALS, SINKS
from .options import check_budget, check_room
from .plan import BITS, DEFAULT_BITS, Planner
from .plan_file import Plan


def configure(parser: argparse.ArgumentParser) -> None:
    default = CacheConfig()
    add = parser.add_argument
    add("--model", default="default", help="as pqlab.load_model takes it")
    add("--device", default="cpu", help="torch device that the model runs on")
    add("--text", default=CALIBRATION_TEXT, help="name of a shipped text or mix, or a file")
    add("--bits", nargs="+", type=float, default=[], help="budgets, bits per element, beside --sinks and --residual")
    add("--mib", nargs="+", type=float, default=[], help="budgets, MiB of a sequence of --context tokens as it is "
        "stored; sinks and residual are chosen, too")  # fmt: skip
    add("--kl", nargs="+", type=float, default=[], help="budgets, nats: the fewest bits that keep them, and with "
        "--context the fewest bytes, sinks and residual chosen, too")  # fmt: skip
    add("--context", type=int, help="tokens of a sequence whose bytes count")
    add("--choices", nargs="+", type=int, default=list(DEFAULT_BITS), help=f"of {BITS}")
    add("--span", type=int, default=0, help=f"tokens whose keys are turned back to one anchor, e.g. {SPAN} (0: none)")
    add("--residual", nargs="+", type=int, help=f"exact newest tokens (default {default.residual_length}); with "
        f"--context those to choose from (default {' '.join(map(str, RESIDUALS))})")  # fmt: skip
    add("--sinks", nargs="+", type=int, help=f"exact first tokens (default {default.num_sinks}); with --context "
        f"those to choose from (default {' '.join(map(str, SINKS))})")  # fmt: skip
    add("--length", type=int, help="tokens of a window that is measured on; a context that is longer is told worse")
    add("--windows", type=int, default=2, help="windows of every text to choose by, and as many again to measure")
    add("--out", type=Path, default=Path("."), help="folder for plan-<budget>.safetensors")


def run(args: argparse.Namespace) -> int:
    """Plan every budget, print what was measured, write the files; the exit status."""
    budgets = [(name, value) for name in ("bits", "mib", "kl") for value in getattr(args, name)]
    if not budgets:
        print("pqlab plan: give budgets: --bits 2.25, --kl 0.002, or --mib 24 --context 8192")
        return 2
    try:
        settings = _settings(args)
        for name, budget in budgets:
            check_budget(**{"bits": None, "mib": None, "kl": None, name: budget}, context=args.context)
        if args.bits and min(args.bits) < min(args.choices):
            raise ConfigError(f"bits = {min(args.bits):g} is below the smallest choice, {min(args.choices)}")
        args.out.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(args.model, device=args.device)
        if args.mib:
            check_room(model, min(args.mib), args.context, args.choices, args.sinks, args.residual)
        planner = Planner(model, tokenizer, calibration_text(args.text), **settings)
        if args.context and planner.length < args.context:
            print(
                f"measured on windows of {planner.length} tokens, which flatters a large R for a context of "
                f"{args.context}; --length {args.context} sees all of it",
                flush=True,
            )
        for name, budget in budgets:
            found = planner.plan(**{name: budget})
            at = (f"-{args.context}" if args.context else "") + (f"-span{args.span}" if args.span else "")
            path = args.out / f"plan-{name}-{budget:g}{at}.safetensors"
            found.save(path)
            print(f"{path.name}: {found}", flush=True)
            if len(found.tried):
                print(render_tried(found), flush=True)
    except (UnsupportedModelError, ValueError, OSError) as error:
        print(f"pqlab plan: {error}")
        return 2
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `Planner` is given."""
    given = {"sinks": args.sinks, "residuals": args.residual}
    settings = {"choices": args.choices, "length": args.length, "windows": args.windows, "span": args.span}
    settings |= {"text_name": Path(args.text).name}
    if args.context is not None:
        return {**settings, "context": args.context, **given}
    for name, values in given.items():
        if values is not None and len(values) > 1:
            raise ConfigError(f"{name} = {values} are to choose from for a context; give --context, or one of them")
    default = CacheConfig()
    (residual,), (sinks,) = args.residual or [default.residual_length], args.sinks or [default.num_sinks]
    return {**settings, "config": CacheConfig(residual_length=residual, num_sinks=sinks)}


def render_tried(found: Plan) -> str:
    """What every choice of sinks (rows) and R (columns) was predicted to come to, as text."""
    tried = found.tried.assign(mib=found.tried.bytes / MIB)
    grids = (
        ("bits", "bits per element", "{:.3f}"),
        ("mib", f"MiB at {found.certificate['context']} tokens", "{:.2f}"),
        ("predicted_kl", "predicted KL", "{:.5f}"),
    )
    parts = []
    for column, title, form in grids:
        grid = tried.pivot(index="num_sinks", columns="residual_length", values=column)
        grid = grid.map(lambda value, form=form: "-" if isnan(value) else form.format(value))
        parts.append(f"{title}, by sinks and R\n{grid.rename_axis(index=None, columns=None).to_string()}")
    return "\n".join(parts)
