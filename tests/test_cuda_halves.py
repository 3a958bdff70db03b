"""CUDA decode of heads of 256, whose codebooks take turns in shared memory, and the code for older GPUs."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_cuda import RAGGED, check, make_call, sanitize

from pqlab import kernels
from pqlab.kernels import cuda_config
from pqlab.kernels.cuda import CudaBackend
from pqlab.kernels.cuda_config import SHARED_MEMORY

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _started():
    kernels.start()


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (4, 2), (9, 3), (7, 1)])
def test_any_ratio_of_heads(heads, kv_heads):
    for rows in (RAGGED, ((4, 9000, 130),), ((4, 300, 17),), ((2, 0, 0),), ((4, 0, 100), (0, 0, 0))):
        check(make_call(heads, kv_heads, 256, (128, 8), (128, 8), rows=rows, seed=11))


@pytest.mark.parametrize("length, kv_heads", [(1, 1), (33, 2), (513, 2), (8193, 1), (8191, 8), (40000, 8), (131072, 1)])
def test_lengths(length, kv_heads):
    """Of segments: none is full, one, several in one block; the shares of a batch are cut elsewhere."""
    for rows in (((0, length, 0),), ((3, length, 50), (0, length // 3, 0))):
        check(make_call(2 * kv_heads, kv_heads, 256, (128, 8), (128, 8), rows=rows, seed=12))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-3), (torch.bfloat16, 5e-3)])
def test_element_types(dtype, limit):
    check(make_call(4, 1, 256, (128, 8), (128, 8), dtype=dtype, rows=RAGGED, seed=13), limit)


def test_many_rows():
    rows = [(i % 5, i * 97 % 900, i * 31 % 193) for i in range(70)]
    check(make_call(2, 2, 256, (64, 8), (64, 8), rows=rows, seed=14))
    check(make_call(4, 2, 256, (128, 8), (128, 8), steps=3, rows=((4, 5000, 100), (1, 70, 20)), seed=15))


@pytest.mark.parametrize("arch", [80, 89])
@pytest.mark.parametrize("head_dim, m", [(64, 32), (256, 128), (256, 64)])
def test_code_for_older_gpus(arch, head_dim, m, monkeypatch):
    """Without bulk copies and in their shared memory, as PTX, which a newer GPU translates for itself."""
    monkeypatch.setenv("PQLAB_NVCC_FLAGS", f"-gencode=arch=compute_{arch},code=compute_{arch}")
    backend = CudaBackend()
    monkeypatch.setattr(backend, "_device", lambda x: (arch, SHARED_MEMORY[arch], 108))
    for rows in (RAGGED, ((4, 40000, 130),)):
        check(make_call(4, 1, head_dim, (m, 8), (m, 8), rows=rows, seed=16), backend=backend)


def check_few_blocks():
    """Several segments a row, several rows a block: with few chunks a segment and as if there were two blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_config, "_LEAST_CHUNKS", 2)
        patch.setattr(cuda_config, "_MOST_CHUNKS", 2)
        backend, device = CudaBackend(), CudaBackend()._device(torch.empty(0, device="cuda"))
        patch.setattr(backend, "_device", lambda x: (*device[:2], 2))
        for rows in (((4, 2600, 30),), ((4, 1900, 30), (0, 33, 0), (2, 0, 5), (4, 500, 9))):
            for kv_heads in (1, 2):
                check(make_call(4, kv_heads, 256, (128, 8), (128, 8), rows=rows, seed=17), backend=backend)


def test_segments():
    check_few_blocks()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(
        tool,
        "import sys; sys.path.append('tests')\nimport test_cuda_halves as t\nt.kernels.start()\nt.check_few_blocks()\n",
    )
