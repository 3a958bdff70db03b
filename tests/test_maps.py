"""Maps and weights of calibration: what attention is sensitive to is stored better."""

from __future__ import annotations

import pytest
import torch

from pqlab.quantization import PQCodec, record_kv
from pqlab.quantization.kmeans import product_kmeans
from pqlab.quantization.maps import balanced_map, balanced_order
from pqlab.quantization.sensitivity import EXACT_WINDOW, value_metrics


def metric(heads: int, d: int) -> torch.Tensor:
    q = torch.randn(heads, 500, d) @ torch.randn(heads, d, d)
    return q.mT @ q / 500


@pytest.mark.parametrize("with_metric", [True, False])
def test_the_map_has_an_inverse_and_measures_the_metric(with_metric):
    torch.manual_seed(0)
    x, e = torch.randn(3, 400, 16) @ torch.randn(3, 16, 16), torch.randn(3, 20, 16)
    m = metric(3, 16) if with_metric else None
    forward, backward = balanced_map(x, m, 4)
    torch.testing.assert_close(forward @ backward, torch.eye(16).expand(3, -1, -1), rtol=0, atol=1e-3)
    error = e.square().sum(-1) if m is None else (e @ m * e).sum(-1)
    torch.testing.assert_close((e @ forward).square().sum(-1), error, rtol=0.02, atol=0)
    covariance = torch.stack([torch.cov(y.T) for y in x @ forward])
    off = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-2 * covariance.abs().max(), "principal axes are uncorrelated"


def test_axes_are_dealt_so_that_subspaces_are_equally_hard():
    variances = torch.rand(5, 32).exp().pow(4).sort(-1, descending=True).values
    order = balanced_order(variances, 8)
    assert torch.equal(order.sort(-1).values, torch.arange(32).expand(5, -1))
    sums = variances.log().gather(-1, order).unflatten(-1, (8, 4)).sum(-1)
    in_turn = variances.log().unflatten(-1, (8, 4)).sum(-1)
    assert (sums.amax(-1) - sums.amin(-1) < 0.2 * (in_turn.amax(-1) - in_turn.amin(-1))).all()


def test_mapped_codes_have_the_smaller_error_under_the_metric():
    torch.manual_seed(0)
    x, m = torch.randn(2, 3000, 16) @ torch.randn(2, 16, 16), metric(2, 16)
    forward, backward = balanced_map(x, m, 8)
    mapped = PQCodec(product_kmeans(x @ forward, 8, 16), forward, backward)
    plain = PQCodec(product_kmeans(x, 8, 16))
    errors = []
    for codec in (mapped, plain):
        e = codec.decode(codec.encode(x)) - x
        errors.append(float((e @ m * e).sum()))
    assert errors[0] < 0.5 * errors[1]


def test_heavy_samples_are_stored_better():
    torch.manual_seed(0)
    x = torch.randn(2, 2000, 8)
    weights = torch.ones(2, 2000)
    weights[:, :50] = 100
    heavy, plain = (product_kmeans(x, 4, 16, weights=w) for w in (weights, None))

    def error(books, rows):
        codec = PQCodec(books)
        return float((codec.decode(codec.encode(x)) - x)[:, rows].square().mean())

    assert error(heavy, slice(50)) < 0.5 * error(plain, slice(50))
    assert torch.equal(
        product_kmeans(x, 4, 16, weights=torch.full((2, 2000), 3.0)),
        product_kmeans(x, 4, 16, weights=torch.ones(2, 2000)),
    )
    for wrong in (torch.ones(2, 5), torch.zeros(2, 2000)):
        with pytest.raises(ValueError, match="weights must be positive"):
            product_kmeans(x, 4, 16, weights=wrong)


def plain_attention(model, ids):
    """Queries, keys and weights of every layer as transformers' eager attention computes them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    seen = {}

    def attention(module, query, key, value, mask, **settings):
        out, weights = eager_attention_forward(module, query, key, value, mask, **settings)
        seen[module.layer_idx] = query, weights
        return out, weights

    AttentionInterface.register("test_seen", attention)
    AttentionMaskInterface.register("test_seen", eager_mask)
    model.set_attn_implementation("test_seen")
    with torch.no_grad():
        model(ids)
    model.set_attn_implementation("sdpa")
    return seen


def test_what_is_observed_is_the_attention_of_the_text(make_model):
    model = make_model("llama")
    ids = torch.randint(256, (1, EXACT_WINDOW + 60))
    expected = plain_attention(model, ids)
    samples = record_kv(model, ids, num_sinks=4)
    for i, (query, weights) in expected.items():
        seen, heads = samples.sensitivity[i], samples.keys[i].shape[0]
        q = query[0, :, 4:].unflatten(0, (heads, -1)).flatten(1, 2)  # [H, g * n, d]
        torch.testing.assert_close(seen.key_metric, q.mT @ q / q.shape[1], rtol=1e-3, atol=1e-4)
        rows = torch.arange(EXACT_WINDOW, ids.shape[1], 8)
        far = (rows[:, None] - torch.arange(ids.shape[1])) >= EXACT_WINDOW
        p = (weights[0, :, rows] * far).unflatten(0, (heads, -1))
        for_k, for_v = seen.importance[0]
        torch.testing.assert_close(for_v, p.square().sum((1, 2))[:, 4:], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(for_k, (p * (1 - p)).sum((1, 2))[:, 4:], rtol=1e-3, atol=1e-7)
        for w in seen.weights():
            assert w.shape == samples.keys[i].shape[:2] and bool((w > 0).all())


def test_pads_see_and_are_seen_by_nobody(make_model):
    """A left-padded row is observed as the row alone."""
    model = make_model("llama")
    row = torch.randint(256, (1, EXACT_WINDOW + 40))
    padded = torch.cat([torch.full((1, 8), model.config.pad_token_id), row], 1)
    mask = (torch.arange(padded.shape[1]) >= 8).long()[None]
    alone, beside = record_kv(model, row), record_kv(model, padded, mask)
    for i in alone.keys:
        torch.testing.assert_close(
            alone.sensitivity[i].key_metric, beside.sensitivity[i].key_metric, rtol=1e-3, atol=1e-4
        )
        for k in (0, 1):  # 8 pads: the same queries are looked at
            a, b = alone.sensitivity[i].importance[0][k], beside.sensitivity[i].importance[0][k]
            assert a.shape == b.shape and torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


def test_value_metrics_are_those_of_the_output_projection(tiny_model):
    for i, m in value_metrics(tiny_model).items():
        layer = tiny_model.base_model.layers[i].self_attn
        heads, d, _ = m.shape
        e = torch.randn(heads, d)
        whole = e.repeat_interleave(layer.o_proj.in_features // (heads * d), 0)  # every query head of the group errs
        one_by_one = [
            layer.o_proj.weight[:, h * d : (h + 1) * d] @ whole[h] for h in range(layer.o_proj.in_features // d)
        ]
        expected = torch.stack(one_by_one).square().sum(-1).unflatten(0, (heads, -1)).sum(-1)
        torch.testing.assert_close(torch.einsum("hd,hde,he->h", e, m, e), expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_shows_no_queries_is_said(make_model, tiny_tokenizer, caplog, monkeypatch):
    from pqlab import PQConfig, calibrate

    model = make_model("llama")
    monkeypatch.setattr(type(model.base_model), "_supports_attention_backend", False)
    books = calibrate(model, tiny_tokenizer, "whales sing. " * 60, PQConfig(8, 3), num_tokens=200, progress=False)
    assert "shows no queries" in caplog.text
    assert books.origin.maps and not books.origin.weighted and books.layer(0).k.forward is not None
    plain = calibrate(
        model, tiny_tokenizer, "whales sing. " * 60, PQConfig(8, 3), num_tokens=200, progress=False, maps=False
    )
    assert plain.layer(0).k.forward is None
