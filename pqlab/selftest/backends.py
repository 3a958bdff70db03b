"""Phase 2: the kernels of every backend that this machine has: they compile, bind, and agree with the reference.

The reference itself is held to plain float64 attention and search, so that the chain ends outside of pqlab.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels import dispatch, ops, reference, use_backend
from ..kernels.build import finished_builds
from ..kernels.reference import MIN_SPAN
from ..paging.layout import PageLayout, read_pages
from .session import DETAILS, Phase, Session, expect

CODECS = (
    (64, 32, 8), (64, 32, 4), (128, 64, 8), (128, 32, 8), (96, 48, 8), (32, 16, 8), (64, 16, 8),
    (64, 64, 8), (64, 8, 8),
)  # fmt: skip
"""(head size, M, nbits): what a check draws from; every backend has kernels for them."""

CPU_CODECS = (*CODECS, (64, 4, 8), (128, 8, 6), (48, 16, 5), (80, 40, 3), (256, 128, 7))
"""What the C++ kernels and the reference take besides."""


def checks(session: Session):
    for name in ("reference", "cpu", "cuda"):
        if name not in dispatch.backends():
            why = dispatch.absences().get(name, "absent")
            session.console.info(f"{name}: not on this machine, nothing to check ({why})")
            continue
        device = "cuda" if name == "cuda" else "cpu"
        if name != "reference":
            yield f"{name} compiles and binds", lambda n=name, d=device: compiles_and_binds(session, n, d)
        yield f"{name} decode", lambda n=name, d=device: decode_agrees(session, n, d)
        yield f"{name} encode", lambda n=name, d=device: encode_agrees(session, n, d)
        yield f"{name} sums over cells", lambda n=name, d=device: sums_agree(session, n, d)
        yield f"{name} append", lambda n=name, d=device: append_agrees(session, n, d)
    yield "built variants", lambda: built_variants(session)


def compiles_and_binds(session: Session, name: str, device: str) -> str:
    """Forced calls of every operation arrive at this backend's own code."""
    backend = dispatch.backends()[name]
    before = dispatch.runs()
    call = random_decode(session.generator(f"{name} binds"), device)
    heads, d = call[5].shape[0], call[0].shape[3]
    x = torch.randn(heads, 20, d, generator=session.generator("x")).to(device)
    append = _append_call(session.generator("append"), device)[0]
    query = torch.randn(2, 2, 1, append[6].shape[-1], generator=session.generator("query")).to(device)
    calls = {
        "decode": call,
        "encode": (x, call[5]),
        "cell_sums": (x, torch.ones_like(x[..., 0]), torch.zeros_like(x[..., :1], dtype=torch.uint8), 1),
        "encode_pages_": (call[1].clone(), x, call[5], torch.tensor([0, 1], device=device), 3, call[11]),
        "append_": append,
        "step_": (*append, query, query.shape[-1] ** -0.5),
    }
    with use_backend(name):
        for op in ops.OPS:
            getattr(ops, op)(*calls[op])
    kernels.wait()
    status = backend.status()
    expect(status.state in ("ready", "none"), f"the build is {status.state}: {status.detail}", backend.remedy)
    for op in ops.OPS:
        calls = dispatch.runs().get((op, name, "forced"), 0) - before.get((op, name, "forced"), 0)
        expect(calls == 1, f"{op} was forced once and ran {calls} times on {name}")
    return f"{len(ops.OPS)} operations ran on it when forced; {status.detail or status.state}, {' '.join(status.flags)}"


def decode_agrees(session: Session, name: str, device: str) -> str:
    """Random shapes, ragged rows, shuffled pages, NaN wherever no token lies; every other call of anchored keys."""
    g, count = session.generator(f"decode {name}"), session.amount(4 if device == "cuda" else 8, 30)
    worst = worst_lse = 0.0
    shapes = set()
    for case in range(count):
        every = session.full and device == "cuda"  # each is compiled for itself: quick keeps to one
        call = random_decode(g, device, codec=CODECS[case % len(CODECS)] if every else None)
        if case % 2 and name != "reference" and (device != "cuda" or session.full):
            call = anchored(g, call)  # the reference, which asks span by span, is what they are held to
        shapes.add(_shape(call))
        with use_backend(name):
            out, lse = ops.decode(*call)
        stored = call[4].sum(1) > 0
        if name == "reference":
            want, want_lse = plain_attention(call)
        else:
            want, want_lse = reference.decode(call[0].double(), *call[1:])
        expect((out[~stored] == 0).all(), f"{_shape(call)}: a row without tokens gives something else than zero")
        expect(torch.isfinite(out).all(), f"{_shape(call)}: the output is not finite")
        error = (out.double() - want)[stored].norm(dim=-1) / want[stored].norm(dim=-1)
        worst = max(worst, float(error.max()) if len(error) else 0.0)
        apart = (lse.double() - want_lse)[stored].abs()
        worst_lse = max(worst_lse, float(apart.max()) if len(apart) else 0.0)
        DETAILS.debug("%s decode %s: error %.3g, lse %.3g", name, _shape(call), worst, worst_lse)
        limit, lse_limit = (2e-3, 5e-3) if device == "cuda" else (1e-4, 1e-4)  # fp16 centroids in shared memory
        beside = "plain float64 attention" if name == "reference" else "the reference in float64"
        expect(
            worst < limit, f"{_shape(call)}: off by {worst:.2g} (relative) from {beside}, at most {limit:g} is right"
        )
        expect(worst_lse < lse_limit, f"{_shape(call)}: log-sum-exp off by {worst_lse:.2g}, at most {lse_limit:g}")
    return f"{count} random calls of {len(shapes)} shapes within {worst:.1g} of {beside}"


def encode_agrees(session: Session, name: str, device: str) -> str:
    """Nearest centroids against a search in float64; pages written, their other slots kept."""
    g, count = session.generator(f"encode {name}"), session.amount(4, 20)
    codes_seen = 0
    for _ in range(count):
        d, m, nbits = _codec(g, device)
        heads, n, page_size = _pick(g, 1, 2, 3), _pick(g, 1, 17, 40), 16 * _pick(g, 1, 2, 4)
        books = torch.randn(heads, m, 2**nbits, d // m, generator=g).to(device)
        x = torch.randn(heads, n, d, generator=g).to(device)
        first = int(torch.randint(0, page_size, (1,), generator=g))
        shape = PageLayout(page_size, heads, m, nbits).shape
        pages = torch.randint(0, 256, (9, *shape), generator=g, dtype=torch.uint8).to(device)
        ids = torch.randperm(9, generator=g)[: -(-(first + n) // page_size)].to(device)
        before = read_pages(pages, torch.arange(9), nbits).clone()
        with use_backend(name):
            codes = ops.encode(x, books)
            ops.encode_pages_(pages, x, books, ids, first, nbits)
        where = f"{heads} heads of {d}, M = {m}, {nbits} bits, {n} vectors"
        worst = _excess(x, codes, books)
        expect(worst < 1e-5, f"{where}: a code lies {worst:.2g} farther than the nearest centroid")
        written = read_pages(pages, ids, nbits)[:, first : first + n]
        expect(torch.equal(written, codes), f"{where}: encode_pages_ wrote other codes than encode gives")
        after = read_pages(pages, torch.arange(9), nbits)
        slots = (ids.cpu()[:, None] * page_size + torch.arange(page_size)).flatten()[first : first + n]
        after[:, slots], before[:, slots] = 0, 0
        expect(torch.equal(after, before), f"{where}: a slot outside of the new tokens was changed")
        codes_seen += codes.numel()
    return f"{codes_seen:,} codes nearest by a search in float64, neighbours in their pages untouched"


def sums_agree(session: Session, name: str, device: str) -> str:
    """Weights, vectors and squares of every cell against a product with the cells' members in float64."""
    g, cells_seen = session.generator(f"sums {name}"), 0
    for _ in range(session.amount(4, 20)):
        d, m, nbits = _codec(g, device)
        groups, n = _pick(g, 1, 2, 3), _pick(g, 1, 40, 300)
        x, weights = torch.randn(groups, n, d, generator=g), torch.rand(groups, n, generator=g)
        codes = torch.randint(0, 2**nbits, (groups, n, m), generator=g, dtype=torch.uint8)
        with use_backend(name):
            found = ops.cell_sums(x.to(device), weights.to(device), codes.to(device), 2**nbits)
        members = (codes.movedim(-1, 1)[..., None] == torch.arange(2**nbits)).double()  # [G, M, n, C]
        vectors = x.double().unflatten(-1, (m, -1)).movedim(2, 1)  # [G, M, n, dm]
        weighted = members * weights.double()[:, None, :, None]
        wanted = (weighted.sum(2), weighted.mT @ vectors, weighted.mT @ vectors.square())
        where = f"{groups} groups of {n} vectors, d = {d}, M = {m}, {nbits} bits"
        for what, got, want in zip(("weights", "vectors", "squares"), found, wanted, strict=True):
            worst = float((got.cpu() - want).abs().max())
            expect(worst < 1e-9, f"{where}: a sum of {what} is off by {worst:.2g}")
        cells_seen += wanted[0].numel()
    return f"sums of {cells_seen:,} cells as in float64"


def append_agrees(session: Session, name: str, device: str) -> str:
    """One token a row, again and again; then every token is looked for where it has to be, exact or nearest."""
    flushed = 0
    for case in range(session.amount(2, 10)):
        g = session.generator(f"append {name} {case}")
        (*buffers, token, _, table, _, _, k_books, v_books, nbits, _), residual, page_size = _append_call(g, device)
        lengths = torch.zeros(table.shape[0], 3, dtype=torch.int32, device=device)
        tokens: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(table.shape[0])]
        for step in range(session.amount(60, 150)):
            k, v = torch.randn(2, *token.shape, generator=g).to(device)
            after = _advanced(lengths, buffers[0].shape[2], residual, page_size, skip=step % 3 == 2)
            with use_backend(name):
                ops.append_(*buffers, k, v, table, lengths, after, k_books, v_books, nbits, nbits)
            for row in range(len(tokens)):
                if (after - lengths)[row].sum():
                    tokens[row].append((k[row, :, 0], v[row, :, 0]))
            lengths = after
        for row, (sinks, coded, _) in enumerate(lengths.tolist()):
            for side, books in enumerate((k_books, v_books)):
                sink, ring, pages = buffers[side], buffers[2 + side], buffers[4 + side]
                x = torch.stack([pair[side] for pair in tokens[row]], 1)  # [H, n, d]
                where = f"row {row} with {sinks} sinks, {coded} codes, R = {residual}"
                expect(torch.equal(sink[row, :, :sinks], x[:, :sinks]), f"{where}: a sink is not the token that came")
                slots = torch.arange(coded, x.shape[1] - sinks) % ring.shape[2]
                live = ring[row][:, slots]
                expect(torch.equal(live, x[:, sinks + coded :]), f"{where}: the ring does not hold the newest tokens")
                codes = read_pages(pages, table[row], nbits)[:, :coded]
                excess = _excess(x[:, sinks : sinks + coded], codes, books)
                expect(excess < 1e-5, f"{where}: a code lies {excess:.2g} farther than the nearest centroid")
            flushed += coded
    return f"sinks and ring hold the tokens that came, {flushed} flushed tokens are nearest by a search in float64"


def _excess(x: torch.Tensor, codes: torch.Tensor, books: torch.Tensor) -> float:
    """How much farther than the nearest centroid the chosen ones are, at worst; x [H, n, d], codes [H, n, M]."""
    split = x.double().unflatten(-1, (books.shape[1], -1)).transpose(1, 2)
    distance = torch.cdist(split, books.double())  # [H, M, n, C]
    chosen = distance.gather(-1, codes.transpose(1, 2).long()[..., None])[..., 0]
    return float((chosen - distance.amin(-1)).max()) if x.shape[1] else 0.0


def built_variants(session: Session) -> str:
    """List what the cache of kernels holds; the libraries that are loaded now have to be among them."""
    builds = finished_builds()
    for build in builds:
        session.console.info(f"variant {build.name}: torch {build.torch}, built in {build.seconds:.1f} s")
    loaded = {name: backend.status().path for name, backend in dispatch.backends().items() if backend.status().path}
    known = {str(build.path) for build in builds}
    for name, path in loaded.items():
        expect(path in known, f"{name} runs {path}, which is no finished build", "Remove that folder and import pqlab")
    names = sorted({build.name for build in builds})
    return f"{len(names)} configurations in {len(builds)} builds: {', '.join(names) or 'none'}"


# -- random calls ----------------------------------------------------------------------------------------------------


def _pick(g: torch.Generator, *choices):
    return choices[int(torch.randint(0, len(choices), (1,), generator=g))]


def _codec(g: torch.Generator, device: str) -> tuple[int, int, int]:
    return _pick(g, *(CODECS if device == "cuda" else CPU_CODECS))


def random_decode(g: torch.Generator, device: str, codec: tuple[int, int, int] | None = None) -> tuple:
    """Arguments of `ops.decode` in float32: ragged rows (one of them empty), shuffled pages; dead slots hold NaN.

    On CUDA the shapes are few: each is compiled for itself.
    """
    d, m, nbits = codec or (CODECS[0] if device == "cuda" else _codec(g, device))
    heads, group = _pick(g, 1, 2, 3), 3 if device == "cuda" else _pick(g, 1, 2, 3, 5)
    steps = 1 if device == "cuda" else _pick(g, 1, 1, 2, 7)
    rows, page_size, num_sinks, slots = _pick(g, 1, 2, 4), 16 * _pick(g, 1, 2, 4), 4, 100

    def upto(limit: int) -> list[int]:
        return torch.randint(0, limit + 1, (rows,), generator=g).tolist()

    lengths = torch.tensor([upto(num_sinks), upto(600), upto(slots)], dtype=torch.int32).T.contiguous()
    if rows > 1:
        lengths[0] = 0
    width = max(1, -(-int(lengths[:, 1].max()) // page_size)) + 1
    ids = torch.randperm(rows * width + 3, generator=g)[: rows * width].view(rows, width).int()
    used = torch.arange(width) * page_size < lengths[:, 1:2]
    table = torch.where(used, ids, -1).int()
    shape = PageLayout(page_size, heads, m, nbits).shape

    def exact(count: int, live: torch.Tensor) -> torch.Tensor:
        x = torch.randn(rows, heads, count, d, generator=g)
        return torch.where(live[:, None, :, None], x, torch.nan).to(device)

    sink = torch.arange(num_sinks) < lengths[:, :1]
    window = (torch.arange(slots) - lengths[:, 1:2]) % slots < lengths[:, 2:]
    pages = [torch.randint(0, 256, (rows * width + 3, *shape), generator=g, dtype=torch.uint8) for _ in "kv"]
    books = [torch.randn(heads, m, 2**nbits, d // m, generator=g) for _ in "kv"]
    q = torch.randn(rows, heads * group, steps, d, generator=g)
    moved = [x.to(device) for x in (q, *pages, table, lengths, *books)]
    return (*moved, exact(num_sinks, sink), exact(num_sinks, sink), exact(slots, window), exact(slots, window),
            nbits, nbits, d**-0.5)  # fmt: skip


def plain_attention(call: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64, a row at a time over its tokens in order, codes looked up one by one."""
    q, k_pages, v_pages, table, lengths, k_books, v_books, sink_k, sink_v, ring_k, ring_v, nbits, _, scale = call
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    group = q.shape[1] // k_books.shape[0]
    for row, (sinks, coded, window) in enumerate(lengths.tolist()):
        slots = [(coded + i) % ring_k.shape[2] for i in range(window)]
        if not sinks + coded + window:
            continue
        sides = []
        for pages, books, sink, ring in ((k_pages, k_books, sink_k, ring_k), (v_pages, v_books, sink_v, ring_v)):
            heads, m, _, _ = books.shape
            codes = read_pages(pages, table[row, : -(-coded // (pages.shape[2] * 16))], nbits)[:, :coded].long()
            looked_up = torch.stack(
                [torch.cat([books[h, s][codes[h, :, s]] for s in range(m)], -1) for h in range(heads)]
            )
            x = torch.cat([sink[row, :, :sinks], looked_up, ring[row][:, slots]], 1).double()
            sides.append(x.repeat_interleave(group, 0))
        scores = q[row].double() @ sides[0].mT * scale
        out[row], lse[row] = scores.softmax(-1) @ sides[1], scores.logsumexp(-1)
    return out, lse


def anchored(g: torch.Generator, call: tuple) -> tuple:
    """The same arguments of `ops.decode` with a query for every span of tokens, and offsets."""
    q, lengths = call[0], call[4]
    spans = max(1, -(-int((lengths[:, 1] + lengths[:, 2]).max()) // MIN_SPAN))
    asked = torch.randn(spans, *q.shape, generator=g).to(q)
    return (asked, *call[1:], MIN_SPAN, torch.randn(asked.shape[:-1], generator=g).to(q.device))


def _shape(call: tuple) -> str:
    q, pages, books = call[0] if call[0].dim() == 4 else call[0][0], call[1], call[5]
    heads, m, centroids, dm = books.shape
    rows, tokens = q.shape[0], int(call[4].sum())
    return (
        f"d{heads and m * dm} M{m} C{centroids} heads {q.shape[1]}/{heads} page {16 * pages.shape[2]} "
        f"rows {rows} queries {q.shape[2]} tokens {tokens}{' anchored' if call[0].dim() == 5 else ''}"
    )


def _append_call(g: torch.Generator, device: str) -> tuple[tuple, int, int]:
    """Arguments of `ops.append_` for two rows without tokens; and (residual length, page size)."""
    rows, heads, d, m, nbits = 2, 2, 64, 32, 8
    page_size, residual, sinks = 16, _pick(g, 5, 20, 33), _pick(g, 0, 2)
    exact = [torch.zeros(rows, heads, n, d) for n in (sinks, sinks, residual + page_size, residual + page_size)]
    pages = [torch.zeros(24, *PageLayout(page_size, heads, m, nbits).shape, dtype=torch.uint8) for _ in "kv"]
    books = [torch.randn(heads, m, 2**nbits, d // m, generator=g) for _ in "kv"]
    token = [torch.randn(rows, heads, 1, d, generator=g) for _ in "kv"]
    table = torch.randperm(24, generator=g).view(rows, 12).int()
    before = torch.zeros(rows, 3, dtype=torch.int32)
    after = _advanced(before, sinks, residual, page_size)
    tensors = [x.to(device) for x in (*exact, *pages, *token, table, before, after, *books)]
    return (*tensors, nbits, nbits), residual, page_size


def _advanced(before: torch.Tensor, sinks: int, residual: int, page_size: int, skip: bool = False) -> torch.Tensor:
    """Lengths after one more token in every row (not in row 0 with `skip`); a page leaves a window that is full."""
    rows = before.tolist()
    for index, row in enumerate(rows):
        if skip and index == 0:
            continue
        row[0 if row[0] < sinks else 2] += 1
        if row[2] == residual + page_size:
            row[1:] = row[1] + page_size, row[2] - page_size
    return torch.tensor(rows, dtype=torch.int32, device=before.device)


PHASE = Phase(
    "phase2",
    "Phase 2: kernels compile, bind and agree with the reference",
    checks,
    "The kernel gives wrong results here. Until it is mended, forbid its backend: PQLAB_BACKEND=-cpu (or -cuda); to "
    "build it afresh, remove the folder kernels in pqlab's cache directory (python -m pqlab doctor names it).",
)
