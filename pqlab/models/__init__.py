"""Which model and which text: the embedded defaults, any Hugging Face id, any folder, and where things are kept."""

from ..store import CacheDirError, cache_dir
from .fetch import FetchError
from .fingerprint import fingerprint
from .load import ModelLoadError, ensure_default_model, load_model
from .packaged import PACKAGED, PackagedModel
from .sampled import CODE_OPENINGS, sampled_text
from .texts import Text, calibration_text, load_text, texts

__all__ = [
    "CODE_OPENINGS",
    "PACKAGED",
    "CacheDirError",
    "FetchError",
    "ModelLoadError",
    "PackagedModel",
    "Text",
    "cache_dir",
    "calibration_text",
    "ensure_default_model",
    "fingerprint",
    "load_model",
    "load_text",
    "sampled_text",
    "texts",
]
