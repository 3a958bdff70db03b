"""The file of `Codebooks` and of samples: tensors and a JSON header in one safetensors file, with a checksum.

A tensor that several names share, or that is expanded (one codebook for all heads), is stored once; the header's
"shared" says which names are what expansion of it, and reading gives the same sharing back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 2  # 2: tensors may be float16 or int8
_READ = (1, 2)
_KEY = "pqlab"  # of the header in safetensors' metadata
_DRAFT = ".unfinished-"  # followed by the process


Tensors = dict[str, torch.Tensor]


class CodebookError(ValueError):
    """A codebook (or its file) is damaged, foreign, or made for another model; the message names both sides."""


def write(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write header and tensors; an existing file is replaced at once, never left half written."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored, shared = _distinct(tensors)
    about = {"schema_version": SCHEMA_VERSION, **header, **({"shared": shared} if shared else {})}
    text = json.dumps({**about, "sha256": _digest(stored)}, sort_keys=True)
    draft = path.with_name(f".{path.name}{_DRAFT}{os.getpid()}")
    try:
        save_file(stored, draft, {_KEY: text})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(path: str | Path) -> None:
    """Delete what killed writers of this file left lying beside it. No other process may be writing it."""
    path = Path(path)
    for draft in path.parent.glob(f".{path.name}{_DRAFT}*"):
        draft.unlink(missing_ok=True)


def read(path: str | Path, what: str = "codebook", remedy: str = "calibrate again") -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of a file. Raises `CodebookError` when it is damaged, foreign or of another schema.

    Args:
        what, remedy: what kind of file it is and what to do about a bad one, for the messages.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no {what} file at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CodebookError(f"{path.name} is a safetensors file but no pqlab {what} file")
            header = _parse(path, text, remedy)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CodebookError(f"{path.name} cannot be read as a safetensors file ({error}); {remedy}") from error
    if _digest(tensors) != header.get("sha256"):
        raise CodebookError(f"{path.name} is damaged: its checksum is not that of its content; {remedy}")
    whole = {name: tensors[first].expand(shape) for name, (first, shape) in header.pop("shared", {}).items()}
    return header, tensors | whole


def _distinct(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, tuple[str, list[int]]]]:
    """Copies of the tensors, each piece of memory once and without expanded dimensions, and {name: (the name it is
    stored under, its shape)} for those that are not stored as they are."""
    stored: Tensors = {}
    shared: dict[str, tuple[str, list[int]]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        kept = tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
        first = seen.setdefault((kept.device, kept.data_ptr(), tuple(kept.shape), kept.stride(), kept.dtype), name)
        if first == name:
            stored[name] = kept.cpu().contiguous().clone()
        if first != name or kept.shape != tensor.shape:
            shared[name] = (first, list(tensor.shape))
    return stored, shared


def _parse(path: Path, text: str, remedy: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CodebookError(f"{path.name} has no readable pqlab header ({error!r}); {remedy}") from error
    if version not in _READ:
        raise CodebookError(
            f"{path.name} has schema version {version}, this pqlab reads versions {_READ[0]} to {_READ[-1]}; "
            f"{remedy}, or use the pqlab that wrote it"
        )
    return header


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes: safetensors itself does not notice a flipped bit."""
    total = sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
