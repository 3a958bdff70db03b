"""The tasks: what is asked, how long an answer may be, which metric marks it.

Metrics, answer lengths, and which tasks are asked without a chat template and marked by their first line are
LongBench's. A prompt has to name the form of the answer that its metric reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: LongBench's; the data file is called `<name>.jsonl`.
        metric: name in `metrics.METRICS`.
        new_tokens: most tokens of an answer.
        prompt: with {context} and {input}.
        chat: a chat model gets the prompt as a user's turn.
        first_line: only the first line of an answer is marked.
    """

    name: str
    metric: str
    new_tokens: int
    prompt: str
    chat: bool = True
    first_line: bool = False


_STORY = (
    "Below is a story, from a book or a film script. Read it, then answer the question about it in one short phrase, "
    "without an explanation.\n\nStory: {context}\n\nQuestion about the story: {input}\n\nShort answer:"
)
_PAPER = (
    "Below is a scientific article. Answer the question about it in one phrase or sentence. If the article does not "
    'answer it, write "unanswerable". If it is a yes/no question, write "yes", "no" or "unanswerable". Explain '
    "nothing.\n\nArticle: {context}\n\nQuestion about the article: {input}\n\nAnswer:"
)
_TEXT = (
    "Read the text and answer the question about it briefly.\n\n{context}\n\nAnswer the question from the text above, "
    "with the answer alone.\n\nQuestion: {input}\nAnswer:"
)
_TEXT_ZH = (
    "请阅读下面的文章，然后用中文简短回答问题。\n\n{context}\n\n根据上文回答，只写答案。\n\n问题：{input}\n回答："
)
_PASSAGES = (
    "Answer the question from the passages below. Write the answer alone, without further words.\n\nPassages:\n"
    "{context}\n\nQuestion: {input}\nAnswer:"
)
_PASSAGES_ZH = "请根据下面的文章回答问题。\n\n文章：{context}\n\n问题：{input}\n回答："
_REPORT = "Write a summary of one page of this government report.\n\nReport:\n{context}\n\nSummary:"
_MEETING = (
    "Below are the minutes of a meeting and a request about it. Answer the request in one or more sentences.\n\n"
    "Minutes:\n{context}\n\nRequest: {input}\nAnswer:"
)
_NEWS = "Write a summary of one page of these news articles.\n\nNews:\n{context}\n\nSummary:"
_MEETING_ZH = "下面是一段会议记录，请写出会议总结。\n\n会议记录：\n{context}\n\n会议总结："
_TREC = "Name the type of each question. Examples come first.\n\n{context}\n{input}"
_TRIVIA = "Answer the question from the passage, with the answer alone. Examples come first.\n\n{context}\n\n{input}"
_SAMSUM = "Write a few short sentences that sum up the dialogue. Examples come first.\n\n{context}\n\n{input}"
_LSHT = "判断新闻的类别。下面先给出例子。\n\n{context}\n{input}"
_COUNT = (
    "Below are numbered paragraphs, some of which may be the same. How many different paragraphs are there when each "
    "is counted once?\n\n{context}\n\nWrite the number alone, such as 1, 2 or 3.\n\nNumber of different paragraphs:"
)
_WHICH = (
    "Below are 30 numbered paragraphs, and a summary of one of them. Which paragraph is it of?\n\n{context}\n\n"
    'Summary: {input}\n\nWrite the number of the paragraph in the form "Paragraph 1", "Paragraph 2" and so on.\n\n'
    "The summary is of:"
)
_WHICH_ZH = (
    "下面有若干编号的段落，以及其中一段的摘要。请判断摘要出自哪一段。\n\n{context}\n\n摘要：{input}\n\n"
    "请按“段落1”“段落2”的形式写出段落编号。\n\n摘要出自："
)
_LINE = "Complete the code. Write the next line.\n{context}Next line of code:\n"
_REPOSITORY = "Complete the code. Write the next line.\n{context}{input}Next line of code:\n"

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("narrativeqa", "f1", 128, _STORY),
            Task("qasper", "f1", 128, _PAPER),
            Task("multifieldqa_en", "f1", 64, _TEXT),
            Task("multifieldqa_zh", "f1_zh", 64, _TEXT_ZH),
            Task("hotpotqa", "f1", 32, _PASSAGES),
            Task("2wikimqa", "f1", 32, _PASSAGES),
            Task("musique", "f1", 32, _PASSAGES),
            Task("dureader", "rouge_zh", 128, _PASSAGES_ZH),
            Task("gov_report", "rouge", 512, _REPORT),
            Task("qmsum", "rouge", 512, _MEETING),
            Task("multi_news", "rouge", 512, _NEWS),
            Task("vcsum", "rouge_zh", 512, _MEETING_ZH),
            Task("trec", "classification", 64, _TREC, chat=False, first_line=True),
            Task("triviaqa", "f1", 32, _TRIVIA, chat=False, first_line=True),
            Task("samsum", "rouge", 128, _SAMSUM, chat=False, first_line=True),
            Task("lsht", "classification", 64, _LSHT, chat=False, first_line=True),
            Task("passage_count", "count", 32, _COUNT),
            Task("passage_retrieval_en", "retrieval", 32, _WHICH),
            Task("passage_retrieval_zh", "retrieval_zh", 32, _WHICH_ZH),
            Task("lcc", "code", 64, _LINE, chat=False),
            Task("repobench-p", "code", 64, _REPOSITORY, chat=False),
        )
    }
)
"""By name, in LongBench's order."""
