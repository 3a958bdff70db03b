"""What the report claims, and where pqlab's figure for each claim is to be found."""

from __future__ import annotations

from functools import partial

from ..config import CacheConfig, PQConfig
from ..cost import CacheCost
from ..shapes import SHAPES
from .results import Results
from .verdict import Claim, Measured

_ITS_OWN = "none: the original's kernels and training are no part of pqlab"
_NO_CUDNN = "exact eager, no cuDNN"
"""`bench model`'s row of the fastest exact attention without graphs."""
_HEADS_7B = {"heads": 32, "kv_heads": 32, "head_dim": 128, "m": 64}
"""Attention of the report's 7B models at 4 bits."""

LATENCIES = (
    ("LLaMA-2-7B", "Llama-2-7B", 8192, 245, 118, 2.07, 73),
    ("LLaMA-2-7B", "Llama-2-7B", 16384, 520, 203, 2.56, 75),
    ("LLaMA-2-7B", "Llama-2-7B", 32768, 1120, 378, 2.96, 74),
    ("LongChat-7B", "LongChat-7B-32K", 32768, 1050, 365, 2.88, 76),
)
"""The report's table for an A100: model, its shape here, tokens, ms exact, ms paged, speed-up, per cent saved."""


def _bandwidth(results: Results) -> Measured | None:
    """Best share over contexts, and that of the report's longest one."""
    found = [pair for pair in results.on_gpu("decode", **_HEADS_7B) if len(pair[0]["tokens"]) == 1]
    if not found:
        return None
    best, source = max(found, key=lambda pair: pair[0]["share_of_read_rate"])
    shares = {record["tokens"][0]: record["share_of_read_rate"] for record, _ in found}
    at_32k = f", {shares[32768]:.0%} at 32,768" if 32768 in shares else ""
    shown = f"{best['share_of_read_rate']:.0%} of the rate of reading these bytes, at {best['tokens'][0]:,} tokens"
    return Measured(best["share_of_read_rate"], shown + at_32k, source)


def _attention(results: Results) -> Measured | None:
    for record, source in results.on_gpu("decode", **_HEADS_7B, tokens=[32768]):
        shown = f"{record['speedup']:.2f}x the fastest exact attention ({record['exact']}) at 32,768 tokens, one layer"
        return Measured(record["speedup"], shown, source, ("attention alone",))
    return None


def _model(results: Results, context: int, how: str = "graph") -> Measured | None:
    """Time per token of the 7B shape: the fastest paged row beside the fastest exact one."""
    rows = [
        (record, source)
        for record, source in results.on_gpu("model", shape="7b", context=context)
        if record["milliseconds"] is not None
        and (" eager" in record["case"]) == (how == "eager")
        and "no maps" not in record["case"]
    ]
    times = {
        side: {record["case"]: record["milliseconds"] for record, _ in rows if record["case"].startswith(side)}
        for side in ("paged", "exact")
    }
    if not all(times.values()):
        return None
    paged, exact = (min(times[side].items(), key=lambda item: item[1]) for side in ("paged", "exact"))
    shown = f"{exact[1]:.1f} -> {paged[1]:.1f} ms a token, {exact[1] / paged[1]:.2f}x ({exact[0]}, {paged[0]})"
    differs = ["random weights of this shape"]
    if how == "eager" and _NO_CUDNN not in times["exact"]:
        differs.append("exact is torch's default, which builds a cuDNN plan for every new length")
    return Measured(exact[1] / paged[1], shown, rows[0][1], tuple(differs))


def _stored(results: Results) -> Measured | None:
    """Bytes of one sequence of 32K tokens beside fp16, window and codebooks included."""
    for record, source in results.records("eval", method="pq-4"):
        exact = next(other for other, its in results.records("eval", method="exact") if its == source)
        ratio, coded = exact["bytes_32768"] / record["bytes_32768"], exact["token_bits"] / record["token_bits"]
        shown = f"{ratio:.2f}x at 32,768 tokens, exact window and codebooks included; {coded:.2f}x for a coded token"
        return Measured(ratio, shown, source, ("another model",))
    return None


def _saved(results: Results, shape: str, context: int) -> Measured | None:
    """Per cent of the fp16 cache that is saved: as measured on a GPU, or else from the layout."""
    for record, source in results.on_gpu("memory", shape="7b", context=context):
        saved = 100 * (1 - record["paged_bytes"] / record["exact_bytes"])
        peak = 100 * (1 - record["paged_peak_bytes"] / record["exact_peak_bytes"])
        shown = f"{saved:.1f} % less than an exact cache allocates, {peak:.1f} % less at a step's peak; codebooks apart"
        return Measured(saved, shown, source, ("random weights of this shape",))
    cost = CacheCost(SHAPES[shape], PQConfig(), CacheConfig(), context)
    saved = 100 * (1 - cost.stored_bytes / cost.baseline_bytes)
    with_books = 100 * (1 - (cost.stored_bytes + cost.constant_bytes) / cost.baseline_bytes)
    return Measured(
        saved, f"{saved:.1f} % at 4 bits; {with_books:.1f} % with the codebooks, which sequences share", None
    )


def _loss(results: Results) -> Measured | None:
    """Change of perplexity at 4 bits: the worse of what was measured over window lengths."""
    found = [(abs(record["change"]), record, source) for record, source in results.records("eval", method="pq-4")]
    if not found:
        return None
    _, record, source = max(found, key=lambda item: item[0])
    content = results.files[source.file]
    shown = (
        f"{record['change']:+.2%} perplexity at {record['token_bits']:g} bits, {record['agreement']:.1%} same first "
        f"choice; {content['model']['name']} on {content['text']['name']}, windows of {content['length']} tokens"
    )
    return Measured(abs(record["change"]), shown, source, ("another model",))


def _nothing(results: Results) -> None:
    return None


def _claims() -> tuple[Claim, ...]:
    bench, memory = (f"python -m pqlab bench {name} --shape 7b --context {{}} --json" for name in ("model", "memory"))
    decode, evaluate = "python -m pqlab bench decode --json", "python -m pqlab eval --json"
    claims = [
        Claim("memory bandwidth, original MILLION", "about 60 %", 0.6, _nothing, _ITS_OWN),
        Claim("memory bandwidth, paged", "about 95 %", 0.95, _bandwidth, decode),
        Claim("KV cache memory", "4x smaller", 4.0, _stored, evaluate, of_gpu=False),
        Claim("speed-up over exact, original MILLION", "2.09x", 2.09, _nothing, _ITS_OWN),
        Claim("speed-up, whole model at 32K", "2.5-3.0x", 2.5, partial(_model, context=32768), bench.format(32768)),
        Claim("speed-up, whole model at 32K, without graphs", "2.5-3.0x", 2.5,
              partial(_model, context=32768, how="eager"), bench.format(32768)),
        Claim("speed-up, attention at 32K", "2.5-3.0x", 2.5, _attention, decode),
        Claim("loss of accuracy", "< 1 %", 0.01, _loss, evaluate, better="less", of_gpu=False),
    ]  # fmt: skip
    for model, shape, context, exact, paged, ratio, percent in LATENCIES:
        name = f"{model} at {context // 1024}K"
        latency, saved = partial(_model, context=context), partial(_saved, shape=shape, context=context)
        claims += [
            Claim(f"{name}, latency", f"{exact} -> {paged} ms, {ratio}x", ratio, latency, bench.format(context)),
            Claim(f"{name}, memory saved", f"{percent} %", percent, saved, memory.format(context)),
        ]
    return tuple(claims)


CLAIMS = _claims()
