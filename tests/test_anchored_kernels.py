"""Anchored keys in the fused operations: every span of code indexes has a query of its own."""

from __future__ import annotations

import pytest
import torch
from test_kernels import cpu as cpu  # a fixture
from test_kernels import decode_case, libraries, library, plain_attention  # noqa: F401  fixtures

from pqlab.kernels import checks, ops, reference, use_backend
from pqlab.paging.layout import read_pages

SPAN = 64


def anchored_case(span: int = SPAN, spans: int | None = None, **shape):
    """Arguments of `decode` with a query for every span."""
    q, *rest = decode_case(**shape)
    lengths = rest[3]
    reached = int((lengths[:, 1] + lengths[:, 2]).max())
    count = max(1, -(-reached // span)) if spans is None else spans
    g = torch.Generator().manual_seed(7)
    offsets = torch.randn(count, *q.shape[:-1], generator=g)
    return (torch.randn(count, *q.shape, generator=g).to(q.dtype), *rest, span, offsets)


def by_token(case, row: int):
    """float64 attention of one row, every token asked by the query that its code index says."""
    q, k_pages, v_pages, table, lengths, k_books, v_books, sink_k, sink_v, window_k, window_v, *rest = case
    k_nbits, v_nbits, scale, span, offsets = rest
    sinks, coded, window = lengths[row].tolist()
    sides = []
    for pages, books, sink, ring, nbits in (
        (k_pages, k_books, sink_k, window_k, k_nbits),
        (v_pages, v_books, sink_v, window_v, v_nbits),
    ):
        codes = read_pages(pages, table[row, : -(-coded // (pages.shape[2] * 16))], nbits)[:, :coded]
        slots = [(coded + i) % ring.shape[2] for i in range(window)]
        parts = (
            sink[row, :, :sinks].double(),
            reference.dequantize(codes, books).double(),
            ring[row, :, slots].double(),
        )
        sides.append(torch.cat(parts, 1).repeat_interleave(q.shape[2] // books.shape[0], 0))
    k, v = sides  # [Hq, n, d]
    asking = [0] * sinks + [u // span for u in range(coded + window)]
    queries = q[asking, row].double()  # [n, Hq, S, d]
    scores = torch.einsum("nhsd,hnd->hsn", queries, k) * scale + offsets[asking, row].movedim(0, -1)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


CASES = {
    "plain": {},
    "a span of several pages": {"span": 128, "coded": (300, 129), "page_size": 32},
    "a page of several spans": {"coded": (300, 129), "page_size": 256, "batch": 2},
    "long": {"span": 256, "batch": 1, "coded": (2100,), "sinks": (4,), "window": (40,), "page_size": 64},
    "group of 3": {"heads": 3, "group": 3, "head_dim": 64, "k_m": 32, "v_m": 32, "coded": (200, 33)},
    "group of 4": {"group": 4, "head_dim": 128, "k_m": 64, "v_m": 64, "heads": 1, "coded": (130, 64)},
    "group of 8, dequantized": {"group": 8, "coded": (250, 70)},
    "two queries": {"group": 3, "steps": 2, "coded": (90, 200)},
    "d_m 1": {"k_m": 32, "v_m": 32, "group": 3},
    "d_m 4, 4 bits": {"k_m": 8, "v_m": 8, "k_nbits": 4, "v_nbits": 4},
    "d 20": {"head_dim": 20, "k_m": 10, "v_m": 5, "group": 3},
    "long window": {"slots": 300, "window": (300, 211)},
    "a ring that wraps within a span": {"coded": (47, 95), "window": (48, 30)},
    "empty rows": {"batch": 4, "coded": (0, 0, 0, 150), "sinks": (0, 3, 0, 0), "window": (0, 0, 9, 0)},
    "more spans than tokens": {"spans": 9},
    "pages and spans that do not divide each other": {"coded": (300, 129), "page_size": 80},
    "a span of one page and a half": {"span": 64, "coded": (200, 130), "page_size": 48, "heads": 1, "group": 4},
}


CODES = {
    "6 bits": {"k_nbits": 6, "v_nbits": 6, "group": 2},
    "7 bits": {"k_nbits": 7, "v_nbits": 7, "group": 1, "coded": (300, 10)},
    "8 and 4 bits": {"k_nbits": 8, "v_nbits": 4, "k_m": 8, "group": 4},
    "more rows than share a look-up": {"group": 7, "coded": (1500, 3), "page_size": 64, "span": 128},
    "blocks and more": {"group": 3, "heads": 1, "batch": 1, "coded": (2500,), "sinks": (2,), "window": (9,)},
    "no look-up in registers": {"head_dim": 512, "k_m": 512, "v_m": 64, "heads": 1, "coded": (90, 30)},
}  # fmt: skip
"""What only the C++ kernels have several ways for."""


@pytest.mark.parametrize("name", CASES)
def test_reference_asks_every_token_by_its_span(name):
    case = anchored_case(**CASES[name])
    out, lse = reference.decode(*case)
    for row in range(out.shape[0]):
        if int(case[4][row].sum()):
            want, want_lse = by_token(case, row)
            torch.testing.assert_close(out[row].double(), want, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(lse[row].double(), want_lse, atol=2e-5, rtol=2e-5)
        else:
            assert not out[row].any() and (lse[row] == -torch.inf).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("books", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CASES, *CODES])
def test_cpu_asks_every_token_by_its_span(library, name, books, threads):  # noqa: F811
    case = anchored_case(**{**CASES, **CODES}[name])
    case = (*case[:5], *(x.to(books) for x in case[5:7]), *case[7:])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = library.decode(*case)
    finally:
        torch.set_num_threads(before)
    want, want_lse = reference.decode(*case)
    torch.testing.assert_close(out, want, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(lse, want_lse, atol=3e-5, rtol=3e-5)


def test_equal_queries_are_as_no_spans():
    q, *rest, span, _ = anchored_case(coded=(200, 90))
    out, lse = reference.decode(q[:1].expand_as(q), *rest, span)
    want, want_lse = plain_attention((q[0], *rest), 0)
    torch.testing.assert_close(out[0].double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[0].double(), want_lse, atol=2e-5, rtol=2e-5)


# -- steps -----------------------------------------------------------------------------------------------------------


def anchored_step(batch=2, heads=2, group=3, head_dim=32, m=16, dtype=torch.float32, spans=6, span=SPAN, seed=3):
    """What `step_` needs but tokens and lengths: buffers, pages, books, maps, fit and turns."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    tiles, pages = 2, 40
    buffers = [torch.zeros(batch, heads, n, head_dim, dtype=dtype) for n in (4, 4, 48, 48)]
    stored = [torch.zeros(pages, heads, tiles, m, 16, dtype=torch.uint8) for _ in range(2)]
    table = torch.randperm(pages, generator=g)[: batch * 16].view(batch, 16).int()
    books = [randn(heads, m, 256, head_dim // m) for _ in range(2)]
    orthogonal = [torch.linalg.qr(randn(heads, head_dim, head_dim))[0] for _ in range(2)]
    maps = [x.contiguous() for o in orthogonal for x in (o, o.mT)]
    fit = [randn(batch, heads, head_dim).abs() + 0.5, randn(batch, heads, head_dim)]
    angles = torch.arange(spans)[:, None] * span * 10000 ** -torch.linspace(0, 1, head_dim // 2)
    turns = torch.stack([angles.cos(), angles.sin()], 1)
    return buffers, stored, table, books, maps, fit, turns, randn


def run_steps(backend: str, count: int = 230, **shape):
    """Tokens one by one through `step_`, flushing whole pages of 32 behind a window of 16; the results and what is
    stored. The second row skips every fifth token."""
    buffers, stored, table, books, maps, fit, turns, randn = anchored_step(**shape)
    batch, heads, _, d = buffers[0].shape
    group, dtype, span = shape.get("group", 3), buffers[0].dtype, shape.get("span", SPAN)
    lengths, results = [[0, 0, 0] for _ in range(batch)], []
    with use_backend(backend):
        for i in range(count):
            before = torch.tensor(lengths, dtype=torch.int32)
            for row in range(batch):
                if row == 1 and i % 5 == 4:
                    continue
                sinks, coded, window = lengths[row]
                sinks, window = (sinks + 1, window) if sinks < 4 else (sinks, window + 1)
                if window == 48:
                    coded, window = coded + 32, window - 32
                lengths[row] = [sinks, coded, window]
            k, v = (randn(batch, heads, 1, d).to(dtype) for _ in range(2))
            q = randn(batch, heads * group, 1, d).to(dtype)
            out, lse = ops.step_(
                *buffers, *stored, k, v, table, before, torch.tensor(lengths, dtype=torch.int32), *books, 8, 8, q,
                d**-0.5, *maps, *fit, turns, span,
            )  # fmt: skip
            results.append((out, lse))
    return results, buffers, stored


def test_steps_attend_to_keys_as_they_came():
    """In head space: turning both sides back changes no score, so what is stored exactly counts as it was given."""
    buffers, stored, table, books, maps, fit, turns, randn = anchored_step(batch=1, group=1)
    heads, d, coded = 2, 32, 60  # the window then lies in two spans
    scale, shift = fit[0][:1], fit[1][:1]
    keys, values = randn(1, heads, 44, d), randn(1, heads, 44, d)
    for i in range(44):
        sinks = min(i, 4)
        before = torch.tensor([[sinks, 0 if i < 4 else coded, i - sinks]], dtype=torch.int32)
        after = torch.tensor([[min(i + 1, 4), 0 if i < 4 else coded, max(0, i - 3)]], dtype=torch.int32)
        q = randn(1, heads, 1, d)
        k, v = keys[:, :, i : i + 1], values[:, :, i : i + 1]
        with use_backend("reference"):
            out, lse = ops.step_(
                *buffers, *stored, k, v, table[:1], before, after, *books, 8, 8, q, d**-0.5, *maps, scale, shift,
                turns, SPAN,
            )  # fmt: skip
    codes = torch.zeros(heads, coded, 16, dtype=torch.uint8)
    y = (reference.dequantize(codes, books[0])[None] - shift[:, :, None]) / scale[:, :, None]
    forward_again = torch.stack([turns[:, 0], -turns[:, 1]], 1)[torch.arange(coded) // SPAN]
    old_k = reference.turn_back(reference.apply_map(y, maps[1]), forward_again)
    old_v = reference.apply_map(reference.dequantize(codes, books[1])[None], maps[3])
    k, v = torch.cat([keys, old_k], 2).double(), torch.cat([values, old_v], 2).double()
    scores = q.double() @ k.mT * d**-0.5
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [{}, {"group": 1, "head_dim": 64, "m": 32}, {"group": 6, "span": 128, "spans": 3}])
def test_cpu_steps_are_those_of_the_reference(cpu, shape):  # noqa: F811
    (got, buffers, stored), (want, wanted, codes) = run_steps("cpu", **shape), run_steps("reference", **shape)
    for x, y in zip(buffers, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)
    for x, y in zip(stored, codes, strict=True):  # a vector between two centroids may fall to either
        assert (x != y).float().mean() < 1e-3
    for (out, lse), (want_out, want_lse) in zip(got, want, strict=True):
        torch.testing.assert_close(out, want_out, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("forward, backward", [(torch.int8, torch.float16), (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_cpu_maps_the_queries_of_many_spans(library, head_dim, forward, backward):  # noqa: F811
    shape = {"batch": 1, "heads": 2, "group": 3, "head_dim": head_dim, "m": head_dim // 2, "spans": 21}
    buffers, stored, _, books, maps, fit, turns, randn = anchored_step(**shape)
    for pages in stored:
        pages.random_(256, generator=torch.Generator().manual_seed(1))
    table = torch.randperm(40).view(1, 40).int()  # 1280 tokens
    maps[::2] = [(x * 127).round().to(torch.int8) if forward == torch.int8 else x for x in maps[::2]]
    maps[1::2] = [x.to(backward) for x in maps[1::2]]
    books = [(x / 8).half() for x in books]
    before, after = (torch.tensor([[4, 1264, n]], dtype=torch.int32) for n in (6, 7))
    for buffer in buffers:
        buffer.copy_(randn(*buffer.shape))
    new = [randn(1, 2, 1, head_dim) for _ in "kv"]
    args = (*stored, *new, table, before, after, *books, 8, 8, randn(1, 6, 1, head_dim), head_dim**-0.5, *maps, *fit)
    out, lse = library.step_(*[x.clone() for x in buffers], *args, turns, SPAN)
    with use_backend("reference"):
        want, want_lse = ops.step_(*buffers, *args, turns, SPAN)
    torch.testing.assert_close(out, want, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"span": 32}, "power of two, at least 64"),
        ({"span": 96}, "power of two, at least 64"),
        ({"span": 0}, "power of two, at least 64"),
        ({"turns": None}, "needs turns"),
        ({"turns": torch.zeros(3, 2, 8)}, "turns must be float32"),
        ({"maps": (None,) * 4, "fit": (None, None)}, "give k_forward"),
    ],
)
def test_steps_that_do_not_fit_are_named(change, message):
    buffers, stored, table, books, maps, fit, turns, randn = anchored_step()
    maps, fit = change.get("maps", maps), change.get("fit", fit)
    lengths = torch.zeros(2, 3, dtype=torch.int32)
    k, q = randn(2, 2, 1, 32), randn(2, 6, 1, 32)
    with pytest.raises(ValueError, match=message):
        ops.step_(
            *buffers, *stored, k, k, table, lengths, lengths, *books, 8, 8, q, 0.1, *maps, *fit,
            change.get("turns", turns), change.get("span", SPAN),
        )  # fmt: skip


def test_queries_that_do_not_fit_are_named():
    case = anchored_case()
    with pytest.raises(ValueError, match="q must be"):
        checks.decode(case[0][0], *case[1:])
    with pytest.raises(ValueError, match="q must be"):
        checks.decode(*case[:-2], 0, None)
    with pytest.raises(ValueError, match="offsets must be"):
        checks.decode(*case[:-1], case[-1].double())


def test_operations_are_registered_with_spans():
    case = anchored_case()
    torch.library.opcheck(torch.ops.pqlab.decode.default, case, test_utils=("test_schema", "test_faketensor"))
