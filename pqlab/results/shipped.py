"""The measurements that travel with the package, as data frames of one form each.

shipped("decode-h200")                      the result as `python -m pqlab bench decode --json` printed it
decode_frame(shipped("decode-h200"))        a row a case; also for "cpu-..." results
shipped_like("layout-*")                    all results of this name, by name
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.resources import files
from typing import Any

import pandas as pd

_CASE = re.compile(
    r"(?P<shape>\d+/(?P<kv>\d+) d(?P<d>\d+)) (?P<bits>[\d.]+) bit, batch (?P<batch>\d+), (?P<tokens>\S+)"
)


def shipped(name: str) -> dict[str, Any]:
    """A shipped result by the name of its file, without ".json". Raises FileNotFoundError that lists the names."""
    found = shipped_like(name)
    if name not in found:
        raise FileNotFoundError(f"there is no shipped result {name}; there are {', '.join(shipped_like('*'))}")
    return found[name]


def shipped_like(pattern: str) -> dict[str, dict[str, Any]]:
    """Shipped results whose names match a shell pattern, by name."""
    folder = files("pqlab") / "results"
    named = {path.name.removesuffix(".json"): path for path in folder.iterdir() if path.name.endswith(".json")}
    return {name: json.loads(named[name].read_text()) for name in sorted(named) if fnmatch(name, pattern)}


def measured_with(result: Mapping[str, Any]) -> str:
    """One line: device, date, commit, torch."""
    device = result.get("device") or result.get("cpu", "")
    torch = result.get("torch") or result.get("versions", {}).get("torch", "")
    threads = f"{result['threads']} threads" if "threads" in result else ""
    said = (device, threads, result.get("date", ""), result.get("commit", ""), f"torch {torch}")
    return ", ".join(part for part in said if part)


def decode_frame(result: Mapping[str, Any], read_gb_per_s: float | None = None) -> pd.DataFrame:
    """The decode cases of `bench decode` or `bench cpu`, one form for both.

    Args:
        read_gb_per_s: rate at which bytes can just be read, for results that do not say how long that takes.

    Returns:
        DataFrame: shape ("32/8 d128": query heads, kv heads, head size), bits, batch, context (of the longest row),
        ragged, microseconds, exact (name of the fastest), exact_microseconds, speedup, code_bytes, read_microseconds
        (NaN where unknown), share (of the read rate).
    """
    rows = []
    for r in result["records"]:
        if not (case := _CASE.match(r["case"])):
            continue
        shortest, _, longest = case["tokens"].partition("-")
        context, ours = int(longest or shortest), r.get("us") or r["microseconds"]
        exact = r["exact_us"][r["exact"]] if "exact_us" in r else r["exact_microseconds"]
        tokens = sum(r["tokens"]) if "tokens" in r else context * int(case["batch"])
        code_bytes = int(tokens * int(case["kv"]) * int(case["d"]) * 2 * float(case["bits"]) / 8)
        read = r.get("read_us") or (code_bytes / read_gb_per_s / 1e3 if read_gb_per_s else float("nan"))
        rows.append((case["shape"], float(case["bits"]), int(case["batch"]), context, bool(longest), ours, r["exact"],
                     exact, exact / ours, code_bytes, read, read / ours))  # fmt: skip
    names = ["shape", "bits", "batch", "context", "ragged", "microseconds", "exact", "exact_microseconds", "speedup",
             "code_bytes", "read_microseconds", "share"]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def model_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """The cases of `bench model` (in a "cpu-..." result: its part "model"): shape, context, case, milliseconds, how.

    `how` is "eager", "graph" or "compiled"; rest_milliseconds is the time of the same step without attention and cache
    (NaN where that was not measured). Cases without a time are left out.
    """
    table = pd.DataFrame(result.get("model", result)["records"])
    table = table[table.milliseconds.notna() & ~table.case.str.startswith("prefill")].copy()
    on_gpu = "device" in result and result["device"].startswith("NVIDIA")
    end = r" (eager|compiled)(?=,|$)"  # "exact eager, no cuDNN" is the case "exact, no cuDNN"
    ends = table.case.str.extract(end)[0]
    table["how"] = ends.fillna("graph" if on_gpu else "static buffers")
    table["case"] = table.case.str.replace(end, "", regex=True)
    none = table[table.case == "none"].set_index(["shape", "context", "how"]).milliseconds
    keys = pd.MultiIndex.from_frame(table[["shape", "context", "how"]])
    table["rest_milliseconds"] = none.reindex(keys).to_numpy()
    return table[["shape", "context", "how", "case", "milliseconds", "rest_milliseconds"]].reset_index(drop=True)
