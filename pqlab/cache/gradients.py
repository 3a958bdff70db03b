"""A paged cache has no gradients: forward calls outside of `torch.no_grad()` work, backward through them is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

_REFUSAL = (
    "a PagedPQCache has no gradients: its codes are written in place and rounding has no slope; "
    "train with transformers' DynamicCache or use_cache=False"
)


class _Refused(torch.autograd.Function):
    """Its first argument, which is not differentiable through the others."""

    @staticmethod
    def forward(ctx, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        raise RuntimeError(_REFUSAL)


def no_gradients(method: Callable) -> Callable:
    """Run a method that writes to the cache without gradients; backward through what it returns raises RuntimeError.

    The method returns a tensor or a tuple of tensors. Where gradients are off anyway it is only called.
    """

    @wraps(method)
    def wrapped(self, *args):
        if not torch.is_grad_enabled():
            return method(self, *args)
        with torch.no_grad():
            out = method(self, *args)
        inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if not inputs:
            return out
        return (
            _Refused.apply(out, *inputs) if isinstance(out, Tensor) else tuple(_Refused.apply(x, *inputs) for x in out)
        )

    return wrapped
