"""Every error code is provoked through the public API; message, remedy and explanation speak of the same settings."""

from __future__ import annotations

import pytest
import torch

import pqlab
from pqlab import cli
from pqlab.errors import EXPLAINED, PQCacheError
from pqlab.explain import explain
from pqlab.transformers_api import cache_argument

PROMPT = torch.arange(400)[None] % 200


def prefill(model, cache) -> None:
    with torch.inference_mode():
        model(PROMPT, **cache_argument(model, cache))


def pages_run_out(model, books) -> None:
    prefill(model, pqlab.PagedPQCache(model, books, pqlab.CacheConfig(page_size=16, max_pages=3)))


def the_kernel_is_missing(model, books) -> None:
    with pqlab.use_backend("cuda"):  # tensors on the CPU: cuda cannot run them on any machine
        prefill(model, pqlab.PagedPQCache(model, books))


def a_static_cache_is_full(model, books) -> None:
    prefill(model, pqlab.PagedPQCache(model, books, pqlab.CacheConfig(mode="static"), context=300))


def pages_do_not_fit(model, books) -> None:
    pqlab.PagedPQCache(model, books, pqlab.CacheConfig(max_pages=10**10))


PROVOKED = {
    "PQC001": pages_run_out,
    "PQC002": the_kernel_is_missing,
    "PQC003": a_static_cache_is_full,
    "PQC004": pages_do_not_fit,
}


@pytest.mark.parametrize("code", PROVOKED)
def test_the_error_and_its_explanation_agree(code, model, books):
    with pytest.raises(PQCacheError) as caught:
        PROVOKED[code](model, books)
    error, text = caught.value, caught.value.explanation
    assert error.code == code and type(error) is EXPLAINED[code]
    assert str(error).startswith(f"[{code}]") and str(error).endswith(error.remedy)
    assert [name for name in text.settings if name in error.remedy], (error.remedy, text.settings)
    assert [name for name in text.settings if name not in text.remedy] == []
    assert any(name in text.example for name in text.settings)


@pytest.mark.parametrize("code", PROVOKED)
def test_what_the_example_sets_mends_it(code, model, books):
    lines = EXPLAINED[code].explanation.example.splitlines()
    assert len(lines) == 2
    names = {"pqlab": pqlab, "model": model, "books": books}
    before = pqlab.kernels.current_setting().text
    exec("\n".join(lines), names)
    prefill(model, names.get("cache") or pqlab.PagedPQCache(model, books))
    assert pqlab.kernels.current_setting().text == before == "auto"


def test_the_pool_alone_raises_the_first_and_the_last():
    from pqlab.paging import PageLayout, PoolLayout

    pool = pqlab.PagePool(3)
    with pytest.raises(pqlab.PageAllocationError, match="PQC001.*4 pages are needed, 3 of 3 are free.*max_pages"):
        pool.allocate(4)
    page = PageLayout(64, 8, 64, 8)
    with pytest.raises(pqlab.OutOfMemoryError, match="PQC004.*max_pages to at most"):
        pqlab.PagePool(10**9, PoolLayout(((page, page),), 10**9))


@pytest.mark.parametrize("typed", ["PQC001", "pqc001", "[PQC001]"])
def test_the_command(typed, capsys):
    assert cli.main(["explain", typed]) == 0
    said = capsys.readouterr().out
    assert said.strip() == explain("PQC001")
    assert all(head in said for head in ("What happened", "Why", "What to set", "Example", "CacheConfig(max_pages="))


def test_without_a_code_it_lists_them_all(capsys):
    assert cli.main(["explain"]) == 0
    said = capsys.readouterr().out
    assert all(code in said and error.explanation.title in said for code, error in EXPLAINED.items())


def test_an_unknown_code_names_the_good_ones(capsys):
    assert cli.main(["explain", "PQC999"]) == 2
    said = capsys.readouterr().err
    assert "'PQC999'" in said and "PQC001, PQC002, PQC003, PQC004" in said


def test_every_coded_error_is_explained():
    assert {error.code: error for error in PQCacheError.__subclasses__()} == EXPLAINED
