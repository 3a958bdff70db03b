"""Turn a GGUF file into an ordinary Hugging Face folder with float32 weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .fetch import FetchError
from .quiet import quiet_transformers

CONVERSION = 1
"""Counts up when `convert` changes what it writes."""


def check_converter() -> None:
    """Raise `FetchError` where a package is missing that `convert` needs; said before anything is downloaded."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise FetchError(f"an embedded model is converted with the package {package}: pip install 'pqlab[model]'")


def convert(gguf: Path, folder: Path, what: str, progress: bool = True) -> None:
    """Write a GGUF model as a Hugging Face folder: config, tokenizer and float32 safetensors."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tqdm(total=4, desc=f"convert {what}", disable=not progress, unit="step") as bar, quiet_transformers():
        bar.set_postfix_str("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        bar.update()
        bar.set_postfix_str("weights")
        packed = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        bar.update()
        # transformers may still take it for a quantized model, which it does not save: weights move to a plain one
        if hasattr(packed.config, "quantization_config"):
            del packed.config.quantization_config
        plain = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
        plain.load_state_dict(packed.state_dict())
        plain.generation_config = packed.generation_config
        bar.update()
        bar.set_postfix_str("writing")
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
