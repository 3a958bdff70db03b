"""The report's third table: perplexity on its corpora and scores on LongBench, a quantized cache beside the exact one.

What cannot be read is a row that says why; no other text takes its place. `python -m pqlab run --dataset NAME` measures
one of them, with codebooks trained on the data set's own train split; here all share one set of codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from transformers.cache_utils import Cache, DynamicCache

from ..cache import PagedPQCache
from ..config import CacheConfig
from ..models.hub import offline_unless_hub_answers
from ..quantization import Codebooks, default_codebooks
from .corpora import HUB, Corpus, DatasetError
from .fidelity import compare, summarize, text_windows
from .longbench.answers import answer_tasks, scores
from .methods import Setting, from_codebooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CORPORA = (*HUB, "pride", "moby-dick")
"""The report's three, and the shipped novels that the default codebooks were not trained on."""
MEASURES = ("exact_perplexity", "perplexity", "change", "kl", "agreement")


def corpora_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] = CORPORA,
    *,
    codebooks: Codebooks | None = None,
    config: CacheConfig | None = None,
    windows: int = 1,
    length: int = 1024,
    data: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Perplexity of every corpus in the decode path, a row each.

    Args:
        names: as `corpora.Corpus` takes them.
        codebooks: default: those of `pqlab.default_codebooks`.
        windows, length: of each text, from its beginning; tokens.
        data: a folder with the hub data sets' files; None asks the hub, if it answers.

    Returns:
        DataFrame: corpus, exact_perplexity, perplexity, change, kl (nats), agreement (likeliest tokens), positions,
        and note: "" or why there are no numbers.
    """
    books = codebooks or default_codebooks(model, tokenizer)
    settings = config or CacheConfig()
    method = from_codebooks("pq", books, Setting(model, tokenizer, settings))
    rows = []
    with offline_unless_hub_answers():
        for name in names:
            try:
                text = Corpus(name, data if name in HUB else None).test_text
            except DatasetError as error:
                rows.append({"corpus": name, "note": str(error)})
                continue
            pieces = text_windows(tokenizer, text, length, windows)
            (found,) = summarize(
                compare(model, pieces, {"pq": method.quantize}, settings, progress=progress)
            ).to_dict("records")  # fmt: skip
            rows.append({"corpus": name, **{key: found[key] for key in (*MEASURES, "positions")}, "note": ""})
    return pd.DataFrame(rows, columns=["corpus", *MEASURES, "positions", "note"])


def longbench_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    codebooks: Codebooks | None = None,
    config: CacheConfig | None = None,
    examples: int | None = None,
    data: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Scores of LongBench tasks with the exact and the paged cache.

    Args:
        tasks: names in `longbench.tasks.TASKS`. examples: of each task; None is all.
        data: LongBench's files or their archive; None asks the hub, if it answers.

    Returns:
        DataFrame: task, cache, score (0 to 100), examples, cut, same_as_first (see `longbench.answers.scores`), note;
        a task that cannot be read is one row with a note.
    """
    books = codebooks or default_codebooks(model, tokenizer)
    settings = config or CacheConfig()

    def exact(tokens: int) -> tuple[Cache, str]:
        return DynamicCache(config=model.config), "sdpa"

    def paged(tokens: int) -> tuple[Cache, str]:
        return PagedPQCache(model, books, settings, context=tokens), "pqlab"

    caches = {"exact": exact, "paged": paged}
    parts = []
    with offline_unless_hub_answers():
        for task in tasks:
            try:
                answers = answer_tasks(model, tokenizer, [task], caches, data=data, limit=examples, progress=progress)
            except DatasetError as error:
                parts.append(pd.DataFrame([{"task": task, "note": str(error)}]))
                continue
            parts.append(scores(answers).assign(note=""))
    columns = ["task", "cache", "score", "examples", "cut", "same_as_first", "note"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)
