"""Calls like an earlier one, through the compiled caller and from Python: the same results, the same things noticed."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from test_kernels import decode_case, fit_of_keys
from torch.utils._python_dispatch import TorchDispatchMode

from pqlab import kernels
from pqlab.kernels import dispatch, ops
from pqlab.kernels.caller import INSTEAD
from pqlab.kernels.cpu import CpuBackend

kernels.start()


@pytest.fixture(autouse=True)
def backend():
    """The C++ backend, or a skip that says why it is not there."""
    kernels.wait()
    backend = dispatch.backends()["cpu"]
    if backend.status().state != "ready":
        pytest.skip(f"no C++ kernels here: {backend.status().detail}")
    with kernels.use_backend("cpu"):
        yield backend


def without_caller(backend: CpuBackend, monkeypatch) -> None:
    monkeypatch.setattr(backend.caller, "_module", None)
    backend._forget_held()


@pytest.fixture(params=["compiled", "python"])
def caller(request, backend, monkeypatch) -> str:
    if request.param == "python":
        without_caller(backend, monkeypatch)
    elif backend.caller._module is None:
        pytest.skip(f"no compiled caller here: {backend.caller.extension.status.detail}")
    yield request.param
    backend._forget_held()


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Operations whose calls were checked, in order."""
    ops_checked, first = [], ops.run_first
    monkeypatch.setattr(ops, "run_first", lambda op, *rest: ops_checked.append(op) or first(op, *rest))
    return ops_checked


def decode_call(**options) -> list:
    return [*decode_case(batch=1, coded=(50,), sinks=(4,), window=(9,), group=3, **options), 0, None]


def step_call(maps="kv", dtype=torch.float32, fitted=False, anchored=False) -> list:
    q, k_pages, v_pages, table, after, k_books, v_books, *exact, k_nbits, v_nbits, scale, _, _ = decode_call(
        dtype=dtype
    )
    g = torch.Generator().manual_seed(1)
    heads, d = k_books.shape[0], q.shape[-1]
    before = after - torch.tensor([[0, 0, 1]], dtype=torch.int32)
    k, v = (torch.randn(1, heads, 1, d, generator=g).to(dtype) for _ in "kv")
    given = [torch.randn(heads, d, d, generator=g) / d**0.5 if side in maps else None for side in "kkvv"]
    given += fit_of_keys(1, heads, d) if fitted else (None, None)
    given += (torch.randn(3, 2, d // 2, generator=g), 64) if anchored else (None, 0)
    return [*exact, k_pages, v_pages, k, v, table, before, after, k_books, v_books, k_nbits, v_nbits, q, scale, *given]


CALLS = {
    "decode": (ops.decode, decode_call),
    "decode bf16": (ops.decode, lambda: decode_call(dtype=torch.bfloat16)),
    "decode of 3 queries": (ops.decode, lambda: decode_call(steps=3)),
    "step_": (ops.step_, step_call),
    "step_ fp16": (ops.step_, lambda: step_call(dtype=torch.float16)),
    "step_ with maps of the keys": (ops.step_, lambda: step_call("k")),
    "step_ without maps": (ops.step_, lambda: step_call("")),
    "step_ with fitted keys": (ops.step_, lambda: step_call(fitted=True)),
    "step_ with anchored keys": (ops.step_, lambda: step_call(fitted=True, anchored=True)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_not_checked_and_has_the_same_bits(name, inference, caller, checked):
    op, make = CALLS[name]
    with torch.inference_mode(inference):
        args = make()
        out, lse = op(*args)
        again, lse_again = op(*args)
        assert len(checked) == 1
        assert torch.equal(again, out) and torch.equal(lse_again, lse)
        assert (again.dtype, lse_again.dtype) == (args[0].dtype, torch.float32)
        assert again.is_inference() is inference and not again.requires_grad and again.is_contiguous()
        assert again.data_ptr() != out.data_ptr(), "every call has results of its own"


def test_both_ways_agree_bit_by_bit_on_other_vectors(backend, monkeypatch):
    results = []
    for compiled in (True, False):
        if not compiled:
            without_caller(backend, monkeypatch)
        args = step_call(fitted=True)
        ops.step_(*args)
        args[K_SCALE].mul_(1.5)
        for i in (6, 7, 15):
            args[i] = torch.randn(args[i].shape, generator=torch.Generator().manual_seed(i))
        args[16] = 0.3
        results.append((*ops.step_(*args), *args[:4]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def other_object(x):
    return x.view(x.shape)


def with_strides(x):
    return torch.stack([x, x], -1)[..., 0]


def moved(x):
    x.data = x.clone()
    return x


def changed(x):
    return x.mul_(1.5)


def checked_step(args, place, change, checked):
    """Results of a step behind two that were alike, with one argument changed: it has to be checked."""
    ops.step_(*args)
    ops.step_(*args)
    assert len(checked) == 1
    args[place] = change(args[place])
    got = ops.step_(*args)
    assert len(checked) == 2
    return got


K, V, TABLE, BEFORE, AFTER, K_BOOKS, V_BOOKS, Q, K_SCALE, K_SHIFT = 6, 7, 8, 9, 10, 11, 12, 15, 21, 22


@pytest.mark.parametrize(
    ("place", "change"),
    [
        *((place, moved) for place in (0, 1, 2, 3, 4, 5, K_BOOKS, V_BOOKS, 17, 20, K_SCALE, K_SHIFT)),
        *((place, changed) for place in (K_BOOKS, V_BOOKS)),
        *((place, torch.clone) for place in (0, 3, 4, 5, K_BOOKS, 18, K_SHIFT)),
        *((place, with_strides) for place in (K, V, TABLE, BEFORE, AFTER, Q)),
        (Q, lambda q: q[:, : q.shape[1] // 3]),  # one query head a kv head
        (18, lambda _: torch.eye(32).expand(2, -1, -1)),
    ],
)
def test_a_step_that_differs_is_checked(place, change, caller, checked):
    args = step_call(fitted=True)
    got = checked_step(args, place, change, checked)
    with kernels.use_backend("reference"):
        want = ops.step_(*args)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [K, V, TABLE, BEFORE, AFTER, Q])
def test_other_tensors_of_a_step_of_the_same_form_are_not_checked(place, caller, checked):
    args = step_call()
    ops.step_(*args)
    args[place] = args[place].clone()
    ops.step_(*args)
    assert len(checked) == 1


def test_a_fit_that_changes_where_it_lies_is_read_anew(caller, checked):
    args = step_call(fitted=True)
    before, _ = ops.step_(*args)
    args[K_SCALE].mul_(1.5)
    args[K_SHIFT].sub_(0.5)
    got = ops.step_(*args)
    assert len(checked) == 1 and not torch.allclose(got[0], before, atol=1e-3)
    with kernels.use_backend("reference"):
        want = ops.step_(*args)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_fit_that_comes_or_goes_is_checked(caller, checked):
    args = step_call(fitted=True)
    plain = [*args[:K_SCALE], None, None]
    for number, given in enumerate((args, plain, args), 1):
        for _ in range(2):
            got, _ = ops.step_(*given)
        assert len(checked) == number
        with kernels.use_backend("reference"):
            torch.testing.assert_close(got, ops.step_(*given)[0], atol=1e-4, rtol=1e-4)
        checked.pop()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (K, lambda k: k.half(), "sinks and window must be torch.float16"),
        (V, lambda v: v[:, :1].contiguous(), "k and v must be"),
        (TABLE, lambda table: table.long(), "page_table must be int32"),
        (BEFORE, lambda lengths: lengths[:, :2].contiguous(), "before and after must be"),
        (AFTER, lambda lengths: lengths[0], "before and after must be"),
        (AFTER, lambda lengths: lengths + 1000, "lengths exceed"),
        (TABLE, lambda table: table + 1000, "a page id lies outside"),
        (Q, lambda q: q.half(), "as q is"),
        (18, lambda _: None, "both directions"),
        (K_SHIFT, lambda _: None, "k_scale and k_shift, or neither"),
        (K_SCALE, lambda scale: scale[:, :1].clone(), "k_scale must be"),
    ],
)
def test_what_does_not_fit_is_named_after_a_call_that_did(place, change, message, caller):
    args = step_call(fitted=True)
    ops.step_(*args)
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=message):
        ops.step_(*args)


def test_a_flush_is_left_to_the_checked_call(caller, checked):
    args = step_call()
    ops.step_(*args)
    lengths = args[AFTER]
    args[BEFORE], args[AFTER] = lengths, lengths + torch.tensor([[0, 2, -1]], dtype=torch.int32)
    got = ops.step_(*args)
    assert len(checked) == 2
    with kernels.use_backend("reference"):
        torch.testing.assert_close(got[0], ops.step_(*args)[0], atol=1e-4, rtol=1e-4)


def test_modes_see_what_is_allocated(caller):
    """Fake tensors and others that watch: torch's operations of a call do not go past them."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    args = decode_call()
    ops.decode(*args)
    with Watch():
        ops.decode(*args)
    assert any("empty_like" in name for name in seen)


def test_a_subclass_goes_its_own_way(caller, checked):
    args = step_call()
    ops.step_(*args)
    args[K] = args[K].as_subclass(torch.nn.Parameter)
    want = ops.step_(*args)[0]
    args[K] = args[K].as_subclass(torch.Tensor)
    assert torch.equal(ops.step_(*args)[0], want)


def test_what_is_known_ends_with_its_tensors(backend, caller):
    args = decode_call()
    ops.decode(*args)
    (held,) = backend._held.values()
    again = backend.again("decode", tuple(args))
    assert again(*args) is not None
    keep, args[10] = args[10].clone(), None
    gc.collect()
    assert not held.alive and not backend._held
    args[10] = keep
    assert again(*args) is None


def test_the_caller_is_taken_up_by_calls_that_were_known_before(backend, checked):
    module = backend.caller._module
    if module is None:
        pytest.skip(f"no compiled caller here: {backend.caller.extension.status.detail}")
    args = decode_call()
    backend.caller._module = None
    try:
        ops.decode(*args)
        assert "function again" not in repr(backend.again("decode", tuple(args)))
    finally:
        backend.caller._module = module
    backend.caller._changed()
    ops.decode(*args)
    ops.decode(*args)
    assert len(checked) == 2
    assert "again" in repr(backend.again("decode", tuple(args)))


def test_without_the_caller_all_goes_on_and_is_said_once(backend, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path))
    broken = CpuBackend()
    broken._library = backend._library
    source = tmp_path / "source" / "caller.cpp"
    source.parent.mkdir()
    source.write_text("#error this torch is not known\n")
    broken.caller.extension.sources = [source]
    broken.caller.extension.start("eager")
    status = broken.builds()["caller"]
    assert status.state == "failed" and "this torch is not known" in status.detail and status.instead == INSTEAD
    args = tuple(decode_call())
    want = broken.decode(*args)
    with caplog.at_level(logging.WARNING, logger="pqlab"):
        for _ in range(2):
            again = broken.again("decode", args)
            assert torch.equal(again(*args)[0], want[0])
    assert [record.getMessage() for record in caplog.records] == [f"{INSTEAD}; {status.detail}"]


def test_reports_name_the_caller(backend):
    report = kernels.backend_report()
    assert report.builds["caller"] is backend.caller.extension.status
    assert "caller" in repr(report)


def test_a_torch_with_other_objects_is_refused(backend):
    module = backend.caller._module
    if module is None:
        pytest.skip(f"no compiled caller here: {backend.caller.extension.status.detail}")
    for thing in (torch.empty(1), SimpleNamespace(), 1):
        with pytest.raises(ImportError, match="in a way that is not known"):
            module.set_up(thing, 12345)
    args = decode_call()
    assert torch.equal(ops.decode(*args)[0], ops.decode(*args)[0])
