"""What a code is: codecs, the codebooks of a model, and how they are trained."""

from __future__ import annotations

from .codebook import Codebooks, LayerCodec, Origin
from .codebook_file import CodebookError
from .codec import Codec, IdentityCodec, PQCodec
from .geometry import attention_geometry

__all__ = [
    "Codebooks",
    "CodebookError",
    "Codec",
    "IdentityCodec",
    "LayerCodec",
    "Origin",
    "PQCodec",
    "attention_geometry",
]
