"""pqlab: see and run a paged, product-quantized KV cache of a real Hugging Face model.

    model, tokenizer = pqlab.load_model()
    cache = pqlab.PagedPQCache(model, pqlab.default_codebooks(model, tokenizer))
    model.generate(**tokenizer("Call me Ishmael.", return_tensors="pt"), cache=cache)

(Before transformers 5.24 the argument `cache` is called `past_key_values`.)

Importing registers the "pqlab" attention with transformers and starts to build the kernels in the background
(`pqlab.backend_report()` says how far they are). Panels are in `pqlab.panels`, which needs the extra `notebook`.
"""

from __future__ import annotations

from typing import NoReturn

__version__ = "0.1.0"

try:
    from . import kernels

    kernels.start()  # first: the build then runs beside the imports below, of which transformers takes seconds

    from . import attention
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
    from .models import fingerprint, load_model, load_text
    from .paging import PagePool, PageTable
    from .quantization import Codebooks, calibrate, default_codebooks
    from .trace import DecodeTrace, trace_decode

    attention.register()
except Exception as error:  # a broken torch, a bad setting: `python -m pqlab doctor` must still answer
    _import_error = error

    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(f"module 'pqlab' has no attribute {name!r}")
        said = f"{type(_import_error).__name__}: {_import_error}"
        raise ImportError(f"pqlab could not be loaded ({said}); python -m pqlab doctor says more") from _import_error


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
