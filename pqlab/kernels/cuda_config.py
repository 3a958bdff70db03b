"""Which CUDA kernel fits a call: configurations as values, what they are compiled with, and why one cannot be.

A configuration names everything that is a template parameter of the kernels in `csrc/cuda`. It is hashable, knows its
macros and flags, and needs neither a GPU nor a compiler to be made; `Configuration.extension` is what builds it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc" / "cuda"

ELEMENT = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
HEAD_DIMS = (32, 64, 96, 128)
NBITS = (4, 8)
MAX_VECTORS = 4
"""Query vectors (query heads of a kv head times new tokens) that one block works for: registers bound it."""
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448}
"""Bytes a block can have, by architecture; for compiling where there is no device to ask."""
_SHAPES = ((16, 4), (16, 3), (16, 2), (12, 2), (16, 1), (12, 1), (8, 1), (6, 1))
"""(warps a block, chunks of codes on their way to a warp), best first; with a copy engine (9.0) warps come first."""


@dataclass(frozen=True)
class DecodeConfig:
    """`pq_decode.cu` for one head size, two codecs, an element type and a number of query vectors.

    Args:
        k_m, v_m: subspaces; k_nbits, v_nbits: bits a code.
        vectors: query vectors a block works for, 1 to 4.
        arch: compute capability, 10 * major + minor.
        shared_memory: bytes a block can have on the device; 0 takes the architecture's.
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

    @property
    def name(self) -> str:
        element = str(self.dtype).removeprefix("torch.")
        codecs = f"k{self.k_m}x{self.k_nbits}_v{self.v_m}x{self.v_nbits}"
        return f"pqlab_decode_d{self.head_dim}_{codecs}_{element}_g{self.vectors}_sm{self.arch}"

    @property
    def source(self) -> Path:
        return SOURCES / "pq_decode.cu"

    @property
    def book_bytes(self) -> int:
        """Of both codebooks of a kv head in shared memory: fp16, rows of whole 128-byte blocks."""
        blocks = -(-2 * self.head_dim // 128)
        return blocks * 128 * (2**self.k_nbits + 2**self.v_nbits)

    def smem_bytes(self, warps: int, slots: int) -> int:
        """Shared memory of a block; the same sum as in csrc/cuda/pq_shape.cuh, which a test compares."""
        padded = -(-self.head_dim // 64) * 64
        tile = max(self.k_m * 2 * self.k_nbits, self.v_m * 2 * self.v_nbits)
        ring = max(slots * 2 * tile, self.vectors * padded * 4)
        scores = 32 * (4 if self.vectors == 3 else self.vectors) * 4
        spread = 0 if self.k_nbits == 8 else 2 * self.k_m * 16
        pairs = warps // 2
        pair = 2 * scores + self.vectors * 32 * 2 + spread
        barriers = 2 + 4 * pairs + warps * slots
        rest = (warps + 2) * self.vectors * 8 + 80 + 64  # maxima and sums, what to do next, zeros
        return self.book_bytes + warps * ring + pairs * pair + rest + 8 * barriers

    def shape(self) -> tuple[int, int] | None:
        """(warps, slots) of the best block that the device's shared memory can hold, or None."""
        limit = self.shared_memory or SHARED_MEMORY.get(self.arch, 101376)
        shapes = _SHAPES if self.arch < 90 else sorted(_SHAPES, reverse=True)
        return next((s for s in shapes if self.smem_bytes(*s) <= limit), None)

    def unsupported(self) -> str | None:
        """Why there is no kernel for this, or None; a constant text per cause."""
        if self.dtype not in ELEMENT:
            return f"{self.dtype} queries"
        if self.arch < 80:
            return "a GPU older than compute capability 8.0"
        if self.head_dim not in HEAD_DIMS:
            return f"head size {self.head_dim}: two codebooks fit into shared memory for {HEAD_DIMS}"
        for m, nbits in ((self.k_m, self.k_nbits), (self.v_m, self.v_nbits)):
            if nbits not in NBITS:
                return f"{nbits}-bit codes: the kernel reads {NBITS}"
            if m % 16 or self.head_dim % m or self.head_dim // m not in (1, 2, 4, 8):
                return f"M = {m} at head size {self.head_dim}: 1, 2, 4 or 8 dimensions a subspace, M a multiple of 16"
        if self.shape() is None:
            return "the codebooks do not fit into this GPU's shared memory"
        return None

    def macros(self) -> tuple[str, ...]:
        warps, slots = self.shape() or _SHAPES[-1]
        return (
            f"-DPQ_D={self.head_dim}", f"-DPQ_KM={self.k_m}", f"-DPQ_KBITS={self.k_nbits}", f"-DPQ_VM={self.v_m}",
            f"-DPQ_VBITS={self.v_nbits}", f"-DPQ_T={ELEMENT[self.dtype]}", f"-DPQ_HG={self.vectors}",
            f"-DPQ_NW={warps}", f"-DPQ_SLOTS={slots}",
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
