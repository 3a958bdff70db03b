"""A model of random weights and a tokenizer of bytes: the shape of a real model, where its weights cannot be had.

Time and memory of a model do not depend on what it says; everything else about it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

NUM_BYTE_TOKENS = 258
"""Bytes, <pad> and <s>: the vocabulary of `byte_tokenizer`."""


def random_weights(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    attn: str = "pqlab",
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model of this configuration, initialized as transformers does, made on the device itself.

    No token ends its generation.
    """
    from transformers import AutoModelForCausalLM

    place = torch.device(device or "cpu")
    gpus = range(torch.cuda.device_count()) if place.type == "cuda" else ()
    with torch.random.fork_rng(devices=gpus), quiet_transformers(), place:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def byte_tokenizer(max_length: int = 4096) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (ids 0 to 255), then <pad> 256 and <s> 257; pads on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", padding_side="left", model_max_length=max_length
    )
