"""The file of `Codebooks`: tensors and a JSON header in one safetensors file, with a checksum over the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1
_KEY = "pqlab"  # of the header in safetensors' metadata


class CodebookError(ValueError):
    """A codebook (or its file) is damaged, foreign, or made for another model; the message names both sides."""


def write(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write header and tensors; an existing file is replaced at once, never left half written."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"schema_version": SCHEMA_VERSION, **header, "sha256": _digest(copies)}, sort_keys=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(copies, draft, {_KEY: text})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file. Raises `CodebookError` when it is damaged, foreign or of another schema."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no codebook file at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CodebookError(f"{path.name} is a safetensors file but no pqlab codebook file")
            header = _parse(path, text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CodebookError(f"{path.name} cannot be read as a safetensors file ({error}); calibrate again") from error
    if _digest(tensors) != header.get("sha256"):
        raise CodebookError(f"{path.name} is damaged: its checksum is not that of its content; calibrate again")
    return header, tensors


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CodebookError(f"{path.name} has no readable pqlab header ({error!r}); calibrate again") from error
    if version != SCHEMA_VERSION:
        raise CodebookError(
            f"{path.name} has schema version {version}, this pqlab reads version {SCHEMA_VERSION}; "
            "calibrate again, or use the pqlab that wrote it"
        )
    return header


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes: safetensors itself does not notice a flipped bit."""
    total = sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
