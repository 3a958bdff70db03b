"""Every kind of CUDA configuration compiles where there is an nvcc; no GPU is needed, nothing is run on one."""

from __future__ import annotations

import ctypes
import re
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pqlab.kernels import cuda_params
from pqlab.kernels.caller import ADDRESSES
from pqlab.kernels.cuda_config import (
    HEAD_DIMS,
    NBITS,
    SHARED_MEMORY,
    DecodeConfig,
    EncodeConfig,
    compile_flags,
    vectors_per_block,
)
from pqlab.kernels.cuda_params import APPEND_AT, Held, decode_at

NVCC = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

DECODE = [
    DecodeConfig(128, 64, 8, 64, 8, torch.float16, 4, 90),  # 32/8 heads
    DecodeConfig(128, 64, 8, 64, 8, torch.float16, 1, 90),  # 32/32 heads
    DecodeConfig(128, 32, 8, 32, 8, torch.bfloat16, 2, 90),  # entries of 8 bytes, room for longer rings
    DecodeConfig(64, 32, 8, 32, 8, torch.bfloat16, 3, 90),  # 9/3 heads
    DecodeConfig(128, 32, 4, 16, 8, torch.float32, 2, 90),  # K and V of different codecs
    DecodeConfig(128, 64, 8, 64, 8, torch.float16, 4, 80),  # no bulk copies, less shared memory
    DecodeConfig(96, 48, 8, 48, 8, torch.float16, 1, 80),
    DecodeConfig(64, 32, 4, 32, 4, torch.float16, 2, 89),  # both sides 4 bits, the smallest shared memory
    DecodeConfig(128, 128, 8, 64, 8, torch.float16, 4, 90),  # keys of 8 bits an element
    DecodeConfig(128, 64, 8, 128, 8, torch.float16, 1, 90),  # values
    DecodeConfig(128, 128, 8, 128, 8, torch.bfloat16, 4, 80),  # both, the smallest blocks
    DecodeConfig(96, 96, 8, 96, 4, torch.float16, 3, 90),
    DecodeConfig(64, 8, 8, 32, 8, torch.float16, 3, 90),  # 9/3 heads, a code for eight dimensions of keys
    DecodeConfig(64, 32, 8, 8, 4, torch.float32, 1, 90),  # of values
    DecodeConfig(96, 12, 8, 24, 8, torch.float16, 4, 90),
    DecodeConfig(96, 24, 4, 12, 4, torch.bfloat16, 1, 80),
    DecodeConfig(32, 4, 4, 8, 8, torch.float16, 2, 89),  # the fewest codes
    DecodeConfig(128, 64, 8, 64, 8, torch.float16, 4, 90, anchored=True),
    DecodeConfig(128, 64, 8, 64, 8, torch.float16, 1, 90, anchored=True),
    DecodeConfig(64, 32, 8, 32, 8, torch.bfloat16, 3, 90, anchored=True),
    DecodeConfig(128, 64, 4, 128, 8, torch.float32, 2, 90, anchored=True),
    DecodeConfig(128, 128, 8, 64, 8, torch.bfloat16, 4, 80, anchored=True),
    DecodeConfig(96, 24, 4, 12, 4, torch.float16, 2, 89, anchored=True),
    DecodeConfig(256, 128, 8, 128, 8, torch.float16, 4, 90),  # in halves: 4/1 heads
    DecodeConfig(256, 128, 8, 128, 8, torch.bfloat16, 2, 90),  # 16/8 heads
    DecodeConfig(256, 64, 4, 128, 8, torch.float32, 1, 90),
    DecodeConfig(256, 128, 8, 32, 8, torch.float16, 3, 80),
    DecodeConfig(256, 64, 8, 64, 8, torch.float16, 2, 80),
    DecodeConfig(256, 128, 8, 128, 8, torch.float16, 2, 89),  # 99 KiB
    DecodeConfig(256, 128, 8, 128, 8, torch.bfloat16, 4, 90, anchored=True),
    DecodeConfig(256, 64, 8, 64, 8, torch.float16, 2, 80, anchored=True),
]
ENCODE = [
    EncodeConfig(2, 8, torch.float16, 90),
    EncodeConfig(4, 4, torch.bfloat16, 80),
    EncodeConfig(8, 4, torch.float32, 89),
    EncodeConfig(1, 8, torch.float16, 80),
]
MOST_SECONDS = 15
"""Of processor time, which another load on the machine does not stretch; on idle cores it is more than the wait."""


def compiled(config: DecodeConfig | EncodeConfig, folder: Path) -> tuple[ctypes.CDLL, str]:
    library = folder / f"{config.name}.so"
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", *compile_flags(config), config.source]
    before = _processor_seconds()
    done = subprocess.run([*map(str, command), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _processor_seconds() - before < MOST_SECONDS, "a configuration is met while somebody waits for it"
    return ctypes.CDLL(str(library)), done.stderr


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@needs_nvcc
@pytest.mark.parametrize("config", DECODE, ids=lambda c: c.name)
def test_decode_compiles(config, tmp_path):
    library, output = compiled(config, tmp_path)
    assert "warning" not in output
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", output)]
    assert max(spills) <= 64, output  # registers bound this kernel; more spills would be in its loops
    info = (ctypes.c_int * 6)()
    library.pqlab_decode_info(info)
    shape = config.shape()
    assert list(info[:4]) == [config.vectors, shape.warps, config.smem_bytes(shape), config.book_bytes]
    assert info[2] <= SHARED_MEMORY[config.arch]
    floats, slices = info[4:]
    assert slices % config.vectors == 0 and floats >= config.vectors * config.head_dim + 4 * slices


@needs_nvcc
@pytest.mark.parametrize("config", ENCODE, ids=lambda c: c.name)
def test_encode_compiles(config, tmp_path):
    library, output = compiled(config, tmp_path)
    assert "warning" not in output
    assert hasattr(library, "pqlab_encode") and hasattr(library, "pqlab_append")


@pytest.mark.parametrize(
    "config, cause",
    [
        (DecodeConfig(160, 80, 8, 80, 8, torch.float16, 1, 90), "head size 160"),
        (DecodeConfig(128, 64, 7, 64, 8, torch.float16, 1, 90), "7-bit"),
        (DecodeConfig(128, 8, 8, 64, 8, torch.float16, 1, 90), "M = 8"),
        (DecodeConfig(256, 256, 8, 128, 8, torch.float16, 1, 90), "M = 256"),
        (DecodeConfig(128, 64, 8, 64, 8, torch.float64, 1, 90), "float64"),
        (DecodeConfig(128, 64, 8, 64, 8, torch.float16, 1, 75), "older"),
        (DecodeConfig(128, 64, 8, 64, 8, torch.float16, 1, 89), "shared memory"),
        (EncodeConfig(3, 8, torch.float16, 90), "3 dimensions"),
    ],
)
def test_what_has_no_kernel_is_named(config, cause):
    assert cause in config.unsupported()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_code_for_1_2_4_or_8_dimensions_has_a_kernel(head_dim):
    """Of keys and values alike, so that a plan may give each side of each layer what it needs."""
    dims = (2, 4, 8) if head_dim == 256 else (1, 2, 4, 8)
    sides = [(head_dim // n, nbits) for n in dims for nbits in NBITS]
    for k in sides:
        for v in sides:
            config = DecodeConfig(head_dim, *k, *v, torch.float16, 3, 90)
            assert config.fitting().unsupported() is None, config


def test_small_shared_memory_takes_smaller_blocks():
    roomy, tight = (DecodeConfig(128, 64, 8, 64, 8, torch.float16, 4, arch) for arch in (90, 80))
    assert roomy.unsupported() is None and tight.unsupported() is None
    assert roomy.shape() > tight.shape()
    assert DecodeConfig(64, 32, 8, 32, 8, torch.float16, 3, 89).unsupported() is None  # d 64 fits everywhere


def test_small_shared_memory_takes_fewer_vectors():
    config = DecodeConfig(256, 128, 8, 128, 8, torch.float16, 4, 89)
    assert "shared memory" in config.unsupported() and config.fitting() == replace(config, vectors=2)
    whole = DecodeConfig(128, 64, 8, 64, 8, torch.float16, 4, 89)
    assert whole.fitting() is whole  # the codebooks alone are too large
    assert replace(config, arch=80).fitting().vectors == 4


@pytest.mark.parametrize("group, steps, vectors", [(1, 1, 1), (4, 1, 4), (3, 1, 3), (7, 1, 4), (6, 1, 3), (1, 5, 4)])
def test_vectors_per_block(group, steps, vectors):
    assert vectors_per_block(group, steps) == vectors


@needs_nvcc
def test_addresses_lie_where_the_structs_have_them(tmp_path):
    """What `caller` changes from call to call, by the compiler's own account of the structs."""
    names = {"lengths": "after", "k": "side[0].x", "v": "side[1].x"}
    held = Held(torch.empty(0), torch.empty(0), torch.empty(0), 1)
    places = [("DecodeParams", name, at) for name, at in zip(ADDRESSES, decode_at(held), strict=True) if at >= 0]
    places += [("AppendParams", names.get(n, n), at) for n, at in zip(ADDRESSES, APPEND_AT[0], strict=True) if at >= 0]
    assert [name for _, name, _ in places] == [
        "q", "page_table", "lengths", "out", "lse", "q", "page_table", "after", "side[0].x", "side[1].x", "before",
    ]  # fmt: skip
    asserts = [f"static_assert(offsetof(pqlab::{struct}, {name}) == {at});" for struct, name, at in places]
    asserts.append(f"static_assert(offsetof(pqlab::AppendParams, side[0].x) == {APPEND_AT[1][ADDRESSES.index('v')]});")
    asserts.append(f"static_assert(sizeof(pqlab::DecodeParams) == {cuda_params._DECODE.size});")
    append_size = 2 * cuda_params._APPEND_SIDE.size + cuda_params._APPEND.size
    asserts.append(f"static_assert(sizeof(pqlab::AppendParams) == {append_size});")
    source = tmp_path / "places.cu"
    source.write_text("\n".join(['#include "pq_shape.cuh"', '#include "pq_append.cuh"', *asserts]))
    folder = EncodeConfig(2, 8, torch.float16, 90).source.parent
    command = [NVCC, "-c", "-std=c++17", "-arch=sm_90", f"-I{folder}", str(source), "-o", str(tmp_path / "places.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
