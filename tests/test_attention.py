"""The "pqlab" attention asks whoever handed the keys over, and nobody else."""

from __future__ import annotations

import pytest
import torch

from pqlab.attention import handed_over, pqlab_attention
from pqlab.errors import UnsupportedModelError


class Layer:
    """An `Attends` that answers with its queries doubled."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def attend(self, query, mask, scaling):
        self.asked.append((query, mask, scaling))
        return 2 * query


@pytest.fixture
def step():
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    return module, query, key, value


def test_the_layer_of_the_keys_is_asked(step):
    module, query, key, value = step
    layer, mask = Layer(), torch.ones(2, 1, 3, 9, dtype=torch.bool)
    out, weights = pqlab_attention(module, query, handed_over(key, layer), value, mask)
    assert weights is None and torch.equal(out, 2 * query.transpose(1, 2)) and out.is_contiguous()
    assert layer.asked == [(query, mask, 8**-0.5)]


def test_keys_of_no_layer_get_plain_attention(step):
    module, query, key, value = step
    marked = handed_over(key, Layer())
    assert torch.equal(marked, key) and marked.data_ptr() == key.data_ptr()
    out, _ = pqlab_attention(module, query, key, value, None)  # the tensor itself was not marked
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_what_a_layer_is_not_asked_for_is_refused(step):
    module, query, key, value = step
    layer = Layer()
    for more in ({"softcap": 30.0}, {"dropout": 0.1}, {"attention_mask": torch.zeros(2, 1, 3, 3)}):
        mask = more.pop("attention_mask", None)
        with pytest.raises(UnsupportedModelError):
            pqlab_attention(module, query, handed_over(key, layer), value, mask, **more)
    assert not layer.asked
