"""The CUDA kernels against the reference in float64: fresh inputs, shuffled pages, ragged rows, poisoned results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from pqlab import kernels
from pqlab.kernels import ops, reference, use_backend
from pqlab.kernels.backend import in_code_space
from pqlab.paging.layout import pack_codes, read_pages
from pqlab.quantization.maps import compact_map

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _started():
    kernels.start()


def make_call(
    heads=8, kv_heads=2, head_dim=128, k_codec=(64, 8), v_codec=(64, 8), page_size=64, dtype=torch.float16, steps=1,
    rows=((4, 1000, 130),), slots=192, num_sinks=4, seed=0, scale_q=1.0,
):  # fmt: skip
    """Arguments of `ops.decode`. What no length covers holds NaN: nothing of it may reach the result."""
    g = torch.Generator(device="cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    batch, tiles = len(rows), page_size // 16
    per_row = max(1, max(-(-coded // page_size) for _, coded, _ in rows))
    max_pages = batch * per_row + 5
    table = torch.randperm(max_pages, generator=g, device="cuda")[: batch * per_row].view(batch, per_row).int()
    lengths = torch.tensor(rows, dtype=torch.int32, device="cuda")
    used = torch.arange(per_row, device="cuda") * page_size < lengths[:, 1:2]
    pages, books = [], []
    for m, nbits in (k_codec, v_codec):
        codes = torch.randint(0, 2**nbits, (max_pages, kv_heads, tiles, m, 16), generator=g, device="cuda")
        pages.append(pack_codes(codes.to(torch.uint8), nbits))
        books.append(random(kv_heads, m, 2**nbits, head_dim // m))
    sinks = [random(batch, kv_heads, num_sinks, head_dim).to(dtype) for _ in range(2)]
    window = [random(batch, kv_heads, slots, head_dim).to(dtype) for _ in range(2)]
    for row, (sink, coded, live) in enumerate(rows):
        dead = [slot for slot in range(slots) if (slot - coded) % slots >= live]
        for side in range(2):
            sinks[side][row, :, sink:] = float("nan")
            window[side][row, :, dead] = float("nan")
    q = (random(batch, heads, steps, head_dim) * scale_q).to(dtype)
    table = torch.where(used, table, -1).int()
    return (q, *pages, table, lengths, *books, *sinks, *window, k_codec[1], v_codec[1], head_dim**-0.5)


def random_maps(heads, head_dim, seed=0, eight=True):
    """The maps of `ops.step_`: forward int8 or float16, backward float16, near each other's inverse."""
    g = torch.Generator().manual_seed(seed)
    maps = []
    for _ in "kv":
        rotation = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=g)).Q
        forward, backward = compact_map(rotation * (torch.rand(heads, 1, head_dim, generator=g) + 0.5), head_dim // 4)
        maps += [forward if eight else (forward / 127).half(), backward.half()]
    return tuple(m.cuda() for m in maps)


def random_fit(batch, heads, head_dim, fitted=True):
    """k_scale and k_shift of `ops.step_`, different for every row; or none."""
    if not fitted:
        return None, None
    g = torch.Generator().manual_seed(batch)
    scale, shift = (make(batch, heads, head_dim, generator=g).cuda() for make in (torch.rand, torch.randn))
    return 0.5 + scale / 2, shift


def check(call, limit=2e-3, backend=None):
    with use_backend("cuda"):
        out, lse = (backend or ops).decode(*call)
    expected, expected_lse = reference.decode(call[0].double(), *call[1:])
    stored = call[4].sum(1) > 0
    assert (out[~stored] == 0).all() and (lse[~stored] == -torch.inf).all()
    error = (out[stored].double() - expected[stored]).norm(dim=-1) / expected[stored].norm(dim=-1)
    assert error.max() < limit
    assert (lse[stored].double() - expected_lse[stored]).abs().max() < 5e-3


GROWING = ((4, 0, 0), (0, 0, 0), (3, 0, 0), (4, 517, 192), (4, 4096, 17), (4, 33, 150), (4, 64, 0), (4, 0, 7)) * 2
RAGGED = ((4, 0, 0), (0, 1, 1), (3, 517, 192), (4, 4096, 17), (0, 0, 0), (4, 33, 150), (0, 64, 0), (0, 0, 7))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (9, 3), (8, 2), (7, 1), (16, 2)])
def test_any_ratio_of_heads(heads, kv_heads):
    check(make_call(heads, kv_heads, rows=RAGGED))


@pytest.mark.parametrize(
    "head_dim, k_codec, v_codec",
    [
        (64, (32, 8), (32, 8)), (64, (16, 8), (32, 8)), (32, (16, 8), (16, 8)), (96, (48, 8), (48, 8)),
        (128, (32, 8), (32, 8)), (128, (16, 8), (64, 8)), (128, (64, 4), (64, 4)), (128, (64, 8), (32, 4)),
        (64, (64, 8), (32, 8)), (64, (16, 8), (64, 8)), (96, (96, 8), (96, 8)), (32, (32, 8), (32, 8)),
        (128, (128, 4), (128, 4)), (128, (128, 8), (32, 4)), (64, (64, 4), (64, 8)),
        (256, (64, 8), (128, 8)), (256, (32, 8), (32, 8)), (256, (128, 4), (128, 4)), (256, (64, 8), (64, 4)),
        (64, (8, 4), (8, 4)), (64, (8, 8), (64, 8)), (64, (64, 8), (8, 4)), (96, (24, 8), (96, 8)),
        (96, (12, 4), (12, 8)), (96, (24, 4), (12, 4)), (32, (8, 8), (4, 8)), (32, (4, 4), (8, 4)),
        (32, (4, 8), (32, 8)),
    ],
)  # fmt: skip
def test_codecs(head_dim, k_codec, v_codec):
    check(make_call(4, 2, head_dim, k_codec, v_codec, rows=RAGGED, seed=1))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1)])
@pytest.mark.parametrize("k_m, v_m", [(128, 64), (64, 128), (128, 128)])
def test_a_code_for_every_dimension(heads, kv_heads, k_m, v_m):
    check(make_call(heads, kv_heads, 128, (k_m, 8), (v_m, 8), rows=RAGGED, seed=11))
    check(make_call(heads, kv_heads, 128, (k_m, 8), (v_m, 8), rows=((4, 9000, 100),), seed=12))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (9, 3), (8, 2), (5, 1)])
@pytest.mark.parametrize("head_dim, k_m, v_m", [(64, 8, 8), (64, 8, 32), (64, 32, 8), (96, 12, 24), (96, 24, 12)])
def test_few_codes_a_head(heads, kv_heads, head_dim, k_m, v_m):
    """No multiple of 16: a row of the codebooks has fewer entries than lanes look up, or than the tile has places."""
    check(make_call(heads, kv_heads, head_dim, (k_m, 8), (v_m, 8), rows=RAGGED, seed=18))
    check(make_call(heads, kv_heads, head_dim, (k_m, 8), (v_m, 8), rows=((4, 9000, 100),), seed=19))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-3), (torch.bfloat16, 5e-3)])  # bfloat16 rounds the result
def test_element_types(dtype, limit):
    check(make_call(dtype=dtype, rows=RAGGED, seed=2), limit)
    check(make_call(9, 3, 64, (8, 8), (32, 8), dtype=dtype, rows=RAGGED, seed=2), limit)


@pytest.mark.parametrize("page_size", [16, 48, 64, 512])
def test_page_sizes(page_size):
    check(make_call(page_size=page_size, rows=((4, 3000, 100), (1, 501, 20)), seed=3))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 256, 257, 2048, 2049, 8191, 131072])
def test_lengths(length):
    """Of one row: at 256 tokens the first 8 blocks have a chunk each, at 2048 one for every pair of warps."""
    check(make_call(4, 1, rows=((0, length, 0),), seed=4))


@pytest.mark.parametrize("length", [0, 100, 1000, 5000])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 1, 128), (32, 32, 128), (4, 1, 256)])
def test_a_table_wider_than_the_row(length, heads, kv_heads, head_dim):
    """As static caches have it: a kernel asks for entries of it before it knows the length."""
    call = list(make_call(heads, kv_heads, head_dim, (64, 8), (64, 8), rows=((4, length, 130),), seed=20))
    call[3] = torch.nn.functional.pad(call[3], (0, 700), value=-1)
    check(tuple(call))


def test_many_rows():
    check(make_call(2, 2, rows=[(i % 5, i * 97 % 900, i * 31 % 193) for i in range(70)], seed=5))


def test_several_new_tokens():
    check(make_call(4, 2, steps=3, rows=((4, 300, 100), (1, 70, 20)), seed=6))


def test_maximum_that_rises_and_large_scores():
    check(make_call(rows=((4, 3000, 100),), seed=7, scale_q=8.0), 4e-3)  # sharp: fp16 centroids show


def test_strided_inputs():
    call = list(make_call(rows=((4, 300, 100),), seed=8))
    call[0] = call[0].transpose(1, 2).contiguous().transpose(1, 2)
    call[9] = torch.cat([call[9], call[9]], -1)[..., :128]
    check(tuple(call))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("batch", [1, 2])
def test_graph_replay_reads_new_lengths(batch, head_dim):
    call = make_call(head_dim=head_dim, rows=((4, 2000, 100), (4, 700, 0))[:batch], seed=9)
    with use_backend("cuda"):
        ops.decode(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = ops.decode(*call)
        call[4][:, 1] -= torch.tensor([900, 699], device="cuda", dtype=torch.int32)[:batch]
        call[4][:, 2] = 0
        expected, _ = reference.decode(call[0].double(), *call[1:])
        for _ in range(3):  # tickets are zero again
            out.fill_(float("nan"))
            graph.replay()
            assert (out.double() - expected).norm() / expected.norm() < 2e-3


def test_same_result_twice():
    call = make_call(rows=((4, 30000, 100),), seed=10)
    with use_backend("cuda"):
        first, second = ops.decode(*call)[0], ops.decode(*call)[0]
    assert (first - second).abs().max() < 1e-3


@pytest.mark.parametrize("m, nbits, d", [(64, 8, 128), (32, 8, 128), (32, 4, 64), (16, 8, 128), (64, 8, 64),
                                           (8, 8, 64), (12, 4, 96)])  # fmt: skip
@pytest.mark.parametrize("n", [5, 100, 5000])
def test_encode(m, nbits, d, n):
    g = torch.Generator(device="cuda").manual_seed(n)
    books = torch.randn(3, m, 2**nbits, d // m, generator=g, device="cuda")
    x = torch.randn(3, n, d, generator=g, device="cuda")
    with use_backend("cuda"):
        codes = ops.encode(x, books)
    expected = reference.encode(x, books)
    assert (codes != expected).float().mean() < 1e-4  # float32 rounds differently: ties in the last bit

    def distance(c):
        return (x - reference.dequantize(c, books)).square().unflatten(-1, (m, -1)).sum(-1)

    assert (distance(codes) <= distance(expected) * (1 + 1e-5) + 1e-6).all()


def test_a_centroid_finds_itself():
    books = torch.randn(2, 64, 256, 2, device="cuda")
    codes = torch.randint(0, 256, (2, 3000, 64), device="cuda", dtype=torch.uint8)
    with use_backend("cuda"):
        again = ops.encode(reference.dequantize(codes, books), books)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("m, nbits", [(32, 8), (32, 4), (64, 8), (8, 8), (8, 4)])
@pytest.mark.parametrize("first_slot, n", [(0, 192), (0, 40), (23, 100), (63, 1)])
def test_encode_pages_keeps_other_slots(m, nbits, first_slot, n):
    heads, d = 2, 64
    books = torch.randn(heads, m, 2**nbits, d // m, device="cuda")
    x = torch.randn(heads, n, d, device="cuda", dtype=torch.float16)
    ids = torch.tensor([5, 1, 3], device="cuda")
    pages = torch.randint(0, 256, (7, heads, 4, m, 2 * nbits), device="cuda", dtype=torch.uint8)
    expected = pages.clone()
    reference.encode_pages_(expected, x, books, ids, first_slot, nbits)
    with use_backend("cuda"):
        ops.encode_pages_(pages, x, books, ids, first_slot, nbits)
    a, b = (read_pages(p, torch.arange(7, device="cuda"), nbits) for p in (pages, expected))
    assert (a != b).float().mean() < 1e-4


def _books(kind: str, g: torch.Generator) -> torch.Tensor:
    """Centroids [2, 8, 256, 2] of different kinds; distances between them spread over many orders of magnitude."""
    books = torch.randn(2, 8, 256, 2, generator=g, device="cuda")
    return {
        "normal": books, "heavy tails": books**5, "far away": books + 300, "equal": books[:, :, :1].expand_as(books),
        "apart": books * torch.tensor([1e-4, 50.0], device="cuda"), "raster": (books * 4).round(),
        "on a line": books * torch.tensor([0.0, 1.0], device="cuda"), "twins": books[:, :, torch.arange(256) // 2],
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "far away", "equal", "apart", "raster", "on a line", "twins"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [2, 1])
def test_encode_of_many_tokens_is_exact(kind, dtype, dims):
    """Long prompts take lists or an order of centroids: none is lost, ties go to the lowest, outliers find theirs."""
    g = torch.Generator(device="cuda").manual_seed(0)
    books = _books(kind, g)[..., -dims:].contiguous()
    near = books.gather(2, torch.randint(0, 256, (2, 8, 9001, 1), generator=g, device="cuda").expand(-1, -1, -1, dims))
    noise = torch.randn(near.shape, generator=g, device="cuda") * books.std((1, 2, 3), keepdim=True)
    scale = torch.tensor([0, 1e-3, 0.1, 0.5, 1, 3, 100], device="cuda")
    scale = scale[torch.randint(0, 7, (9001, 1), generator=g, device="cuda")]
    x = (near + scale * noise).transpose(1, 2).flatten(2).to(dtype)
    ids = torch.randperm(150, generator=g, device="cuda")[:142]
    pages = torch.full((150, 2, 4, 8, 16), 255, device="cuda", dtype=torch.uint8)
    with use_backend("cuda"):
        codes = ops.encode(x, books)
        ops.encode_pages_(pages, x, books, ids, 37, 8)
    assert torch.equal(codes, reference.encode(x, books))
    written = read_pages(pages, ids, 8)
    assert torch.equal(written[:, 37 : 37 + 9001], codes)
    assert (written[:, :37] == 255).all() and (written[:, 37 + 9001 :] == 255).all()


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, k_codec, v_codec",
    [
        (1, 1, 128, (64, 8), (64, 8)), (8, 2, 128, (64, 8), (64, 8)), (7, 1, 128, (32, 8), (64, 8)),
        (9, 3, 64, (32, 8), (32, 4)), (2, 2, 96, (48, 8), (48, 8)), (6, 2, 32, (16, 8), (16, 8)),
        (8, 2, 128, (128, 8), (64, 8)), (9, 3, 64, (32, 8), (64, 8)),
        (4, 1, 256, (128, 8), (128, 8)), (4, 2, 256, (64, 8), (32, 8)),
        (9, 3, 64, (8, 8), (32, 8)), (2, 2, 96, (24, 8), (12, 8)), (6, 2, 32, (8, 8), (4, 8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 2e-3)])
@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
def test_a_step_with_maps(heads, kv_heads, head_dim, k_codec, v_codec, dtype, limit, rows, fitted):
    """Raw keys, values and queries in, results in the head space out; what is stored is in code space."""
    rows = ((4, 3000, 130),) if rows == "one" else GROWING
    call = make_call(heads, kv_heads, head_dim, k_codec, v_codec, dtype=dtype, rows=rows, slots=256)
    q, k_pages, v_pages, table, before, k_books, v_books, *exact, k_nbits, v_nbits, scale = call
    maps = random_maps(kv_heads, head_dim, eight=dtype != torch.bfloat16)
    fit = k_scale, _ = random_fit(len(rows), kv_heads, head_dim, fitted)
    k, v = torch.randn(2, len(rows), kv_heads, 1, head_dim, device="cuda").to(dtype)
    brings = [row % 5 != 4 for row in range(len(rows))]  # the others are pads
    more = [((s < 4) * new, 0, (s == 4) * new) for (s, _, _), new in zip(rows, brings, strict=True)]
    after = before + torch.tensor(more, device="cuda").int()
    arguments = (*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale)
    with use_backend("cuda"):
        out, _ = ops.step_(*arguments, *maps, *fit)
    asked = reference.apply_map(q.double(), maps[1].mT, 1 / k_scale if fitted else None).to(dtype).double()
    wanted = reference.decode(asked, k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, scale)
    wanted = reference.apply_map(wanted[0], maps[3])
    stored = after.sum(1) > 0
    assert (out[~stored] == 0).all()
    error = (out[stored].double() - wanted[stored]).norm(dim=-1) / wanted[stored].norm(dim=-1)
    assert error.max() < limit
    of_sides = ((k, maps[0], fit, *exact[::2]), (v, maps[2], (None, None), *exact[1::2]))
    for x, matrix, by, sink, window in of_sides:
        mapped = reference.apply_map(x.double(), matrix, *by)
        for row in (row for row, new in enumerate(brings) if new):
            token = sum(rows[row])
            at = sink[row, :, token] if token < 4 else window[row, :, (token - 4) % 256]
            torch.testing.assert_close(at.double(), mapped[row, :, 0], rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 4e-4), (torch.bfloat16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("batch, heads", [(1, 2), (2, 2), (2, 6)])
def test_maps_of_prompts(batch, heads, dtype, limit):
    """On the tensor cores: large values do not overflow on the way, layouts as models leave them."""
    x = 3000 * torch.randn(batch, 500, heads, 64, device="cuda").to(dtype).transpose(1, 2)
    for matrix in random_maps(2, 64)[:2]:
        got, want = reference.apply_map(x, matrix), reference.apply_map(x.double(), matrix)
        assert got.dtype == dtype and got.shape == x.shape
        assert ((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max() < limit


@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
def test_maps_that_only_float32_holds(fitted):
    call = make_call(rows=((4, 300, 100),), slots=256)
    q, k_pages, v_pages, table, before, k_books, v_books, *exact, k_nbits, v_nbits, scale = call
    maps = [m.float() / (127 if m.dtype == torch.int8 else 1) for m in random_maps(2, 128)]
    k, v = torch.randn(2, 1, 2, 1, 128, device="cuda").half()
    after = before + before.new_tensor([0, 0, 1])
    arguments = (*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale)
    outs = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            outs.append(ops.step_(*arguments, *maps, *random_fit(1, 2, 128, fitted))[0])
    torch.testing.assert_close(*outs, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("mapped", ["", "maps", "fitted"], ids=["plain", "maps", "fitted"])
@pytest.mark.parametrize("v_codec", [(32, 8), (16, 8), (64, 8), (8, 8), (8, 4)])
def test_steps_in_a_graph(v_codec, mapped):
    """Steps of a ragged batch through one graph: sinks fill, the ring turns, pages are flushed, as in the reference."""
    batch, heads, d, sinks, residual, page_size = 3, 2, 64, 2, 20, 16
    slots, codecs = residual + page_size, ((32, 8), v_codec)
    books = [torch.randn(heads, m, 2**nbits, d // m, device="cuda") for m, nbits in codecs]
    table = torch.randperm(12, device="cuda").view(batch, 4).int()
    buffers = [torch.zeros(batch, heads, n, d, device="cuda").half() for n in (sinks, sinks, slots, slots)]
    buffers += [torch.zeros(12, heads, 1, m, 2 * nbits, device="cuda", dtype=torch.uint8) for m, nbits in codecs]
    expected = [b.clone() for b in buffers]
    k, v = torch.randn(2, batch, heads, 1, d, device="cuda").half()
    before, after = torch.zeros(2, batch, 3, dtype=torch.int32, device="cuda")
    q, new_q, new_k, new_v = (torch.randn(batch, n, 1, d, device="cuda").half() for n in (4, 4, heads, heads))
    new_before, new_after = torch.zeros_like(before), torch.zeros_like(after)
    call = (*buffers, k, v, table, before, after, *books, codecs[0][1], codecs[1][1], q, d**-0.5)
    fit = random_fit(batch, heads, d, mapped == "fitted")
    maps = (*(random_maps(heads, d) if mapped else (None,) * 4), *fit)

    def step():
        for old, new in ((before, new_before), (after, new_after), (k, new_k), (v, new_v), (q, new_q)):
            torch.add(new, 0, out=old)  # by kernels right ahead of the step's
        return ops.step_(*call, *maps)[0]

    with use_backend("cuda"):
        step()  # nothing is stored: no row changes
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
            copied = torch.empty_like(q).copy_(q)  # copies are no kernels
            after_copy = ops.step_(*call[:15], copied, call[16], *maps)[0]
    rows = [[0, 0, 0] for _ in range(batch)]
    for step in range(70):
        if step == 20 and fit[0] is not None:  # a graph reads it where it lies
            fit[0].mul_(0.9)
            fit[1].neg_()
        new = []
        for row, (s, c, w) in enumerate(rows):
            if step % (row + 1):
                new.append([s, c, w])
                continue
            s, w = (s + 1, w) if s + c + w < sinks else (s, w + 1)
            new.append([s, c + page_size, w - page_size] if w == slots else [s, c, w])
        new_before.copy_(torch.tensor(rows))
        new_after.copy_(torch.tensor(new))
        for x in (new_k, new_v, new_q):
            x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        wanted, (asked, *_), home = in_code_space((*expected, *call[6:15], new_q, d**-0.5, *maps, None, 0))
        reference.append_(*wanted)
        rows = new
        args = (asked, *expected[4:], table, after, *books, *expected[:4], codecs[0][1], codecs[1][1], d**-0.5)
        want = reference.decode(args[0].double(), *args[1:])[0]
        want = want if home is None else reference.apply_map(want, home)
        limit = 1e-2 if mapped else 3e-3  # a bit of a stored vector may round another way, and with it a code
        assert (out.double() - want).norm() <= limit * want.norm()
        assert (after_copy.double() - want).norm() <= limit * want.norm()
    assert max(c for _, c, _ in rows) >= 2 * page_size
    for ours, theirs in zip(buffers, expected, strict=True):
        same = (ours == theirs).float().mean()
        if mapped and ours.dtype == torch.float16:
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        else:
            assert same == 1 if ours.dtype == torch.float16 else same > (0.998 if mapped else 0.9999)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(
        tool,
        "import torch, tests.test_cuda as t\n"
        "t.kernels.start()\n"
        "t.check(t.make_call(8, 2, rows=((4, 700, 100), (0, 33, 0)), seed=1))\n"
        "t.check(t.make_call(2, 2, rows=((4, 2600, 100),), seed=1))\n"
        "t.check(t.make_call(8, 2, k_codec=(128, 8), v_codec=(128, 8), rows=((4, 700, 100), (0, 33, 0)), seed=1))\n"
        "t.check(t.make_call(9, 3, 64, (8, 8), (32, 8), rows=((4, 700, 100), (0, 33, 0)), seed=1))\n"
        "t.check(t.make_call(2, 2, 96, (12, 4), (24, 8), rows=((4, 700, 100),), seed=1))\n"
        "t.test_encode_pages_keeps_other_slots(32, 8, 23, 100)\n"
        "t.test_encode_pages_keeps_other_slots(8, 8, 23, 100)\n"
        "for rows in ('one', 'many'):\n"
        "    t.test_a_step_with_maps(8, 2, 128, (64, 8), (64, 8), torch.float16, 2e-3, rows, True)\n",
    )


def sanitize(tool, program):
    """Runs a Python program under a tool of compute-sanitizer, which looks at our kernels only."""
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=pq_", "--error-exitcode", "9",
         sys.executable, "-c", program],
        capture_output=True, text=True, check=False,
        env=os.environ | ({"PQLAB_NVCC_FLAGS": "-DPQ_RACECHECK"} if tool == "racecheck" else {}),
    )  # fmt: skip
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
