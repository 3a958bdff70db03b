"""Shared fixtures: tiny random models of four architectures, a byte tokenizer, the real default model.

Every fixture imports what it needs itself, so that tests of plain data structures do not wait for transformers.
"""

from __future__ import annotations

import os

import pytest
import torch

MODEL_KINDS = ("llama", "qwen3", "mistral", "gemma3")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("PQLAB_BUILD", "eager")  # one backend from the first test to the last
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture
def all_threads():
    """As many threads as torch would take by itself, for tests that run a real model."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def make_tiny_model(kind: str, seed: int = 0, **overrides):
    """A random causal LM on the CPU in fp32: 2 layers (4 for Gemma-3), 6 query and 3 kv heads of 16, 264 tokens.

    Head counts are no powers of two on purpose. Weights are wide enough that the top two logits are seldom close, and
    no token ends a sequence. Gemma-3 alternates sliding windows of 24 tokens with full attention.
    """
    import transformers

    common = {
        "vocab_size": 264,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": None,
    }
    if kind == "gemma3":
        common |= {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        }
    if kind == "mistral":
        common |= {"sliding_window": None}
    config_class, model_class = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    }[kind]
    config = getattr(transformers, config_class)(**(common | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
    model.generation_config.pad_token_id = 256
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_model():
    """The factory itself: `make_model("llama", seed=1, num_key_value_heads=2)`; see `make_tiny_model`."""
    return make_tiny_model


@pytest.fixture
def model(make_model):
    """A tiny llama that reads its paged cache directly."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    return model


@pytest.fixture
def books(model):
    """Lossy codebooks of `model`, without maps."""
    from pqlab import Codebooks, PQConfig

    return Codebooks.random(model, pq=PQConfig(M=8, nbits=4))


@pytest.fixture(params=MODEL_KINDS)
def tiny_model(request: pytest.FixtureRequest):
    """Every kind of tiny model in turn."""
    return make_tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per UTF-8 byte (ids 0 to 255), then <pad> 256 and <s> 257: fits the tiny models, pads on the left."""
    from pqlab.models.random_weights import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def cudnn_seen():
    """`cudnn_seen(model)`: a list that gets (tokens, may SDPA choose cuDNN) at every forward pass from now on."""

    def watch(model) -> list[tuple[int, bool]]:
        seen: list[tuple[int, bool]] = []

        def look(module, args) -> None:
            seen.append((args[0].shape[-1], torch.backends.cuda.cudnn_sdp_enabled()))

        model.get_input_embeddings().register_forward_pre_hook(look)
        return seen

    return watch


@pytest.fixture(scope="session")
def default_model():
    """(model, tokenizer) of the embedded SmolLM2-135M-Instruct; fetched and converted on first use, 3 s afterwards."""
    from pqlab.models import load_model

    return load_model()
