"""Every peer stores what its paper or program stores: errors against plain computations, bytes against real tensors."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from pqlab import CacheConfig, ConfigError, PQConfig
from pqlab.evaluation import methods
from pqlab.evaluation.methods import Setting
from pqlab.evaluation.storage import Storage, from_storage, pack, unpack
from pqlab.evaluation.teacher_forced import TeacherForcedCache
from pqlab.transformers_api import cache_argument

HEADS, D, P = 3, 32, 32
PLAIN = ("kivi-4", "kivi-3", "kivi-2", "per-token-4", "per-token-2", "fp8")
HF = ("hf-quanto-4", "hf-quanto-2", "hf-hqq-4", "hf-hqq-2", "hf-hqq-4-axis0")
needs = {name: {"quanto": "optimum.quanto", "hqq": "hqq"}[name.split("-")[1]] for name in HF}


def installed(name: str) -> bool:
    try:
        return name not in needs or importlib.util.find_spec(needs[name]) is not None
    except ModuleNotFoundError:  # no parent package
        return False


def available(name: str):
    return pytest.param(name, marks=[] if installed(name) else pytest.mark.skip(reason=f"{needs[name]} is missing"))


BUILT = [*PLAIN, *map(available, HF)]


@pytest.fixture
def setting(make_model):
    config = CacheConfig(page_size=P, residual_length=20, num_sinks=3)
    return Setting(make_model("llama", head_dim=D), None, config)


def vectors(tokens: int, seed: int = 0) -> torch.Tensor:
    """[H, tokens, D] with channels of very different size, one of them off centre, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, tokens, D, generator=generator) * torch.logspace(-1, 1, D)
    x[..., 5] += 12
    return x


# plain computations, element by element, in numpy


def plain_kivi(group: np.ndarray, bits: int) -> np.ndarray:
    low = group.min()
    scale = float(np.float16((group.max() - low) / (2**bits - 1)))
    zero = float(np.float16(low))
    return np.array([zero + scale * min(max(round((float(x) - zero) / scale), 0), 2**bits - 1) for x in group])


def plain_q4(block: np.ndarray, bits: int) -> np.ndarray:
    """As the C code is written: the cast to an integer cuts, the scale is rounded to fp16 after it was used."""
    half = 2 ** (bits - 1)
    largest = block[np.argmax(np.abs(block))]
    d = np.float32(largest / -half)
    codes = [min(2 * half - 1, int(np.float32(x) * (np.float32(1) / d) + np.float32(half + 0.5))) for x in block]
    return np.array([(code - half) * float(np.float16(d)) for code in codes])


def expected(name: str, side: str, x: torch.Tensor) -> torch.Tensor:
    out = np.zeros(x.shape)
    data, bits = x.numpy(), int(name[-1])
    for head in range(HEADS):
        if name.startswith("kivi") and side == "k":
            for first in range(0, x.shape[1], 32):
                for channel in range(D):
                    at = head, slice(first, first + 32), channel
                    out[at] = plain_kivi(data[at], bits)
        elif name == "fp8":
            for first in range(0, x.shape[1], P):
                page = data[head, first : first + P]
                scale = np.abs(page).max() / 448
                out[head, first : first + P] = nearest_e4m3(page / scale) * scale
        else:
            for token in range(x.shape[1]):
                for first in range(0, D, 32):
                    at = head, token, slice(first, first + 32)
                    out[at] = (plain_kivi if name.startswith("kivi") else plain_q4)(data[at], bits)
    return torch.from_numpy(out)


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """From the format's definition: 3 bits of mantissa, exponents -6 to 8, 448 the largest."""
    values = {mantissa / 8 * 2.0**-6 for mantissa in range(8)}
    values |= {(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)}
    grid = np.array(sorted(v for v in values if v <= 448))
    return np.sign(x) * grid[np.abs(np.abs(x)[..., None] - grid).argmin(-1)]


@pytest.mark.parametrize("name", PLAIN)
def test_stored_values_are_those_of_a_plain_computation(name, setting):
    k, v = vectors(2 * P), vectors(2 * P, seed=1)
    found = methods.make(name, setting).quantize(0, k, v)
    for side, x, y in zip("kv", (k, v), found, strict=True):
        want = expected(name, side, x).float()
        differs = (want - y).abs() > 1e-4 * x.abs().max()
        assert differs.float().mean() < 1e-3, "a value halfway between two codes may round either way, others may not"
        assert 1e-3 < float((y - x).norm() / x.norm()) < (0.05 if name == "fp8" else 0.7)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("kivi-4", 4 + 32 / 32), ("kivi-3", 3 + 32 / 32), ("kivi-2", 2 + 32 / 32),
        ("per-token-4", 4 + 16 / 32), ("per-token-2", 2 + 16 / 32),
        ("fp8", 8 + 32 / (P * D)), *((name, int(name.split("-")[2]) + 32 / 64) for name in HF if installed(name)),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_token_bits_are_those_of_the_tensors_that_would_be_kept(name, bits, setting):
    method = methods.make(name, setting)
    assert method.token_bits == bits
    pages = 5  # 2 layers, K and V
    assert method.page_bytes * pages * 8 == bits * 2 * 2 * HEADS * D * P * pages


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.filterwarnings("ignore")
def test_a_flushed_token_never_changes(name, setting):
    method = methods.make(name, setting)
    x = vectors(4 * P)
    whole = method.quantize(1, x, x)
    for pages in (1, 3):
        part = method.quantize(1, x[:, : pages * P], x[:, : pages * P])
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:, : pages * P])


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.filterwarnings("ignore")
def test_reasonable_errors_and_shapes(name, setting):
    x = vectors(P).half()
    k, v = methods.make(name, setting).quantize(0, x, x)
    assert k.shape == v.shape == x.shape and k.dtype == v.dtype == x.dtype
    constant = torch.full((HEADS, P, D), 0.75)
    for side in methods.make(name, setting).quantize(0, constant, torch.zeros_like(constant)):
        assert side.isfinite().all()
        assert min((side - c).abs().max() for c in (0.75, 0.0)) < 0.03


def test_kivi_in_decode_equals_stepping_and_its_pages_hold_whole_groups(make_model):
    """A prefix of a text gives the same logits as the whole: no later token changes what an earlier one stored."""
    model = make_model("llama", head_dim=D)
    model.set_attn_implementation("pqlab")
    config = CacheConfig(page_size=P, residual_length=20, num_sinks=3)
    method = methods.make("kivi-2", Setting(model, None, config))
    ids = torch.randint(0, 200, (1, 200), generator=torch.Generator().manual_seed(0))

    def run(n):
        cache = TeacherForcedCache(model, method.quantize, config)
        return model(ids[:, :n], **cache_argument(model, cache)).logits[0]

    whole = run(200)
    for n in (90, 121, 160):
        torch.testing.assert_close(run(n), whole[:n], rtol=0, atol=2e-4)
    with pytest.raises(ConfigError, match=r"32 tokens of a page \(set another page_size\).*16 is no multiple of 32"):
        methods.make("kivi-4", Setting(model, None, CacheConfig(page_size=16)))


def test_heads_that_blocks_do_not_fit_are_refused(make_model):
    small = Setting(make_model("llama"), None, CacheConfig(page_size=P))  # heads of 16
    for name in ("kivi-4", "per-token-4"):
        with pytest.raises(ConfigError, match="32 elements of a head; 16 is no multiple"):
            methods.make(name, small)


def test_a_storage_whose_pages_depend_on_each_other_is_refused(setting):
    class OneScale(Storage):
        def store(self, side, pages):
            scale = pages.abs().max()
            return (pages / scale * 127).round().to(torch.int8), scale

        def load(self, side, stored):
            return stored[0] * stored[1] / 127

    with pytest.raises(ConfigError, match="changes with the pages beside"):
        from_storage("one scale", OneScale(), setting)


def test_values_that_scales_cannot_hold_are_an_error(setting):
    x = vectors(P)
    x[0, 0, 0] = 1e6  # more than fp16
    for name in ("kivi-4", "per-token-4"):
        with pytest.raises(ValueError, match=r"K of layer 1 .*largest value, 1e\+06"):
            methods.make(name, setting).quantize(1, x, x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packing(bits):
    codes = torch.arange(64) % 2**bits
    packed = pack(codes, bits)
    assert packed.nbytes == 64 * bits // 8 and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes.to(torch.uint8))
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert packed.numpy().tobytes() == stream.to_bytes(len(packed), "little")
    with pytest.raises(ConfigError, match="do not fill bytes"):
        pack(codes[:1], 4 if bits == 1 else bits)


@pytest.mark.parametrize("name", HF)
def test_hugging_face_without_its_package_says_what_to_install(name, setting, monkeypatch):
    import transformers.cache_utils as cache_utils

    monkeypatch.setattr(cache_utils, "is_optimum_quanto_available", lambda: False)
    monkeypatch.setattr(cache_utils, "is_hqq_available", lambda: False)
    with pytest.raises(ImportError, match="pip install (optimum-quanto|hqq)"):
        methods.make(name, setting)


@pytest.mark.parametrize("name", [available("hf-quanto-4"), available("hf-hqq-4")])
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_is_min_max_over_64_neighbours_or_better(name, setting):
    """quanto is plain asymmetric rounding of 64 neighbours; HQQ starts there and may only lower its error."""
    x = vectors(P)
    groups = x.reshape(-1, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    plain = (((groups - low) / scale).round() * scale + low).view_as(x)
    found, _ = methods.make(name, setting).quantize(0, x, x)
    if name == "hf-quanto-4":
        torch.testing.assert_close(found, plain, atol=float(scale.max()) * 1.01, rtol=0)
        assert math.isclose((found - x).norm(), (plain - x).norm(), rel_tol=0.02)
    else:
        assert (found - x).abs().mean() < 1.02 * (plain - x).abs().mean()


def test_million_shares_one_codebook_and_keeps_no_sinks(make_model, tiny_tokenizer):
    from pqlab.evaluation.peers.million import merged_codebooks

    model = make_model("llama")
    setting = Setting(model, tiny_tokenizer, CacheConfig(page_size=16, residual_length=20))
    books = merged_codebooks(setting, PQConfig(M=8, nbits=8), num_tokens=600)
    method = methods.from_codebooks("million-4", books, setting)
    tables = [codec.centroids for layer in books.layers.values() for codec in (layer.k, layer.v)]
    assert len({t.data_ptr() for t in tables}) == 2
    assert method.constant_bytes == 2 * 16 * 256 * 2, "d * 256 fp16 a side, once for all heads and layers"
    assert method.token_bits == 4
    x = torch.randn(3, 32, 16)
    k, _ = method.quantize(0, x, x)
    centroids = books.layer(0).k.centroids.float()
    nearest = torch.cdist(x[2, :, 4:6], centroids[0, 2]).argmin(-1)
    torch.testing.assert_close(k[2, :, 4:6], centroids[1, 2][nearest])
    assert methods.make("million-2", setting).config == CacheConfig(page_size=16, residual_length=20, num_sinks=0)
