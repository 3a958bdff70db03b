"""Every fused operation against plain torch, on every backend of this machine; the choice of a backend."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pqlab import errors, kernels
from pqlab.kernels import checks, dispatch, ops, reference
from pqlab.kernels.cpu import CpuBackend
from pqlab.paging.layout import PageLayout, pack_codes, read_pages

kernels.start()


@pytest.fixture(scope="module")
def cpu() -> str:
    """The C++ backend, or a skip that says why it is not there."""
    kernels.wait()
    status = dispatch.backends()["cpu"].status()
    if status.state != "ready":
        pytest.skip(f"no C++ kernels here: {status.detail}")
    return "cpu"


@pytest.fixture(scope="module")
def libraries(cpu) -> dict[str, CpuBackend]:
    """The library of this machine, and the one of machines with AVX2 and no more."""
    found = {"native": dispatch.backends()["cpu"], "AVX2": CpuBackend("x86-64-v3")}
    if found["native"].isa.startswith("avx512"):
        found["AVX2"].extension.start("eager")
    return found


@pytest.fixture(params=["native", "AVX2"])
def library(request, libraries) -> CpuBackend:
    backend = libraries[request.param]
    if request.param == "AVX2" and not libraries["native"].isa.startswith("avx512"):
        pytest.skip(f"the library of this machine is tested: {libraries['native'].isa}")
    assert backend.status().state == "ready", backend.status().error
    return backend


def random_pages(g: torch.Generator, max_pages: int, heads: int, page_size: int, m: int, nbits: int) -> torch.Tensor:
    shape = (max_pages, *PageLayout(page_size, heads, m, nbits).shape)
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def decode_case(
    batch=2, heads=2, group=1, steps=1, head_dim=32, k_m=16, v_m=16, k_nbits=8, v_nbits=8, page_size=32,
    coded=(70, 33), sinks=(4, 2), window=(40, 17), num_sinks=4, slots=48, dtype=torch.float32, seed=0,
):  # fmt: skip
    """Arguments of `decode` with shuffled pages; slots that hold no token are NaN, so that reading one shows."""
    g = torch.Generator().manual_seed(seed)
    width = max(1, -(-max(coded) // page_size)) + 1
    max_pages = batch * width + 3
    ids = torch.randperm(max_pages, generator=g)[: batch * width].view(batch, width).to(torch.int32)
    used = torch.tensor([-(-n // page_size) for n in coded])
    page_table = torch.where(torch.arange(width) < used[:, None], ids, -1).to(torch.int32)
    lengths = torch.tensor([sinks, coded, window], dtype=torch.int32).T.contiguous()

    def exact(count, valid):
        x = torch.randn(batch, heads, count, head_dim, generator=g)
        return torch.where(valid[:, None, :, None], x, torch.nan).to(dtype)

    is_sink = torch.arange(num_sinks) < lengths[:, :1]
    is_window = (torch.arange(slots) - lengths[:, 1:2]) % max(slots, 1) < lengths[:, 2:]
    books = [
        torch.randn(heads, m, 2**nbits, head_dim // m, generator=g) for m, nbits in ((k_m, k_nbits), (v_m, v_nbits))
    ]
    return (
        torch.randn(batch, heads * group, steps, head_dim, generator=g).to(dtype),
        random_pages(g, max_pages, heads, page_size, k_m, k_nbits),
        random_pages(g, max_pages, heads, page_size, v_m, v_nbits),
        page_table, lengths, *books,
        exact(num_sinks, is_sink), exact(num_sinks, is_sink), exact(slots, is_window), exact(slots, is_window),
        k_nbits, v_nbits, head_dim**-0.5,
    )  # fmt: skip


def plain_attention(case, row: int):
    """float64 attention of one row over its tokens in order: independent of masks, merging and chunks."""
    q, k_pages, v_pages, table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v, *rest = case
    k_nbits, v_nbits, scale = rest
    sinks, coded, window = lengths[row].tolist()
    sides = []
    for pages, books, sink, ring, nbits in (
        (k_pages, k_books, sink_k, window_k, k_nbits),
        (v_pages, v_books, sink_v, window_v, v_nbits),
    ):
        page_size = pages.shape[2] * 16
        ids = table[row, : -(-coded // page_size)]
        codes = read_pages(pages, ids, nbits)[:, :coded]
        slots = [(coded + i) % ring.shape[2] for i in range(window)]
        parts = [
            sink[row, :, :sinks].double(),
            reference.dequantize(codes, books).double(),
            ring[row, :, slots].double(),
        ]
        sides.append(torch.cat(parts, 1).repeat_interleave(q.shape[1] // books.shape[0], 0))
    k, v = sides
    scores = q[row].double() @ k.mT * scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


CASES = {
    "plain": {},
    "group of 3": {"heads": 3, "group": 3, "head_dim": 64, "k_m": 32, "v_m": 32},
    "group of 2": {"group": 2},
    "group of 4": {"group": 4, "head_dim": 128, "k_m": 64, "v_m": 64, "heads": 1},
    "group of 5": {"group": 5},
    "group of 8, 3 queries": {"group": 8, "steps": 3},
    "many queries": {"group": 1, "steps": 23},
    "d_m 1": {"k_m": 32, "v_m": 32, "group": 3},
    "d_m 4": {"k_m": 8, "v_m": 8, "group": 2},
    "d_m 8": {"k_m": 4, "v_m": 4, "group": 4},
    "d_m 16": {"k_m": 2, "v_m": 2, "group": 3},
    "d_m 32": {"k_m": 1, "v_m": 1, "group": 7},
    "d_m 3 and 6": {"head_dim": 96, "k_m": 32, "v_m": 16, "group": 2},
    "d_m 12 and 24": {"head_dim": 96, "k_m": 8, "v_m": 4},
    "d 256": {"head_dim": 256, "k_m": 128, "v_m": 64, "heads": 1, "group": 4},
    "d 20": {"head_dim": 20, "k_m": 10, "v_m": 5, "group": 3},
    "d 20, many queries": {"head_dim": 20, "k_m": 10, "v_m": 5, "steps": 9},
    "different sides": {"k_m": 16, "v_m": 8, "k_nbits": 8, "v_nbits": 4},
    **{f"nbits {n}": {"k_nbits": n, "v_nbits": n, "group": n % 4 + 1} for n in range(1, 8)},
    "nbits 5, many queries": {"k_nbits": 5, "v_nbits": 3, "steps": 8},
    "long": {"batch": 1, "coded": (2100,), "sinks": (4,), "window": (40,), "page_size": 64},
    "long, many queries": {"batch": 1, "coded": (1100,), "sinks": (0,), "window": (5,), "page_size": 16, "steps": 7},
    "whole pages": {"coded": (64, 32)},
    "empty rows": {"batch": 4, "coded": (0, 0, 0, 50), "sinks": (0, 3, 0, 0), "window": (0, 0, 9, 0)},
    "only empty": {"batch": 2, "coded": (0, 0), "sinks": (0, 0), "window": (0, 0)},
    "no sinks, no window": {"num_sinks": 0, "slots": 0, "sinks": (0, 0), "window": (0, 0)},
    "ring wraps": {"coded": (47, 95), "window": (48, 30)},
    "long window": {"slots": 300, "window": (300, 211)},
    "one row, one head": {"batch": 1, "heads": 1, "coded": (500,), "sinks": (1,), "window": (3,)},
}


@pytest.mark.parametrize("name", CASES)
def test_reference_decode_is_plain_attention(name):
    case = decode_case(**CASES[name])
    out, lse = reference.decode(*case)
    for row, lengths in enumerate(case[4].tolist()):
        if sum(lengths):
            want, want_lse = plain_attention(case, row)
            torch.testing.assert_close(out[row].double(), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[row].double(), want_lse, atol=1e-5, rtol=1e-5)
        else:
            assert (out[row] == 0).all()
            assert (lse[row] == float("-inf")).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_cpu_decode_equals_the_reference(library, name, threads):
    case = decode_case(**CASES[name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = library.decode(*case)
    finally:
        torch.set_num_threads(before)
    want, want_lse = reference.decode(*case)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 9])
def test_cpu_decode_of_half_precision(cpu, dtype, steps):
    case = decode_case(dtype=dtype, group=3, steps=steps)
    with kernels.use_backend("cpu"):
        out, lse = ops.decode(*case)
    want, want_lse = reference.decode(*case)
    assert out.dtype == dtype
    torch.testing.assert_close(out, want)  # the same sums, rounded once
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


def test_large_scores_do_not_overflow(cpu):
    case = list(decode_case(group=3))
    case[0] = case[0] * 300  # scores in the thousands
    with kernels.use_backend("cpu"):
        out, lse = ops.decode(*case)
    want, want_lse = reference.decode(*case)
    torch.testing.assert_close(out, want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-5)


def test_many_tokens_of_small_weight_count(library):
    """One token outweighs each of 2,000 others by e^14, so that they hold 1.7e-3 of the weight in sum."""
    case = list(
        decode_case(batch=1, heads=1, coded=(2000,), sinks=(0,), window=(0,), num_sinks=0, slots=0, page_size=64)
    )
    for place, of_others, of_one in ((5, 0.0, 14.0), (6, 1.0, 0.0)):
        case[place] = torch.full_like(case[place], of_others)
        case[place][:, :, 7] = of_one
    case[0] = torch.full_like(case[0], 32**0.5 / 32)  # a key of 14 everywhere scores 14
    for pages in case[1:3]:
        pages %= 7
        pages[case[3][0, 3], 0, 1, :, 5] = 7
    out, lse = library.decode(*case)
    want, want_lse = reference.decode(*case)
    assert 1e-3 < want.mean() < 2e-3
    torch.testing.assert_close(out, want, atol=3e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=3e-5, rtol=0)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_centroid_far_out_costs_the_others_no_precision(library, group):
    case = decode_case(group=group, coded=(3, 1), sinks=(0, 0), window=(0, 0))
    for books in case[5:7]:
        books[:, ::2, 9] = 100.0
    out, _ = library.decode(*case)
    want, _ = reference.decode(*case)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_codebooks_may_change_and_tensors_may_move(library):
    """What decode keeps of tensors between calls goes by their memory and versions, and goes when they go."""
    kept = len(library._held)
    case = list(decode_case(group=3))
    for change in (lambda: None, lambda: case[5].mul_(2), lambda: case[6].add_(1)):
        change()
        torch.testing.assert_close(library.decode(*case)[0], reference.decode(*case)[0], atol=1e-4, rtol=1e-4)
    assert len(library._held) == kept + 1
    case[9].data = torch.randn(case[9].shape)  # other memory, the same object
    case[6].data = torch.randn(case[6].shape)
    torch.testing.assert_close(library.decode(*case)[0], reference.decode(*case)[0], atol=1e-4, rtol=1e-4)
    del case[6]
    assert len(library._held) == kept
    with torch.inference_mode():
        case = decode_case()
        torch.testing.assert_close(library.decode(*case)[0], reference.decode(*case)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 9])
def test_nan_is_not_hidden(library, steps):
    case = list(decode_case(group=3, steps=steps))
    case[0] = torch.full_like(case[0], torch.nan)
    assert library.decode(*case)[0].isnan().all()


def test_strided_inputs(cpu):
    case = list(decode_case(steps=3, group=2))
    want, _ = reference.decode(*case)
    case[0] = case[0].transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves it
    case[9] = case[9].transpose(1, 2).contiguous().transpose(1, 2)
    with kernels.use_backend("cpu"):
        torch.testing.assert_close(ops.decode(*case)[0], want, atol=1e-4, rtol=1e-4)


def test_identity_codec_is_exact():
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 32, 16).unbind(0)  # [H, n, d] each
    pages = [torch.zeros(2, 2, 1, 16, 64, dtype=torch.uint8) for _ in "kv"]
    books = torch.empty(2, 16, 0, 1)
    for side, x in zip(pages, (k, v), strict=True):
        ops.encode_pages_(side, x, books, torch.tensor([1, 0]), 0, 32)
    q, none = torch.randn(1, 4, 1, 16), torch.empty(1, 2, 0, 16)
    lengths, table = torch.tensor([[0, 32, 0]], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    out, _ = ops.decode(q, *pages, table, lengths, books, books, none, none, none, none, 32, 32, 0.25)
    want, _ = reference.attend_dense(q, k[None], v[None], None, 0.25)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)


# -- attention parts -------------------------------------------------------------------------------------------------


def test_merge_is_attention_over_both_parts():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    whole = reference.attend_dense(q, k, v, None, 0.3)
    a = reference.attend_dense(q, k[:, :, :7], v[:, :, :7], None, 0.3)
    b = reference.attend_dense(q, k[:, :, 7:], v[:, :, 7:], None, 0.3)
    for got, want in zip(reference.merge(*a, *b), whole, strict=True):
        torch.testing.assert_close(got, want)
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], float("-inf"))
    assert torch.equal(reference.merge(*a, *nothing)[0], a[0])
    out, lse = reference.merge(*nothing, *nothing)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_attend_dense_masks_per_query():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    out, _ = reference.attend_dense(q, k, v, causal[None], 0.2)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=0.2
    )
    torch.testing.assert_close(out, want)


# -- encode ----------------------------------------------------------------------------------------------------------

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu")
    with kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dm", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("nbits", "n"), [(8, 33), (8, 1), (5, 70), (1, 16), (4, 0)])
def test_encode_finds_the_nearest_centroid(backend, dm, nbits, n):
    g = torch.Generator().manual_seed(dm * 100 + nbits)
    books = torch.randn(3, 4, 2**nbits, dm, generator=g)
    x = torch.randn(3, n, 4 * dm, generator=g)
    codes = ops.encode(x, books)
    assert codes.shape == (3, n, 4)
    assert codes.dtype == torch.uint8
    distance = torch.cdist(x.double().view(3, n, 4, dm).transpose(1, 2), books.double())  # [3, 4, n, C]
    chosen = distance.gather(-1, codes.transpose(1, 2).long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dm", [1, 2, 4, 8])
def test_encode_is_exact_on_centroids_and_breaks_ties_downwards(backend, dm):
    g = torch.Generator().manual_seed(0)
    books = torch.randn(2, 8, 256, dm, generator=g)
    books[:, :, 200:] = books[:, :, 100:156]  # every one of these exists twice
    codes = torch.randint(0, 256, (2, 500, 8), generator=g, dtype=torch.uint8)
    want = torch.where(codes >= 200, codes - 100, codes)
    assert torch.equal(ops.encode(reference.dequantize(codes, books), books), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_of_half_precision(backend, dtype):
    g = torch.Generator().manual_seed(1)
    x, books = torch.randn(2, 40, 16, generator=g).to(dtype), torch.randn(2, 8, 64, 2, generator=g)
    assert torch.equal(ops.encode(x, books), ops.encode(x.float(), books))


@pytest.mark.parametrize(
    "name", ["group of 3", "d_m 3 and 6", "nbits 4", "many queries", "d 256", "long", "only empty"]
)
def test_centroids_of_half_precision_are_taken_as_they_are(cpu, name):
    """The same bits as with those centroids in float32, of one side or of both."""
    case = decode_case(**CASES[name])
    books = [book.half() for book in case[5:7]]
    for mixed in (books, [books[0], books[1].float()], [books[0].float(), books[1]]):
        for found in (ops.decode(*case[:5], *mixed, *case[7:]), reference.decode(*case[:5], *mixed, *case[7:])):
            for got, want in zip(found, ops.decode(*case[:5], *(b.float() for b in books), *case[7:]), strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)
    x = torch.randn(books[0].shape[0], 70, case[0].shape[-1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.encode(x, books[0]), ops.encode(x, books[0].float()))
    assert torch.equal(ops.encode(x, books[0]), reference.encode(x, books[0]))


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("first_slot", "n"), [(0, 64), (0, 16), (5, 3), (13, 41), (16, 1), (31, 33)])
def test_encode_pages_writes_its_slots_only(backend, nbits, first_slot, n):
    g = torch.Generator().manual_seed(nbits)
    pages = random_pages(g, 5, 2, 32, 6, nbits)
    books = torch.randn(2, 6, 2**nbits, 2, generator=g)
    codes = torch.randint(0, 2**nbits, (2, n, 6), generator=g, dtype=torch.uint8)
    ids = torch.tensor([3, 1])
    before, want = pages.clone(), read_pages(pages, ids, nbits).clone()
    want[:, first_slot : first_slot + n] = codes
    ops.encode_pages_(pages, reference.dequantize(codes, books), books, ids, first_slot, nbits)
    assert torch.equal(read_pages(pages, ids, nbits), want)
    assert torch.equal(pages[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(pack_codes(pages.new_zeros(16), nbits), pages.new_zeros(2 * nbits))  # no stray bits in a tile


def test_steps_store_and_flush_like_the_reference(cpu):
    """With append_ and decode, or both as one."""
    g = torch.Generator().manual_seed(0)
    heads, head_dim, slots, page_size = 2, 8, 24, 16
    results, steps = [], []
    for name in BACKENDS:
        g.manual_seed(0)
        outs = []
        books = [torch.randn(heads, 4, 256, 2, generator=g) for _ in "kv"]
        pages = [torch.zeros(6, heads, 1, 4, 16, dtype=torch.uint8) for _ in "kv"]
        maps = [torch.randn(heads, head_dim, head_dim, generator=g) for _ in range(4)]
        maps = [(40 * maps[0]).round().clamp(-127, 127).to(torch.int8), maps[1].half(), maps[2], maps[3]]
        scale, shift = fit_of_keys(3, heads, head_dim)
        exact = [torch.zeros(3, heads, n, head_dim) for n in (2, 2, slots, slots)]
        table = torch.tensor([[4, 1], [0, -1], [3, 2]], dtype=torch.int32)
        lengths = torch.zeros(3, 3, dtype=torch.int32)
        with kernels.use_backend(name):
            for step in range(45):
                k, v = torch.randn(2, 3, heads, 1, head_dim, generator=g).unbind(0)
                after = lengths.clone()
                for row in range(3):
                    if row == 1 and step % 3:
                        continue  # this row brings no token
                    after[row, 0 if after[row, 0] < 2 else 2] += 1
                    if after[row, 2] == slots:
                        after[row, 1:] += torch.tensor([page_size, -page_size], dtype=torch.int32)
                q = torch.randn(3, 2 * heads, 1, head_dim, generator=g)
                if step % 2:
                    k, v = reference.apply_map(k, maps[0], scale, shift), reference.apply_map(v, maps[2])
                    ops.append_(*exact, *pages, k, v, table, lengths, after, *books, 8, 8)
                    asked = reference.apply_map(q, maps[1].mT, 1 / scale)
                    out = ops.decode(asked, *pages, table, after, *books, *exact, 8, 8, 0.3)[0]
                    outs.append(reference.apply_map(out, maps[3]))
                else:
                    call = (*exact, *pages, k, v, table, lengths, after, *books, 8, 8, q, 0.3)
                    outs.append(ops.step_(*call, *maps, scale, shift)[0])
                lengths = after
        results.append((*pages, *exact))
        steps.append(torch.stack(outs))
    assert lengths.tolist()[0][1] == 2 * page_size
    for got, want in zip(*results, strict=True):  # codes alike, exact tokens as far as a sum's order lets them
        torch.testing.assert_close(got, want, atol=0 if got.dtype == torch.uint8 else 1e-5, rtol=1e-6)
    torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 1), (20, 6), (16, 9)])
@pytest.mark.parametrize("sides", ["kv", "k", "v", "kv fitted", "k fitted"])
def test_maps_of_a_step(library, dtype, head_dim, group, sides):
    """Against float64: what is stored and what comes out, with maps of every dtype that they may have."""
    g = torch.Generator().manual_seed(head_dim + group)
    heads, m = 2, head_dim // 4
    q, *rest = decode_case(heads=heads, group=group, head_dim=head_dim, k_m=m, v_m=m, coded=(50, 0), sinks=(2, 1),
                           window=(9, 0), dtype=dtype)  # fmt: skip
    k_pages, v_pages, table, after, k_books, v_books, sink_k, sink_v, window_k, window_v, *_ = rest
    before = after - torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.int32)
    k, v = (torch.randn(2, heads, 1, head_dim, generator=g).to(dtype) for _ in "kv")
    forward = (25 * torch.randn(heads, head_dim, head_dim, generator=g)).round().clamp(-127, 127).to(torch.int8)
    backward = torch.randn(heads, head_dim, head_dim, generator=g) / head_dim**0.5
    maps = {"k": (forward, backward.half()), "v": (forward.float() / 127, backward)}
    given = [x for side in "kv" for x in (maps[side] if side in sides.split()[0] else (None, None))]
    given += fit_of_keys(2, heads, head_dim) if "fitted" in sides else (None, None)

    def step(backend, kind: torch.dtype) -> list[torch.Tensor]:
        exact = [x.to(kind, copy=True) for x in (sink_k, sink_v, window_k, window_v)]
        out, lse = backend.step_(*exact, k_pages, v_pages, k.to(kind), v.to(kind), table, before, after, k_books,
                                 v_books, 8, 8, q.to(kind), 0.2, *given, None, 0)  # fmt: skip
        return [out, lse, *exact]

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for got, want in zip(step(library, dtype), step(dispatch.backends()["reference"], torch.float64), strict=True):
        got, want = got.double().nan_to_num(0), want.double().nan_to_num(0)  # slots without a token
        torch.testing.assert_close(got, want, atol=tolerance * want.abs().max().item(), rtol=0)


def fit_of_keys(batch: int, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`k_scale` and `k_shift` of `ops.step_`, different for every row."""
    g = torch.Generator().manual_seed(7)
    scale, shift = torch.rand(batch, heads, head_dim, generator=g), torch.randn(batch, heads, head_dim, generator=g)
    return 0.5 + scale / 2, shift


def test_fitted_keys_by_their_formula(backend):
    """In float64, written out: what a row stores of its key, and attention with what it asks."""
    group, d = 3, 32
    q, *case = decode_case(group=group, sinks=(4, 4), window=(9, 1), coded=(40, 16))
    k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, factor = case
    heads = k_books.shape[0]
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2, heads, 1, d, generator=g)
    forward = torch.linalg.qr(torch.randn(heads, d, d, generator=g)).Q
    scale, shift = fit_of_keys(2, heads, d)
    before = after - torch.tensor([0, 0, 1], dtype=torch.int32)
    step = (*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, factor)
    maps = (forward, forward.mT.contiguous(), None, None)
    out, lse = ops.step_(*step, *maps, scale, shift)
    for row in range(2):
        token = (int(after[row, 1]) + int(after[row, 2]) - 1) % exact[2].shape[2]
        for h in range(heads):
            stored = (k[row, h, 0].double() @ forward[h].double()) * scale[row, h] + shift[row, h]
            torch.testing.assert_close(exact[2][row, h, token].double(), stored, atol=1e-5, rtol=1e-5)
    asked = torch.stack([q[:, h].double() @ forward[h // group].double() for h in range(heads * group)], 1)
    asked /= scale.repeat_interleave(group, 1)[:, :, None]
    for row in range(2):
        want, want_lse = plain_attention((asked, *case), row)
        torch.testing.assert_close(out[row].double(), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse[row].double(), want_lse, atol=1e-4, rtol=1e-4)


# -- dispatch --------------------------------------------------------------------------------------------------------


def test_opcheck(backend):
    case = decode_case(batch=1, coded=(20,), sinks=(2,), window=(5,))
    torch.library.opcheck(torch.ops.pqlab.decode.default, case)
    x, books = torch.randn(2, 5, 8), torch.randn(2, 4, 16, 2)
    torch.library.opcheck(torch.ops.pqlab.encode.default, (x, books))
    pages = torch.zeros(3, 2, 1, 4, 8, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pqlab.encode_pages_.default, (pages, x, books, torch.tensor([1]), 3, 4))
    lengths = torch.tensor([[0, 0, 3]], dtype=torch.int32)
    exact = [torch.zeros(1, 2, n, 8) for n in (0, 0, 20, 20)]
    token, table = torch.ones(1, 2, 1, 8), torch.tensor([[1]], dtype=torch.int32)
    args = (*exact, pages, pages.clone(), token, token.clone(), table, lengths, lengths + lengths.new_tensor([0, 0, 1]))
    args = (*args, books, books.clone(), 4, 4)
    torch.library.opcheck(torch.ops.pqlab.append_.default, args)
    torch.library.opcheck(torch.ops.pqlab.step_.default, (*args, torch.randn(1, 4, 1, 8), 0.3))
    maps = (torch.ones(2, 8, 8, dtype=torch.int8), *torch.randn(3, 2, 8, 8).half())
    torch.library.opcheck(torch.ops.pqlab.step_.default, (*args, torch.randn(1, 4, 1, 8), 0.3, *maps))
    fitted = (*maps, *fit_of_keys(1, 2, 8))
    torch.library.opcheck(torch.ops.pqlab.step_.default, (*args, torch.randn(1, 4, 1, 8), 0.3, *fitted))
    torch.library.opcheck(torch.ops.pqlab.step_.default, (*args, torch.randn(1, 4, 1, 8), 0.3, None, None, *maps[2:]))


def test_calls_like_earlier_ones_are_not_checked_and_others_are(cpu, monkeypatch):
    checked, check = [], checks.decode
    monkeypatch.setattr(checks, "decode", lambda *args: checked.append(args) or check(*args))
    case = list(decode_case(group=3))

    def run(same: bool, **changes) -> None:
        """One more call, with arguments replaced by their place: not checked when it is the `same` as before."""
        call = [changes.get(f"_{i}", x) for i, x in enumerate(case)]
        before, runs = len(checked), sum(dispatch.runs().values())
        out, lse = ops.decode(*call)
        assert (len(checked) == before) is same and sum(dispatch.runs().values()) == runs + 1
        for got, want in zip((out, lse), reference.decode(*call), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    with kernels.use_backend("cpu"):
        run(False)
        run(True)
        run(True, _0=torch.randn_like(case[0]), _3=case[3].clone(), _4=case[4].clone())
        run(False, _0=case[0][:, :4].contiguous())  # fewer query heads
        run(True, _0=case[0][:, :4].contiguous())
        run(False)
        run(False, _0=torch.cat([case[0], case[0]], -1)[..., ::2])  # with strides
        for change in (lambda: case[5].mul_(2), lambda: setattr(case[10], "data", torch.randn_like(case[10]))):
            change()
            run(False)
            run(True)
        for place, wrong in ((0, case[0].half()), (4, case[4].long()), (3, case[3][:1]), (4, case[4][:, :2])):
            with pytest.raises(ValueError, match=r"pqlab\.decode"):
                run(False, **{f"_{place}": wrong})
        with pytest.raises(ValueError, match="lengths exceed"):
            run(False, _4=case[4] + 1000)
    with kernels.use_backend("reference"):
        run(False)


def test_maps_that_do_not_fit_are_named():
    exact = [torch.zeros(1, 2, n, 8) for n in (0, 0, 20, 20)]
    pages, books = [torch.zeros(3, 2, 1, 4, 8, dtype=torch.uint8)] * 2, [torch.randn(2, 4, 16, 2)] * 2
    token, table = torch.ones(1, 2, 1, 8), torch.tensor([[1]], dtype=torch.int32)
    lengths = torch.tensor([[0, 0, 3]], dtype=torch.int32)
    args = (*exact, *pages, token, token, table, lengths, lengths, *books, 4, 4, torch.randn(1, 4, 1, 8), 0.3)
    good, fit = torch.randn(2, 8, 8), torch.ones(1, 2, 8)
    of_keys = (good, good, None, None)
    for maps, cause in (
        ((good, None, None, None), "both directions"), ((None, None, good, good[:, :4]), "must be \\[2, 8, 8\\]"),
        ((good, good.char(), None, None), "forward int8"), ((*of_keys, fit), "give k_scale and k_shift, or neither"),
        ((None, None, good, good, fit, fit), "give k_forward and k_backward, too"),
        ((*of_keys, fit[0], fit), "k_scale must be float32 \\[1, 2, 8\\] on cpu, dense"),
        ((*of_keys, fit, fit.half()), "k_shift must be .* got torch.float16"),
        ((*of_keys, fit, torch.ones(1, 8, 2).mT), "k_shift must be .* with strides"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=cause):
            ops.step_(*args, *maps)


def test_calls_are_counted_with_their_reason(cpu):
    x, books = torch.randn(1, 4, 4), torch.randn(1, 2, 16, 2)
    before = dispatch.runs()
    ops.encode(x, books)
    with kernels.use_backend("reference"):
        ops.encode(x, books)
    ops.encode(x.double(), books)
    after = dispatch.runs()
    rise = {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}
    assert rise == {
        ("encode", "cpu", "first choice"): 1,
        ("encode", "reference", "forced"): 1,
        ("encode", "reference", "cpu: torch.float64 runs on the reference only"): 1,
    }


def test_a_fallback_is_said_once(cpu, caplog):
    dispatch._forget_known()  # calls are counted there, too
    dispatch._runs.clear()
    x, books = torch.randn(1, 4, 4), torch.randn(1, 2, 16, 2)
    with caplog.at_level(logging.WARNING, logger="pqlab"), kernels.use_backend("-cpu"):
        ops.encode(x, books)
        ops.encode(x, books)
    assert [record.getMessage() for record in caplog.records] == [
        "encode runs on the reference backend; cpu: forbidden by the setting"
    ]


def test_a_forced_backend_that_cannot_run_raises():
    x, books = torch.randn(1, 4, 4), torch.randn(1, 2, 16, 2)
    with kernels.use_backend("cuda"), pytest.raises(errors.KernelMissingError, match="PQC002.*PQLAB_BACKEND=auto"):
        ops.encode(x, books)
    assert ops.encode(x, books).shape == (1, 4, 2)  # the setting is gone with its block


@pytest.mark.parametrize("text", ["gpu", "cpu,cuda", "-reference", "cpu,-cpu"])
def test_unknown_settings_are_refused(text):
    with pytest.raises(errors.ConfigError, match="backend ="):
        kernels.use_backend(text)
    assert kernels.current_setting().text == "auto"


def test_report(cpu):
    report = kernels.backend_report()
    data = report.as_dict()
    assert data["builds"]["cpu"]["state"] == "ready"
    assert data["builds"]["cpu"]["path"].endswith(".so")
    assert {choice["backend"] for choice in data["choices"] if choice["device"] == "cpu"} == {"cpu"}
    assert "-march" in repr(report) or "-mcpu" in repr(report)
    assert "<table>" in report._repr_html_()
    with kernels.use_backend("cuda"):
        assert kernels.backend_report().choices[0].backend == "none"


def test_torch_and_the_kernels_share_one_pool_of_threads(cpu):
    """The library has to use the OpenMP runtime that torch has loaded: a second one would fight it for the cores."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no way to see what is mapped")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len({path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}) == 1


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda q: q[:, :1].expand(-1, 3, -1, -1), "3 query heads cannot be shared by 2"),
        (3, lambda table: table.long(), "page_table must be int32"),
        (5, lambda books: books[:, :, :100], "k books must be"),
        (6, lambda books: books.double(), "v books must be float32"),
        (2, lambda pages: pages[1:], "differ in pages or tiles"),
        (4, lambda lengths: lengths[:, :2], r"lengths must be int32 \[2, 3\]"),
        (9, lambda window: window.double(), r"window_k and window_v must be torch.float32 \(as q is\)"),
        (11, lambda nbits: 7, "14 bytes a tile"),
    ],
)
def test_shapes_that_do_not_fit_are_named(place, change, message):
    case = list(decode_case())
    case[place] = change(case[place])
    with pytest.raises(ValueError, match=message):
        ops.decode(*case)


def test_addresses_outside_are_refused(cpu):
    with kernels.use_backend("cpu"):
        for place, cell, value, message in (
            (3, (0, 1), 99, "page id"),
            (4, (0, 1), 4000, "lengths"),
            (4, (1, 2), 49, "lengths"),
        ):
            case = list(decode_case())
            case[place] = case[place].clone()
            case[place][cell] = value
            with pytest.raises(ValueError, match=message):
                ops.decode(*case)
        pages = torch.zeros(3, 1, 1, 2, 16, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"\[3\] of 3 pages"):
            ops.encode_pages_(pages, torch.randn(1, 4, 4), torch.randn(1, 2, 256, 2), torch.tensor([3]), 0, 8)
    with pytest.raises(ValueError, match="20 tokens from slot 4 do not fit into 1 pages of 16"):
        ops.encode_pages_(pages, torch.randn(1, 20, 4), torch.randn(1, 2, 256, 2), torch.tensor([1]), 4, 8)
