"""The file of `Samples`: calibration in two steps, first the keys and values of a text, then codebooks of any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .codebook_file import CodebookError, read, write
from .samples import Samples
from .sensitivity import Sensitivity


def save_samples(path: str | Path, samples: Samples, about: Mapping[str, Any]) -> None:
    """Write one safetensors file; an existing one is replaced at once, never left half written.

    Args:
        about: JSON types that the header is to hold: the model's fingerprint, the text, the tokens.
    """
    tensors = {} if samples.positions is None else {"positions": samples.positions}
    for i in samples.keys:
        tensors |= {f"{i}.keys": samples.keys[i], f"{i}.values": samples.values[i]}
        seen = samples.sensitivity.get(i)
        if seen and seen.query_moment is not None:
            k, v = (torch.cat(parts, 1) for parts in zip(*seen.importance, strict=True))
            tensors |= {f"{i}.query_moment": seen.query_moment, f"{i}.importance_k": k, f"{i}.importance_v": v}
    queries = {i: seen.num_queries for i, seen in samples.sensitivity.items()}
    header = {"kind": "samples", "about": dict(about), "layers": list(samples.keys), "num_queries": queries}
    write(path, header, tensors)


def load_samples(path: str | Path) -> tuple[Samples, dict[str, Any]]:
    """What `save_samples` wrote, on the CPU, and its `about`. Raises `CodebookError` when it is damaged or foreign."""
    header, tensors = read(path, "samples", "sample again")
    if header.get("kind") != "samples":
        raise CodebookError(f"{Path(path).name} holds codebooks, no samples")
    sensitivity = {}
    for name, num_queries in header["num_queries"].items():
        if f"{name}.query_moment" in tensors:
            importance = (tensors[f"{name}.importance_k"], tensors[f"{name}.importance_v"])
            sensitivity[int(name)] = Sensitivity(tensors[f"{name}.query_moment"], num_queries, [importance])
    keys, values = ({i: tensors[f"{i}.{side}"] for i in header["layers"]} for side in ("keys", "values"))
    return Samples(keys, values, sensitivity, tensors.get("positions")), header["about"]
