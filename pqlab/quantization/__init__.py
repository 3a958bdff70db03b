"""What a code is: codecs, the codebooks of a model, and how they are trained."""

from __future__ import annotations

from .anchors import SPAN, Anchors
from .calibrate import anchors_of, calibrate, origin_of, train
from .codebook import Codebooks, LayerCodec, Origin
from .codebook_file import CodebookError
from .codec import Codec, IdentityCodec, PQCodec
from .defaults import default_codebooks, default_codebooks_path
from .geometry import PQSpec, attention_geometry
from .kmeans import distortion, product_kmeans
from .merged import merged_head_dim, train_merged
from .samples import Samples, collect_kv, record_kv

__all__ = [
    "SPAN",
    "Anchors",
    "CodebookError",
    "Codebooks",
    "Codec",
    "IdentityCodec",
    "LayerCodec",
    "Origin",
    "PQCodec",
    "PQSpec",
    "Samples",
    "anchors_of",
    "attention_geometry",
    "calibrate",
    "collect_kv",
    "default_codebooks",
    "default_codebooks_path",
    "distortion",
    "merged_head_dim",
    "origin_of",
    "product_kmeans",
    "record_kv",
    "train",
    "train_merged",
]
