from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, LlamaConfig

from pqlab.config import CacheConfig, PQConfig
from pqlab.errors import ConfigError, UnsupportedModelError
from pqlab.paging.layout import PageLayout, PoolLayout
from pqlab.quantization import CodebookError, Codebooks, LayerCodec, Origin, PQCodec, attention_geometry


def llama(layers=2, heads=4, kv_heads=2, head_dim=8) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        intermediate_size=16,
        vocab_size=64,
    )


def gemma() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size=32,
        intermediate_size=16,
        vocab_size=64,
    )


def mixed_spec() -> dict[int, tuple[PQConfig, PQConfig]]:
    return {0: (PQConfig(4, 6), PQConfig(2, 8)), 1: (PQConfig(8, 3), PQConfig(4, 4))}


def made(**origin) -> Codebooks:
    books = Codebooks.random(llama(), pq=mixed_spec(), seed=3, maps=True)
    return Codebooks(books.layers, replace(books.origin, model="tiny", fingerprint="abc", text="pride", **origin))


def test_only_full_attention_layers_have_codebooks():
    assert attention_geometry(gemma()) == {1: (1, 16), 3: (1, 16)}
    books = Codebooks.random(gemma())
    assert books.layer_ids == (1, 3) and books.origin.num_layers == 4
    with pytest.raises(CodebookError, match=r"no codebook for layer 0.*\[1, 3\]"):
        books.layer(0)
    sliding = gemma()
    sliding.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="only sliding_attention"):
        Codebooks.random(sliding)


def test_k_and_v_and_layers_may_differ():
    books = made()
    first, second = books.layers.values()
    assert (first.k.num_subspaces, first.k.nbits, first.v.num_subspaces, first.v.nbits) == (4, 6, 2, 8)
    assert second.k.centroids.shape == (2, 8, 8, 1)
    assert books.layouts(32) == (
        (PageLayout(32, 2, 4, 6), PageLayout(32, 2, 2, 8)),
        (PageLayout(32, 2, 8, 3), PageLayout(32, 2, 4, 4)),
    )
    assert PoolLayout(books.layouts(32), 5).page_bytes == 32 * 2 * (24 + 16 + 24 + 16) // 8
    assert books.bits_per_element == (24 + 16 + 24 + 16) / (4 * 8)
    with pytest.raises(ConfigError, match="no PQConfig for layer 1"):
        Codebooks.random(llama(), pq={0: (PQConfig(), PQConfig())})


@pytest.mark.parametrize(
    ("pq", "message"),
    [
        (CacheConfig(), r"was given a CacheConfig.* give that one to PagedPQCache\("),
        ((PQConfig(), CacheConfig()), r"no setting of a quantizer; give PQConfig\(M, nbits\), a pair of them"),
        (
            {0: PQConfig(), 1: PQConfig()},
            r"pq = PQConfig\(.*a pair of them for K and V, or such a pair for every layer",
        ),
        (8, "pq = 8 is no setting of a quantizer"),
    ],
)
def test_what_is_no_setting_of_a_quantizer_is_refused(pq, message):
    with pytest.raises(ConfigError, match=message):
        Codebooks.random(llama(), pq=pq)


def test_nbytes_counts_centroids_and_maps_once():
    books = Codebooks.random(1, 2, 8, pq=PQConfig(4, 8))
    assert books.nbytes == 2 * (2 * 4 * 256 * 2 * 2)
    mapped = Codebooks.random(1, 2, 8, pq=PQConfig(4, 8), maps=True)
    assert mapped.nbytes - books.nbytes == 2 * 2 * (3 * 8 * 8) + 2 * (2 * 8 * 2)  # maps, mean and spread of the keys
    one = PQCodec(torch.randn(1, 4, 16, 2).expand(2, -1, -1, -1))  # one codebook for both heads and both sides
    assert Codebooks({0: LayerCodec(one, one)}).nbytes == 4 * 16 * 2 * 4
    assert Codebooks.identity(3, 2, 8).nbytes == 0


def test_codebooks_are_moved_once():
    """What is moved to a device serves all caches there; a deep copy has memory of its own."""
    books = Codebooks.random(2, 2, 16, maps=True, span=64)
    there = books.to("meta")
    assert there is books.to("meta") is there.to("meta") and there.layer(1).k.centroids.is_meta
    copied = deepcopy(books)
    assert copied.to("meta") is not there
    assert copied.layer(0).k.centroids.data_ptr() != books.layer(0).k.centroids.data_ptr()
    assert copied.layer(0).k.anchors is copied.layer(1).k.anchors


def test_random_and_identity_are_reproducible_and_exact():
    a, b, c = (Codebooks.random(llama(), seed=s).layer(1).k.centroids for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    x = torch.randn(2, 5, 8)
    exact = Codebooks.identity(llama()).layer(1).v
    assert torch.equal(exact.decode(exact.encode(x)), x)
    mapped = Codebooks.random(llama(), maps=True).layer(0).k
    torch.testing.assert_close(mapped.from_code_space(mapped.to_code_space(x)), x, atol=3e-3, rtol=1e-3)


def test_a_saved_file_loads_bit_exactly(tmp_path):
    books = made(text_sha256="f00", num_samples=9, seed=4)
    path = tmp_path / "deep" / "books.safetensors"
    books.save(path)
    loaded = Codebooks.load(path, "abc")
    assert loaded.origin == books.origin
    assert loaded.tensors().keys() == books.tensors().keys()
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in books.tensors().items())
    assert loaded.nbytes == books.nbytes
    assert [p.name for p in path.parent.iterdir()] == ["books.safetensors"]
    first = path.read_bytes()
    books.save(path)
    assert path.read_bytes() == first
    Codebooks.load(path, llama())  # a config has a shape, no weights


def test_what_heads_and_layers_share_is_kept_once(tmp_path):
    book, other = (torch.randn(1, 2, 16, 4).half().expand(2, -1, -1, -1) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(2, 8, 8)).Q
    mapped = PQCodec(other, rotation, rotation.mT.clone())
    books = Codebooks({0: LayerCodec(PQCodec(book), mapped), 1: LayerCodec(PQCodec(book), mapped)})
    expected = 2 * 2 * 16 * 4 * 2 + 2 * rotation.nbytes
    assert books.nbytes == expected
    assert Codebooks({i: LayerCodec(c.k.half(), c.v.half()) for i, c in books.layers.items()}).nbytes < expected + 300
    books.save(tmp_path / "books")
    assert (tmp_path / "books").stat().st_size < expected + 4000
    loaded = Codebooks.load(tmp_path / "books")
    assert loaded.nbytes == expected
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in books.tensors().items())
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "books").read_bytes()


def test_files_of_the_first_schema_are_read(tmp_path, monkeypatch):
    from pqlab.quantization import codebook_file

    books = made()
    monkeypatch.setattr(codebook_file, "SCHEMA_VERSION", 1)
    codebook_file.write(tmp_path / "books", books.header(), books.tensors())
    loaded = Codebooks.load(tmp_path / "books")
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in books.tensors().items())


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (llama(layers=3), r"made for tiny for 2 full.*\(0..1\) of 2 kv heads x 8.*3 full-attention layers"),
        (llama(kv_heads=1), "2 kv heads x 8.*1 kv heads x 8"),
        (llama(head_dim=4), "2 kv heads x 8.*2 kv heads x 4"),
        (gemma(), r"\(0..1\).*\(\[1, 3\]\) of 1 kv heads x 16"),
        ("xyz", "made for tiny .fingerprint abc.*fingerprint xyz"),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_sides(tmp_path, other, names):
    made().save(tmp_path / "books")
    with pytest.raises(CodebookError, match=names):
        Codebooks.load(tmp_path / "books", other)
    if not isinstance(other, str):
        with pytest.raises(CodebookError, match=names):
            made().check_fits(other)
    made().check_fits(llama())


def damage(path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[:-100])
    elif kind == "flipped bit":
        content[-50] ^= 1
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello, this is not a codebook file at all")
    elif kind == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    else:
        tensors = load_file(path)
        header = {"schema_version": 9} if kind == "newer" else {"layers": []}
        save_file(tensors, path, {"pqlab": "{" if kind == "no json" else json.dumps(header)})


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("truncated", "cannot be read"),
        ("flipped bit", "checksum"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("foreign", "no pqlab codebook file"),
        ("no json", "no readable pqlab header"),
        ("no version", "schema_version"),
        ("newer", "schema version 9, this pqlab reads versions 1 to 2"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, kind, names):
    path = tmp_path / "books.safetensors"
    made().save(path)
    damage(path, kind)
    with pytest.raises(CodebookError, match=names):
        Codebooks.load(path)


def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path):
    from pqlab.quantization import codebook_file

    books = made()
    header = books.header()
    header["layers"][0]["k"]["M"] = 2
    codebook_file.write(tmp_path / "books", header, books.tensors())
    with pytest.raises(CodebookError, match=r"header says \(heads, d, M, nbits, span\) = \(2, 8, 2, 6, 0\)"):
        Codebooks.load(tmp_path / "books")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "books"
    made().save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        made(seed=8).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_files_and_identity_codecs_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no codebook file"):
        Codebooks.load(tmp_path / "none")
    with pytest.raises(CodebookError, match="identity"):
        Codebooks.identity(1, 1, 2).save(tmp_path / "books")


def test_summary_has_a_row_per_layer_and_side():
    frame = made().summary()
    assert list(zip(frame.layer, frame.side, frame.M, frame.nbits, strict=True)) == [
        (0, "k", 4, 6),
        (0, "v", 2, 8),
        (1, "k", 8, 3),
        (1, "v", 4, 4),
    ]
    assert frame["bytes"].sum() == made().nbytes and frame["map"].all()
    assert "2 kv heads x 8" in repr(made()) and made().origin != Origin()
    anchored = Codebooks.random(3, 2, 16, maps=True, span=64)  # with frequencies that all layers share
    assert anchored.summary()["bytes"].sum() == anchored.nbytes
