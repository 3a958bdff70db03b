"""How an answer is marked: 0 to 1, by LongBench's definitions (its eval.py; Bai et al. 2024, table 1).

A score of a task is the mean over its examples, times 100, and of an example the best over its accepted answers.
ROUGE, code similarity and Chinese words come from the libraries that LongBench's own numbers were made with (rouge,
fuzzywuzzy's `ratio` in its rapidfuzz form, jieba).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .tasks import Task

Metric = Callable[[str, str, Sequence[str]], float]
"""(answer, accepted answer, all classes) -> 0 to 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ZH_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞"
    "〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_PUNCTUATION = set(string.punctuation)


def f1(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words two answers have in common (Rajpurkar et al. 2016): lower case, no punctuation, no articles."""
    return _overlap(_words(answer), _words(accepted))


def f1_zh(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """`f1` over the words that jieba finds."""
    cut = _jieba()
    marks = _PUNCTUATION | set(_ZH_PUNCTUATION)
    both = []
    for text in (answer, accepted):
        words = ("".join(c for c in word.lower() if c not in marks and not c.isspace()) for word in cut(text))
        both.append([word for word in words if word])
    return _overlap(*both)


def rouge(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L (Lin 2004), the longest common subsequence of words; 0 for an answer without words."""
    scorer = _library("rouge", "rouge").Rouge(metrics=["rouge-l"])
    try:
        return scorer.get_scores(answer, accepted)[0]["rouge-l"]["f"]
    except ValueError:  # the library's word for an empty text
        return 0.0


def rouge_zh(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """`rouge` over the words that jieba finds."""
    cut = _jieba()
    return rouge(" ".join(cut(answer)), " ".join(cut(accepted)))


def classification(answer: str, accepted: str, classes: Sequence[str]) -> float:
    """1 / n when the right class is among the n that the answer names, else 0.

    A class that is only part of the right one's name does not count as named.
    """
    named = [c for c in classes if c in answer and not (c in accepted and c != accepted)]
    return 1 / len(named) if accepted in named else 0.0


def retrieval(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in an answer that are the right paragraph's; accepted is like "Paragraph 4"."""
    return _numbers(answer, _number_of(r"Paragraph (\d+)", accepted))


def retrieval_zh(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """`retrieval` where accepted is like "段落4"."""
    return _numbers(answer, _number_of(r"段落(\d+)", accepted))


def count(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in an answer that are the right one."""
    return _numbers(answer, accepted.strip())


def code(answer: str, accepted: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line of code in an answer: 1 - (insertions and deletions) / (both lengths).

    Lines that look like a comment or a code fence are no code. In whole per cents, as LongBench rounds.
    """
    fuzz = _library("rapidfuzz", "rapidfuzz").fuzz
    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, accepted)) / 100


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        m.__name__: m
        for m in (f1, f1_zh, rouge, rouge_zh, classification, retrieval, retrieval_zh, count, code)
    }
)  # fmt: skip


def mark(task: Task, answer: str, accepted: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """Score of one answer, 0 to 1: the best over the accepted answers."""
    if task.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    return max((metric(answer, one, classes or ()) for one in accepted), default=0.0)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def _overlap(ours: list[str], theirs: list[str]) -> float:
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0  # 2pr / (p + r)


def _numbers(answer: str, right: str) -> float:
    found = re.findall(r"\d+", answer)
    return found.count(right) / len(found) if found else 0.0


def _number_of(pattern: str, accepted: str) -> str:
    found = re.search(pattern, accepted)
    if not found:
        raise ValueError(f'"{accepted}" is no answer of this task: it names no paragraph')
    return found.group(1)


def _library(module: str, package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this metric needs the package {package}: pip install 'pqlab[data]'") from error


def _jieba() -> Callable[[str], list[str]]:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, about the library's own old spellings
        jieba = _library("jieba", "jieba")
    jieba.setLogLevel(logging.WARNING)  # it tells of its dictionary on standard error
    return jieba.lcut
