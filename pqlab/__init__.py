"""pqlab: see and run a paged, product-quantized KV cache of a real Hugging Face model.

    model, tokenizer = pqlab.load_model()
    cache = pqlab.PagedPQCache(model, pqlab.default_codebooks(model, tokenizer))
    model.generate(**tokenizer("Call me Ishmael.", return_tensors="pt"), past_key_values=cache)

Importing registers the "pqlab" attention with transformers and starts to build the kernels in the background
(`pqlab.backend_report()` says how far they are). Panels are in `pqlab.panels`, which needs the extra `notebook`.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import attention, kernels
from .cache import PagedPQCache
from .config import CacheConfig, PQConfig
from .errors import (
    ConfigError,
    KernelMissingError,
    OutOfMemoryError,
    PageAllocationError,
    PQCacheError,
    ResidualOverflowError,
    UnsupportedModelError,
)
from .kernels import backend_report, use_backend
from .models import default_codebooks, fingerprint, load_model, load_text
from .paging import PagePool, PageTable
from .quantization import Codebooks, calibrate
from .trace import DecodeTrace, trace_decode

attention.register()
kernels.start()

__all__ = [
    "CacheConfig",
    "Codebooks",
    "ConfigError",
    "DecodeTrace",
    "KernelMissingError",
    "OutOfMemoryError",
    "PQCacheError",
    "PQConfig",
    "PagePool",
    "PageAllocationError",
    "PageTable",
    "PagedPQCache",
    "ResidualOverflowError",
    "UnsupportedModelError",
    "backend_report",
    "calibrate",
    "default_codebooks",
    "fingerprint",
    "load_model",
    "load_text",
    "trace_decode",
    "use_backend",
]
