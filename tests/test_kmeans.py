from __future__ import annotations

import pytest
import torch

from pqlab.quantization.kmeans import distortion, product_kmeans


def correlated(groups, n, d, seed=0) -> torch.Tensor:
    """Samples with correlated dimensions, unequal scales and heavy tails, as keys have them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, n, d, generator=g) @ torch.randn(groups, d, d, generator=g)
    return x * torch.rand(groups, n, 1, generator=g).reciprocal().clamp_max(20).sqrt()


def faiss_distortion(x: torch.Tensor, m: int, nbits: int, iterations: int) -> float:
    import faiss

    faiss.omp_set_num_threads(1)
    pq = faiss.ProductQuantizer(x.shape[1], m, nbits)
    pq.cp.niter = iterations
    pq.cp.min_points_per_centroid = 1
    pq.cp.max_points_per_centroid = len(x)
    data = x.numpy()
    pq.train(data)
    return float(((data - pq.decode(pq.compute_codes(data))) ** 2).sum(1).mean())


@pytest.mark.parametrize(
    ("d", "m", "nbits"),
    [(64, 32, 8), (64, 16, 8), (64, 16, 4), (32, 32, 4), (48, 6, 6), (12, 1, 8), (30, 10, 5), (8, 4, 1), (8, 2, 2)],
)
def test_distortion_is_within_two_percent_of_faiss(d, m, nbits):
    x = correlated(2, 3000, d)
    books = product_kmeans(x, m, 2**nbits, iterations=15)
    assert books.shape == (2, m, 2**nbits, d // m)
    for group, ours in zip(x, distortion(x, books), strict=True):
        assert float(ours) <= 1.02 * faiss_distortion(group, m, nbits, iterations=15)


def test_every_iteration_count_is_within_two_percent_of_faiss():
    x = correlated(1, 2000, 8)
    for iterations in (1, 2, 4, 8, 25):
        books = product_kmeans(x, 4, 64, iterations=iterations)
        assert float(distortion(x, books)) <= 1.02 * faiss_distortion(x[0], 4, 6, iterations), iterations


def test_well_separated_clusters_are_found():
    centres = torch.tensor([[-9.0, 0], [9, 0], [0, 9], [0, -9], [9, 9], [-9, -9], [9, -9], [-9, 9]])
    x = (centres.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 2))[None]
    found = product_kmeans(x, 1, 8)[0, 0]
    assert found.shape == (8, 2)
    assert torch.cdist(centres, found).amin(1).max() < 0.2


@pytest.mark.parametrize(("distinct", "centroids"), [(1, 4), (3, 8), (12, 16), (200, 256)])
def test_few_distinct_samples_are_represented_without_error(distinct, centroids):
    values = torch.randn(2, distinct, 6)
    x = values[:, torch.randint(distinct, (700,)).clamp_max(distinct - 1)]
    x[:, :distinct] = values
    books = product_kmeans(x, 3, centroids)
    assert books.isfinite().all()
    assert distortion(x, books).max() == 0


def test_fewer_samples_than_centroids():
    x = torch.randn(2, 5, 4)
    books = product_kmeans(x, 2, 16)
    assert books.shape == (2, 2, 16, 2) and books.isfinite().all()
    assert distortion(x, books).max() == 0


def test_no_centroid_is_wasted():
    x = correlated(3, 2000, 4)
    x[:, :100] *= 50  # far outliers lure seeds away
    books = product_kmeans(x, 2, 64)
    from pqlab.kernels import ops

    codes = ops.encode(x, books)
    assert all(len(codes[g, :, m].unique()) == 64 for g in range(3) for m in range(2))


def test_seeds_reproduce_and_differ():
    x = correlated(2, 900, 8)
    first, again, other = (product_kmeans(x, 4, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_groups_are_independent_problems(monkeypatch):
    x = correlated(3, 800, 8)
    x[1] *= 1000  # a large neighbour must not disturb a small one
    alone = distortion(x[2:], product_kmeans(x[2:], 4, 32))
    together = distortion(x, product_kmeans(x, 4, 32))
    assert abs(float(together[2] / alone[0]) - 1) < 0.05
    monkeypatch.setitem(product_kmeans.__globals__["_CHUNK_ELEMENTS"], "cpu", 800 * 8)  # one group at a time
    split = distortion(x, product_kmeans(x, 4, 32))
    assert (split / together - 1).abs().max() < 0.05


def test_more_iterations_and_more_centroids_never_hurt_much():
    x = correlated(2, 2000, 8)
    by_iterations = [float(distortion(x, product_kmeans(x, 4, 32, iterations=i)).mean()) for i in (1, 3, 12)]
    assert by_iterations[0] > by_iterations[1] > by_iterations[2] * 0.999
    by_count = [float(distortion(x, product_kmeans(x, 4, c)).mean()) for c in (1, 2, 8, 64, 256)]
    assert by_count == sorted(by_count, reverse=True)
    assert by_count[0] == pytest.approx(float(x.var(1, unbiased=False).sum(-1).mean()), rel=1e-4)


def test_half_precision_samples():
    x = correlated(1, 500, 8)
    x = x / x.abs().max()
    books = product_kmeans(x.bfloat16(), 4, 16)
    assert books.dtype == torch.float32
    assert float(distortion(x, books)) < 1.1 * float(distortion(x, product_kmeans(x, 4, 16)))


def test_progress_counts_up_to_the_total():
    seen = []
    product_kmeans(torch.randn(3, 50, 4), 2, 4, iterations=5, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (15, 15) and seen == sorted(seen) and len(seen) == 5


@pytest.mark.parametrize(
    ("x", "m", "c", "options", "names"),
    [
        (torch.zeros(2, 0, 4), 2, 4, {}, r"n > 0, d\], got \[2, 0, 4\]"),
        (torch.zeros(5, 4), 2, 4, {}, "groups"),
        (torch.zeros(1, 5, 4), 3, 4, {}, "3 subspaces do not divide 4"),
        (torch.zeros(1, 5, 4), 2, 300, {}, "1 to 256.*got 300"),
        (torch.zeros(1, 5, 4), 2, 4, {"iterations": 0}, "at least 1, got 0"),
        (torch.full((1, 5, 4), torch.nan), 2, 4, {}, "not finite"),
    ],
)
def test_what_cannot_be_trained_is_refused(x, m, c, options, names):
    with pytest.raises(ValueError, match=names):
        product_kmeans(x, m, c, **options)


@pytest.mark.gpu
def test_gpu_and_cpu_reach_the_same_distortion():
    x = correlated(4, 4000, 64)
    on_cpu = distortion(x, product_kmeans(x, 32, 64))
    books = product_kmeans(x.cuda(), 32, 64)
    assert torch.equal(books, product_kmeans(x.cuda(), 32, 64))
    assert (distortion(x, books.cpu()) / on_cpu - 1).abs().max() < 0.02
