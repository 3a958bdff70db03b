"""Codebooks for any model at once: calibrated on shipped texts the first time, read from a file afterwards."""

from __future__ import annotations

import hashlib
import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import PQConfig
from ..models import calibration_text, fingerprint, load_text
from ..store import build_again, build_once, cache_dir
from .calibrate import calibrate
from .codebook import Codebooks
from .codebook_file import CodebookError
from .geometry import attention_geometry, one_setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("pqlab")

CALIBRATION_TEXT = "mixed"
"""A novel, code, sentences with numbers and what a model writes by itself, none of them what `load_text` gives by
default: a notebook should not show what was trained on. On other novels the mix is better than a novel alone, on code
and digits several times better."""


def default_codebooks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pq: PQConfig = PQConfig(),
    *,
    text: str = CALIBRATION_TEXT,
    scope: str = "head",
    span: int = 0,
    progress: bool = True,
) -> Codebooks:
    """Codebooks of `model` at the setting `pq`, calibrated once and kept in the cache directory.

    The file is named by the model's fingerprint, M, nbits, the text and the version of the quantizer; a damaged file
    is made again, which is logged. Several processes may ask at once: one calibrates.

    Args:
        text: what to calibrate on: the name of a shipped text or mix, or the path of a text file.
        scope, span: what shares a codebook, and how many tokens share an anchor; see `calibrate`.
    """
    path = default_codebooks_path(model, pq, text=text, scope=scope, span=span)

    def build(target: Path) -> None:
        settings = {"scope": scope, "span": span, "text_name": Path(text).name, "progress": progress}
        calibrate(model, tokenizer, calibration_text(text), pq, **settings).save(target)

    what = f"the codebooks {path.name}"
    build_once(path, build, what)
    try:
        return Codebooks.load(path, model)
    except CodebookError as error:
        damage = str(error)

    def rebuild(target: Path) -> None:
        log.warning("calibrating %s anew, which takes minutes: %s", what, damage)
        build(target)

    build_again(path, rebuild, what, lambda: _is_sound(path, model))
    return Codebooks.load(path, model)


def _is_sound(path: Path, model: PreTrainedModel) -> bool:
    try:
        Codebooks.load(path, model)
    except CodebookError:
        return False
    return True


def default_codebooks_path(
    model: PreTrainedModel,
    pq: PQConfig = PQConfig(),
    *,
    text: str = CALIBRATION_TEXT,
    scope: str = "head",
    span: int = 0,
) -> Path:
    """The file that `default_codebooks` keeps; it need not exist yet."""
    pq = one_setting(pq)
    subspaces = sorted({pq.num_subspaces(head_dim) for _, head_dim in attention_geometry(model).values()})
    key = hashlib.sha256(_quantizer_version().encode() + load_text(text).encode()).hexdigest()[:8]
    size = f"M{'-'.join(map(str, subspaces))}-{pq.nbits}bit" + ("" if scope == "head" else f"-per-{scope}")
    size += f"-span{span}" if span else ""
    return cache_dir() / "codebooks" / f"{fingerprint(model)}-{size}-{Path(text).stem}-{key}.safetensors"


def _quantizer_version() -> str:
    """Hash of the quantizer's source: a changed calibration must not go on with codebooks of the old one."""
    digest = hashlib.sha256()
    for source in sorted(files("pqlab").joinpath("quantization").iterdir(), key=lambda entry: entry.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()
