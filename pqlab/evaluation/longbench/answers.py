"""A model's answers to LongBench's questions, with one or more caches side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from ...transformers_api import cache_argument
from .examples import Example, prompts, read_examples
from .metrics import mark
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

MakeCache = Callable[[int], "tuple[Cache, str]"]
"""Tokens that a sequence may reach -> a fresh cache, and the attention to run it with."""


def answer_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str],
    caches: Mapping[str, MakeCache],
    *,
    data: Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Every example of every task, answered greedily with every cache.

    Args:
        tasks: names in `TASKS`.
        caches: name -> how to make a cache; each answer gets a new one.
        data, limit: see `read_examples`.
        max_length: tokens of a prompt, beyond which its middle is cut out; None: what the model's context leaves
            beside the longest answer.

    Returns:
        DataFrame: task, cache, example, tokens (of the prompt), cut (its middle was cut out), answer, score (0 to 1).

    Raises:
        DatasetError: the data cannot be read. ValueError: no room for a prompt.
    """
    asked = prompts(data)
    work = [(TASKS[name], i, example) for name in tasks for i, example in enumerate(read_examples(name, data, limit))]
    before = model.config._attn_implementation
    rows = []
    try:
        for task, i, example in tqdm(work, desc="answering", unit="example", disable=not progress):
            text, cut = prompt_text(model, tokenizer, task, asked[task.name], example, max_length)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=not _is_chat(tokenizer, task)).input_ids
            for name, make in caches.items():
                cache, attention = make(ids.shape[1] + task.new_tokens)
                model.set_attn_implementation(attention)
                said = _generate(model, tokenizer, task, ids.to(model.device), cache)
                score = mark(task, said, example.answers, example.classes)
                rows.append((task.name, name, i, ids.shape[1], cut, said, score))
    finally:
        model.set_attn_implementation(before)
    return pd.DataFrame(rows, columns=["task", "cache", "example", "tokens", "cut", "answer", "score"])


def scores(answers: pd.DataFrame) -> pd.DataFrame:
    """What `answer_tasks` found, one row a task and cache.

    Returns:
        DataFrame: task, cache, score (0 to 100), examples, cut (examples whose middle was cut out), same_as_first (the
        share of answers that are word for word those of the first cache).
    """
    rows = []
    for task, group in answers.groupby("task", sort=False):
        first = group[group.cache == group.cache.iloc[0]].set_index("example").answer
        for name, part in group.groupby("cache", sort=False):
            same = (part.set_index("example").answer == first).mean()
            rows.append((task, name, 100 * part.score.mean(), len(part), int(part.cut.sum()), float(same)))
    return pd.DataFrame(rows, columns=["task", "cache", "score", "examples", "cut", "same_as_first"])


def prompt_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompt: str,
    example: Example,
    max_length: int | None = None,
) -> tuple[str, bool]:
    """The text that is asked, with the chat template where the task and the model have one, and whether it was cut.

    A prompt of too many tokens loses its middle, as in LongBench: instructions stand at its beginning and its end.
    """
    text = prompt.format(context=example.context, input=example.input)
    chat = _is_chat(tokenizer, task)
    if max_length is None:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        around = len(tokenizer(_as_turn(tokenizer, "") if chat else "", add_special_tokens=not chat).input_ids)
        max_length = limit - task.new_tokens - around if limit else None
    if max_length is not None and max_length < 2:
        raise ValueError(f"{max_length} tokens are left for a prompt of {task.name}; its answer may have the rest")
    text, cut = middle_cut(tokenizer, text, max_length)
    return (_as_turn(tokenizer, text) if chat else text), cut


def middle_cut(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> tuple[str, bool]:
    """The text without its middle, so that it has at most `max_length` tokens, and whether anything was cut."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if max_length is None or len(ids) <= max_length:
        return text, False
    half = max_length // 2
    while True:
        parts = (ids[:half], ids[len(ids) - half :])
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
        excess = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) - max_length
        if excess <= 0:  # where words were cut, other tokens may come out
            return text, True
        half -= -(-excess // 2)


def _is_chat(tokenizer: Any, task: Task) -> bool:
    return task.chat and bool(tokenizer.chat_template)


def _as_turn(tokenizer: Any, text: str) -> str:
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, task: Task, ids: torch.Tensor, cache: Cache) -> str:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(model, cache), do_sample=False, num_beams=1,
        max_new_tokens=task.new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
