"""What the stages of a run share: the model (loaded when first needed), the texts, and where files are kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from ..cache import PagedPQCache
from ..cache.contiguous import contiguous_cache
from ..config import PQConfig
from ..evaluation.corpora import Corpus
from ..evaluation.fidelity import text_windows
from ..evaluation.longbench.answers import MakeCache, answer_tasks, scores
from ..evaluation.longbench.examples import read_examples
from ..models import fingerprint
from ..models.named import FoundModel
from ..quantization import Anchors, CodebookError, Codebooks, anchors_of
from .settings import Settings, resolved_m

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXACT, PAGED, CONTIGUOUS = "exact", "paged pq", "contiguous pq"
"""Names of the caches in tables and records."""


@dataclass(frozen=True)
class Job:
    """One run's inputs.

    Args:
        settings: what was asked for.
        found: the model, looked up.
        corpus: texts to evaluate on and to train on.
        folder: for results, samples and codebooks.
        force: replace samples and codebooks that are there.
    """

    settings: Settings
    found: FoundModel
    corpus: Corpus
    folder: Path
    force: bool = False

    # -- files ----------------------------------------------------------------------------------------------------

    @property
    def samples_file(self) -> Path:
        """Of the sampled vectors; named by what they depend on."""
        return self.folder / f"samples-{self._train_label}-{_short(self._sampled)}.safetensors"

    @property
    def codebooks_file(self) -> Path:
        """Of the codebooks; named by what they depend on."""
        pq, size = self.pq, "half" if self.pq.M is None else self.pq.M
        s = self.settings
        kind = ("-merged" if s.merged else "") + (f"-span{s.span}" if s.span else "")
        anchored = {"span": s.span} if s.span else {}  # or files of before had another name
        key = _short({**self._sampled, "M": pq.M, "nbits": pq.nbits, "merged": s.merged, **anchored})
        return self.folder / f"codebooks-{self._train_label}-M{size}-{pq.nbits}bit{kind}-{key}.safetensors"

    @property
    def _train_label(self) -> str:
        name = f"{self.settings.record()['model']}-{Path(self.corpus.train_name).stem}"
        return "".join(c if c.isalnum() or c in "-._" else "-" for c in name)

    @property
    def _sampled(self) -> dict[str, Any]:
        """Everything that sampled vectors depend on."""
        s = self.settings
        return {
            "model": s.model, "random": self.found.random, "half": s.half, "text": self.corpus.train_name,
            "samples": s.samples, "sinks": s.sinks, "seed": s.seed,
        }  # fmt: skip

    def read_texts(self) -> None:
        """Read every text and example that a stage will ask for. Raises `DatasetError` when one cannot be had."""
        s = self.settings
        if {"baseline", "evaluation"} & set(s.stages):
            _ = self.corpus.test_text
            for task in s.tasks:
                read_examples(task, s.data, s.examples)
        if {"sampling", "training"} & set(s.stages):
            _ = self.corpus.train_text

    # -- the model ------------------------------------------------------------------------------------------------

    @property
    def pq(self) -> PQConfig:
        return resolved_m(self.settings, self.found.config)[0]

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        dtype = torch.float16 if self.settings.half else torch.float32
        return self.found.load(dtype, self.settings.device, self.settings.seed)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.loaded[0])

    @cached_property
    def anchors(self) -> Anchors | None:
        """What keys are turned back to. Raises `ConfigError` where the model's rotary embedding cannot be undone."""
        return anchors_of(self.loaded[0], self.settings.span)

    # -- caches ---------------------------------------------------------------------------------------------------

    @property
    def pq_name(self) -> str:
        return PAGED if self.settings.paged else CONTIGUOUS

    @cached_property
    def codebooks(self) -> tuple[Codebooks, str]:
        """Those of `--codebooks`, else the trained ones, else (random weights only) random ones; and their name.

        Raises:
            CodebookError: there are none, or they are for another model.
        """
        model, _ = self.loaded
        path = self.settings.codebooks or self.codebooks_file
        if path.is_file():
            return Codebooks.load(path, model).to(model.device), path.name
        if self.found.random:
            s = self.settings
            books = Codebooks.random(model, pq=self.pq, seed=s.seed, maps=not s.merged, span=s.span)
            return books.to(model.device), "random"
        raise CodebookError(f"there is no codebooks file {path}; run the training stage")

    def exact_cache(self) -> MakeCache:
        return lambda tokens: (DynamicCache(config=self.loaded[0].config), "sdpa")

    def pq_cache(self) -> MakeCache:
        model, config = self.loaded[0], self.settings.cache
        books = self.codebooks[0]
        if not self.settings.paged:
            return lambda tokens: (contiguous_cache(model, books, config), "sdpa")
        batch = self.settings.batch
        return lambda tokens: (PagedPQCache(model, books, config, context=tokens, max_batch=batch), "pqlab")

    # -- what is measured on --------------------------------------------------------------------------------------

    @cached_property
    def windows(self) -> list[torch.Tensor]:
        """Windows [1, length] of the text, for perplexity and KL. Raises ValueError when the text is too short."""
        s = self.settings
        return text_windows(self.loaded[1], self.corpus.test_text, s.length, s.windows)

    @cached_property
    def prompts(self) -> torch.Tensor:
        """int64 [batch, context]: neighbouring pieces of the text, for timing. Raises like `windows`."""
        s = self.settings
        return torch.cat(text_windows(self.loaded[1], self.corpus.test_text, s.context, s.batch))

    def answers(self, caches: dict[str, MakeCache]) -> list[dict[str, Any]]:
        """LongBench: the table of `scores` as records."""
        s = self.settings
        found = answer_tasks(*self.loaded, s.tasks, caches, data=s.data, limit=s.examples, progress=True)
        return scores(found).to_dict("records")


def _short(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
