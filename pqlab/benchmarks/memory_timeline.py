"""Memory over the time of a long generation, sampled: a paged PQ cache beside an exact one that grows by concatenation.

    frame = memory_timeline(model, codebooks, ids, prompt=1024)   # ids [1, n]: the text that both are fed
    summary(frame)                                                # steady state and peak
    pqlab.figures.memory.memory_figure(frame)

Both caches see the same tokens, so a difference is one of storage. The paged pool is reserved when the cache is made.
Steps run without cuDNN attention: `model_runs.cudnn_attention_off` says why their seconds would be no times of a cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..arguments import (
    add_cache_arguments,
    add_json,
    add_model_arguments,
    add_text,
    load,
    output_file,
    whole,
)
from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..memory import MIB, readable_bytes
from ..model_runs import check_positions, cudnn_attention_off
from ..models import load_text
from ..models.load import check_device
from ..process_memory import ProcessMemory
from ..quantization import Codebooks, default_codebooks
from ..results.provenance import commit, device_name, today, versions
from ..transformers_api import cache_argument
from .random_models import SHAPES, random_model

PAGED, EXACT = "paged pq", "exact"
CACHES = (EXACT, PAGED)
COLUMNS = ("cache", "step", "tokens", "seconds", "used", "reserved", "process", "peak", "device")


def memory_timeline(
    model,
    codebooks: Codebooks,
    ids: Tensor,
    *,
    prompt: int,
    config: CacheConfig | None = None,
    chunk: int = 1,
    every: int = 8,
    progress: bool = False,
) -> pd.DataFrame:
    """Feed a text to both caches, the prompt as one chunk and then step by step, and look at the memory.

    Args:
        model: a model that `PagedPQCache` supports; its attention is switched for the run and back.
        ids: int64 [1, n] token ids; the pool of the paged cache is made for n tokens.
        prompt: tokens that are prefilled.
        config: of the paged cache.
        chunk: tokens a step; more than one (as with a draft model) makes a long run short, the caches hold the same.
        every: steps between two samples.
        progress: show a bar.

    Returns:
        DataFrame, a row a sample, all sizes in bytes: cache ("exact" or "paged pq"); step (-2 before the cache is made,
        -1 with the empty cache, 0 after the prompt); tokens fed; seconds since the prompt; used (what the tokens
        occupy), reserved (what the cache holds, free pages included); process and peak (see `process_memory`, above
        what the process took before); device (the whole GPU's, NaN where NVML is not there). Model constants, which a
        process has once, are in none of them.

    Raises:
        ConfigError: a prompt that leaves no token to decode.
    """
    total = ids.shape[1]
    if not 1 <= prompt < total:
        raise ConfigError(f"prompt = {prompt} of {total} tokens is out of range; set 1 to {total - 1}")
    for setting, value in (("every", every), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{setting} = {value} is out of range (at least 1); the nearest good value is 1")
    codebooks = codebooks.to(model.device)
    makers: dict[str, tuple[str, Callable[[], Cache]]] = {
        EXACT: ("sdpa", lambda: DynamicCache(config=model.config)),
        PAGED: ("pqlab", lambda: PagedPQCache(model, codebooks, config, context=total)),
    }
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=len(CACHES) * (total - prompt), desc="decoding", unit="token")
    before = model.config._attn_implementation
    rows: list[tuple] = []
    try:
        for name in CACHES:
            attention, make = makers[name]
            model.set_attn_implementation(attention)
            _warm_up(model, make(), ids[:, : min(ids.shape[1], 1024)])
            with ProcessMemory(model.device) as memory:
                rows += [(name, *row) for row in _feed(model, make, ids, prompt, chunk, every, memory, bar)]
    finally:
        model.set_attn_implementation(before)
        if bar is not None:
            bar.close()
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"device": float})


@torch.inference_mode()
def _feed(model, make, ids: Tensor, prompt: int, chunk: int, every: int, memory: ProcessMemory, bar) -> Iterator[tuple]:
    """The columns of a sample behind the cache's name, at every sample; the cache is gone when this ends."""
    yield -2, 0, 0.0, 0, 0, *memory.sample()
    cache = make()
    yield -1, 0, 0.0, *held_bytes(cache), *memory.sample()
    given = cache_argument(model, cache)
    model(ids[:, :prompt], **given, use_cache=True, logits_to_keep=1)
    yield 0, prompt, 0.0, *held_bytes(cache), *memory.sample()
    seconds, parts = 0.0, ids[:, prompt:].split(chunk, 1)
    for step, part in enumerate(parts, 1):
        begin = time.perf_counter()
        with cudnn_attention_off():
            model(part, **given, use_cache=True, logits_to_keep=1)
        if memory.cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
        if bar is not None:
            bar.update(part.shape[1])
        if step % every == 0 or step == len(parts):
            yield step, min(prompt + step * chunk, ids.shape[1]), seconds, *held_bytes(cache), *memory.sample()


@torch.inference_mode()
def _warm_up(model, cache: Cache, ids: Tensor) -> None:
    """Whatever a first call makes for good (threads, workspaces, kernels) belongs to no cache."""
    from .. import kernels

    for part in (ids[:, :-4], *ids[:, -4:].split(1, 1)):
        model(part, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        kernels.wait()  # for what this has asked for; a step asks for one kernel after the other


def held_bytes(cache: Cache) -> tuple[int, int]:
    """(what the tokens occupy, what the cache has allocated), model constants left out."""
    if isinstance(cache, PagedPQCache):
        return cache.stored_bytes, cache.reserved_bytes
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    return held, held


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cache, bytes: tokens; reserved_at_start; used and reserved at the end; process (steady: the median of
    the second half of the decode); peak (the highest while decoding); prefill_peak; seconds a token."""
    rows = []
    for name, part in frame.groupby("cache", sort=False):
        decode, end = part[part.step > 0], part.iloc[-1]
        rows.append(
            {
                "cache": name,
                "tokens": int(end.tokens),
                "reserved_at_start": int(part[part.step == -1].reserved.iloc[0]),
                "used": int(end.used),
                "reserved": int(end.reserved),
                "process": int(decode.process[len(decode) // 2 :].median()),
                "peak": int(decode.peak.max()),
                "prefill_peak": int(part[part.step == 0].peak.iloc[0]),
                "seconds": float(end.seconds / (end.tokens - part[part.step == 0].tokens.iloc[0])),
            }
        )
    return pd.DataFrame(rows)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser, default=None, note=" (default: the embedded model)")
    add("--shape", choices=list(SHAPES), help="a Llama of this shape with random weights instead of a model, in fp16 "
        "on a GPU (default: see --model)")  # fmt: skip
    add_text(parser, what="text that both caches are fed; not with --shape")
    add("--context", type=whole(2), default=1536, metavar="TOKENS", help="tokens at the end of the run")
    add("--steps", type=whole(), default=384, metavar="TOKENS", help="tokens of it that are decoded; the rest is the "
        "prompt")  # fmt: skip
    add("--chunk", type=whole(), default=1, metavar="TOKENS", help="tokens a step; more make a long run short, the "
        "caches hold the same")  # fmt: skip
    add("--every", type=whole(), default=8, metavar="STEPS", help="steps between two samples")
    add_cache_arguments(parser, "page_size", "residual")
    add("--csv", type=output_file, metavar="FILE", help="write every sample to this file (default: none)")
    add("--html", type=output_file, metavar="FILE", help="draw the figure into this file; needs plotly (default: none)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the summary, write what was asked for; raises for what cannot be measured."""
    if args.html:
        _need_plotly()
    frame, what = _measured(args)
    found = summary(frame)
    print(f"{args.shape or args.model} on {args.device}: {what}")
    print(render(found))
    if args.csv:
        frame.to_csv(args.csv, index=False)
    if args.html:
        from ..figures.html_file import write_figure
        from ..figures.memory import memory_figure

        write_figure(memory_figure(frame), args.html, "Memory over the time of a generation", found)
    if args.json:
        print(json.dumps(_record(args, frame, found, what)))
    return 0


def _need_plotly() -> None:
    """Raises ImportError with what to install."""
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise ImportError("--html needs plotly: pip install 'pqlab[notebook]'") from error


def _measured(args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    if not 1 <= args.steps < args.context:
        raise ConfigError(f"--steps {args.steps} is out of range; of --context {args.context} it can be 1 to "
                          f"{args.context - 1}")  # fmt: skip
    if args.shape and (args.model or args.random_weights):
        raise ConfigError("--shape has random weights of its own: give --model or --shape, not both")
    config = CacheConfig(page_size=args.page_size, residual_length=args.residual)
    check_device(args.device)
    args.model = args.model or "default"
    if args.shape:
        dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
        model = random_model(args.shape, args.context, dtype, args.device)
        codebooks = Codebooks.random(model.config, pq=PQConfig())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, args.context), generator=generator).to(args.device)
    else:
        from ..evaluation.fidelity import text_windows

        found, model, tokenizer = load(args)
        check_positions(model, args.context)
        random = Codebooks.random(model, pq=PQConfig(), maps=True) if found.random else None
        codebooks = random or default_codebooks(model, tokenizer)
        ids = text_windows(tokenizer, load_text(args.text), args.context, 1)[0].to(args.device)
    options = {"prompt": args.context - args.steps, "config": config, "chunk": args.chunk, "every": args.every}
    frame = memory_timeline(model, codebooks, ids, **options, progress=True)
    how = ", steps without cuDNN attention" if model.device.type == "cuda" else ""
    return frame, f"{str(model.dtype).removeprefix('torch.')}{how}, process: {ProcessMemory(args.device).what}"


def render(found: pd.DataFrame) -> str:
    """`summary` as text."""
    sizes = ["reserved_at_start", "used", "reserved", "process", "peak", "prefill_peak"]
    shown = found.assign(**{name: found[name].map(readable_bytes) for name in sizes})
    shown["seconds"] = (found.seconds * 1e3).map("{:.1f}".format)
    return shown.rename(columns={"seconds": "ms a token"}).to_string(index=False)


def _record(args: argparse.Namespace, frame: pd.DataFrame, found: pd.DataFrame, what: str) -> dict:
    """Summary and samples (MiB) as JSON, with one record that `pqlab claims` reads."""
    exact, paged = (found[found.cache == name].iloc[0] for name in (EXACT, PAGED))
    record = {
        "shape": args.shape or args.model,
        "context": args.context,
        "exact_bytes": int(exact.process),
        "paged_bytes": int(paged.process),
        "exact_peak_bytes": int(exact.peak),
        "paged_peak_bytes": int(paged.peak),
        "paged_reserved_at_start": int(paged.reserved_at_start),
    }
    sizes = ["used", "reserved", "process", "peak", "device"]
    samples = frame.assign(**{name: (frame[name] / MIB).round(2) for name in sizes}, seconds=frame.seconds.round(3))
    return {
        "benchmark": "memory",
        "device": device_name(args.device),
        "date": today(),
        "commit": commit(),
        "versions": versions(),
        "measured": what,
        "note": f"python -m pqlab bench memory {_model_typed(args)} "
        f"--context {args.context} --steps {args.steps} --chunk {args.chunk} --json",
        "records": [record],
        "summary": found.round(6).to_dict("records"),
        "samples_mib": samples.astype(object).where(samples.notna(), None).to_dict("split", index=False),
    }


def _model_typed(args: argparse.Namespace) -> str:
    if args.shape:
        return f"--shape {args.shape}"
    return f"--model {args.model}" + " --random-weights" * args.random_weights + " --half" * args.half
