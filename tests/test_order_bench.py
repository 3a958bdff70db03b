"""`bench layout`: kernels of every byte order give the same sums, page sizes the same attention."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from test_cuda_compile import NVCC, needs_nvcc

from pqlab import cli
from pqlab.benchmarks import order_bench
from pqlab.benchmarks.decode_bench import Case
from pqlab.benchmarks.order_kernels import SOURCES, OrderKernels, expected, in_order, strides
from pqlab.kernels import ops
from pqlab.paging.layout import ORDERS, PageLayout


@pytest.fixture(scope="module")
def order_kernels():
    try:
        return OrderKernels()
    except RuntimeError as error:
        pytest.skip(f"no compiler here: {error}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("page_size", [16, 48])
def test_strides_find_every_code(order, page_size):
    codes = torch.randint(0, 256, (3, 2, page_size, 16), dtype=torch.uint8)
    layout = PageLayout(page_size, 2, 16, 8, order)
    stored = in_order(codes, order)
    tile, token, subspace = strides(layout)
    slots, subspaces = torch.arange(page_size)[:, None], torch.arange(16)
    places = slots // 16 * tile + slots % 16 * token + subspaces * subspace
    assert torch.equal(stored[:, :, places], codes)
    assert layout.address(page_size - 1, 1, 3)[0] == stored.shape[2] + int(places[-1, 3])


@pytest.mark.parametrize("page_size, m", [(16, 16), (64, 32), (512, 64), (48, 80)])
def test_all_orders_give_the_same_sum(order_kernels, page_size, m):
    g = torch.Generator().manual_seed(page_size)
    codes = torch.randint(0, 256, (7, 3, page_size, m), generator=g, dtype=torch.uint8)
    ids = torch.randperm(7, generator=g)[:5]
    books, weights = torch.randn(3, m, 256, 2, generator=g), torch.rand(5 * page_size, generator=g)
    wanted = expected(codes, ids, books, weights)
    rows = codes[ids].transpose(0, 1).flatten(1, 2).long()  # and by plain indexing
    direct = books[torch.arange(3)[:, None, None], torch.arange(m), rows] * weights[:, None, None]
    torch.testing.assert_close(direct.sum(1).flatten(1).double(), wanted, rtol=1e-4, atol=1e-4)
    for name in order_kernels.names:
        call = order_kernels.prepare(name, codes, ids, books, weights)
        call()
        torch.testing.assert_close(call.result().double(), wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_reading_reads_all(order_kernels):
    data = torch.arange(999)
    assert order_kernels.read(data) == int(data.sum())
    with pytest.raises(ValueError, match="multiples of 16"):
        order_kernels.prepare("tiled", torch.zeros(1, 1, 16, 8, dtype=torch.uint8), *[data] * 3)


def test_page_size_changes_no_result():
    outs = []
    for page_size in (16, 128):
        case = Case(4, 2, (300,), m=8, head_dim=16)
        args = order_bench.decode_arguments(case, device="cpu", page_size=page_size)
        assert args[1].shape[2] * 16 == page_size
        assert args[3].shape == (1, -(-168 // page_size)) and (args[3] >= 0).all()
        outs.append(ops.decode(*args)[0])
    assert torch.isfinite(torch.stack(outs)).all()  # random codes: other pages, other numbers


def test_the_command_prints_shares(order_kernels, monkeypatch, capsys):
    monkeypatch.setattr(order_bench, "_TOKENS", {"cpu": 2048})
    monkeypatch.setattr(order_bench, "_EVICT", 1 << 20)
    monkeypatch.setitem(order_bench.CASES, "cpu", (Case(6, 2, (600,), m=16, head_dim=32),))
    options = ["--device", "cpu", "--page-sizes", "16", "64", "--seconds", "0.001", "--json"]
    assert cli.main(["bench", "layout", *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["records"]
    assert {r["order"] for r in found if "order" in r} == {*ORDERS, "row_major, by token", "read"}
    assert [r["page_size"] for r in found if r["what"] == "decode"] == [16, 64]
    reads = {r["page_size"]: r["microseconds"] for r in found if r.get("order") == "read"}
    for r in found:
        if "order" in r:
            assert r["share"] == pytest.approx(reads[r["page_size"]] / r["microseconds"], rel=0.01)
    assert cli.main(["bench", "layout", "--page-sizes", "17"]) == 2
    assert "--page-sizes 17 is unknown" in capsys.readouterr().err


@needs_nvcc
def test_the_cuda_kernel_compiles(tmp_path):
    arches = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command = [NVCC, "-c", "-O3", "-std=c++17", *arches, str(SOURCES / "orders.cu"), "-o", str(tmp_path / "orders.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


@pytest.mark.gpu
def test_orders_on_a_gpu():
    for page_size in (16, 512):  # raises when a sum is wrong
        records = order_bench.bench_orders(page_size, "cuda", tokens=4096, heads=2)
        assert {r["order"] for r in records} == {*ORDERS, "read"}
