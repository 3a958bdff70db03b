"""pqlab: see and run a paged, product-quantized KV cache of a real Hugging Face model."""

from __future__ import annotations

__version__ = "0.1.0"

from . import attention
from .cache import PagedPQCache
from .config import CacheConfig, PQConfig
from .errors import UnsupportedModelError
from .quantization import Codebooks
from .trace import DecodeTrace, trace_decode

attention.register()

__all__ = [
    "CacheConfig",
    "Codebooks",
    "DecodeTrace",
    "PQConfig",
    "PagedPQCache",
    "UnsupportedModelError",
    "trace_decode",
]
