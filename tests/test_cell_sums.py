"""Sums over the cells of a quantizer: C++ against plain torch, plain torch against a product with the members."""

from __future__ import annotations

import pytest
import torch

from pqlab import kernels
from pqlab.kernels import dispatch, ops, reference

kernels.start()


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    kernels.wait()
    status = dispatch.backends()["cpu"].status()
    if request.param == "cpu" and status.state != "ready":
        pytest.skip(f"no C++ kernels here: {status.detail}")
    with kernels.use_backend(request.param):
        yield request.param


def case(groups, n, d, m, num_centroids, dtype=torch.float32, seed=0):
    """Vectors with far means, weights of which some are 0, and codes that leave some cells empty."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(groups, n, d, generator=g) + 30 * torch.randn(d, generator=g)).to(dtype)
    weights = torch.rand(groups, n, generator=g).reciprocal().clamp_max(1e3)
    weights[torch.rand(groups, n, generator=g) < 0.2] = 0
    codes = torch.randint(0, num_centroids, (groups, n, m), generator=g, dtype=torch.uint8)
    codes[codes % 7 == 3] = 0
    return x, weights, codes, num_centroids


def by_products(x, weights, codes, num_centroids):
    """The members of every cell as a matrix of ones and zeros."""
    members = (codes.movedim(-1, 1)[..., None] == torch.arange(num_centroids)).double()  # [G, M, n, C]
    vectors = x.double().unflatten(-1, (codes.shape[2], -1)).movedim(2, 1)  # [G, M, n, dm]
    weighted = members * weights.double()[:, None, :, None]
    return weighted.sum(2), weighted.mT @ vectors, weighted.mT @ vectors.square()


SHAPES = [
    (2, 300, 64, 32, 256), (3, 1, 6, 3, 4), (1, 77, 5, 5, 2), (2, 129, 40, 10, 100), (1, 500, 64, 8, 256),
    (2, 65, 30, 2, 17), (1, 90, 12, 1, 1), (9, 33, 256, 128, 256), (0, 5, 8, 4, 16), (2, 0, 8, 4, 16),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_those_of_the_members(backend, shape, dtype):
    arguments = case(*shape, dtype)
    found = ops.cell_sums(*arguments)
    groups, _, d, m, num_centroids = shape
    assert found[0].shape == (groups, m, num_centroids)
    assert found[1].shape == found[2].shape == (groups, m, num_centroids, d // m)
    for got, want in zip(found, by_products(*arguments), strict=True):
        assert got.dtype == torch.float64 and got.is_contiguous()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-7)


def test_a_cell_of_nothing_or_of_no_weight_has_zeros(backend):
    x, weights, codes = torch.randn(2, 50, 8), torch.zeros(2, 50), torch.full((2, 50, 4), 3, dtype=torch.uint8)
    weights[1] = 1
    count, total, squares = ops.cell_sums(x, weights, codes, 5)
    others = torch.arange(5) != 3
    for sums in (count[..., None], total, squares):
        assert sums[0].abs().max() == 0 and sums[1][:, others].abs().max() == 0
    assert (count[1, :, 3] == 50).all() and (squares[1, :, 3] > 0).all()


def test_vectors_with_strides_and_of_double_precision(backend):
    x, weights, codes, num_centroids = case(3, 40, 16, 4, 32)
    want = reference.cell_sums(x, weights, codes, num_centroids)
    strided = (x.mT.contiguous().mT, weights[:, :, None].expand(-1, -1, 2)[..., 0], codes.mT.contiguous().mT)
    for got, wanted in zip(ops.cell_sums(*strided, num_centroids), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-9)
    with kernels.use_backend("auto"):
        for got, wanted in zip(ops.cell_sums(x.double(), *strided[1:], num_centroids), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 5000, 64, 32, 256), (5, 3000, 48, 6, 64), (7, 800, 256, 128, 256)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(backend, shape):
    arguments = case(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.cell_sums(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def test_opcheck(backend):
    torch.library.opcheck(torch.ops.pqlab.cell_sums.default, case(2, 9, 12, 3, 16))


X, WEIGHTS, CODES = torch.zeros(2, 9, 8), torch.ones(2, 9), torch.zeros(2, 9, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ((X[0], WEIGHTS, CODES, 4), r"x must be \[G, n, d\].* got \[9, 8\]"),
        ((X, WEIGHTS, CODES[0], 4), r"uint8 \[9, 4\]"),
        ((X, WEIGHTS, CODES.int(), 4), "codes uint8.*int32"),
        ((X, WEIGHTS, CODES[:, :8], 4), r"\[2, 8, 4\]"),
        ((X, WEIGHTS[:1], CODES, 4), r"weights must be float32 \[2, 9\], got torch.float32 \[1, 9\]"),
        ((X, WEIGHTS.double(), CODES, 4), "got torch.float64"),
        ((X, WEIGHTS, CODES[..., :3], 4), "3 subspaces do not divide d = 8"),
        ((X, WEIGHTS, CODES[..., :0], 4), "0 subspaces"),
        ((X, WEIGHTS, CODES, 0), "1 to 256, got 0"),
        ((X, WEIGHTS, CODES, 257), "1 to 256, got 257"),
        ((X, WEIGHTS, CODES + 4, 4), "code 4 names none of 4 centroids"),
    ],
)
def test_what_does_not_fit_is_named(backend, arguments, cause):
    with pytest.raises(ValueError, match=rf"pqlab\.cell_sums: .*{cause}"):
        ops.cell_sums(*arguments)


@pytest.mark.gpu
def test_on_a_gpu():
    arguments = case(3, 700, 64, 32, 256)
    for got, want in zip(ops.cell_sums(*(a.cuda() for a in arguments[:3]), 256), by_products(*arguments), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-7)
