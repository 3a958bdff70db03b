from __future__ import annotations

import pytest
import torch

from pqlab.paging.layout import PageLayout
from pqlab.quantization.codec import Codec, IdentityCodec, PQCodec
from pqlab.quantization.maps import compact_map


def random_codec(heads=3, m=4, nbits=5, dm=2, seed=0, mapped=False) -> PQCodec:
    g = torch.Generator().manual_seed(seed)
    centroids = torch.randn(heads, m, 2**nbits, dm, generator=g)
    if not mapped:
        return PQCodec(centroids)
    forward = torch.randn(heads, m * dm, m * dm, generator=g) + 3 * torch.eye(m * dm)
    return PQCodec(centroids, forward, torch.linalg.inv(forward))


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("m", "dm"), [(1, 6), (3, 2), (6, 1)])
def test_vectors_made_of_centroids_survive_bit_exactly(m, dm, nbits):
    codec = random_codec(2, m, nbits, dm)
    codes = torch.randint(0, 2**nbits, (5, 2, 7, m), dtype=torch.uint8)
    x = codec.decode(codes)  # [5, H, 7, d]
    assert torch.equal(codec.encode(x), codes)
    assert torch.equal(codec.decode(codec.encode(x)), x)
    first = torch.cat([codec.centroids[1, s, codes[2, 1, 3, s].int()] for s in range(m)])
    assert torch.equal(x[2, 1, 3], first)


def test_encode_takes_the_nearest_centroid_of_every_subspace():
    codec = random_codec()
    x = torch.randn(2, 3, 9, 8)
    distance = (x.view(2, 3, 9, 4, 1, 2) - codec.centroids[:, None]).square().sum(-1)
    assert torch.equal(codec.encode(x).long(), distance.argmin(-1))


def test_ties_go_to_the_lowest_index():
    codec = PQCodec(torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 4, 1))
    assert codec.encode(torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1)).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("query_heads", [3, 9])
def test_attention_in_code_space_equals_attention_in_head_space(query_heads):
    codec = random_codec(mapped=True)
    q, k = torch.randn(2, query_heads, 4, 8), torch.randn(2, 3, 11, 8)
    group = query_heads // 3
    scores = q @ k.repeat_interleave(group, 1).mT
    y = codec.to_code_space(k)
    torch.testing.assert_close(codec.map_query(q) @ y.repeat_interleave(group, 1).mT, scores, rtol=1e-4, atol=1e-4)
    weights = scores.softmax(-1)
    inside = weights @ y.repeat_interleave(group, 1)
    torch.testing.assert_close(
        codec.from_code_space(inside), weights @ k.repeat_interleave(group, 1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(codec.from_code_space(y), k, rtol=1e-4, atol=1e-4)


def test_a_map_that_bytes_would_lose_takes_halves():
    """One dimension of one head is small in every subspace, as in Gemma-3's keys."""
    generator = torch.Generator().manual_seed(0)
    forward = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator)).Q
    assert compact_map(forward, 8)[0].dtype == torch.int8
    forward[1, 3] *= 1e-4
    half, backward = compact_map(forward, 8)
    assert half.dtype == torch.float16 and backward.isfinite().all()
    product = half.double() @ backward.double()
    torch.testing.assert_close(product, torch.eye(16).double().expand(2, 16, 16), rtol=0, atol=1e-3)


def test_a_map_in_eight_bits_is_undone_by_its_own_inverse():
    """Rounding moves the map, not the vectors: what counts is that backward belongs to the rounded forward."""
    codec = random_codec(mapped=True)
    forward, backward = compact_map(codec.forward, 4)
    small = PQCodec(codec.centroids, forward, backward)
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(small.from_code_space(small.to_code_space(x)), x, rtol=1e-4, atol=1e-4)
    assert forward.dtype == torch.int8 and forward.unflatten(-1, (4, 2)).abs().amax((1, 3)).eq(127).all()
    wanted = codec.forward / codec.forward.unflatten(-1, (4, 2)).abs().amax((1, 3)).repeat_interleave(2, 1)[:, None]
    assert (forward / 127 - wanted).abs().max() < 0.51 / 127
    half = small.half()
    assert (half.forward.dtype, half.backward.dtype, half.centroids.dtype) == (torch.int8, torch.float16, torch.float16)
    torch.testing.assert_close(half.from_code_space(half.to_code_space(x)), x, rtol=0.01, atol=0.01)
    q = torch.randn(3, 5, 8)
    torch.testing.assert_close(half.map_query(q) @ half.to_code_space(x).mT, q @ x.mT, rtol=0.01, atol=0.02)


def test_what_float16_cannot_hold_stays_float32():
    large = PQCodec(torch.tensor([1.0, 1e5]).view(1, 1, 2, 1)).half()
    assert large.centroids.dtype == torch.float32 and large.decode(torch.ones(1, 1, 1, dtype=torch.uint8)) == 1e5


def test_a_mapped_codec_quantizes_in_code_space():
    codec = random_codec(mapped=True)
    x = torch.randn(3, 10, 8)
    y = codec.to_code_space(x)
    assert not torch.allclose(x, y)
    assert torch.equal(codec.encode(x), PQCodec(codec.centroids).encode(y))
    assert torch.equal(codec.encode(x), codec.quantize(y))
    torch.testing.assert_close(codec.decode(codec.encode(x)), codec.dequantize(codec.quantize(y)) @ codec.backward)


@pytest.mark.parametrize("codec", [random_codec(), IdentityCodec(3, 8)])
def test_without_a_map_code_space_is_head_space_and_nothing_is_copied(codec):
    x = torch.randn(3, 4, 8)
    assert codec.to_code_space(x) is x and codec.from_code_space(x) is x and codec.map_query(x) is x
    assert isinstance(codec, Codec)


def test_maps_keep_the_dtype():
    codec = random_codec(mapped=True)
    x = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    assert codec.to_code_space(x).dtype == codec.map_query(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_codec_is_exact(dtype):
    codec = IdentityCodec(3, 8)
    x = torch.randn(2, 3, 5, 8).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([float("inf"), -0.0, 0.0, 6e-8]).to(dtype)
    codes = codec.encode(x.transpose(-2, -1).contiguous().transpose(-2, -1))
    assert codes.dtype == torch.int32 and codes.shape == (2, 3, 5, 8)
    assert torch.equal(codec.decode(codes).view(torch.int32), x.float().view(torch.int32))


def test_layouts_follow_the_codec():
    assert random_codec().page_layout(64) == PageLayout(64, 3, 4, 5)
    assert IdentityCodec(3, 8).page_layout(16) == PageLayout(16, 3, 8, 32)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: PQCodec(torch.zeros(2, 4, 3, 2)), "got 3"),
        (lambda: PQCodec(torch.zeros(4, 16, 2)), "heads, M, C"),
        (lambda: PQCodec(torch.zeros(1, 2, 4, 1, dtype=torch.float64)), "float32"),
        (lambda: PQCodec(torch.zeros(1, 2, 4, 1), torch.eye(2)[None]), "both"),
        (lambda: PQCodec(torch.zeros(1, 2, 4, 1), torch.eye(3)[None], torch.eye(3)[None]), r"\[1, 2, 2\]"),
        (lambda: random_codec().encode(torch.zeros(2, 5, 8)), "3 heads"),
        (lambda: random_codec(mapped=True).map_query(torch.zeros(1, 4, 5, 8)), "multiple of 3"),
    ],
)
def test_misfits_are_refused(make, names):
    with pytest.raises(ValueError, match=names):
        make()


@pytest.mark.parametrize("shape", [(3, 4, 8), (6, 1, 8), (1, 9, 5, 8), (4, 3, 7, 8), (2, 2, 6, 3, 8), (1, 3, 0, 8)])
def test_a_map_is_a_product_with_the_matrix_of_the_head(shape):
    codec = random_codec(mapped=True)
    x = torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2)  # strides as no caller promises better
    groups = shape[-3] // 3
    by_head = codec.forward.repeat_interleave(groups, 0)  # query heads of a group follow each other
    torch.testing.assert_close(
        codec.to_code_space(x), torch.einsum("...hnd,hde->...hne", x, by_head), rtol=1e-5, atol=1e-5
    )
    back = torch.linalg.inv(by_head)
    torch.testing.assert_close(codec.map_query(x), torch.einsum("...hnd,hed->...hne", x, back), rtol=1e-4, atol=1e-4)
    assert codec.to_code_space(x.half()).dtype == torch.float16
