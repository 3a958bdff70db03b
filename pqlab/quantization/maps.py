"""The linear map in front of a quantizer: what attention is sensitive to gets its share of the codes.

Product quantization spends the same bits on every subspace and measures plain distances. Attention does not: an error
e of a key moves the scores by q . e, an error of a value the layer's output by W_O e. So vectors are first mapped into
a space where plain distance is that error, and the space is turned so that subspaces are equally hard:

1. the symmetric square root of the metric: E[q q^T] for keys, W_O^T W_O for values (`sensitivity`),
2. principal axes (PCA), which decorrelates the subspaces (as in OPQ: Ge, He, Ke, Sun 2013, section 3.2),
3. axes dealt to the subspaces so that the products of their variances balance (OPQ's "eigenvalue allocation").

All of it is closed-form and per kv head; `codec` says how attention works in the mapped space.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORSE = 2  # times as large may rounding make a map's inverse, and with it the errors that come back
_RIDGE = 1e-3  # of the metric's mean eigenvalue: directions that no query asked for still count a little


def balanced_map(x: Tensor, metric: Tensor | None, num_subspaces: int) -> tuple[Tensor, Tensor]:
    """The map of every head and its inverse: y = x @ forward[h] is to be quantized, x = y @ backward[h].

    Args:
        x: [H, n, d] samples of the head space.
        metric: [H, d, d], symmetric and positive semidefinite: the squared error of e is e metric e^T. None: identity.
        num_subspaces: M, divides d.

    Returns:
        forward, backward: float32 [H, d, d] on x's device.
    """
    x = x.double()
    heads, n, d = x.shape
    root = inverse_root = torch.eye(d, dtype=x.dtype, device=x.device).expand(heads, d, d)
    if metric is not None:
        metric = metric.to(x)
        scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
        values, axes = torch.linalg.eigh(metric)
        values = values.clamp_min(0) + _RIDGE * scale.clamp_min(torch.finfo(torch.float32).tiny)
        root = axes * values.sqrt()[:, None] @ axes.mT
        inverse_root = axes * values.rsqrt()[:, None] @ axes.mT
    y = x @ root
    y -= y.mean(1, keepdim=True)
    variances, axes = torch.linalg.eigh(y.mT @ y / n)
    variances, axes = variances.flip(-1), axes.flip(-1)  # descending
    axes = axes.gather(-1, balanced_order(variances, num_subspaces)[:, None].expand(-1, d, -1))
    return (root @ axes).float().contiguous(), (axes.mT @ inverse_root).float().contiguous()


def compact_map(forward: Tensor, num_subspaces: int) -> tuple[Tensor, Tensor]:
    """A map near `forward` that takes a byte an entry where that does, and its inverse.

    Subspaces are scaled, each as a whole, so that their largest entry is 127/127: no centroid is nearer for it. Where a
    dimension of a head is so small in all subspaces that bytes nearly lose it (Gemma-3's keys: the norm's weights span
    three orders), the layer's maps take float16, which have as many digits for small entries as for large ones.

    Args:
        forward: [H, d, d].

    Returns:
        int8 [H, d, d] in units of 1/127, or float16, and float32 [H, d, d], the inverse of just that matrix.
    """
    columns = forward.double().unflatten(-1, (num_subspaces, -1))
    largest = columns.abs().amax((1, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (columns / largest).flatten(-2)
    rounded = (scaled * 127).round()
    inverse, failed = torch.linalg.inv_ex(rounded / 127)
    wanted = torch.linalg.inv(scaled)
    if not failed.any() and (_size(inverse) < _WORSE * _size(wanted)).all():
        return rounded.to(torch.int8).contiguous(), inverse.float().contiguous()
    half = scaled.half()
    return half.contiguous(), torch.linalg.inv(half.double()).float().contiguous()


def _size(matrices: Tensor) -> Tensor:
    """Frobenius norm: [H] of [H, d, d]."""
    return torch.linalg.matrix_norm(matrices)


def alike(x: Tensor, forward: Tensor, backward: Tensor, num_subspaces: int) -> tuple[Tensor, Tensor]:
    """The map with every subspace scaled to a mean square of 1 and its axes turned to a positive third moment.

    Neither changes which centroid is nearest, so heads whose subspaces look alike afterwards can share a codebook.

    Args:
        x: [H, n, d] samples of the head space; forward, backward: [H, d, d] of `balanced_map`.
    """
    y = x.float() @ forward
    sizes = y.unflatten(-1, (num_subspaces, -1)).square().mean((1, 3)).sqrt()  # [H, M]
    sizes = sizes.clamp_min(torch.finfo(torch.float32).tiny).repeat_interleave(x.shape[-1] // num_subspaces, 1)
    sizes = sizes * torch.where((y**3).mean(1) < 0, -1.0, 1.0)  # [H, d]
    return forward / sizes[:, None], backward * sizes[:, :, None]


def balanced_order(variances: Tensor, num_subspaces: int) -> Tensor:
    """int64 [H, d]: principal axes in the order of the subspaces that they are dealt to.

    Axes go, largest variance first, to the subspace whose log-variances sum to least and that still has room.

    Args:
        variances: [H, d], descending.
        num_subspaces: M, divides d.
    """
    heads, d = variances.shape
    room = d // num_subspaces
    logs = variances.clamp_min(1e-12).log()
    logs = logs - logs.amin(-1, keepdim=True) + 1e-3  # positive: a subspace with more axes has the larger sum
    sums = torch.zeros(heads, num_subspaces, dtype=logs.dtype, device=logs.device)
    filled = torch.zeros(heads, num_subspaces, dtype=torch.int64, device=logs.device)
    order = torch.empty(heads, d, dtype=torch.int64, device=logs.device)
    rows = torch.arange(heads, device=logs.device)
    for axis in range(d):
        chosen = torch.where(filled < room, sums, torch.inf).argmin(-1)
        order[rows, chosen * room + filled[rows, chosen]] = axis
        filled[rows, chosen] += 1
        sums[rows, chosen] += logs[:, axis]
    return order
