"""Sinks and windows of all layers come from one piece of memory, and are each layer's own all the same."""

from __future__ import annotations

import torch

from pqlab.cache.exact_buffers import ExactBuffers


def test_buffers_are_zero_aligned_and_apart():
    made = ExactBuffers({3: (2, 8), 5: (1, 24)}, 3, 20)
    first, second = (made.take(layer, 2, torch.float16, torch.device("cpu")) for layer in (5, 3))
    assert [tuple(x.shape) for x in first] == [(2, 1, 3, 24)] * 2 + [(2, 1, 20, 24)] * 2
    assert [tuple(x.shape) for x in second] == [(2, 2, 3, 8)] * 2 + [(2, 2, 20, 8)] * 2
    every = [*first, *second]
    assert len({x.untyped_storage().data_ptr() for x in every}) == 1
    for number, x in enumerate(every):
        assert x.dtype == torch.float16 and x.is_contiguous() and not x.any() and x.storage_offset() % 64 == 0
        x.fill_(number + 1)
    assert all((x == number + 1).all() for number, x in enumerate(every))


def test_a_layer_that_asks_again_gets_fresh_ones():
    """After a reset, and for another batch."""
    made = ExactBuffers({0: (1, 8), 1: (1, 8)}, 1, 4)
    old = made.take(0, 1, torch.float32, torch.device("cpu"))
    old.window_k.fill_(1)
    again = made.take(0, 1, torch.float32, torch.device("cpu"))
    assert not again.window_k.any() and old.window_k.all()
    wider = made.take(1, 3, torch.float32, torch.device("cpu"))
    assert wider.window_v.shape == (3, 1, 4, 8)
