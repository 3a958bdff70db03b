"""What is typed behind `python -m pqlab run`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..errors import ConfigError, PQCacheError, UnsupportedModelError
from ..evaluation import corpora
from ..evaluation.longbench.tasks import TASKS
from ..evaluation.plan_file import planned_config
from ..models import named
from ..models.arguments import add_model_arguments
from ..models.hub import offline_unless_hub_answers
from ..models.load import check_device
from .job import Job
from .runner import run_stages
from .settings import LONGBENCH, Settings, check, resolved_m
from .stages import STAGES, check_inputs, check_order
from .tables import render


def configure(parser: argparse.ArgumentParser) -> None:
    default = Settings(())
    add = parser.add_argument
    add("-p", "--pipeline", nargs="+", required=True, metavar="STAGE", help=f"stages: {' '.join(STAGES)}")
    add_model_arguments(parser)
    add("--dataset", default=default.dataset, help=f"{', '.join(corpora.names())}, a text file, {LONGBENCH}, or of its "
        f"tasks: {', '.join(TASKS)}")  # fmt: skip
    add("--data", type=Path, help="folder with a data set's files, instead of the hub")
    add("--calibration", help="text for training: a shipped text or mix, or a file (default: the data set's own train "
        "split, else the mix of four texts, or one that is not evaluated on)")  # fmt: skip
    add("--batch", type=int, default=default.batch, help="rows of the timed generation")
    add("-M", type=int, help="subspaces, 16 to 128 (default: 64, or half of a head size below 128)")
    add("--nbits", type=int, default=default.nbits, help="bits of a code, 4 to 8")
    add("-m", "--merged", action="store_true", help="one codebook a side for all layers and heads")
    add("--paged", action="store_true", help="the paged cache (default: contiguous PQ, without fused kernels)")
    add("--page_size", type=int, default=default.page_size, help="tokens of a page, 16 to 512")
    add("--extended_residual", type=int, default=default.extended_residual, help="exact newest tokens, 32 to 1024")
    add("--max_pages", type=int, default=default.max_pages, help="pages of the pool, 100 to 10000")
    add("--breakdown", action="store_true", help="where the time of a decode step goes, part by part")
    add("--sinks", type=int, default=default.sinks, help="exact first tokens")
    add("--windows", type=int, default=default.windows, help="windows of the text for perplexity and KL")
    add("--length", type=int, default=default.length, help="tokens of a window")
    add("--context", type=int, default=default.context, help="tokens of the prompt of the timed generation")
    add("--new_tokens", type=int, default=default.new_tokens, help="tokens that it makes")
    add("--samples", type=int, default=default.samples, help="tokens that codebooks are trained on")
    add("--examples", type=int, help="of each LongBench task (default: all)")
    add("--codebooks", type=Path, help="evaluate this file instead of trained codebooks")
    add("--seed", type=int, default=default.seed)
    add("--out", type=Path, default=Path("pqlab-run"), help="folder for results.jsonl, samples and codebooks")
    add("--force", action="store_true", help="start over, and replace samples and codebooks that are there")


def run(args: argparse.Namespace) -> int:
    """Run the stages and print what they found; 2 for settings that cannot be run, 1 when a stage broke off."""
    far_data = args.data is None and (args.dataset in corpora.HUB or args.dataset in (LONGBENCH, *TASKS))
    if not far_data and not named.is_on_hub(args.model, args.random_weights):
        return _run(args)
    with offline_unless_hub_answers() as answers:
        if not answers:
            print("[run] the Hugging Face hub does not answer: only what was fetched before is at hand", flush=True)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        job = _job(args)
    except (ConfigError, UnsupportedModelError, OSError) as error:  # OSError: no such model, text or data set
        print(f"pqlab run: {error}")
        return 2
    for line in _heading(job):
        print(line, flush=True)
    try:
        records = run_stages(job, lambda line: print(f"[run] {line}", flush=True))
    except ConfigError as error:
        print(f"pqlab run: {error}")
        return 2
    except (PQCacheError, ValueError, ImportError, OSError, torch.OutOfMemoryError) as error:
        advice = ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "Lower --batch, --context, --length or --samples, or add --half. "
        print(f"pqlab run: {error}\n{advice}The stages before this one are done; the same command goes on from here.")
        return 1
    for part in render(records):
        print(f"\n{part}")
    print(f"\n{job.folder / 'results.jsonl'}: {len(records)} records of run {records[0]['run']}")
    return 0


def _job(args: argparse.Namespace) -> Job:
    """Everything that can be checked before a model is loaded."""
    given = vars(args)
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
    job.read_texts()
    return job


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
    own = planned_config(s.codebooks) if s.codebooks and s.codebooks.is_file() else None
    if own is not None and (own.num_sinks, own.residual_length) != (s.sinks, s.extended_residual):
        chosen = f"--sinks {own.num_sinks} --extended_residual {own.residual_length}"
        lines.append(f"[run] {s.codebooks.name} was planned with other exact tokens than this run has: {chosen}")
    return lines


def _random_codebooks(job: Job) -> bool:
    stages, given = job.settings.stages, job.settings.codebooks
    return "evaluation" in stages and "training" not in stages and not given and not job.codebooks_file.is_file()
