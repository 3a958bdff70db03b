"""CUDA decode and steps over anchored keys, against plain attention in float64 that asks one token after the other."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_cuda import GROWING, RAGGED, make_call, random_fit, random_maps, sanitize

from pqlab import kernels
from pqlab.kernels import dispatch, ops, reference, use_backend
from pqlab.kernels.backend import append_part
from pqlab.kernels.cuda import CudaBackend
from pqlab.kernels.cuda_config import SHARED_MEMORY
from pqlab.paging.layout import read_pages

pytestmark = pytest.mark.gpu

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
OF_128, OF_64 = (128, (64, 8), (64, 8)), (64, (32, 8), (32, 8))
KINDS = [
    (1, 1, *OF_128, F16), (3, 1, *OF_128, F16), (4, 2, *OF_128, F16), (4, 1, *OF_128, F16), (8, 1, *OF_128, F16),
    (8, 2, *OF_128, F16), (7, 1, *OF_128, F16), (8, 2, *OF_128, BF16), (8, 2, *OF_128, F32),
    (4, 2, 128, (32, 8), (32, 8), F16), (4, 2, 128, (64, 4), (32, 4), F16), (4, 2, 128, (128, 8), (64, 8), F16),
    (9, 3, *OF_64, F16), (9, 3, *OF_64, BF16), (4, 4, 64, (16, 8), (32, 4), F16), (4, 2, 96, (48, 8), (24, 8), F16),
    (2, 2, 96, (24, 4), (48, 4), F16), (6, 2, 32, (16, 8), (8, 8), F16), (6, 2, 64, (32, 8), (16, 8), F16),
    (4, 1, 256, (128, 8), (128, 8), F16), (16, 8, 256, (128, 8), (128, 8), BF16), (2, 2, 256, (64, 4), (128, 8), F32),
    (3, 1, 256, (32, 8), (64, 4), F16),
]  # fmt: skip
"""Query heads, kv heads, head size, codecs of keys and values (M, nbits), element type."""
IN_HALVES = KINDS[-4]
LIMITS = {F16: 2e-3, BF16: 5e-3, F32: 2e-3}


def name(kind) -> str:
    heads, kv_heads, head_dim, k_codec, v_codec, dtype = kind
    return f"{heads}-{kv_heads}-{head_dim}-{k_codec[0]}x{k_codec[1]}-{v_codec[0]}x{v_codec[1]}-{dtype}"


@pytest.fixture(autouse=True, scope="module")
def _started():
    kernels.start()
    backend = dispatch.backends()["cuda"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PQLAB_BUILD", "background")  # all at once
        for kind in KINDS:
            call = call_of(kind, rows=((0, 40, 0),))
            backend.unable("decode", call)
            for m, nbits in kind[3:5]:
                backend._encode_kernel(call[0], m, nbits)
        backend.wait()


def call_of(kind, span=64, spare=1, rows=RAGGED, **rest):
    """Arguments of `ops.decode` with `spare` spans more than there are. What is of no token's span is NaN."""
    heads, kv_heads, head_dim, k_codec, v_codec, dtype = kind
    call = make_call(heads, kv_heads, head_dim, k_codec, v_codec, dtype=dtype, rows=rows, **rest)
    used = [max(1, -(-(coded + window) // span)) for _, coded, window in rows]
    g = torch.Generator(device="cuda").manual_seed(7)
    q = torch.randn(max(used) + spare, *call[0].shape, generator=g, device="cuda").to(dtype)
    offsets = torch.randn(q.shape[:-1], generator=g, device="cuda")
    for row, n in enumerate(used):
        q[n:, row] = offsets[n:, row] = float("nan")
    return (q, *call[1:], span, offsets)


def attend(call):
    """What `ops.decode` says of anchored keys, in float64."""
    (q, k_pages, v_pages, table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v, k_nbits, v_nbits,
     scale, span, offsets) = call  # fmt: skip
    spans, batch, query_heads, steps, head_dim = q.shape
    heads = k_pages.shape[1]
    out = torch.zeros(batch, query_heads, steps, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
    for row, (sinks, coded, window) in enumerate(lengths.tolist()):
        if sinks + coded + window == 0:
            continue
        ring = (coded + torch.arange(window, device=q.device)) % max(1, window_k.shape[2])

        def stored(pages, books, nbits, sink, exact, row=row, sinks=sinks, coded=coded, ring=ring):
            codes = read_pages(pages, table[row].clamp_min(0), nbits)
            parts = sink[row, :, :sinks], reference.dequantize(codes, books)[:, :coded], exact[row][:, ring]
            return torch.cat([x.double() for x in parts], 1)  # [H, n, d]

        k = stored(k_pages, k_books, k_nbits, sink_k, window_k)
        v = stored(v_pages, v_books, v_nbits, sink_v, window_v)
        index = torch.arange(-sinks, coded + window, device=q.device).clamp_min(0)
        number = (index // span).clamp_max(spans - 1)
        asked = q[number, row].double().unflatten(1, (heads, -1))  # [n, H, g, S, d]
        scores = torch.einsum("nhgsd,hnd->hgsn", asked, k) * scale
        if offsets is not None:
            scores = scores + offsets[number, row].double().movedim(0, -1).unflatten(0, (heads, -1))
        out[row] = torch.einsum("hgsn,hnd->hgsd", scores.softmax(-1), v).flatten(0, 1)
        lse[row] = scores.logsumexp(-1).flatten(0, 1)
    return out, lse


def check(call, limit=2e-3, backend=None):
    with use_backend("cuda"):
        out, lse = (backend or ops).decode(*call)
    assert out.dtype == call[0].dtype and lse.dtype == torch.float32
    expected, expected_lse = attend(call)
    stored = call[4].sum(1) > 0
    assert (out[~stored] == 0).all() and (lse[~stored] == -torch.inf).all()
    if not stored.any():
        return
    error = (out[stored].double() - expected[stored]).norm(dim=-1) / expected[stored].norm(dim=-1)
    assert error.max() < limit
    assert (lse[stored].double() - expected_lse[stored]).abs().max() < 5e-3


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_kinds(kind):
    for span in (64, 256):
        for rows in (RAGGED, ((4, 2500, 130),)):
            check(call_of(kind, span, rows=rows), LIMITS[kind[5]])


@pytest.mark.parametrize("length", [0, 1, 32, 63, 64, 65, 255, 256, 257, 2048, 4097, 40000])
@pytest.mark.parametrize("window", [0, 1, 130])
def test_lengths(length, window):
    """Of one row: within the first span, at its border, more spans than a block meets."""
    for kind in (KINDS[5], IN_HALVES):
        for span, rows in ((64, ((4, length, window),)), (1024, ((0, length, window),))):
            check(call_of(kind, span, rows=rows))


@pytest.mark.parametrize("kind", [KINDS[2], IN_HALVES], ids=name)
def test_many_rows(kind):
    rows = [(i % 5, i * 97 % 900, i * 31 % 193) for i in range(70)]
    check(call_of(kind, rows=rows))


@pytest.mark.parametrize("kind", [KINDS[2], IN_HALVES], ids=name)
def test_several_new_tokens(kind):
    for rows in (RAGGED, ((4, 3000, 100),)):
        check(call_of(kind, rows=rows, steps=2))


def test_strided_queries():
    q, *rest = call_of(KINDS[2], steps=2)
    check((q.transpose(2, 3).contiguous().transpose(2, 3), *rest))


def test_no_offsets():
    check((*call_of(KINDS[5])[:-1], None))


def test_behind_the_last_query_nothing_is_read():
    q, *rest, offsets = call_of(KINDS[5], spare=0, rows=((4, 1000, 130), (4, 64, 20)))
    check((q[:2], *rest, offsets[:2]))


def test_spans_as_one_row_of_queries_are_plain_decode():
    call = call_of(KINDS[5], 64)
    q = call[0][:1]
    with use_backend("cuda"):
        got = ops.decode(q.expand_as(call[0]), *call[1:-1])
        want = ops.decode(q[0], *call[1:14])
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [KINDS[5], IN_HALVES], ids=name)
@pytest.mark.parametrize("batch", [1, 2])
def test_graph_replay_reads_new_lengths(batch, kind):
    call = call_of(kind, rows=((4, 2000, 100), (4, 700, 0))[:batch], spare=0)
    call[0].nan_to_num_(), call[-1].nan_to_num_()
    with use_backend("cuda"):
        ops.decode(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = ops.decode(*call)
        call[4][:, 1] -= torch.tensor([900, 699], device="cuda", dtype=torch.int32)[:batch]
        call[4][:, 2] = 0
        expected, _ = attend(call)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert (out.double() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("arch", [80, 89])
def test_code_for_older_gpus(arch, monkeypatch):
    """As PTX, which a newer GPU translates for itself."""
    monkeypatch.setenv("PQLAB_NVCC_FLAGS", f"-gencode=arch=compute_{arch},code=compute_{arch}")
    backend = CudaBackend()
    monkeypatch.setattr(backend, "_device", lambda x: (arch, SHARED_MEMORY[arch], 108))
    for kind in (KINDS[12], IN_HALVES):
        for rows in (RAGGED, ((4, 9000, 130),)):
            check(call_of(kind, rows=rows), backend=backend)


# -- steps -------------------------------------------------------------------------------------------------------------


def angles(spans, head_dim, span):
    """Turns of `ops.step_`: those of positions r * span under a rotary embedding."""
    frequency = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(spans)[:, None] * span * frequency
    return torch.stack((angle.cos(), angle.sin()), 1).float().cuda()


def turned_back(x, turns):
    """x [..., d] in float64, turned back by turns [..., 2, d/2]."""
    low, high = x.double().chunk(2, -1)
    cos, sin = turns.double().unbind(-2)
    return torch.cat((low * cos + high * sin, high * cos - low * sin), -1)


def turned_and_mapped(k, q, index, turns, span, maps, fit):
    """New keys [B, H, 1, d] of code indexes [B] (below 0: sinks) as stored, queries [R, B, Hq, 1, d] as asked, and what
    is added to their scores [R, B, Hq, 1]."""
    number = (torch.as_tensor(index, device=k.device).clamp_min(0) // span).clamp_max(len(turns) - 1)
    stored = reference.apply_map(turned_back(k, turns[number][:, None, None]), maps[0], *fit)
    inverse = None if fit[0] is None else 1 / fit[0]
    asked = reference.apply_map(turned_back(q, turns[:, None, None, None]), maps[1].mT, inverse)
    asked = asked.to(q.dtype)
    if fit[0] is None:
        return stored.to(k.dtype), asked, None
    shift = fit[1].double().repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
    offsets = -(k.shape[-1] ** -0.5) * (asked.double() * shift).sum(-1)
    return stored.to(k.dtype), asked, offsets


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
def test_a_step(kind, rows, fitted):
    """Raw keys, values and queries in, results in the head space out; the ring has what is turned and mapped."""
    heads, kv_heads, head_dim, *_, dtype = kind
    limit = {F16: 2e-3, BF16: 1e-2, F32: 2e-3}[dtype]
    rows = ((4, 3000, 130),) if rows == "one" else GROWING
    span, spans = 64, 80
    call = call_of(kind, span, rows=rows, slots=256)
    _, k_pages, v_pages, table, before, k_books, v_books, *exact, k_nbits, v_nbits, scale, _, _ = call
    maps = random_maps(kv_heads, head_dim, eight=dtype != BF16)
    fit = random_fit(len(rows), kv_heads, head_dim, fitted)
    turns = angles(spans, head_dim, span)
    g = torch.Generator(device="cuda").manual_seed(3)
    k, v = torch.randn(2, len(rows), kv_heads, 1, head_dim, generator=g, device="cuda").to(dtype)
    q = torch.randn(len(rows), heads, 1, head_dim, generator=g, device="cuda").to(dtype)
    brings = [row % 5 != 4 for row in range(len(rows))]  # the others are pads
    more = [((s < 4) * new, 0, (s == 4) * new) for (s, _, _), new in zip(rows, brings, strict=True)]
    after = before + torch.tensor(more, device="cuda").int()
    arguments = (*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale)
    with use_backend("cuda"):
        out, lse = ops.step_(*arguments, *maps, *fit, turns, span)
    index = [sum(row) - 4 for row in rows]
    stored_k, asked, offsets = turned_and_mapped(k, q, index, turns, span, maps, fit)
    anchored = scale, span, offsets
    of_decode = (asked, k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, *anchored)
    wanted, wanted_lse = attend(of_decode)
    wanted = reference.apply_map(wanted, maps[3])
    stored = after.sum(1) > 0
    assert (out[~stored] == 0).all()
    error = (out[stored].double() - wanted[stored]).norm(dim=-1) / wanted[stored].norm(dim=-1)
    assert error.max() < limit
    assert (lse[stored].double() - wanted_lse[stored]).abs().max() < 5 * limit
    stored_v = reference.apply_map(v.double(), maps[2]).to(dtype)
    for x, sink, window in ((stored_k, *exact[::2]), (stored_v, *exact[1::2])):
        for row in (row for row, new in enumerate(brings) if new):
            token = sum(rows[row])
            at = sink[row, :, token] if token < 4 else window[row, :, (token - 4) % 256]
            torch.testing.assert_close(at, x[row, :, 0], rtol=limit, atol=limit)


@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
def test_maps_that_only_float32_holds(fitted):
    kind, span = KINDS[5], 64
    call = call_of(kind, span, rows=((4, 300, 100),), slots=256)
    _, k_pages, v_pages, table, before, k_books, v_books, *exact, k_nbits, v_nbits, scale, _, _ = call
    maps = [m.float() / (127 if m.dtype == torch.int8 else 1) for m in random_maps(2, 128)]
    fit, turns = random_fit(1, 2, 128, fitted), angles(8, 128, span)
    k, v = torch.randn(2, 1, 2, 1, 128, device="cuda").half()
    q = torch.randn(1, 8, 1, 128, device="cuda").half()
    after = before + before.new_tensor([0, 0, 1])
    arguments = (*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale)
    with use_backend("cuda"):
        out, _ = ops.step_(*arguments, *maps, *fit, turns, span)
    _, asked, offsets = turned_and_mapped(k, q, [400], turns, span, maps, fit)
    anchored = scale, span, offsets
    of_decode = (asked, k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, *anchored)
    want, _ = attend(of_decode)
    torch.testing.assert_close(out.double(), reference.apply_map(want, maps[3]), rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
@pytest.mark.parametrize("v_codec", [(32, 8), (16, 8)])  # one launch of append, or two
@pytest.mark.parametrize("captured", [False, True], ids=["calls", "graph"])
def test_steps(captured, v_codec, fitted):
    """A ragged batch over flushes and borders of spans, step for step as the reference stores and attends."""
    check_steps(captured, v_codec, fitted)


def check_steps(captured, v_codec, fitted, steps=200):
    batch, heads, d, sinks, residual, page_size, span, spans = 3, 2, 64, 2, 20, 16, 64, 8
    slots, codecs = residual + page_size, ((32, 8), v_codec)
    g = torch.Generator(device="cuda").manual_seed(steps)

    def random(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    books = [random(heads, m, 2**nbits, d // m) for m, nbits in codecs]
    table = torch.randperm(3 * 13, generator=g, device="cuda").view(batch, 13).int()
    buffers = [torch.zeros(batch, heads, n, d, device="cuda").half() for n in (sinks, sinks, slots, slots)]
    buffers += [torch.zeros(39, heads, 1, m, 2 * nbits, device="cuda", dtype=torch.uint8) for m, nbits in codecs]
    expected = [b.clone() for b in buffers]
    k, v, q = (torch.zeros(batch, n, 1, d, device="cuda").half() for n in (heads, heads, 6))
    before, after = torch.zeros(2, batch, 3, dtype=torch.int32, device="cuda")
    maps, fit, turns = random_maps(heads, d), random_fit(batch, heads, d, fitted), angles(spans, d, span)
    nbits, scale = (codecs[0][1], codecs[1][1]), d**-0.5
    call = (*buffers, k, v, table, before, after, *books, *nbits, q, scale, *maps, *fit, turns, span)

    def step():
        with use_backend("cuda"):
            return ops.step_(*call)[0]

    out = step()  # nothing is stored: no row changes
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    rows = [[0, 0, 0] for _ in range(batch)]
    for number in range(steps):
        new = []
        for row, (s, c, w) in enumerate(rows):
            if number % (row + 1):
                new.append([s, c, w])
                continue
            s, w = (s + 1, w) if s + c + w < sinks else (s, w + 1)
            new.append([s, c + page_size, w - page_size] if w == slots else [s, c, w])
        before.copy_(torch.tensor(rows))
        after.copy_(torch.tensor(new))
        for x in (k, v, q):
            x.copy_(random(*x.shape))
        if captured:
            graph.replay()
        else:
            out = step()
        index = [sum(row) - sinks for row in rows]
        stored_k, asked, offsets = turned_and_mapped(k, q, index, turns, span, maps, fit)
        stored_v = reference.apply_map(v.double(), maps[2]).half()
        reference.append_(*append_part((*expected, stored_k, stored_v, *call[8:])))
        rows = new
        decode = (asked, *buffers[4:], table, after, *books, *buffers[:4], *nbits, scale, span, offsets)
        want = reference.apply_map(attend(decode)[0], maps[3])
        assert (out.double() - want).norm() <= 2e-3 * want.norm(), number
    assert max(c + w for _, c, w in rows) > min(steps - 3, 3 * span)
    for ours, theirs in zip(buffers, expected, strict=True):
        if ours.dtype == torch.float16:
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        else:  # a bit of a stored vector may round another way, and with it a code
            assert (ours == theirs).float().mean() > 0.998


def check_few_blocks():
    """Several rows a block, several spans a warp."""
    backend = CudaBackend()
    device = backend._device(torch.empty(0, device="cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_device", lambda x: (*device[:2], 2))
        for rows in (((4, 2600, 30),), ((4, 1900, 30), (0, 33, 0), (2, 0, 5), (4, 500, 9))):
            check(call_of(KINDS[3], rows=rows), backend=backend)
        for rows in (((4, 40_000, 30),), ((4, 9000, 30), (0, 33, 0), (2, 0, 5), (4, 20_000, 9))):  # several segments
            check(call_of(IN_HALVES, rows=rows), backend=backend)


def test_few_blocks():
    check_few_blocks()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(
        tool,
        "import sys; sys.path.append('tests')\nimport test_cuda_anchored as t\nt.kernels.start()\n"
        "t.check(t.call_of(t.KINDS[5], rows=((4, 700, 100), (0, 33, 0))))\n"
        "t.check(t.call_of(t.KINDS[12], rows=((4, 2600, 100),)))\n"
        "t.check_few_blocks()\n"
        "t.check_steps(False, (16, 8), True, steps=80)\n"
        "t.check(t.call_of(t.IN_HALVES, rows=((4, 2600, 100), (0, 33, 0))))\n"
        "for kind in (t.KINDS[5], t.IN_HALVES):\n"
        "    for rows in ('one', 'many'):\n"
        "        t.test_a_step(kind, rows, True)\n",
    )
