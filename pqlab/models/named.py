"""The report's model names (its option -f): which model a name means, and its shape where the weights are far away.

A name is one of `CONFIGS`, an embedded model, a folder or a hub id. `find_model` reads only a configuration, so that
settings can be checked before gigabytes are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .fetch import FetchError
from .load import ModelLoadError, load_model, model_source
from .packaged import PACKAGED
from .quiet import quiet_transformers
from .random_weights import NUM_BYTE_TOKENS, byte_tokenizer, random_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelConfig:
    """A Llama model by its published configuration; without a hub id there are no weights but random ones."""

    hub_id: str
    settings: Mapping[str, Any]


_7B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008}

CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-2-7b": ModelConfig(
            "meta-llama/Llama-2-7b-hf",
            {**_7B, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
        ),
        "longchat-7b-32k": ModelConfig(
            "lmsys/longchat-7b-v1.5-32k",
            {
                **_7B, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        ),
        "llama-3.1-8b": ModelConfig(
            "meta-llama/Llama-3.1-8B",
            {
                **_7B, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                },
            },
        ),
        "debug-model": ModelConfig(
            "",
            {
                "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
                "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 320, "max_position_embeddings": 4096,
            },
        ),
    }
)  # fmt: skip
"""Name -> model. "debug-model" is two layers of random weights: it tries a command in seconds."""

SHORT = {"gemma": "gemma3-270m"}
"""Other names of embedded models."""


@dataclass(frozen=True)
class FoundModel:
    """A model that was looked up and not yet loaded.

    Args:
        name: as it was asked for; config: of transformers; source: what `load_model` takes.
        random: it has random weights: what it says means nothing.
    """

    name: str
    config: PreTrainedConfig
    source: str
    random: bool

    def load(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, as `load_model` gives them; random weights come with a tokenizer of bytes."""
        if not self.random:
            return load_model(self.source, dtype, device=device)
        text = self.config.get_text_config(decoder=True)
        if text.vocab_size < NUM_BYTE_TOKENS:
            raise ModelLoadError(f"{self.name} has {text.vocab_size} tokens, too few for bytes ({NUM_BYTE_TOKENS})")
        limit = getattr(text, "max_position_embeddings", None) or 4096
        return random_weights(self.config, dtype, device=device, seed=seed), byte_tokenizer(limit)


def names() -> list[str]:
    """Every name that is neither a folder nor a hub id."""
    return [*PACKAGED, *SHORT, *CONFIGS]


def source_of(name: str) -> str:
    """What `load_model` takes for a name, a folder or a hub id; "" for a name that only means random weights."""
    return CONFIGS[name].hub_id if name in CONFIGS else SHORT.get(name, name)


def is_on_hub(name: str, random: bool = False) -> bool:
    """Whether looking a model up asks the hub."""
    source = source_of(name)
    if name in CONFIGS and (random or not source):
        return False
    return source not in PACKAGED and not Path(source).expanduser().is_dir()


def find_model(name: str, *, random: bool = False) -> FoundModel:
    """Look a model up.

    Args:
        name: of `names()`, a folder, or a hub id.
        random: random weights of its shape; for a name of `CONFIGS` nothing is fetched then.

    Raises:
        ModelLoadError: no such model, or it cannot be reached; the message says what can be typed instead.
        FetchError: the package of an embedded model could not be fetched.
    """
    from transformers import AutoConfig, LlamaConfig

    known = CONFIGS.get(name)
    if known and (random or not known.hub_id):
        return FoundModel(name, LlamaConfig(**known.settings), "", True)
    source = source_of(name)
    if source not in PACKAGED and not Path(source).expanduser().is_dir():
        # a hub that cannot be reached takes a minute to say so: catch a slip of the pen before it is asked
        if close := get_close_matches(source, names(), n=1, cutoff=0.8):
            raise ModelLoadError(f'there is no model "{name}"; did you mean "{close[0]}"?')
    try:
        place = model_source(source)
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place)
    except (FetchError, ModelLoadError):
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if known:
            raise ModelLoadError(
                f"{name} is {source} on the Hugging Face hub, which could not be read. Give -f the folder of a copy; "
                f"or --random-weights, for time and memory of its shape; or -f default. The hub's client said: {reason}"
            ) from error
        raise ModelLoadError(
            f'"{name}" is none of {", ".join(names())}, no folder of a model, and could not be read from the Hugging '
            f"Face hub: {reason}"
        ) from error
    return FoundModel(name, config, source, random)
