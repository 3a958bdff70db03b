"""Calibrated on one kind of text, measured on another: how far codebooks carry.

texts()                                # what is calibrated on and what is measured on, never the same characters
transfer(model, tokenizer, *texts())   # KL of every pair: a row a calibration, a column a text
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from ..arguments import add_codebooks, add_json, add_model_arguments, add_span, load, whole
from ..config import CacheConfig, PQConfig
from ..models import CODE_OPENINGS, calibration_text, fingerprint, load_text, sampled_text
from ..models.texts import STDLIB
from ..quantization import Codebooks, calibrate
from ..quantization.defaults import CALIBRATION_TEXT
from ..quantization.samples import NUM_TOKENS
from ..results.provenance import commit, device_name, text_record, today, versions
from . import fidelity
from .calibration_bench import add_bits, pq_of
from .evaluate import check_window
from .plan_file import planned_configs
from .teacher_forced import from_codebooks

NOVEL, OTHER_NOVEL, SPANISH, SAMPLED = "emma", "pride", "genesis-es", "sampled"


def texts() -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """Texts to calibrate on and texts to measure on, by what they are.

    Code and Spanish are one text each: its second half is calibrated on, its first half is measured on. The default's
    mix has other code and no Spanish of its own; what a model writes by itself goes with a novel alone, too.
    """
    code, spanish = load_text(STDLIB), load_text(SPANISH)
    calibration: dict[str, str | list[str]] = {
        "novel": load_text(NOVEL),
        "source code": code[len(code) // 2 :],
        "Spanish": spanish[len(spanish) // 2 :],
    }
    calibration |= {"all three": list(calibration.values()), "novel, sampled": [load_text(NOVEL), load_text(SAMPLED)]}
    calibration[CALIBRATION_TEXT] = calibration_text(CALIBRATION_TEXT)
    measured = {
        "novel": load_text(OTHER_NOVEL),
        "source code": code[: len(code) // 2],
        "Spanish": spanish[: len(spanish) // 2],
    }
    return calibration, measured


def transfer(
    model,
    tokenizer,
    calibration: Mapping[str, str | Sequence[str]],
    measured: Mapping[str, str],
    pq: PQConfig = PQConfig(),
    *,
    num_tokens: int = NUM_TOKENS,
    span: int = 0,
    windows: int = 2,
    length: int = 2048,
    config: CacheConfig | None = None,
    codebooks: Mapping[str, Codebooks] | None = None,
    own_configs: Mapping[str, CacheConfig] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """KL to the exact cache of codebooks from every text on every text.

    Args:
        calibration: name -> a text, or several (see `collect_kv`), of which `num_tokens` are read.
        measured: name -> a text, whose first windows are measured.
        span: of `calibrate`: tokens whose keys share an anchor, 0 for none.
        codebooks: more columns of codebooks that are there already (such as plans), by name.
        own_configs: name -> config of those that are not measured under `config`.

    Returns:
        DataFrame: calibration, text, kl (nats), kl_error (over windows), change (of perplexity), agreement, and ratio:
        the KL over that of the same codebooks on the first text of `measured`.
    """
    check_window(windows, length, 1, 0, config or CacheConfig(), model)
    # says so when a text is too short, before the calibration takes its time
    ids = {name: fidelity.text_windows(tokenizer, text, length, windows) for name, text in measured.items()}
    books = {}
    for name, text in calibration.items():
        options = {"num_tokens": num_tokens, "span": span, "text_name": name, "progress": progress}
        books[name] = calibrate(model, tokenizer, text, pq, **options)
    books |= codebooks or {}
    methods = {name: from_codebooks(book.to(model.device)) for name, book in books.items()}
    parts, options = [], {"own_configs": own_configs, "progress": progress}
    for name in measured:
        table = fidelity.summarize(fidelity.compare(model, ids[name], methods, config, **options))
        parts.append(table.assign(text=name).rename(columns={"method": "calibration"}))
    found = pd.concat(parts, ignore_index=True)
    first = found[found.text == next(iter(measured))].set_index("calibration").kl
    found["ratio"] = found.kl / found.calibration.map(first)
    return found[["calibration", "text", "kl", "kl_error", "ratio", "change", "agreement"]]


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser, random=False)
    add_codebooks(parser, "more rows, each named by its file's stem")
    add("--windows", type=whole(), default=2, metavar="COUNT", help="windows of every text that is measured on")
    add("--length", type=whole(), default=2048, metavar="TOKENS", help="tokens of a window")
    add_span(parser)
    add("--tokens", type=whole(), default=NUM_TOKENS, help="tokens of every text to calibrate on")
    add_bits(parser)
    add("--own-code", type=whole(0), default=0, metavar="COUNT", help="one more row, the novel beside as many texts of "
        "source code that the model writes by itself (default: 0, no such row)")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate on every text, measure on every text, print the table (and JSON); the exit status."""
    options = {"num_tokens": args.tokens, "span": args.span, "windows": args.windows, "length": args.length}
    _, model, tokenizer = load(args)
    options["codebooks"] = {path.stem: Codebooks.load(path, model) for path in args.codebooks}
    options["own_configs"] = planned_configs(args.codebooks)
    calibration, measured = texts()
    if args.own_code:
        own = "\n\n".join(sampled_text(model, tokenizer, count=args.own_code, openings=CODE_OPENINGS))
        calibration = {**calibration, "novel, own code": [load_text(NOVEL), own]}
    frame = transfer(model, tokenizer, calibration, measured, pq_of(model, args.bits), progress=True, **options)
    wide = frame.pivot(index="calibration", columns="text", values="kl")
    print("KL, nats: a row what was calibrated on, a column what was measured on")
    print(wide.loc[frame.calibration.unique(), frame.text.unique()].round(5).to_string())
    if args.json:
        about = {"benchmark": "texts", "date": today(), "commit": commit(), "versions": versions()}
        about |= {"model": fingerprint(model), "device": device_name(args.device), "half": args.half}
        about |= {"cache": asdict(CacheConfig())}
        about |= {
            "texts": [text_record(name) for name in (NOVEL, OTHER_NOVEL, STDLIB, SPANISH, SAMPLED, CALIBRATION_TEXT)]
        }
        about |= {"windows": args.windows, "length": args.length, "tokens": args.tokens, "span": args.span}
        about |= {"bits": args.bits, "own_code": args.own_code}
        print(json.dumps({**about, "records": frame.round(6).to_dict("records")}))
    return 0
