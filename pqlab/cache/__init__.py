"""The cache: which token lies where (`sequences`), one layer (`layer`), the transformers `Cache` (`facade`)."""

from .facade import PagedPQCache
from .layer import PagedPQLayer
from .sequences import SequenceGroup, StepPlan

__all__ = ["PagedPQCache", "PagedPQLayer", "SequenceGroup", "StepPlan"]
