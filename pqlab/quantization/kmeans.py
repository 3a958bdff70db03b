"""Batched k-means: all codebooks of a model (layer x kv head x side x subspace) are trained at once.

Lloyd's iterations with two additions that matter for keys and values, whose heavy tails leave randomly seeded
centroids in the wrong places (a quarter of the distortion at 256 centroids in 2 dimensions):

- Seeding draws from the squared distance to the seeds so far (k-means++: Arthur and Vassilvitskii 2007), in rounds
  that add half as many seeds again instead of one by one (as in k-means||: Bahmani et al. 2012).
- Early iterations move centroids that are worth little to cells that need two (ELBG: Patane and Russo 2001). Empty
  cells are worth nothing, so this is also how they are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import ops, reference

ITERATIONS = 8
"""Twice as many gain nothing in KL, half as many lose 5 % (`bench calibration`)."""

Progress = Callable[[int, int], None]
"""Called with (done, total); the unit is the callee's own."""

_TINY = 1e-12  # of a cell's weight: below it the cell is empty
_RELOCATIONS = (1, 3, 5)  # iterations that move centroids of little worth; in the others only empty cells move
_SEEDING_SAMPLES = 4096
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}  # of the samples that are trained on at once
_RELOCATE_CODEBOOKS = {"cpu": 16, "cuda": 1024}  # at once: each needs a C x C matrix of distances


class Groups(Protocol):
    """Samples [G, n, d] that are made when they are asked for, some groups at a time: all may not fit into memory."""

    shape: Sequence[int]
    device: torch.device

    def __getitem__(self, groups: slice) -> Tensor: ...


def product_kmeans(
    x: Tensor | Groups,
    num_subspaces: int,
    num_centroids: int,
    *,
    weights: Tensor | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Codebooks of product quantization: k-means in every subspace of every group.

    Reproducible for a seed on one backend. Groups with fewer distinct samples than centroids are represented without
    error (the rest of the centroids repeat samples).

    Args:
        x: [G, n, d] samples, any floating dtype; G is any grouping, e.g. (layer, kv head). Every group is asked for
            once, in order.
        num_subspaces: M, divides d.
        num_centroids: C, 1 to 256.
        weights: [G, n], positive: what the squared error of a sample counts; None: all count the same.
        progress: called after every iteration of a part of the groups with the work done and the total.

    Returns:
        float32 [G, M, C, d/M] on x's device.

    Raises:
        ValueError: sizes that do not fit, no samples, or samples that are not finite.
    """
    if len(x.shape) != 3 or x.shape[1] == 0:
        raise ValueError(f"samples must be [groups, n > 0, d], got {list(x.shape)}")
    groups, n, d = x.shape
    if num_subspaces < 1 or d % num_subspaces:
        raise ValueError(f"{num_subspaces} subspaces do not divide {d} dimensions")
    if not 1 <= num_centroids <= 256:
        raise ValueError(f"num_centroids must be 1 to 256 (a code has 8 bits), got {num_centroids}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if weights is not None and (tuple(weights.shape) != (groups, n) or not bool((weights > 0).all())):
        raise ValueError(f"weights must be positive and {[groups, n]}, got {list(weights.shape)}")
    books = torch.empty(groups, num_subspaces, num_centroids, d // num_subspaces, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    step = max(1, _CHUNK_ELEMENTS.get(x.device.type, 2**23) // (n * d))
    for first in range(0, groups, step):
        part = x[first : first + step].float().contiguous()
        if not all_finite(part):
            raise ValueError(f"samples of groups {first} to {first + len(part) - 1} are not finite")
        weight = torch.ones_like(part[..., 0]) if weights is None else weights[first : first + step].to(part)
        copies = -(-num_centroids // n)  # seeding needs C samples to choose from
        if copies > 1:
            part, weight = part.repeat(1, copies, 1), weight.repeat(1, copies)
        centroids = _seed(part, weight, num_subspaces, num_centroids, generator)
        weight = weight / weight.mean(1, keepdim=True)
        for i in range(iterations):
            codes = ops.encode(part, centroids)
            cells = _cells(part, weight, codes, num_centroids)
            centroids = torch.where(cells.count > 0, cells.mean, centroids.double())
            only_empty = i not in _RELOCATIONS or i >= iterations - 2
            if i + 1 < iterations and not (only_empty and cells.count.all()):
                centroids = _relocate(centroids, cells, only_empty)
            centroids = centroids.float().contiguous()
            if progress is not None:
                progress(first * iterations + (i + 1) * len(part), groups * iterations)
        books[first : first + step] = centroids
    return books


def distortion(x: Tensor, books: Tensor) -> Tensor:
    """Mean squared error [G] per vector of samples x [G, n, d] under codebooks [G, M, C, d/M]."""
    x = x.float()
    return (x - reference.dequantize(ops.encode(x, books), books)).square().sum(-1).mean(-1)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither infinities nor NaN, which the extremes hand on: a twentieth of what `isfinite` takes."""
    return x.numel() == 0 or all(bool(extreme.isfinite()) for extreme in x.aminmax())


class _Cells(NamedTuple):
    """Samples of every cell, float64."""

    count: Tensor  # [g, M, C, 1], the sum of their weights
    mean: Tensor  # [g, M, C, dm]
    spread: Tensor  # [g, M, C, dm], sum of the squared distance to the mean along every axis


def _cells(x: Tensor, weight: Tensor, codes: Tensor, num_centroids: int) -> _Cells:
    """Of samples x [g, n, d] with codes [g, n, M]; weights [g, n] with a mean of 1."""
    count, total, squares = ops.cell_sums(x, weight, codes, num_centroids)
    count = count[..., None]
    mean = total / count.clamp_min(_TINY)
    return _Cells(count, mean, (squares - count * mean.square()).clamp_min(0))


def _seed(x: Tensor, weight: Tensor, num_subspaces: int, num_centroids: int, generator: torch.Generator) -> Tensor:
    """float32 [g, M, C, dm]: samples of x [g, n, d], chosen apart from each other; heavy ones [g, n] are likelier."""
    if x.shape[1] > _SEEDING_SAMPLES:
        chosen = weight.multinomial(_SEEDING_SAMPLES, generator=generator)
        x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
    axes = x.unflatten(-1, (num_subspaces, -1)).permute(3, 0, 2, 1).contiguous()  # [dm, g, M, n]: quick to sum over dm
    distance = torch.ones_like(axes[0])
    rounds: list[Tensor] = []
    have = 0
    while have < num_centroids:
        count = min(num_centroids - have, max(1, have // 2 if have else num_centroids // 16))
        # the largest distance / Exp(1): samples without replacement, in proportion to their distance
        noise = torch.empty_like(distance).exponential_(generator=generator).clamp_min_(1e-30)
        chosen = (distance / noise).topk(count).indices  # [g, M, count]
        seeds = _along(axes, chosen)  # [dm, g, M, count]
        rounds.append(seeds.permute(1, 2, 3, 0).contiguous())
        nearest = ops.encode(x, rounds[-1]).movedim(-1, 1).contiguous().long()  # [g, M, n]
        found = (axes - _along(seeds, nearest)).square_().sum(0)
        distance = torch.minimum(distance, found) if have else found
        have += count
    return torch.cat(rounds, 2)


def _relocate(centroids: Tensor, cells: _Cells, only_empty: bool) -> Tensor:
    """Move the centroids that are missed least next to those whose cells gain most by a second one.

    What a centroid is worth is at most the cost of merging its cell with the nearest one (Ward's criterion,
    n_i n_j / (n_i + n_j) |c_i - c_j|^2); splitting a cell gains about 3/5 of its spread along its widest axis.
    """
    if centroids.shape[2] < 2:
        return centroids
    at_once = _RELOCATE_CODEBOOKS.get(centroids.device.type, 16)
    parts = [t.flatten(0, 1).split(at_once) for t in (centroids, cells.count.squeeze(-1), cells.spread)]
    moved = [_relocate_some(*part, only_empty) for part in zip(*parts, strict=True)]
    return torch.cat(moved).view_as(centroids)


def _relocate_some(centroids: Tensor, count: Tensor, spread: Tensor, only_empty: bool) -> Tensor:
    """centroids, spread [b, C, dm], count [b, C]."""
    num_centroids = count.shape[1]
    widest = spread.max(-1)
    gain = 0.6 * widest.values
    if only_empty:
        worth = torch.where(count > 0, torch.inf, 0.0)
    else:
        rest = count.float().clamp_min(_TINY).reciprocal()
        apart = torch.cdist(centroids.float(), centroids.float()).square_()
        apart.div_(rest[:, None] + rest[:, :, None])
        apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if not count.all():
            apart.masked_fill_(count[:, None] == 0, torch.inf)  # an empty cell is no neighbour to merge with
        worth = torch.where(count > 0, apart.amin(-1).double(), 0.0)
    limit = num_centroids // 2 if only_empty else max(1, num_centroids // 8)
    poor, rich = worth.argsort(1)[:, :limit], gain.argsort(1, descending=True)[:, :limit]
    pays = worth.gather(1, poor) < gain.gather(1, rich)
    pays &= ~(rich[:, :, None] == poor[:, None]).any(-1)
    pays = pays.cumprod(1).bool()[..., None]  # the first pair that does not pay ends it: later ones pay less

    deviation = (widest.values / count.clamp_min(_TINY)).sqrt()
    offset = torch.zeros_like(centroids).scatter_(2, widest.indices[..., None], 0.8 * deviation[..., None])
    middle, offset = _rows(centroids, rich), _rows(offset, rich)
    out = _with_rows(centroids, poor, torch.where(pays, middle + offset, _rows(centroids, poor)))
    return _with_rows(out, rich, torch.where(pays, middle - offset, _rows(out, rich)))


def _along(axes: Tensor, index: Tensor) -> Tensor:
    """axes [dm, ..., n] at index [..., k] -> [dm, ..., k]."""
    return axes.gather(-1, index.expand(len(axes), *index.shape))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [..., n, dm] at index [..., k] -> [..., k, dm]."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def _with_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of x [..., n, dm] with `rows` [..., k, dm] at index [..., k]."""
    return x.scatter(-2, index[..., None].expand_as(rows), rows)
