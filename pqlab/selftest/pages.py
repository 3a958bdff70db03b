"""Phase 1: the page manager and the cache's data structures, against sets, lists and arithmetic.

Nothing here reads back through the code under test: free pages are counted in a deque, codes are read bit by bit from
the pool's bytes, lengths follow from the rule of the report, and nearest centroids are searched in float64.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator

import torch

from ..config import CacheConfig, PQConfig
from ..errors import PageAllocationError
from ..paging import POLICIES, PageLayout, PagePool, PageTable, PoolLayout, write_pages
from .session import Check, Disagreement, Phase, Session, expect


def checks(session: Session) -> Iterator[Check]:
    for policy in sorted(POLICIES):
        yield f"pool ({policy})", lambda policy=policy: pool_against_sets(session, policy)
        yield f"constant time ({policy})", lambda policy=policy: constant_time(session, policy)
    yield "page table", lambda: table_against_lists(session)
    yield "cache contents", lambda: cache_against_search(session)


# -- the pool --------------------------------------------------------------------------------------------------------

ORDER: dict[str, Callable[[deque], int]] = {"lifo": deque.pop, "fifo": deque.popleft}
"""Which end of the row of free pages a policy takes from; pages given back go to the right end."""


def pool_against_sets(session: Session, policy: str) -> str:
    """Random takes, shares and returns; after each, every count and the order of free pages are a plain model's."""
    rng, steps = session.random(f"pool {policy}"), session.amount(1500, 20000)
    size = rng.randint(5, 60)
    pool, held = PagePool(size, policy=policy), Counter()
    free = deque(range(size) if policy != "lifo" else reversed(range(size)))
    refused = 0
    for step in range(steps):
        where = f"step {step} of {policy}, {size} pages"
        act = rng.choice(("take", "share", "give", "give too often"))
        if act == "take":
            n = rng.randint(0, 6) if rng.random() < 0.95 else len(free) + rng.randint(1, 3)
            try:
                pages = pool.allocate(n)
                expect(n <= len(free), f"{where}: {n} pages were handed out, {len(free)} are free")
                if policy in ORDER:
                    wanted = [ORDER[policy](free) for _ in pages]
                    expect(pages == wanted, f"{where}: pages {pages}, the policy's order gives {wanted}")
                else:
                    expect(len({*pages} & {*free}) == n, f"{where}: pages {pages} were not all free")
                    free = deque(page for page in free if page not in pages)
                held.update(pages)
            except PageAllocationError as error:
                refused += 1
                expect(n > len(free), f"{where}: refused {n} pages while {len(free)} are free: {error}")
        elif act == "share":
            pages = [page for page in held if rng.random() < 0.2]
            pool.share(pages)
            held.update(pages)
        elif act == "give":
            pages = [page for page, count in held.items() for _ in range(rng.randint(0, count)) if rng.random() < 0.4]
            held.subtract(pages)
            gone = list(dict.fromkeys(page for page in pages if not held[page]))
            freed = pool.free(pages)
            expect(sorted(freed) == sorted(gone), f"{where}: {freed} became free, should be {gone}")
            free.extend(freed)
            held = +held
        else:
            _must_refuse(pool, [*list(held)[:2], *list(free)[:1]], bool(free), where)
        counts = [pool.refcount(page) for page in range(size)]
        expect(counts == [held[page] for page in range(size)], f"{where}: reference counts {counts}")
        expect(set(pool.free_pages()) == set(free) and pool.num_free == len(free), f"{where}: free {pool.free_pages()}")
    expect(refused, f"no request was ever too large in {steps} steps: the refusal was not seen")
    return f"{steps:,} random steps on {size} pages equal sets and counters, {refused} requests refused whole"


def _must_refuse(pool: PagePool, pages: list[int], wrong: bool, where: str) -> None:
    """Giving back a page that is free already is refused whole: the pages before it in the call are still held."""
    if not wrong:
        return
    try:
        pool.free(pages)
    except ValueError:
        return
    raise Disagreement(f"{where}: a page that is free was given back once more")


def constant_time(session: Session, policy: str) -> str:
    """A page costs the same to take and give back in pools of any size."""
    sizes, runs = (100, 10_000, session.amount(100_000, 1_000_000)), 9
    nanoseconds = []
    for size in sizes:
        pool, times = PagePool(size, policy=policy), []
        for _ in range(runs):
            begin = time.perf_counter_ns()
            for _ in range(100):
                pool.free(pool.allocate(10))
            times.append((time.perf_counter_ns() - begin) / 1000)
        nanoseconds.append(min(times))  # what disturbs a run only ever makes it longer
    factor = max(nanoseconds) / min(nanoseconds)
    said = ", ".join(f"{ns:,.0f} ns in {size:,}" for ns, size in zip(nanoseconds, sizes, strict=True))
    expect(factor < 5, f"a page costs {said} pages: it grows with the pool", "make take and give of the policy O(1)")
    return f"a page costs {said} pages"


# -- the table -------------------------------------------------------------------------------------------------------


def table_against_lists(session: Session) -> str:
    """Sequences grow, shrink, fork and end; every stored code is read back from the bytes by hand."""
    rng, steps = session.random("table"), session.amount(60, 500)
    page_size, nbits, m = rng.choice((16, 32, 48)), rng.randint(1, 8), 3
    sides = PageLayout(page_size, 2, m, 8), PageLayout(page_size, 2, m, nbits)
    pool = PagePool(30, PoolLayout((sides,), 30))
    table, model, stamp = PageTable(pool, page_size, 2), [[], []], 0
    codes_read = 0
    for step in range(steps):
        where = f"step {step}, pages of {page_size}, {nbits} bits"
        act = rng.choice(("extend", "extend", "truncate", "select"))
        if act == "extend":
            counts = [rng.randint(0, 2 * page_size) for _ in model]
            try:
                writes = table.extend(counts)
            except PageAllocationError:
                rows = zip(model, counts, strict=True)
                new = sum(-(-(len(row) + n) // page_size) - -(-len(row) // page_size) for row, n in rows)
                copies = sum(n > 0 for n in counts)  # at most one a row: its partial last page may be shared
                expect(new + copies > pool.num_free, f"{where}: {counts} refused while {pool.num_free} pages are free")
                codes_read += _compare_bytes(rng, pool, table, model, sides, where)  # nothing was changed
                table.clear()
                model = [[] for _ in model]
                continue
            for row, count in zip(model, counts, strict=True):
                row += range(stamp, stamp + count)
                stamp += count
            for w in writes:
                run = torch.tensor(model[w.seq][w.first_token : w.first_token + w.count])
                for side, bits in ((0, 8), (1, nbits)):
                    codes = _codes(run[None, :, None], torch.arange(2)[:, None, None], torch.arange(m), bits)
                    page = torch.tensor([w.page])
                    write_pages(pool.view(0, side), codes.to(torch.uint8), page, w.first_slot, bits)
        elif act == "truncate":
            row = rng.randrange(len(model))
            keep = rng.randint(0, len(model[row]))
            table.truncate(row, keep)
            del model[row][keep:]
        else:
            rows = [rng.randrange(len(model)) for _ in range(rng.randint(1, 3))]
            table.select(rows)
            model = [list(model[row]) for row in rows]
        codes_read += _compare_bytes(rng, pool, table, model, sides, where)
    return f"{steps} steps on pages of {page_size} tokens, {codes_read:,} codes of 8 and {nbits} bits read bit by bit"


def _codes(stamp: torch.Tensor, head: torch.Tensor, subspace: torch.Tensor, bits: int) -> torch.Tensor:
    """The code that a token's stamp stands for: different in every head, subspace and token."""
    return (stamp * 37 + head * 101 + subspace * 11) % 2**bits


def _compare_bytes(rng, pool: PagePool, table: PageTable, model: list[list[int]], sides, where: str) -> int:
    """Read a few tokens of every row from the pool's bytes, by the layout of the documentation; the codes read."""
    held = set()
    buffer, count = pool.buffer.numpy(), 0
    for seq, row in enumerate(model):
        pages = table.pages(seq)
        held.update(pages)
        lengths = table.num_tokens(seq), len(pages)
        wanted = len(row), -(-len(row) // sides[0].page_size)
        expect(lengths == wanted, f"{where}: sequence {seq} has (tokens, pages) {lengths}, should be {wanted}")
        for u in rng.sample(range(len(row)), min(4, len(row))):
            page, slot = pages[u // sides[0].page_size], u % sides[0].page_size
            start = 0
            for bits in (sides[0].nbits, sides[1].nbits):
                m, tile, lane = 3, slot // 16, slot % 16
                head_bytes = sides[0].page_size // 16 * m * 2 * bits
                for head in range(2):
                    for subspace in range(m):
                        first = start + (page * 2 + head) * head_bytes + (tile * m + subspace) * 2 * bits
                        whole = int.from_bytes(buffer[first : first + 2 * bits].tobytes(), "little")
                        code = whole >> (lane * bits) & (2**bits - 1)
                        right = (row[u] * 37 + head * 101 + subspace * 11) % 2**bits
                        expect(code == right, f"{where}: token {u} of sequence {seq} has code {code}, not {right}")
                        count += 1
                start += pool.max_pages * 2 * head_bytes
    expect(pool.num_used == len(held), f"{where}: {pool.num_used} pages are used, the sequences hold {len(held)}")
    return count


# -- the cache -------------------------------------------------------------------------------------------------------


def cache_against_search(session: Session) -> str:
    """What a cache gives back after random steps: exact ends bit by bit, and in between the nearest centroids."""
    from transformers import LlamaConfig

    from ..cache import PagedPQCache
    from ..quantization import Codebooks

    rng, g = session.random("cache"), session.generator("cache")
    config = CacheConfig(page_size=16, residual_length=rng.randint(1, 40), num_sinks=rng.randint(0, 5), max_pages=200)
    heads, d, rows = 3, 16, rng.randint(1, 3)
    shape = LlamaConfig(
        hidden_size=6 * d, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=heads, head_dim=d
    )
    shape._attn_implementation = "sdpa"  # `update` then gives back all K and V as the cache keeps them
    pq = PQConfig(M=8, nbits=rng.randint(2, 8))
    books = Codebooks.random(shape, pq=pq, seed=rng.randrange(2**31))
    cache = PagedPQCache(shape, books, config)
    exact = torch.zeros(2, 2, rows, heads, 0, d)  # [layer, side, B, H, n, d]
    coded = 0
    for step in range(session.amount(80, 800)):
        where = f"step {step}, R = {config.residual_length}, {config.num_sinks} sinks, {pq.nbits} bits"
        n = exact.shape[4]
        if n > 300 or (n and rng.random() < 0.05):
            cut = rng.randint(1, n)
            cache.crop(-cut)
            exact = exact[..., : n - cut, :]
            coded = min(coded, max(0, n - cut - config.num_sinks))
        count = rng.choice((1, 1, 1, 1, rng.randint(2, 70)))
        new = torch.randn(2, 2, rows, heads, count, d, generator=g)
        exact = torch.cat([exact, new], 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it dequantizes is what is wanted here
            for layer in range(2):
                cache.update(*new[layer], layer)
        body = exact.shape[4] - config.num_sinks
        if body - coded >= config.residual_length + config.page_size:  # the rule: whole pages, R stay
            coded = (body - config.residual_length) // config.page_size * config.page_size
        for row, lengths in enumerate(cache.lengths.tolist()):
            sinks = min(config.num_sinks, exact.shape[4])
            wanted = [sinks, coded, exact.shape[4] - sinks - coded]
            expect(lengths == wanted, f"{where}: row {row} has {lengths} sinks, codes, window; should be {wanted}")
    distances = []
    for layer in range(2):
        codec = books.layer(layer)
        kept_k, kept_v, _ = cache.quantized_layers[layer].stored(cache.lengths)
        for kept, original, side in ((kept_k, exact[layer, 0], codec.k), (kept_v, exact[layer, 1], codec.v)):
            body = slice(config.num_sinks, config.num_sinks + coded)
            for part in (slice(0, body.start), slice(body.stop, None)):
                expect(torch.equal(kept[:, :, part], original[:, :, part]), f"{where}: an exact token was changed")
            distances.append(_excess(kept[:, :, body], original[:, :, body], side.centroids))
    worst = max(distances, default=0.0)
    expect(worst < 1e-5, f"{where}: a coded vector lies {worst:.2g} farther than the nearest centroid")
    return (
        f"{step + 1} steps of {rows} rows: lengths by the rule, exact tokens bit-equal, {coded} coded tokens a row are "
        "the nearest centroids of a search in float64"
    )


def _excess(kept: torch.Tensor, original: torch.Tensor, books: torch.Tensor) -> float:
    """How much farther the kept vectors are from the originals than the nearest centroids, searched in float64.

    kept, original: [B, H, n, d]; books [H, M, C, dm]. A vector that is no centroid at all is infinitely far.
    """
    if not kept.shape[2]:
        return 0.0
    heads, m, _, dm = books.shape

    def split(x: torch.Tensor) -> torch.Tensor:  # [H, M, B * n, dm]
        return x.double().unflatten(-1, (m, dm)).permute(1, 3, 0, 2, 4).reshape(heads, m, -1, dm)

    kept, original, books = split(kept), split(original), books.double()
    if torch.cdist(kept, books).amin(-1).max() > 1e-6:
        return float("inf")
    nearest = torch.cdist(original, books).amin(-1)
    return float(((kept - original).norm(dim=-1) - nearest).max())


PHASE = Phase(
    "phase1",
    "Phase 1: page manager and cache data structures",
    checks,
    "This is a fault of pqlab (or of a page policy you added): pytest tests/test_pool.py tests/test_table.py "
    "tests/test_cache.py narrows it down; the report of a bug needs the seed.",
)
