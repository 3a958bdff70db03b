"""The cache on a GPU: eager, static and compiled give the tokens of the plain model of the same quantization."""

from __future__ import annotations

import pytest
import torch
from plain_pq import plain_pq_cache
from test_static_cache import assert_compiled_is_stepped

from pqlab import CacheConfig, PagedPQCache, PQConfig, kernels
from pqlab.kernels import dispatch
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

pytestmark = pytest.mark.gpu
EAGER = CacheConfig(page_size=16, residual_length=20, num_sinks=3)
STATIC = CacheConfig(page_size=16, residual_length=20, num_sinks=3, mode="static")


def generate(model, cache, attention: str, **settings):
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 200, (2, 90), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    ids[1, :25], mask[1, :25] = 256, 0
    return model.generate(
        input_ids=ids, attention_mask=mask, **cache_argument(model, cache), max_new_tokens=40, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip


@pytest.fixture(params=[False, True, "anchored"], ids=["plain", "maps", "anchored"])
def setting(make_model, request):
    model = make_model("llama", head_dim=64).cuda().half()
    span = 64 if request.param == "anchored" else 0
    books = Codebooks.random(model, pq=PQConfig(M=32, nbits=8), maps=bool(request.param), span=span)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, :25] = False
    plain = generate(model, plain_pq_cache(model, books.to("cuda"), EAGER, mask), "sdpa")
    generate(model, PagedPQCache(model, books, EAGER, context=200, max_batch=2), "pqlab")  # asks for the kernels
    assert kernels.wait(300)
    return model, books, plain


def assert_same(result, plain) -> None:
    difference = max(float((a - b).abs().max()) for a, b in zip(result.logits[:5], plain.logits[:5], strict=True))
    assert difference < 0.1
    assert (result.sequences == plain.sequences).float().mean() > 0.9


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("config", [EAGER, STATIC], ids=lambda config: config.mode)
def test_generation_on_the_kernels(setting, config):
    model, books, plain = setting
    before = dispatch.runs()
    result = generate(model, PagedPQCache(model, books, config, context=200, max_batch=2), "pqlab")
    new = {key: n - before.get(key, 0) for key, n in dispatch.runs().items() if n > before.get(key, 0)}
    assert {backend for _, backend, _ in new} == {"cuda"}, new
    assert_same(result, plain)


@pytest.mark.filterwarnings("default")
def test_static_generation_without_kernels(make_model, caplog):
    """Codes that the CUDA kernels do not read: `generate` makes no graph of what the reference does, and goes on."""
    model = make_model("llama", head_dim=64).cuda().half()
    books = Codebooks.random(model, pq=PQConfig(M=32, nbits=6))
    eager, static = (PagedPQCache(model, books, c, context=200, max_batch=2) for c in (EAGER, STATIC))
    assert not static.is_compileable and "6-bit codes" in caplog.text
    assert_same(generate(model, static, "pqlab"), generate(model, eager, "pqlab"))


@pytest.mark.filterwarnings("default")
def test_the_first_static_generation_waits_for_its_kernels(make_model):
    model = make_model("llama", head_dim=64).cuda().half()
    books = Codebooks.random(model, pq=PQConfig(M=16, nbits=4))  # of no other test
    cache = PagedPQCache(model, books, STATIC, context=200, max_batch=2)
    assert cache.is_compileable
    before = dispatch.runs()
    generate(model, cache, "pqlab")
    new = {key for key, n in dispatch.runs().items() if n > before.get(key, 0)}
    assert {(op, backend) for op, backend, _ in new if op == "step_"} == {("step_", "cuda")}, new


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_by_inductor(setting, mode):
    model, books, _ = setting
    model.set_attn_implementation("pqlab")
    compiled, stepped = (PagedPQCache(model, books, STATIC, context=200) for _ in range(2))
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, mode=mode)
    assert_compiled_is_stepped(model, step, compiled, stepped, tolerance=0.5, flips=0.05)


@pytest.mark.filterwarnings("default")
def test_a_step_as_a_cuda_graph(setting):
    """Replays of one captured step, flushes among them, give the logits of uncaptured steps."""
    model, books, _ = setting
    model.set_attn_implementation("pqlab")
    prompt = torch.randint(0, 200, (1, 90), generator=torch.Generator().manual_seed(0)).cuda()
    captured, stepped = (PagedPQCache(model, books, STATIC, context=200) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    position = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")

    def step(cache):
        return model(token, **cache_argument(model, cache), position_ids=position, attention_mask=mask).logits

    with torch.no_grad():
        for cache in (captured, stepped):
            model(prompt, **cache_argument(model, cache))
        token.fill_(7), position.fill_(90)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the warm-up stores a token, so the other cache takes the same step
            step(captured)
        torch.cuda.current_stream().wait_stream(stream)
        step(stepped)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(captured)
        for n in range(40):
            token.fill_(n), position.fill_(91 + n)
            logits.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(logits, step(stepped), rtol=0, atol=0.05)
    assert captured.lengths.tolist() == stepped.lengths.tolist()
