"""MILLION as its authors run it: one codebook a side for all layers and heads, no sinks, in the cache or the samples.

Wang, Xu, Liu et al.: MILLION. DAC 2025. Product quantization with 8-bit codes (M = d/2 subspaces at 4 bits, d/4 at 2),
trained here by pqlab's k-means on the calibration text, so that what differs from pqlab's default is the scope of a
codebook and the sinks, not the quality of the training. Its residual window is the harness's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ...config import PQConfig
from ...models import calibration_text
from ...quantization import Codebooks, collect_kv, merged_head_dim, train_merged
from ...quantization.samples import NUM_TOKENS
from ..methods import Method, Setting, from_codebooks, register


def merged_codebooks(setting: Setting, pq: PQConfig, *, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Codebooks:
    """One codebook for K and one for V, shared by every layer and kv head.

    Args:
        setting: model, tokenizer and calibration text.
        pq: M and nbits.
        num_tokens: tokens of the text that are run through the model; none of them counts as a sink.

    Raises:
        ConfigError: layers of unequal head size have no common codebook, or M does not divide the head size.
    """
    pq.num_subspaces(merged_head_dim(setting.geometry))  # raises before the text is read
    samples = collect_kv(
        setting.model, setting.tokenizer, calibration_text(setting.calibration), num_tokens=num_tokens, num_sinks=0
    )
    return Codebooks(train_merged(samples, pq, seed=seed))


def make(setting: Setting, bits: int) -> Method:
    from ... import kernels

    kernels.wait(300)  # without compiled kernels training takes many times longer
    head_dim = max(head_dim for _, head_dim in setting.geometry.values())
    books = merged_codebooks(setting, PQConfig(M=head_dim * bits // 8))
    own = replace(setting.config, num_sinks=0)
    note = "one codebook for all layers and heads, no sinks"
    return from_codebooks(f"million-{bits}", books, setting, config=own, note=note)


for _bits in (4, 2):
    register(f"million-{_bits}")(partial(make, bits=_bits))
