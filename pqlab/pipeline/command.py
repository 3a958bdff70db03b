"""What is typed behind `python -m pqlab run`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..arguments import (
    add_cache_arguments,
    add_model_arguments,
    add_new_tokens,
    add_span,
    output_folder,
)
from ..config import REPORT_RANGES
from ..errors import ConfigError, PQCacheError
from ..evaluation import corpora
from ..evaluation.longbench.tasks import TASKS
from ..evaluation.plan_file import planned_config
from ..models import named
from ..models.hub import offline_unless_hub_answers
from ..models.load import check_device
from ..models.texts import text_names
from ..quantization import Codebooks
from .job import Job
from .runner import run_stages
from .settings import LONGBENCH, Settings, check, resolved_m
from .stages import STAGES, check_inputs, check_order
from .tables import render

HELP = """\
Stages: baseline measures the exact cache; sampling keeps keys and values of a text; training makes codebooks of them;
evaluation measures the quantized cache, --paged or contiguous, beside the exact one. What is measured: perplexity and
KL, or scores of LongBench, then time and memory of a generation. Samples and codebooks lie in the folder --out and are
used again; the same command goes on where it was stopped."""


def configure(parser: argparse.ArgumentParser) -> None:
    default = Settings(())
    parser.description = f"{parser.description}.\n\n{HELP}"
    add = parser.add_argument
    add("-p", "--pipeline", nargs="+", required=True, metavar="STAGE", help=f"stages, of {' '.join(STAGES)}")
    add_model_arguments(parser)
    add("--dataset", default=default.dataset, metavar="NAME", help="to evaluate on: "
        f"{', '.join(corpora.names())}, a text file, {LONGBENCH}, or of its tasks: {', '.join(TASKS)}")  # fmt: skip
    add("--data", type=Path, metavar="FOLDER", help="a data set's files (default: from the Hugging Face hub)")
    add("--calibration", metavar="TEXT", help=f"to train on: {', '.join(text_names())} or a text file (default: the "
        "data set's own train split, else the mix of four texts, or one that is not evaluated on)")  # fmt: skip
    add("--batch", type=int, default=default.batch, metavar="ROWS", help="rows of the timed generation")
    add("-M", type=int, help=f"subspaces of a head: {REPORT_RANGES['M']} (default: 64, or half of the head size where "
        "64 does not divide it or is more than that)")  # fmt: skip
    add("--nbits", type=int, default=default.nbits, metavar="BITS", help=f"bits of a code: {REPORT_RANGES['nbits']}")
    add("-m", "--merged", action="store_true", help="one codebook a side for all layers and heads")
    add_span(parser, None, "0: keys as the model makes them (default: 0, or what the file of --codebooks has)")
    add("--paged", action="store_true", help="the paged cache (default: contiguous PQ, without fused kernels)")
    add_cache_arguments(
        parser, "sinks", page_size=default.page_size, residual=default.extended_residual, max_pages=default.max_pages
    )
    add("--breakdown", action="store_true", help="where the time of a decode step goes, part by part")
    add("--windows", type=int, default=default.windows, metavar="COUNT", help="windows of the text for perplexity and "
        "KL")  # fmt: skip
    add("--length", type=int, default=default.length, metavar="TOKENS", help="tokens of a window")
    add("--context", type=int, default=default.context, metavar="TOKENS", help="tokens of the prompt of the timed "
        "generation")  # fmt: skip
    add_new_tokens(parser, default.new_tokens)
    add("--samples", type=int, default=default.samples, metavar="TOKENS", help="tokens that codebooks are trained on")
    add("--examples", type=int, metavar="COUNT", help="examples of each LongBench task (default: all)")
    add("--codebooks", type=Path, metavar="FILE", help="evaluate this file of `pqlab plan` or Codebooks.save "
        "(default: what the stage training made)")  # fmt: skip
    add("--seed", type=int, default=default.seed, help="of random weights, random text and training")
    add("--out", type=output_folder, default=Path("pqlab-run"), metavar="FOLDER", help="for results.jsonl, samples and "
        "codebooks; it is made where it is missing")  # fmt: skip
    add("--force", action="store_true", help="start over, and replace samples and codebooks that are there")


def run(args: argparse.Namespace) -> int:
    """Run the stages and print what they found; 1 when a stage broke off. Raises for settings that cannot be run."""
    far_data = args.data is None and (args.dataset in corpora.HUB or args.dataset in (LONGBENCH, *TASKS))
    if not far_data and not named.is_on_hub(args.model, args.random_weights):
        return _run(args)
    with offline_unless_hub_answers() as answers:
        if not answers:
            print("[run] the Hugging Face hub does not answer: only what was fetched before is at hand", flush=True)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    job = _job(args)
    for line in _heading(job):
        print(line, flush=True)
    try:
        records = run_stages(job, lambda line: print(f"[run] {line}", flush=True))
    except ConfigError:  # nothing has begun, or not that stage: the setting is wrong
        raise
    except (PQCacheError, ValueError, ImportError, OSError, torch.OutOfMemoryError) as error:
        advice = ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "Lower --batch, --context, --length or --samples, or add --half. "
        advice += "The stages before this one are done; the same command goes on from here."
        print(f"pqlab run: {error}\n{advice}", file=sys.stderr)
        return 1
    for part in render(records):
        print(f"\n{part}")
    print(f"\n{job.folder / 'results.jsonl'}: {len(records)} records of run {records[0]['run']}")
    return 0


def _job(args: argparse.Namespace) -> Job:
    """Everything that can be checked before a model is loaded; makes the output folder.

    Raises:
        ConfigError, UnsupportedModelError: settings that cannot be run. CodebookError: the file of `--codebooks` is
            none. OSError: no such model, text or data set, or a folder that cannot be made.
    """
    given = {**vars(args), "extended_residual": args.residual, "span": args.span or 0}
    settings = Settings(
        stages=tuple(args.pipeline), **{k: given[k] for k in Settings.__dataclass_fields__ if k in given}
    )
    check_order(settings.stages)
    corpus = _corpus(settings)
    check_device(settings.device)
    found = named.find_model(settings.model, random=settings.random_weights)
    check(settings, found.config, found.random)
    job = Job(settings, found, corpus, args.out, args.force)
    check_inputs(job)
    if settings.codebooks:
        job = replace(job, settings=replace(settings, span=_span_of(settings.codebooks, args.span)))
    job.folder.mkdir(parents=True, exist_ok=True)
    job.read_texts()
    return job


def _span_of(path: Path, asked: int | None) -> int:
    """The span of a codebooks file. Raises `ConfigError` when another one is asked for."""
    own = Codebooks.load(path).span
    if asked is not None and asked != own:
        what = f"keys anchored every {own} tokens" if own else "keys without anchors"
        raise ConfigError(f"--span {asked}: {path.name} has {what}; leave --span out, or give other --codebooks")
    return own


def _corpus(settings: Settings) -> corpora.Corpus:
    if settings.tasks:  # the answers are LongBench's; the timed generation and the training need a text
        return corpora.Corpus("pride", calibration=settings.calibration)
    try:
        corpora.check_name(settings.dataset)
    except ConfigError as error:
        raise ConfigError(f"--dataset: {error}, {LONGBENCH}, {', '.join(TASKS)}") from error
    return corpora.Corpus(settings.dataset, settings.data, settings.calibration, settings.seed)


def _heading(job: Job) -> list[str]:
    s, said = job.settings, resolved_m(job.settings, job.found.config)[1]
    kind = "random weights: time and memory only, perplexity and KL are left out" if job.found.random else s.dataset
    lines = [f"[run] {s.model}, {kind}; {'fp16' if s.half else 'fp32'} on {s.device}; {' '.join(s.stages)}"]
    if said:
        lines.append(f"[run] {said}")
    if not job.corpus.means_something:
        lines.append("[run] _synthetic is made-up words: its perplexity says nothing about language")
    if s.tasks:
        lines.append(f"[run] time and memory are measured on {job.corpus.name}")
    if {"sampling", "training"} & set(s.stages):
        lines.append(f"[run] codebooks are trained on {job.corpus.train_name}")
    if job.found.random and _random_codebooks(job):
        lines.append("[run] codebooks are random, too: time and memory do not depend on them")
    if s.span and {"training", "evaluation"} & set(s.stages):
        lines.append(f"[run] keys are turned back to an anchor every {s.span} tokens before they are coded")
    own = planned_config(s.codebooks) if s.codebooks else None
    if own is not None and (own.num_sinks, own.residual_length) != (s.sinks, s.extended_residual):
        chosen = f"--sinks {own.num_sinks} --extended_residual {own.residual_length}"
        lines.append(f"[run] {s.codebooks.name} was planned with other exact tokens than this run has: {chosen}")
    return lines


def _random_codebooks(job: Job) -> bool:
    stages, given = job.settings.stages, job.settings.codebooks
    return "evaluation" in stages and "training" not in stages and not given and not job.codebooks_file.is_file()
