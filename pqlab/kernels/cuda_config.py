"""Which CUDA kernel fits a call: configurations as values, what they are compiled with, and why one cannot be.

A configuration names everything that is a template parameter of the kernels in `csrc/cuda`. It is hashable, knows its
macros and flags, and needs neither a GPU nor a compiler to be made; `cuda.CudaBackend.kernel` has it built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "csrc" / "cuda"

ELEMENT = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
HEAD_DIMS = (32, 64, 96, 128, 256)
NBITS = (4, 8)
MAX_VECTORS = 4
"""Query vectors (query heads of a kv head times new tokens) that one block works for: registers bound it."""
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448}
"""Bytes a block can have, by architecture; for compiling where there is no device to ask."""


class Shape(NamedTuple):
    """Of a block.

    Attributes:
        warps: how many.
        slots: chunks of codes on their way to a warp.
        buffers: quarters of the codebooks in shared memory at a time; 0: both codebooks are there as a whole.
        chunks: of a warp, whose scores wait for the turn of the values' codebook.
    """

    warps: int
    slots: int
    buffers: int = 0
    chunks: int = 0


_WHOLE = tuple(Shape(*s) for s in ((16, 4), (16, 3), (16, 2), (12, 2), (16, 1), (12, 1), (8, 1), (6, 1)))
_HALVES = tuple(
    Shape(warps, slots, buffers)
    for buffers, warps, slots in (
        *((buffers, warps, slots) for buffers in (2, 1) for warps in (16, 12, 8) for slots in (4, 3, 2)),
        (1, 8, 1),
    )
)
"""Shapes of blocks, best first; of whole codebooks warps come first where there is a copy engine (9.0)."""
_MOST_CHUNKS, _LEAST_CHUNKS = 16, 6


@dataclass(frozen=True)
class DecodeConfig:
    """`pq_decode.cu` for one head size, two codecs, an element type and a number of query vectors.

    Args:
        k_m, v_m: subspaces; k_nbits, v_nbits: bits a code.
        vectors: query vectors a block works for, 1 to 4.
        arch: compute capability, 10 * major + minor.
        shared_memory: bytes a block can have on the device; 0 takes the architecture's.
        anchored: whether keys are turned back by anchors, so that every span of tokens has queries of its own.
    """

    head_dim: int
    k_m: int
    k_nbits: int
    v_m: int
    v_nbits: int
    dtype: torch.dtype
    vectors: int
    arch: int
    shared_memory: int = 0
    anchored: bool = False

    @property
    def name(self) -> str:
        element = str(self.dtype).removeprefix("torch.")
        codecs = f"k{self.k_m}x{self.k_nbits}_v{self.v_m}x{self.v_nbits}"
        anchored = "_anchored" * self.anchored
        return f"pqlab_decode_d{self.head_dim}_{codecs}_{element}_g{self.vectors}{anchored}_sm{self.arch}"

    @property
    def source(self) -> Path:
        return SOURCES / "pq_decode.cu"

    @property
    def book_bytes(self) -> int:
        """Of both codebooks of a kv head in shared memory: fp16, rows of whole 128-byte blocks."""
        blocks = -(-2 * self.head_dim // 128)
        return blocks * 128 * (2**self.k_nbits + 2**self.v_nbits)

    @property
    def in_halves(self) -> bool:
        """Whether a head is taken as two halves (`pq_halves.cuh`): its codebooks are too large to be there at once."""
        return self.head_dim > 128

    def smem_bytes(self, shape: Shape) -> int:
        """Shared memory of a block; the same sums as in csrc/cuda, which a test compares."""
        warps, slots, buffers, chunks = shape
        halves = 2 if self.in_halves else 1
        padded = -(-self.head_dim // 64) * 64
        tile = max(self.k_m * 2 * self.k_nbits, self.v_m * 2 * self.v_nbits) // halves
        ring = max(slots * 2 * tile, self.vectors * padded * 4)
        scores = self._score_bytes
        spread = 0 if self.k_nbits == 8 else 2 * self.k_m // halves * 16
        rest = (warps + 2) * self.vectors * 8 + 80 + 64  # maxima and sums, what to do next, zeros
        if self.in_halves:
            query = 2 * self.vectors * (self.head_dim + 8)
            barriers = 2 * buffers + warps * slots
            return buffers * 65536 + warps * (ring + chunks * scores + spread) + query + rest + 8 * barriers
        pairs = warps // 2
        pair = 2 * scores + self.vectors * 32 * 2 + spread
        barriers = 2 + 4 * pairs + warps * slots
        return self.book_bytes + warps * ring + pairs * pair + rest + 8 * barriers

    @property
    def _score_bytes(self) -> int:
        """Of a chunk; three vectors take the place of four."""
        return 32 * (4 if self.vectors == 3 else self.vectors) * 4

    def shape(self) -> Shape | None:
        """Of the best block that the device's shared memory can hold, or None."""
        limit = self.shared_memory or SHARED_MEMORY.get(self.arch, 101376)
        if not self.in_halves:
            shapes = _WHOLE if self.arch < 90 else sorted(_WHOLE, reverse=True)
            return next((s for s in shapes if self.smem_bytes(s) <= limit), None)
        for shape in _HALVES:
            room = (limit - self.smem_bytes(shape)) // (shape.warps * self._score_bytes)
            if shape.warps <= self._most_warps and room >= _LEAST_CHUNKS:
                return shape._replace(chunks=min(room, _MOST_CHUNKS))
        return None

    @property
    def _most_warps(self) -> int:
        """Of a block that takes a head in halves: a lane has the sums of both in registers, of each of its vectors."""
        if self.vectors <= 2:
            return 16
        return 12 if self.arch >= 90 and self.v_m > 32 else 8

    def unsupported(self) -> str | None:
        """Why there is no kernel for this, or None; a constant text per cause."""
        if self.dtype not in ELEMENT:
            return f"{self.dtype} queries"
        if self.arch < 80:
            return "a GPU older than compute capability 8.0"
        if self.head_dim not in HEAD_DIMS:
            return f"head size {self.head_dim}: there are kernels for {HEAD_DIMS}"
        for m, nbits in ((self.k_m, self.k_nbits), (self.v_m, self.v_nbits)):
            if nbits not in NBITS:
                return f"{nbits}-bit codes: the kernel reads {NBITS}"
            few, names = ((2, 4, 8), "2, 4") if self.in_halves else ((1, 2, 4, 8), "1, 2, 4")
            if self.head_dim % m or self.head_dim // m not in few:
                return f"M = {m} at head size {self.head_dim}: the kernel takes {names} or 8 dimensions a subspace"
        if self.shape() is None:
            return "the codebooks do not fit into this GPU's shared memory"
        return None

    def fitting(self) -> DecodeConfig:
        """This, or with fewer vectors a block where shared memory has no room for as many."""
        fewer = (replace(self, vectors=n) for n in range(self.vectors, 0, -1))
        return next((config for config in fewer if config.unsupported() is None), self)

    def macros(self) -> tuple[str, ...]:
        shape = self.shape() or _WHOLE[-1]
        turns = (f"-DPQ_BUFFERS={shape.buffers}", f"-DPQ_CHUNKS={shape.chunks}") if self.in_halves else ()
        return (
            f"-DPQ_D={self.head_dim}", f"-DPQ_KM={self.k_m}", f"-DPQ_KBITS={self.k_nbits}", f"-DPQ_VM={self.v_m}",
            f"-DPQ_VBITS={self.v_nbits}", f"-DPQ_T={ELEMENT[self.dtype]}", f"-DPQ_HG={self.vectors}",
            f"-DPQ_NW={shape.warps}", f"-DPQ_SLOTS={shape.slots}", f"-DPQ_ANCHORED={int(self.anchored)}", *turns,
        )  # fmt: skip


@dataclass(frozen=True)
class EncodeConfig:
    """`pq_encode.cu` for one kind of subspace: dm dimensions, 2**nbits centroids, an element type."""

    dm: int
    nbits: int
    dtype: torch.dtype
    arch: int

    @property
    def name(self) -> str:
        return f"pqlab_encode_{self.dm}x{self.nbits}_{str(self.dtype).removeprefix('torch.')}_sm{self.arch}"

    @property
    def source(self) -> Path:
        return SOURCES / "pq_encode.cu"

    def fitting(self) -> EncodeConfig:
        return self

    def unsupported(self) -> str | None:
        if self.dtype not in ELEMENT:
            return f"{self.dtype} vectors"
        if self.arch < 80:
            return "a GPU older than compute capability 8.0"
        if self.nbits not in NBITS or self.dm not in (1, 2, 4, 8):
            return f"{self.nbits}-bit codes of {self.dm} dimensions: the kernel takes {NBITS} bits, 1 to 8 dimensions"
        return None

    def macros(self) -> tuple[str, ...]:
        return f"-DPQ_DM={self.dm}", f"-DPQ_NBITS={self.nbits}", f"-DPQ_T={ELEMENT[self.dtype]}"


Configuration = DecodeConfig | EncodeConfig


def compile_flags(config: Configuration) -> list[str]:
    """For nvcc; PQLAB_NVCC_FLAGS adds to them. Only the architecture at hand: one configuration takes seconds."""
    arch = f"-gencode=arch=compute_{config.arch},code=sm_{config.arch}"
    more = os.environ.get("PQLAB_NVCC_FLAGS", "").split()
    return ["-O3", "-std=c++17", "--expt-relaxed-constexpr", arch, *config.macros(), *more]


def vectors_per_block(group: int, steps: int) -> int:
    """Query vectors a block takes: few equal groups at one new token, as many as fit otherwise (one build for all)."""
    if steps > 1:
        return MAX_VECTORS
    blocks = -(-group // MAX_VECTORS)
    return -(-group // blocks)
