"""The records of a run as tables of text: caches, the parts of a step, LongBench's tasks."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..benchmarks.step_parts import PARTS
from ..memory import MIB, readable_bytes

NOTES = """\
First token: from the prompt. Token: median, one of every row of the batch. Cache: codes, exact tokens and page table at
the end; reserved: pages taken in advance, free ones too; constants: codebooks and maps. Peak: {memory}."""
NO_CUDNN = """\
Times are without cuDNN attention, torch's first choice on Hopper GPUs, which builds a plan for every new length of the
keys: a cache that grows would wait for one at every token."""


def render(records: list[dict[str, Any]]) -> list[str]:
    """The tables of a run's records, as text: caches, and LongBench's tasks."""
    measured = [record["result"] for record in records if "generation" in record["result"]]
    parts = []
    if measured:
        rows = [_row(result) for result in measured]
        columns = max((list(row) for row in rows), key=len)  # a PQ cache has columns that the exact one lacks
        table = pd.DataFrame(rows, columns=columns).fillna("-")
        first = measured[0]["generation"]
        notes = [NOTES.format(memory=first["memory"])]
        if first["cudnn_attention"] is False:  # None on a CPU
            notes.append(NO_CUDNN)
        parts += [table.to_string(index=False), "\n".join(notes)]
    steps = [(result["cache"], result["breakdown"]) for result in measured if "breakdown" in result]
    if steps:
        parts.append(_parts_table(steps))
    marks = {(row["task"], row["cache"]): row for result in measured for row in result.get("longbench", [])}
    if marks:
        table = pd.DataFrame([{**row, "score": f"{row['score']:.2f}"} for row in marks.values()])
        parts.append(table.to_string(index=False))
    return parts


def _parts_table(steps: list[tuple[str, dict[str, Any]]]) -> str:
    """Milliseconds of every part of a step, a column a cache."""
    columns = {}
    for cache, found in steps:
        column = {row["part"]: f"{row['milliseconds']:.3f}" for row in found["parts"]}
        columns[f"{cache}, ms"] = column | {"step": f"{found['step_milliseconds']:.3f}"}
    order = [part for part in (*PARTS, "step") if any(part in column for column in columns.values())]
    about = steps[0][1]
    head = f"A decode step behind {about['context']} tokens, one row ({about['how']}); step: without measuring"
    table = pd.DataFrame(columns).reindex(order).fillna("-").rename_axis("part").reset_index()
    return f"{head}\n{table.to_string(index=False)}"


def _row(result: dict[str, Any]) -> dict[str, str]:
    g, row = result["generation"], {"cache": result["cache"]}
    if "token_bits" in result:
        row["token bits"] = f"{result['token_bits']:.3g}"
    if "perplexity" in result:
        row["perplexity"] = f"{result['perplexity']:.3f}"
    if "kl" in result:
        row |= {
            "change": f"{result['change']:+.2%}",
            "KL": f"{result['kl']:.5f}",
            "top-1": f"{result['agreement']:.1%}",
        }
    return row | {
        "first token s": f"{g['first_token_seconds']:.3f}",
        "token ms": f"{g['token_ms']:.2f}",
        "tokens/s": f"{g['tokens_per_second']:.1f}",
        "cache MiB": f"{g['cache_bytes'] / MIB:.2f}",
        "reserved MiB": f"{g['reserved_bytes'] / MIB:.1f}",
        "constants MiB": f"{g['constant_bytes'] / MIB:.1f}",
        "peak": "-" if g["peak_bytes"] is None else readable_bytes(g["peak_bytes"]),
    }
