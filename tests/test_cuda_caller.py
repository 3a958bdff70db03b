"""CUDA calls like an earlier one, through the compiled caller: the same results, the same things noticed."""

from __future__ import annotations

import gc

import pytest
import torch
from test_caller import changed, checked_step, moved, with_strides
from test_cuda import make_call, random_fit, random_maps
from test_cuda_anchored import angles

from pqlab import kernels
from pqlab.kernels import dispatch, ops, use_backend

pytestmark = pytest.mark.gpu

K, V, TABLE, BEFORE, AFTER, K_BOOKS, Q, SCALE, K_SCALE, K_SHIFT = 6, 7, 8, 9, 10, 11, 15, 16, 21, 22
TURNS, SPAN = 23, 24


@pytest.fixture(autouse=True, scope="module")
def _started():
    kernels.start()
    kernels.wait()
    caller = dispatch.backends()["cpu"].caller
    if not caller.is_there():
        pytest.skip(f"no compiled caller here: {caller.extension.status.detail}")


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("cuda"):
        yield


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Operations whose calls were checked, in order."""
    found, first = [], ops.run_first
    monkeypatch.setattr(ops, "run_first", lambda op, *rest: found.append(op) or first(op, *rest))
    return found


def step_call(
    maps="kv", v_codec=(64, 8), batch=1, head_dim=128, dtype=torch.float16, fitted=False, anchored=False
) -> list:  # fmt: skip
    """Arguments of `ops.step_`, by place."""
    m = head_dim // 2
    rows = ((4, 3000, 130), (4, 70, 60), (2, 0, 0))[:batch]
    call = make_call(8, 2, head_dim, (m, 8), v_codec, dtype=dtype, rows=rows, slots=256)
    q, k_pages, v_pages, table, before, k_books, v_books, *exact, k_nbits, v_nbits, scale = call
    given = random_maps(2, head_dim)
    given = [x if side in maps else None for x, side in zip(given, "kkvv", strict=True)]
    given += random_fit(batch, 2, head_dim, fitted)
    given += (angles(64, head_dim, 64), 64) if anchored else (None, 0)
    k, v = torch.randn(2, batch, 2, 1, head_dim, device="cuda").to(dtype)
    more = [[int(s < 4), 0, int(s == 4)] for s, _, _ in rows]
    after = before + torch.tensor(more, device="cuda").int()
    return [*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale, *given]


def unlike(x: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same form with other values."""
    return torch.randn_like(x)


def by_checks(op, args) -> tuple[torch.Tensor, torch.Tensor]:
    dispatch._forget_known()
    return op(*args)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("maps", ["", "k", "v", "kv", "k fitted", "kv fitted", "k anchored", "kv fitted anchored"])
@pytest.mark.parametrize("v_codec", [(64, 8), (32, 8), (32, 4)])  # one launch of append, or two
def test_a_repeated_step_has_the_same_bits(batch, maps, v_codec, checked):
    args = step_call(maps.split(" ")[0], v_codec, batch, fitted="fitted" in maps, anchored="anchored" in maps)
    ops.step_(*args)
    for round_ in range(3):
        if "fitted" in maps:
            args[K_SCALE].mul_(0.9)
            args[K_SHIFT].neg_()
        for place in (K, V, Q):
            args[place] = unlike(args[place])
        for place in (TABLE, BEFORE, AFTER):
            args[place] = args[place].clone()
        got = ops.step_(*args)
        kept = [x.clone() for x in args[:6]]
        assert len(checked) == 1 + round_
        want = by_checks(ops.step_, args)
        for one, other in zip((*got, *kept), (*want, *args[:6]), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert got[0].dtype == torch.float16 and got[1].dtype == torch.float32 and not got[0].requires_grad
        assert got[0].data_ptr() != want[0].data_ptr(), "every call has results of its own"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("inference", [False, True])
def test_a_repeated_decode_has_the_same_bits(dtype, head_dim, inference, checked):
    m = head_dim // 2
    with torch.inference_mode(inference):
        args = list(make_call(8, 2, head_dim, (m, 8), (m, 8), dtype=dtype, rows=((4, 900, 100), (4, 0, 9)), steps=3))
        ops.decode(*args)
        args[0] = unlike(args[0])
        got = ops.decode(*args)
        assert len(checked) == 1
        assert got[0].is_inference() is inference
        want = by_checks(ops.decode, args)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def at_an_odd_place(x):
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        *((place, moved) for place in (0, 1, 2, 3, 4, 5, K_BOOKS, 17, 20, K_SCALE, TURNS)),
        (K_BOOKS, changed),
        *((place, torch.clone) for place in (0, 3, 4, 5, K_BOOKS, 18, K_SHIFT, TURNS)),
        *((place, with_strides) for place in (K, V, TABLE, BEFORE, AFTER, Q)),
        *((place, at_an_odd_place) for place in (K, V, Q)),
        (TABLE, lambda table: torch.nn.functional.pad(table, (0, 3), value=-1)),
        (SCALE, lambda scale: 2 * scale),
        (SPAN, lambda span: 2 * span),
    ],
)
def test_a_step_that_differs_is_checked(place, change, checked):
    args = step_call(fitted=True, anchored=True)
    got = checked_step(args, place, change, checked)
    want = by_checks(ops.step_, args)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_queries_at_an_odd_place(checked):
    """Dense, but not where a GPU reads two elements at once."""
    args = list(make_call(rows=((4, 900, 100),), steps=3))
    want = ops.decode(*args)
    args[0] = at_an_odd_place(args[0])
    for _ in range(2):
        assert torch.equal(ops.decode(*args)[0], want[0])
    assert len(checked) == 3


def test_another_stream_is_checked(checked):
    args = step_call()
    want = ops.step_(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.step_(*args)
        assert len(checked) == 2
        ops.step_(*args)
        assert len(checked) == 2
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0])


def test_a_graph_has_memory_of_its_own(checked):
    args = step_call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            want = ops.step_(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = len(checked)
    with torch.cuda.graph(graph, stream=stream):
        out, _ = ops.step_(*args)
    assert len(checked) == before + 1, "what is known of the stream is not taken into a graph"
    with torch.cuda.stream(stream):
        again = ops.step_(*args)
        assert len(checked) == before + 1
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[0]) and torch.equal(again[0], want[0])


def test_what_is_known_ends_with_its_tensors():
    args = step_call()
    ops.step_(*args)
    again = dispatch.backends()["cuda"].again("step_", tuple(args))
    assert again(*args) is not None
    keep, args[2] = args[2].clone(), None
    gc.collect()
    args[2] = keep
    assert again(*args) is None


def test_calls_are_counted(checked):
    args = step_call()
    before = sum(n for (op, backend, _), n in dispatch.runs().items() if (op, backend) == ("step_", "cuda"))
    for _ in range(4):
        ops.step_(*args)
    after = sum(n for (op, backend, _), n in dispatch.runs().items() if (op, backend) == ("step_", "cuda"))
    assert len(checked) == 1 and after - before == 4
