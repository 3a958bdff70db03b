"""Static mode: the same tokens as eager mode, one compiled graph for all steps, loud when it is full."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from test_cache_matrix import inputs_for

from pqlab import CacheConfig, PagedPQCache, PQConfig
from pqlab.cache.static_sequences import advance
from pqlab.errors import ResidualOverflowError, UnsupportedModelError
from pqlab.kernels import dispatch, use_backend
from pqlab.kernels.backend import Backend, StepShape
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

EAGER = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=200)
STATIC = replace(EAGER, mode="static")


def generate(model, cache, way: str, **settings):
    model.set_attn_implementation("pqlab")
    return model.generate(
        **inputs_for(way), **cache_argument(model, cache), max_new_tokens=60, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["greedy", "padded batch", "chunked prefill"])
def test_static_gives_the_tokens_of_eager(tiny_model, way):
    books = Codebooks.random(tiny_model, pq=PQConfig(M=8, nbits=6))
    settings = {"prefill_chunk_size": 24, "disable_compile": True} if way == "chunked prefill" else {}
    eager, static = (PagedPQCache(tiny_model, books, c, context=200) for c in (EAGER, STATIC))
    theirs = generate(tiny_model, eager, way, **settings)
    for _ in range(2):  # and again after a reset, on the same buffers
        ours = generate(tiny_model, static, way, **settings)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert static.lengths.tolist() == eager.lengths.tolist()
        static.group.check_integrity()
        for a, b in zip(static.quantized_layers, eager.quantized_layers, strict=True):
            for row in range(len(eager.lengths)):
                assert all(torch.equal(x, y) for x, y in zip(a.codes(row), b.codes(row), strict=True))
        assert static.as_frame().tokens.tolist() == eager.as_frame().tokens.tolist()
        static.reset()


def test_advance_is_the_host_s_rule():
    from pqlab.cache import SequenceGroup
    from pqlab.paging import PagePool

    group = SequenceGroup(PagePool(10), EAGER)
    lengths = torch.zeros(1, 3, dtype=torch.int32)
    sinks, coded, window = 0, 0, 0
    for n in range(1, 200):
        lengths = advance(lengths, EAGER)
        sinks, coded, window = group.split(n, coded)
        coded += EAGER.flush_count(coded, window)
        assert lengths[0].tolist() == list(group.split(n, coded))


@pytest.mark.parametrize("way, plain", [("greedy", True), ("padded batch", False)])
def test_a_plainly_causal_prompt_is_attended_without_its_mask(make_model, monkeypatch, way, plain):
    """transformers gives a static cache a mask for every prompt; the fastest attentions take none."""
    from pqlab.cache import layer

    model, masks, attend = make_model("llama"), [], layer.attend_exactly
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    monkeypatch.setattr(layer, "attend_exactly", lambda *args: masks.append(args[3]) or attend(*args))
    model.set_attn_implementation("pqlab")
    with torch.no_grad():
        model(**inputs_for(way), **cache_argument(model, PagedPQCache(model, books, STATIC, context=200)))
        assert [mask is None for mask in masks] == [plain, plain]
        ids = torch.arange(40)[None]
        block = torch.ones(40, 40, dtype=torch.bool).tril()
        block[20:, :20] = False  # two texts in one row
        cache = PagedPQCache(model, books, STATIC, context=200)
        model(ids, attention_mask=block[None, None], **cache_argument(model, cache))
    assert torch.equal(masks[-1][0, 0], block)


def test_one_graph_for_all_decode_steps(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    eager, static = (PagedPQCache(model, books, c, context=200) for c in (EAGER, STATIC))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    ids = inputs_for("greedy")["input_ids"]
    with torch.no_grad():
        for cache in (eager, static):
            model(ids, **cache_argument(model, cache))
        for n in range(40):
            token = torch.tensor([[n]])
            mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
            position = torch.tensor([[90 + n]])
            ours = step(token, **cache_argument(model, static), attention_mask=mask, position_ids=position).logits
            torch.testing.assert_close(ours, model(token, **cache_argument(model, eager)).logits, rtol=0, atol=1e-3)
    assert len(graphs) == 1, "every step should run the same graph"
    assert static.lengths.tolist() == eager.lengths.tolist()


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_compiled_by_inductor(make_model):
    """The default compiler, which sees the mutated pages and buffers as aliases or not: codes and logits stay."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6), maps=True)
    compiled, stepped = (PagedPQCache(model, books, STATIC, context=200) for _ in range(2))
    torch._dynamo.reset()
    assert_compiled_is_stepped(model, torch.compile(model.forward, fullgraph=True), compiled, stepped)


def assert_compiled_is_stepped(model, step, compiled, stepped, tolerance: float = 1e-4, flips: float = 0.01) -> None:
    """Forty steps, flushes among them, of a compiled forward and of the plain one.

    Rounding may move a vector to a neighbouring centroid: in a share `flips` of the codes, no more.
    """
    device = model.device
    with torch.no_grad():
        for cache in (compiled, stepped):
            model(inputs_for("greedy")["input_ids"].to(device), **cache_argument(model, cache))
        for n in range(40):
            token, position = (torch.tensor([[x]], device=device) for x in (n, 90 + n))
            more = {
                "attention_mask": torch.ones(1, 1, 1, 200, dtype=torch.bool, device=device),
                "position_ids": position,
            }
            ours = step(token, **cache_argument(model, compiled), **more).logits
            theirs = model(token, **cache_argument(model, stepped), **more).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert compiled.lengths.tolist() == stepped.lengths.tolist()
    for a, b in zip(compiled.quantized_layers, stepped.quantized_layers, strict=True):
        differ = [(x != y).float().mean().item() for x, y in zip(a.codes(0), b.codes(0), strict=True)]
        assert max(differ) < flips


def test_generate_compiles_it_by_itself_where_told_to(make_model):
    from transformers import CompileConfig

    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    eager, static = (PagedPQCache(model, books, c, context=200) for c in (EAGER, STATIC))
    assert static.is_compileable and not eager.is_compileable
    theirs = generate(model, eager, "greedy")
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    ours = generate(model, static, "greedy", compile_config=compile_config)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_what_a_graph_cannot_hold_is_said_before(make_model, monkeypatch, caplog):
    """Of steps that the CUDA kernels do not run, `generate` must not make graphs: the reference reads lengths."""
    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    step = StepShape(16, 8, 6, 8, 6, 2, torch.float16)
    assert dispatch.uncapturable(torch.device("cpu"), step) is None, "there are no graphs"
    cuda = torch.device("cuda")
    monkeypatch.setitem(dispatch._backends, "cuda", Refuses())
    assert dispatch.uncapturable(cuda, step) == "6-bit codes" and Refuses.asked == [step]
    with use_backend("-cuda"):
        assert "forbidden" in dispatch.uncapturable(cuda, step)
    with use_backend("reference"):
        assert "reference is forced" in dispatch.uncapturable(cuda, step)
    monkeypatch.setattr(dispatch, "uncapturable", lambda device, step: Refuses().refuses(device, step))
    assert not PagedPQCache(model, books, STATIC, context=200).is_compileable
    assert "static mode: steps are neither compiled nor captured; layer 0: 6-bit codes" in caplog.text
    assert caplog.text.count("static mode") == 1, "one line a reason, not a layer"


class Refuses(Backend):
    name = "cuda"
    asked: ClassVar[list[StepShape]] = []

    def refuses(self, device, step):
        self.asked.append(step)
        return "6-bit codes"


def test_what_static_mode_does_not_do_is_named(make_model):
    model = make_model("llama")
    cache = PagedPQCache(model, Codebooks.identity(model), STATIC, context=200)
    with pytest.raises(UnsupportedModelError, match='static cache needs model.set_attn_implementation\\("pqlab"\\)'):
        model(torch.zeros(1, 5, dtype=torch.long), **cache_argument(model, cache))
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.identity(model), STATIC, context=200)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long), **cache_argument(model, cache))
    for act in (lambda: cache.crop(-1), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(UnsupportedModelError, match='mode="eager"'):
            act()


def run(model, cache, ids: torch.Tensor, **settings) -> torch.Tensor:
    """Last logits [B, vocabulary] of a plain forward call."""
    with torch.no_grad():
        return model(ids, **cache_argument(model, cache), **settings).logits[:, -1]


def interrupted(model, cache, ids: torch.Tensor, steps: int) -> None:
    """A prompt and `steps` more tokens; Ctrl-C comes behind the attention of the first layer of the last of these."""
    calls = 0

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids)
        for n in range(steps):
            run(model, cache, torch.tensor([[n]]))
    hook.remove()


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_step_cut_short_is_not_gone_on_from(make_model, steps):
    """Some layers have its tokens and some do not: whatever comes next would be read from a torn cache."""
    model, ids = make_model("llama"), inputs_for("greedy")["input_ids"]
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    cache, fresh = (PagedPQCache(model, books, STATIC, context=200) for _ in range(2))
    interrupted(model, cache, ids, steps)
    pads = torch.ones_like(ids)
    pads[:, :30] = 0
    for _ in range(2):  # it does not pass by being asked again
        with pytest.raises(RuntimeError, match="layers of the last step were not all run.*call cache.reset"):
            run(model, cache, torch.tensor([[7]]))
        with pytest.raises(RuntimeError, match="layers of the last step were not all run.*call cache.reset"):
            run(model, cache, ids, attention_mask=pads)  # of the interrupted prompt's length
        with pytest.raises(RuntimeError, match="layers of the last step were not all run.*call cache.reset"):
            generate(model, cache, "greedy")
    cache.reset()
    assert torch.equal(generate(model, cache, "greedy").sequences, generate(model, fresh, "greedy").sequences)
    cache.group.check_integrity()


def test_a_compiled_step_does_not_go_on_from_one_cut_short(make_model):
    model, ids = make_model("llama"), inputs_for("greedy")["input_ids"]
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.random(model, pq=PQConfig(M=8, nbits=6)), STATIC, context=200)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        run(model, cache, ids)
        step(torch.tensor([[1]]), **cache_argument(model, cache))
        cache.reset()
        interrupted(model, cache, ids, 3)
        with pytest.raises(RuntimeError, match="call cache.reset"):
            step(torch.tensor([[1]]), **cache_argument(model, cache))


def test_layers_may_be_compiled_one_by_one(make_model):
    """Then some layers of a step run Python and some do not, in either order."""
    model, ids = make_model("llama"), inputs_for("greedy")["input_ids"]
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    plain = PagedPQCache(model, books, STATIC, context=200)
    expected = [run(model, plain, ids)] + [run(model, plain, torch.tensor([[n]])) for n in range(4)]
    for index in range(2):
        torch._dynamo.reset()
        cache = PagedPQCache(model, books, STATIC, context=200)
        whole, layer = run(model, cache, ids), model.model.layers[index]
        layer.forward = torch.compile(layer.forward, backend="eager")
        ours = [whole] + [run(model, cache, torch.tensor([[n]])) for n in range(4)]
        del layer.forward
        torch.testing.assert_close(ours, expected)


def test_a_first_prompt_of_one_token(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    eager, static = (PagedPQCache(model, books, c, context=200) for c in (EAGER, STATIC))
    for count in (1, 1, 50, 1):
        ids = torch.arange(count)[None]
        torch.testing.assert_close(run(model, static, ids), run(model, eager, ids))
    assert static.lengths.tolist() == eager.lengths.tolist()


def test_pads_are_forgotten_by_reset(make_model):
    """A second turn over steps that lie in columns where the text before the reset had pads."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    eager, static = (PagedPQCache(model, books, c, context=200) for c in (EAGER, STATIC))
    ids, pads = torch.arange(40)[None], torch.ones(1, 40, dtype=torch.long)
    pads[:, :30] = 0
    run(model, static, ids, attention_mask=pads)
    static.reset()
    for count in (8, *[1] * 20, 6):
        ids = torch.arange(count)[None]
        torch.testing.assert_close(run(model, static, ids), run(model, eager, ids))
    assert static.group.real.all() and static.lengths.tolist() == eager.lengths.tolist()


def test_a_prompt_that_does_not_fit(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.random(model, pq=PQConfig(M=8, nbits=4)), STATIC, context=64)
    with pytest.raises(ResidualOverflowError, match="PQC003.*static cache of 64 tokens holds 0.* 70 more.*context=70"):
        run(model, cache, torch.zeros(1, 70, dtype=torch.long))


def test_a_step_that_does_not_fit_changes_nothing(make_model):
    model, ids = make_model("llama"), torch.arange(60)[None]
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=4))
    cache, fresh = (PagedPQCache(model, books, STATIC, context=64) for _ in range(2))
    settings = {"do_sample": False, "eos_token_id": None}
    with pytest.raises(ResidualOverflowError, match="PQC003.*static cache of 64 tokens holds 64.* 1 more.*context=65"):
        model.generate(ids, **cache_argument(model, cache), max_new_tokens=20, **settings)
    assert int(cache.get_seq_length()) == 64 and cache.lengths.sum() == 64
    cache.group.check_integrity()
    expected = model.generate(ids, **cache_argument(model, fresh), max_new_tokens=5, **settings)
    for name in ("sink_k", "sink_v", "window_k", "window_v"):
        for a, b in zip(cache.quantized_layers, fresh.quantized_layers, strict=True):
            assert torch.equal(getattr(a, name), getattr(b, name))
    with pytest.raises(ResidualOverflowError, match="PQC003"):  # and says so again
        run(model, cache, torch.tensor([[1]]))
    cache.reset()
    assert torch.equal(model.generate(ids, **cache_argument(model, cache), max_new_tokens=5, **settings), expected)


def test_a_chunk_that_does_not_fit_behind_others_changes_nothing(make_model):
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.random(model, pq=PQConfig(M=8, nbits=4)), STATIC, context=64)
    run(model, cache, torch.arange(60)[None])
    with pytest.raises(ResidualOverflowError, match="PQC003.*holds 60 and cannot take 5 more.*context=65"):
        run(model, cache, torch.arange(5)[None])
    run(model, cache, torch.arange(4)[None])
    assert cache.lengths.sum() == 64


@pytest.mark.parametrize("first", [60, 64])
def test_a_refused_step_that_exact_layers_in_front_have_stored_needs_a_reset(make_model, first):
    """They write in place, so that they cannot be put back; the cache says so instead of going on."""
    model = make_model("gemma3")
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.random(model, pq=PQConfig(M=8, nbits=4)), STATIC, context=64)
    assert cache.layer_kinds()[0].startswith("exact")
    run(model, cache, torch.arange(first)[None])
    with pytest.raises(ResidualOverflowError, match="PQC003"):
        run(model, cache, torch.arange(65 - first)[None])
    with pytest.raises(RuntimeError, match="call cache.reset"):
        run(model, cache, torch.tensor([[1]]))
    cache.reset()
    run(model, cache, torch.arange(first)[None])
    assert cache.lengths.sum() == first


def test_a_compiled_step_that_does_not_fit(make_model):
    """It runs no Python: the assertion on the device is heard of, and plain steps know what compiled ones counted."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    cache = PagedPQCache(model, Codebooks.random(model, pq=PQConfig(M=8, nbits=4)), STATIC, context=64)
    run(model, cache, torch.zeros(1, 62, dtype=torch.long))
    torch._dynamo.reset()
    step, token = torch.compile(model.forward, fullgraph=True, backend="eager"), torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(2):
            step(token, **cache_argument(model, cache))
        with pytest.raises(ResidualOverflowError, match="PQC003.*64 tokens holds 64"):
            run(model, cache, token)
        with pytest.raises(RuntimeError, match="PQC003.*static cache of 64 tokens is full"):
            step(token, **cache_argument(model, cache))
    cache.reset()
    run(model, cache, token)


def test_another_batch_needs_another_cache(make_model):
    """Graphs hold the addresses of a batch's tensors, and may be replayed after a reset: these cannot be replaced."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    cache, fresh = (PagedPQCache(model, books, STATIC, context=200, max_batch=2) for _ in range(2))
    two, one = torch.arange(100).view(2, 50), torch.arange(50)[None]
    expected = run(model, fresh, two)
    run(model, cache, two)
    cache.reset()
    for ids in (one, one[:, :1]):  # a chunk, a step
        with pytest.raises(ValueError, match="keeps the batch.*reset.*holds 2 sequences.*given 1; make a new cache"):
            run(model, cache, ids)
    assert torch.equal(run(model, cache, two), expected), "what was refused changed nothing"


@pytest.mark.parametrize("context, batch", [(24, 2), (40, 3), (64, 2)])
def test_the_default_pool_has_the_pages_that_rows_take(make_model, context, batch):
    """Also where no token of a short context is ever coded."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    cache = PagedPQCache(model, books, replace(STATIC, max_pages=None), context=context, max_batch=batch)
    run(model, cache, torch.arange(20).repeat(batch, 1))
    assert cache.pool.num_free == 0


def test_a_shared_pool_has_the_pages_back_when_the_cache_is_dropped(make_model):
    """Not by a reset, after which graphs of the cache may be replayed."""
    model = make_model("llama")
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    kept = PagedPQCache(model, books, STATIC, context=100)
    run(model, kept, torch.arange(70)[None])
    used = kept.pool.num_used
    for _ in range(3):
        other = PagedPQCache(model, books, STATIC, pool=kept.pool, context=100)
        run(model, other, torch.arange(70)[None])
        other.reset()
        assert kept.pool.num_used == 2 * used
        del other
        gc.collect()
        assert kept.pool.num_used == used
    kept.pool.check_integrity()
