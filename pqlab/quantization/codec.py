"""What a code is: codecs turn the head vectors of one (layer, side) into codes and back.

A codec may put a linear map in front of the quantizer. Then there are two spaces, per kv head h::

    code space   y = x @ forward[h]          what is quantized
    head space   x = y @ backward[h]         what the model computes, backward = forward^-1

Attention never has to leave code space: q . x = (q @ backward^T) . y for keys, and for values the output
sum_t p_t x_t = (sum_t p_t y_t) @ backward. So a cache keeps its exact tokens in code space too (`to_code_space`), asks
with `map_query(q)` and brings the output home with `from_code_space`. Without a map all three return their argument.

Keys may be turned back to anchors in front of all that (`anchors`); a codec knows by which, and a cache, which knows
where a token stands, turns them. To a codec "head space" is then what it is given: keys that are turned back.

Keys of a text that the calibration never saw spread wider than what the centroids were made for. `PQCodec.fit` says,
from the first tokens of a sequence, how much a cache has to narrow them, dimension by dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..kernels import ops, reference
from ..paging.layout import PageLayout
from .anchors import Anchors

DTYPES = (torch.float16, torch.float32)
"""Of centroids and maps."""

LEAST_SCALE = 0.5
"""`PQCodec.fit` narrows no dimension by more: few tokens say little about rare ones."""


@runtime_checkable
class Codec(Protocol):
    """Codes of the head vectors of one (layer, side). H kv heads, d head size, M codes a vector, nbits a code.

    Tensors are [..., H, n, d] in head space or code space and [..., H, n, M] as codes (uint8; int32 at nbits 32).
    """

    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_subspaces(self) -> int: ...
    @property
    def nbits(self) -> int: ...
    @property
    def centroids(self) -> Tensor:
        """float16 or float32 [H, M, C, d/M], what the kernels read; C is 0 for the identity codec."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., H, n, M] of head-space vectors x [..., H, n, d]."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Head-space float32 vectors [..., H, n, d] of codes [..., H, n, M]."""
        ...

    def quantize(self, y: Tensor) -> Tensor:
        """`encode` for vectors that are in code space already, as in a cache's window."""
        ...

    def dequantize(self, codes: Tensor) -> Tensor:
        """`decode` that stays in code space."""
        ...

    def to_code_space(self, x: Tensor) -> Tensor:
        """x [..., H, n, d] mapped, in x's dtype; x itself (no copy) without a map."""
        ...

    def from_code_space(self, y: Tensor) -> Tensor:
        """Inverse of `to_code_space`; also takes [..., Hq, n, d] of query heads, Hq a multiple of H."""
        ...

    def map_query(self, q: Tensor) -> Tensor:
        """Queries [..., Hq, S, d] such that map_query(q) . to_code_space(k) = q . k; q itself without a map."""
        ...

    @property
    def forward(self) -> Tensor | None:
        """[H, d, d] of `to_code_space`, float16, float32 or int8 in units of 1/127; None without a map."""
        ...

    @property
    def backward(self) -> Tensor | None:
        """[H, d, d], the inverse of `forward`, float16 or float32; None without a map."""
        ...

    @property
    def can_fit(self) -> bool:
        """Whether keys can be fitted to a sequence; see `PQCodec.fit`."""
        ...

    @property
    def anchors(self) -> Anchors | None:
        """What keys are turned back to before they come here; None: they come as the model made them."""
        ...

    def page_layout(self, page_size: int) -> PageLayout: ...
    def to(self, device: torch.device | str) -> Codec: ...


class _Spaces:
    """Code space is head space: what codecs without a map share."""

    num_heads: int
    num_subspaces: int
    nbits: int
    forward: Tensor | None = None
    backward: Tensor | None = None
    can_fit = False
    anchors: Anchors | None = None

    def to_code_space(self, x: Tensor) -> Tensor:
        return x

    def from_code_space(self, y: Tensor) -> Tensor:
        return y

    def map_query(self, q: Tensor) -> Tensor:
        return q

    def page_layout(self, page_size: int) -> PageLayout:
        return PageLayout(page_size, self.num_heads, self.num_subspaces, self.nbits)


@dataclass(frozen=True, eq=False)
class PQCodec(_Spaces):
    """Product quantization (Jegou, Douze, Schmid 2011, section II-B), a codebook per kv head.

    The code of subspace m of y is the index of the nearest of C = 2**nbits centroids (squared Euclidean distance, ties
    to the lowest index); `dequantize(codes)[..., m*dm:(m+1)*dm] = centroids[h, m, code]`.

    Tensors are float16 (an error far below that of the codes) or float32, `forward` also int8, in units of 1/127: any
    matrix near the wanted one will do, if `backward` is its inverse (`maps.compact_map`). What is computed with them
    is float32.

    Args:
        centroids: [H, M, C, dm], C a power of two from 2 to 256. Heads may share one codebook: a tensor expanded to H.
        forward, backward: [H, d, d] with d = M * dm and backward[h] the inverse of forward[h]; both or neither.
        mean, spread: [H, d], mean and standard deviation of the calibration's vectors in code space, for `fit`; both or
            neither, and only with a map.
        anchors: what keys were turned back to, only with a map.
    """

    centroids: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None
    anchors: Anchors | None = None

    def __post_init__(self) -> None:
        if self.centroids.dim() != 4 or self.centroids.dtype not in DTYPES:
            shape, dtype = list(self.centroids.shape), self.centroids.dtype
            raise ValueError(f"centroids must be float16 or float32 [heads, M, C, d/M], got {dtype} {shape}")
        count = self.centroids.shape[2]
        if count not in [2**nbits for nbits in range(1, 9)]:
            raise ValueError(f"a codebook holds 2**nbits centroids, nbits 1 to 8; got {count}")
        if (self.forward is None) != (self.backward is None):
            raise ValueError("a map needs both directions: give forward and backward, or neither")
        want = (self.num_heads, self.head_dim, self.head_dim)
        for name, matrix in (("forward", self.forward), ("backward", self.backward)):
            allowed = (*DTYPES, torch.int8) if name == "forward" else DTYPES
            if matrix is not None and (tuple(matrix.shape) != want or matrix.dtype not in allowed):
                kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise ValueError(f"{name} must be {list(want)} of {kinds}, got {matrix.dtype} {list(matrix.shape)}")
        if (self.mean is None) != (self.spread is None) or (self.mean is not None and self.forward is None):
            raise ValueError("a fit needs mean, spread and a map: give all of them, or neither mean nor spread")
        for name, moment in (("mean", self.mean), ("spread", self.spread)):
            if moment is not None and (tuple(moment.shape) != want[:2] or moment.dtype not in DTYPES):
                raise ValueError(f"{name} must be {list(want[:2])} of float, got {moment.dtype} {list(moment.shape)}")
        if self.anchors is not None and (self.forward is None or 2 * len(self.anchors.frequencies) != self.head_dim):
            pairs = len(self.anchors.frequencies)
            raise ValueError(f"anchors of {pairs} pairs need a map, and {2 * pairs} dimensions; got {self.head_dim}")

    @property
    def num_heads(self) -> int:
        return self.centroids.shape[0]

    @property
    def num_subspaces(self) -> int:
        return self.centroids.shape[1]

    @property
    def nbits(self) -> int:
        return self.centroids.shape[2].bit_length() - 1

    @property
    def head_dim(self) -> int:
        return self.centroids.shape[1] * self.centroids.shape[3]

    def quantize(self, y: Tensor) -> Tensor:
        *batch, heads, n, d = self._checked(y, self.head_dim).shape
        rows = y.movedim(-3, 0).reshape(heads, -1, d)  # [H, batch * n, d]
        codes = ops.encode(rows, self.centroids)
        return codes.view(heads, *batch, n, self.num_subspaces).movedim(0, -3)

    def dequantize(self, codes: Tensor) -> Tensor:
        return reference.dequantize(self._checked(codes, self.num_subspaces), self.centroids)

    def encode(self, x: Tensor) -> Tensor:
        return self.quantize(self.to_code_space(x))

    def decode(self, codes: Tensor) -> Tensor:
        return self.from_code_space(self.dequantize(codes))

    def to_code_space(self, x: Tensor) -> Tensor:
        return x if self.forward is None else reference.apply_map(x, self.forward)

    def from_code_space(self, y: Tensor) -> Tensor:
        return y if self.backward is None else reference.apply_map(y, self.backward)

    def map_query(self, q: Tensor) -> Tensor:
        return q if self.backward is None else reference.apply_map(q, self.backward.mT)

    @property
    def can_fit(self) -> bool:
        """Whether `fit` has something to hold vectors against."""
        return self.spread is not None

    def fit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that bring vectors to the spread that the centroids were made for: y * scale + shift.

        A dimension that spreads around the calibration's mean as much as the calibration's vectors or less stays as it
        is; a wider one shrinks towards that mean, to `LEAST_SCALE` at most. (Moving the mean as well makes things
        worse: keys of a head lie in several clusters, and how often each comes is not where they lie.)

        Args:
            y: [..., H, n, d], the first vectors of a sequence in code space.

        Returns:
            float32 [..., H, d] each.
        """
        mean, spread = self.mean.float(), self.spread.float()
        here = (y.float() - mean[:, None]).square().mean(-2).sqrt()
        scale = (spread / here.clamp_min(torch.finfo(torch.float32).tiny)).clamp(LEAST_SCALE, 1)
        return scale, (1 - scale) * mean

    def to(self, device: torch.device | str) -> PQCodec:
        """The codec on a device. On CUDA its centroids are float32: the kernels there read them so."""
        moved = self._each(lambda tensor: tensor.to(device).contiguous())
        if self.anchors is not None:
            moved = replace(moved, anchors=self.anchors.to(device))
        return moved._each(to_float, maps=False) if torch.device(device).type == "cuda" else moved

    def half(self) -> PQCodec:
        """The codec with float16 tensors; int8 ones, and those that float16 cannot hold (65504), stay as they are."""
        return self._each(to_half)

    def _each(self, change: Callable[[Tensor], Tensor], maps: bool = True) -> PQCodec:
        names = ("forward", "backward", "mean", "spread") if maps else ()
        tensors = {name: getattr(self, name) for name in names}
        centroids = self.centroids
        if centroids.stride(0) == 0:  # what heads share they go on sharing
            centroids = change(centroids[:1]).expand_as(centroids)
        else:
            centroids = change(centroids)
        return replace(self, centroids=centroids, **{name: change(t) for name, t in tensors.items() if t is not None})

    def _checked(self, x: Tensor, last: int) -> Tensor:
        if x.dim() < 3 or x.shape[-3] != self.num_heads or x.shape[-1] != last:
            raise ValueError(f"expected [..., {self.num_heads} heads, n, {last}], got {list(x.shape)}")
        return x


@dataclass(frozen=True, eq=False)
class IdentityCodec(_Spaces):
    """Exact storage in the same pages: M = d codes of 32 bits, the bit patterns of the float32 values.

    The round trip is bit-exact for float32, bfloat16 and float16 input (not for float64). It exists to test the cache
    against an exact one.
    """

    num_heads: int
    head_dim: int
    device: torch.device | str = "cpu"
    nbits = 32

    @property
    def num_subspaces(self) -> int:
        return self.head_dim

    @property
    def centroids(self) -> Tensor:
        return torch.empty(self.num_heads, self.head_dim, 0, 1, device=self.device)

    def quantize(self, y: Tensor) -> Tensor:
        return y.float().contiguous().view(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float32)

    encode = quantize
    decode = dequantize

    def to(self, device: torch.device | str) -> IdentityCodec:
        return replace(self, device=device)


def to_half(tensor: Tensor) -> Tensor:
    """In float16; as it is where it has eight bits, or float16 would overflow."""
    half = tensor.half()
    return half if tensor.dtype != torch.int8 and half.isfinite().all() else tensor


def to_float(matrix: Tensor) -> Tensor:
    """In float32; int8 counts in units of 1/127."""
    return matrix.float() / 127 if matrix.dtype == torch.int8 else matrix.float()
