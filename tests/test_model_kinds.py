"""Any decoder of transformers: exact storage gives the tokens of DynamicCache, or an error names what is missing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from pqlab import CacheConfig, PagedPQCache, UnsupportedModelError
from pqlab.errors import PageAllocationError
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)

# One name per setting in every dialect of transformers' configs; a config ignores what it does not know.
TINY = {
    "vocab_size": 264, "max_position_embeddings": 600, "n_positions": 600, "initializer_range": 0.2,
    "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": None, "use_sliding_window": False,
    "hidden_size": 48, "n_embd": 48, "d_model": 48, "word_embed_proj_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_attention_heads": 6, "n_head": 6, "n_heads": 6, "head_dim": 8, "rotary_dim": 4,
    "intermediate_size": 96, "n_inner": 96, "ffn_dim": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 3}
FULL = {"layer_types": ["full_attention"] * 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}

SUPPORTED = {
    "apertus": GROUPED, "arcee": GROUPED, "biogpt": {}, "bitnet": GROUPED, "cohere": GROUPED, "cohere2": MIXED,
    "ernie4_5": GROUPED, "exaone4": MIXED | GROUPED, "gemma": GROUPED, "gemma4_text": GROUPED, "glm": GROUPED,
    "glm4": GROUPED, "gpt2": {}, "gpt_bigcode": {}, "gpt_neox": {}, "granite": GROUPED, "granitemoe": GROUPED,
    "helium": GROUPED, "hunyuan_v1_dense": GROUPED, "llama": FULL | GROUPED, "ministral": MIXED | GROUPED,
    "mixtral": GROUPED | {"sliding_window": None}, "nemotron": GROUPED, "olmo": GROUPED, "olmo2": GROUPED,
    "olmo3": MIXED, "opt": {}, "persimmon": {}, "phi": GROUPED, "phi3": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED, "qwen2_moe": GROUPED, "qwen3": GROUPED, "qwen3_moe": GROUPED, "seed_oss": GROUPED,
    "smollm3": GROUPED, "stablelm": GROUPED, "starcoder2": GROUPED | {"sliding_window": None},
}  # fmt: skip


def make(kind: str, **settings):
    made = type(AutoConfig.for_model(kind))
    wanted = {k: v for k, v in (TINY | settings).items() if not isinstance(getattr(made, k, None), property)}
    config = made(**wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 256
    return model


def padded_prompt() -> dict:
    ids = torch.randint(0, 200, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :25], mask[1, :25] = 256, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache):
    with torch.no_grad():
        return model.generate(
            **padded_prompt(), **cache_argument(model, cache), max_new_tokens=20, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.filterwarnings("default")  # what some model classes warn of is not ours
def test_exact_storage_gives_the_tokens_of_dynamic_cache(kind):
    model = make(kind, **SUPPORTED[kind])
    exact = generate(model, DynamicCache(config=model.config))
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    ours = generate(model, cache)
    assert torch.equal(ours.sequences, exact.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(ours.logits, exact.logits, strict=True)) < 1e-3
    assert cache.pool.num_used and "paged pq" in cache.layer_kinds()
    assert cache.lengths.sum(1).tolist() == [89, 64], "the pads of the second row are stored nowhere"
    others = [kind for kind in cache.layer_kinds() if kind != "paged pq"]
    assert bool(cache.nbytes()["exact_layers"]) == bool(others)


OWN_ATTENTION = {
    "gptj": {}, "bloom": {}, "xglm": {}, "falcon": {"multi_query": True, "alibi": False},
    "falcon 40b": {"new_decoder_architecture": True, "num_kv_heads": 3, "alibi": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN_ATTENTION)
@pytest.mark.filterwarnings("default")
def test_models_with_an_attention_of_their_own_fall_back_and_say_so(kind):
    """Their classes do not go through transformers' attention interface: the cache dequantizes for them."""
    model = make(kind.split()[0], **OWN_ATTENTION[kind])
    exact = generate(model, DynamicCache(config=model.config))
    cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
    cache.announce_mask(padded_prompt()["attention_mask"])
    with pytest.warns(UserWarning, match="Falling back to standard implementation"):
        ours = generate(model, cache)
    assert torch.equal(ours.sequences, exact.sequences)
    assert cache.lengths.sum(1).tolist() == [89, 64]


@pytest.mark.parametrize(
    ("kind", "says"),
    [("deepseek_v3", "MLA"), ("gemma2", "attn_logit_softcapping"), ("gpt_oss", "sinks"), ("doge", "float|bias")],
)
@pytest.mark.filterwarnings("default")
def test_what_is_not_supported_is_named_before_a_token_is_generated(kind, says):
    model = make(kind)
    with pytest.raises(UnsupportedModelError, match=says):
        cache = PagedPQCache(model, Codebooks.identity(model), SMALL)
        model.set_attn_implementation("pqlab")
        generate(model, cache)


LINEAR = {
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "qwen3_next": GROUPED | {
        "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "jamba": GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
}  # fmt: skip
BEHIND_EXACT = {"ministral": MIXED | GROUPED, **LINEAR}
"""Models whose first layer keeps an exact state."""


def ready(kind: str, **config) -> tuple:
    model = make(kind, **BEHIND_EXACT[kind])
    model.set_attn_implementation("pqlab")
    books = Codebooks.identity(model)
    return model, lambda **given: PagedPQCache(model, books, CacheConfig(**config), **given)


@torch.no_grad()
def step(model, cache, ids: torch.Tensor, **inputs) -> torch.Tensor:
    return model(ids, **cache_argument(model, cache), **inputs).logits


def text(count: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 200, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BEHIND_EXACT)
@pytest.mark.parametrize(("held", "refused_at"), [(9, 0), (8, 100), (5, 162)])
@pytest.mark.filterwarnings("default")
def test_a_step_refused_for_pages_is_taken_back_from_exact_layers_too(kind, held, refused_at):
    """The first prompt, a chunk and a single token, with so many of 13 pages held by another cache until then."""
    model, make_cache = ready(kind, page_size=16, residual_length=16, num_sinks=3, max_pages=13)
    cache, plain = make_cache(), DynamicCache(config=model.config)
    other = make_cache(pool=cache.pool)
    step(model, other, text(held * 16 + 19))
    refused = []
    for ids in (text(100), text(50), *text(60, seed=1).T[:, None]):
        wanted = step(model, plain, ids)
        before = [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]
        try:
            got = step(model, cache, ids)
        except PageAllocationError:
            assert [x.get_seq_length() for x in cache.layers if hasattr(x, "get_seq_length")] == before
            refused.append(cache.get_seq_length())
            other.reset()
            got = step(model, cache, ids)
        assert (got - wanted).abs().max() < 1e-4
    assert refused == [refused_at]


@pytest.mark.filterwarnings("default")
def test_a_refused_mask_is_taken_back_from_exact_layers_too():
    model, make_cache = ready("ministral", page_size=16, residual_length=16)
    cache, plain = make_cache(), DynamicCache(config=model.config)
    mask = torch.ones(1, 41, dtype=torch.long)
    step(model, cache, text(40)), step(model, plain, text(40))
    mask[:, 10:20] = 0
    with pytest.raises(UnsupportedModelError, match="hides stored tokens"):
        step(model, cache, text(1), attention_mask=mask)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
    assert (step(model, cache, text(1)) - step(model, plain, text(1))).abs().max() < 1e-4


@pytest.mark.filterwarnings("default")
def test_a_step_interrupted_between_exact_layers_and_paged_ones_is_noticed():
    model, make_cache = ready("ministral", page_size=16, residual_length=16)
    cache = make_cache()
    step(model, cache, text(40))

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.get_decoder().layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(model, cache, text(1))
    hook.remove()
    with pytest.raises(RuntimeError, match=r"interrupted.*cache\.reset\(\)"):
        step(model, cache, text(1))
    cache.reset()
    wanted = step(model, DynamicCache(config=model.config), text(40))
    assert (step(model, cache, text(40)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", BEHIND_EXACT)
@pytest.mark.filterwarnings("default")
def test_rows_are_selected_in_all_layers_or_in_none(kind):
    model, make_cache = ready(kind, page_size=16, residual_length=16)
    cache, singles = make_cache(), [make_cache() for _ in range(2)]
    ids = text(60, rows=2)
    step(model, cache, ids)
    for row, single in enumerate(singles):
        step(model, single, ids[row : row + 1])
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    for seed in range(30):  # rows 1, 0, 1
        new = text(1, seed, rows=2)
        wanted = [step(model, single, new[row : row + 1]) for row, single in enumerate(singles)]
        got = step(model, cache, new[[1, 0, 1]])
        assert (got - torch.cat([wanted[row] for row in (1, 0, 1)])).abs().max() < 1e-4
    cache.group.check_integrity()


@pytest.mark.parametrize("kind", BEHIND_EXACT)
@pytest.mark.filterwarnings("default")
def test_a_crop_that_an_exact_layer_cannot_do_changes_nothing(kind):
    model, make_cache = ready(kind, page_size=16, residual_length=16)
    cache, plain = make_cache(), DynamicCache(config=model.config)
    step(model, cache, text(60)), step(model, plain, text(60))
    lengths = cache.lengths.clone()
    with pytest.raises(RuntimeError, match=r"layer 0 \(.*\) cannot be cropped, and nothing was changed"):
        cache.crop(-5)
    cache.crop(0)
    assert cache.get_seq_length() == 60 and torch.equal(cache.lengths, lengths)
    assert (step(model, cache, text(1)) - step(model, plain, text(1))).abs().max() < 1e-4
    cache.crop(-61)  # of everything is a reset
    assert (step(model, cache, text(60)) - step(model, DynamicCache(config=model.config), text(60))).abs().max() < 1e-4


@pytest.mark.filterwarnings("default")
def test_a_sliding_window_that_keeps_its_past_is_cropped_with_the_pages():
    model, make_cache = ready("ministral", page_size=16, residual_length=16)
    cache, plain = make_cache(), DynamicCache(config=model.config)
    for past in (cache, plain):
        past.activate_past_recording()
        step(model, past, text(60))
        past.crop(-25)
    assert [layer.get_seq_length() for layer in cache.layers] == [35, 35]
    assert (step(model, cache, text(9)) - step(model, plain, text(9))).abs().max() < 1e-4
