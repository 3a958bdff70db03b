"""Keys before the rotary embedding: turned back they are what the model's projections gave, and come home turned."""

from __future__ import annotations

import json

import pytest
import torch
from test_model_kinds import GROUPED, MIXED, make

from pqlab import CacheConfig, Codebooks, ConfigError, PQConfig, cli, kernels, load_text
from pqlab.benchmarks import rotary_bench
from pqlab.benchmarks.decode_bench import Case
from pqlab.evaluation import before_rotary, methods
from pqlab.evaluation.before_rotary import key_codec, pairs_map
from pqlab.evaluation.evaluate import evaluate
from pqlab.evaluation.methods import Setting
from pqlab.kernels import dispatch
from pqlab.quantization import LayerCodec, PQCodec, collect_kv, record_kv
from pqlab.quantization.rotary import Rotary
from pqlab.quantization.samples_file import load_samples, save_samples

NAMES = [f"pq-{bits}-{how}" for bits in (4, 2) for how in ("before-rotary", "before-rotary-pairs")]
SMALL = CacheConfig(page_size=32, residual_length=20, num_sinks=3)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}


def projected(model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What k_proj (and the norm behind it) gives for one text, [H, n, d]."""
    attention, seen = model.model.layers[layer].self_attn, []
    source = getattr(attention, "k_norm", attention.k_proj)
    hook = source.register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids)
    hook.remove()
    k = seen[0][0]
    if k.dim() == 2:  # [n, H * d]; a norm has seen heads apart, before or after tokens
        k = k.unflatten(-1, (-1, attention.head_dim))
    return k if k.shape[0] == 3 else k.movedim(1, 0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "yarn"])
def test_turned_back_keys_are_those_of_the_projection(kind, make_model):
    model = make_model("llama", rope_parameters=YARN) if kind == "yarn" else make_model(kind)
    layer = 1
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    samples = record_kv(model, ids, num_sinks=3)
    rotary = Rotary(model)
    back = rotary.back(samples.keys[layer], samples.positions)
    torch.testing.assert_close(back, projected(model, ids, layer)[:, 3:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotary.turn(back, samples.positions), samples.keys[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gpt2", {}, "gpt2 has no rotary embedding that pqlab finds; leave .* pq-4"),
        ("gpt_neox", {}, "turns 2 of the 8 elements of a head, not whole heads; leave"),
        ("cohere", {}, r"layer 0 of cohere does not turn its keys .* pairs \(i, i \+ d/2\)"),  # its pairs: neighbours
        ("exaone4", MIXED | GROUPED, "layer 1 of exaone4 does not turn its keys"),  # full attention without positions
        ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, r"\(dynamic\) depends on the length"),
    ],
)
def test_models_that_turn_otherwise_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        Rotary(make(kind, **settings))


def test_positions_of_samples(make_model, tiny_tokenizer, tmp_path):
    model = make_model("llama")
    rows = torch.randint(0, 200, (2, 9))
    mask = torch.ones_like(rows)
    mask[1, :4] = 0  # pads on the left
    samples = record_kv(model, rows, mask, num_sinks=2, first_position=100)
    assert samples.positions.tolist() == [102, 103, 104, 105, 106, 107, 108, 102, 103, 104]
    assert samples.of([1]).positions is samples.positions and samples.to("cpu").positions is not None
    texts = collect_kv(model, tiny_tokenizer, load_text("emma")[:500], num_tokens=60, window=30, num_sinks=4)
    last = model.config.max_position_embeddings - 30
    assert texts.positions.tolist() == [*range(4, 30), *range(last + 4, last + 30)]
    save_samples(tmp_path / "samples", texts, {})
    assert torch.equal(load_samples(tmp_path / "samples")[0].positions, texts.positions)


@pytest.mark.parametrize("subspaces", [8, 4])
def test_pairs_stay_together_and_come_back(subspaces):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 16, generator=g) * torch.logspace(-1, 1, 16)
    metric = torch.diag(torch.logspace(3, -3, 16)).expand(3, 16, 16)
    forward, backward = pairs_map(x, metric, subspaces)
    assert torch.equal(forward @ backward, torch.eye(16).expand(3, 16, 16))
    assert torch.equal(forward.half().float(), forward) and torch.equal(backward.half().float(), backward)
    for head in forward:
        source = head.abs().argmax(0).tolist()  # the dimension that comes in each place
        assert sorted(source) == list(range(16)) and (head != 0).sum() == 16
        assert all(b == a + 8 for a, b in zip(source[::2], source[1::2], strict=True))
        scale = head.sum(0)
        assert torch.equal(scale[::2], scale[1::2]), "a pair that is scaled unevenly cannot be turned"
    share = (x @ forward).var(1).unflatten(-1, (subspaces, -1)).mean(-1).log()
    plain = x.var(1).unflatten(-1, (2, 8)).mean(1).log()
    assert subspaces == 8 or share.std() < plain.std(), "large pairs share a subspace with small ones"


@pytest.fixture
def turning(make_model):
    """A model, keys of a text whose directions hardly change before they are turned, and their positions."""
    model = make_model("llama", head_dim=32)
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 1, 32, generator=g) * 3
    x = centres + 0.3 * torch.randn(3, 3000, 32, generator=g)
    return model, x, torch.randint(0, 4000, (3000,), generator=g)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_method_loses_less_of_keys_that_only_their_positions_part(turning, pairs):
    """64 centroids for the noise around one direction, instead of for the circle that turning makes of it."""
    model, x, positions = turning
    rotary, pq = Rotary(model), PQConfig(M=16, nbits=6)
    metric = torch.eye(32).expand(3, 32, 32)
    values = PQCodec(torch.zeros(3, 16, 64, 2))
    own, usual = (
        Codebooks({i: LayerCodec(key_codec(y, metric, None, pq, pairs=pairs), values) for i in range(2)})
        for y in (x, rotary.turn(x, positions))
    )
    setting = Setting(model, None, SMALL)
    method = before_rotary.before_rotary("mine", own, setting, rotary, pairs=pairs)
    assert method.token_bits == 3 and method.cache is None
    fresh = x[:, :320] + 0.1
    keys = rotary.turn(fresh, torch.arange(3, 323))  # behind three sinks
    back, _ = method.quantize(0, keys, keys)
    as_it_is, _ = methods.from_codebooks("usual", usual, setting).quantize(0, keys, keys)
    assert (back - keys).norm() < 0.5 * (as_it_is - keys).norm()
    misplaced = rotary.turn(fresh, torch.arange(320))
    assert (method.quantize(0, misplaced, keys)[0] - misplaced).norm() > 1.5 * (back - keys).norm()


def test_pairs_weigh_an_order_and_an_exponent_instead_of_a_map(turning):
    model, x, _ = turning
    codec = key_codec(x, None, None, PQConfig(M=16, nbits=6), pairs=True)
    books = Codebooks({i: LayerCodec(codec, codec) for i in range(2)})
    arguments = "mine", books, Setting(model, None), Rotary(model)
    with_map, with_pairs = (before_rotary.before_rotary(*arguments, pairs=pairs) for pairs in (False, True))
    maps = 3 * 32 * 32 * 2 * 2  # float16, both directions
    assert with_map.constant_bytes - with_pairs.constant_bytes == 2 * (maps - 2 * 3 * 32)


def test_rows_of_the_harness(make_model, tiny_tokenizer, monkeypatch):
    """The whole way on a tiny model: names, bits, a text that is calibrated on, numbers."""
    model = make_model("llama", head_dim=32)
    texts = load_text("pride")[:4000]

    def less(model, tokenizer, text):
        return collect_kv(model, tokenizer, texts, num_tokens=900, window=300)

    monkeypatch.setattr(before_rotary, "collect_kv", less)
    monkeypatch.setattr(
        before_rotary, "default_codebooks", lambda model, tokenizer, pq, **_: Codebooks.random(model, pq=pq)
    )
    assert set(NAMES) < set(methods.names()) and not set(NAMES) & set(methods.default_names())
    options = {"text": "moby-dick", "calibration": "emma", "windows": 1, "length": 150, "config": SMALL}
    result = evaluate(model, tiny_tokenizer, NAMES, **options)
    table = result.table().set_index("method")
    assert table.token_bits[NAMES].tolist() == [4, 4, 2, 2]
    assert (table.kl[NAMES] > 0).all() and (table.note[NAMES] == "only simulated").all()
    refused = evaluate(make("gpt2"), tiny_tokenizer, NAMES[:1], **options)
    assert "no rotary embedding" in refused.table().set_index("method").note[NAMES[0]]


def test_what_a_step_would_cost_at_least(monkeypatch, capsys):
    kernels.wait()
    if dispatch.backends()["cpu"].status().state != "ready":
        pytest.skip("no compiled CPU kernels here")
    monkeypatch.setattr(rotary_bench, "CASES", (Case(6, 2, (300,), m=8, head_dim=16),))
    monkeypatch.setitem(rotary_bench._SIDE, "cpu", 256)
    assert cli.main(["bench", "rotary", "--device", "cpu", "--seconds", "0.001", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    (r,) = record["records"]
    assert r["product_flops"] == 2 * (300 - 4 - 128) * 2 * 16 * 16, "sinks and window are exact, two kv heads"
    assert r["product_microseconds"] == pytest.approx(r["product_flops"] / record["tflops"] / 1e6, rel=0.05)
    assert r["ratio"] == pytest.approx(1 + r["product_microseconds"] / r["microseconds"], rel=1e-3)
    assert 1 <= r["hidden_ratio"] < r["ratio"]
    assert list(r["anchored_ratios"]) == ["64", "256", "1024"] and r["step_microseconds"] > 0
    assert (r["lookup_multiply_adds"], r["pair_multiply_adds"]) == (2, 6)
    assert record["benchmark"] == "rotary" and record["threads"] == torch.get_num_threads()
