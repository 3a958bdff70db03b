"""What a model writes by itself: text to calibrate on where none is at hand, or beside texts of one kind.

It is like what the model has read, code and other languages among it, which a novel is not (text that a model draws to
quantize itself: Liu et al. 2023, "LLM-QAT", section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_OPENINGS = (
    "def ", "class ", "import numpy as np\n", "from __future__ import", '"""', "# -*- coding: utf-8 -*-\n",
    "```python\nimport", "#include <stdio.h>\n", "struct ", "// ", "function ", "public class ",
)  # fmt: skip
"""Beginnings from which a model goes on with source code."""


def sampled_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 16,
    length: int = 1024,
    seed: int = 0,
    openings: Sequence[str] = (),
) -> list[str]:
    """Texts that the model continues from one random token each, drawn from its distribution as it is.

    Args:
        count: texts, generated as one batch.
        length: tokens of each, its beginning included; fewer by as many as its opening is shorter than the longest.
        seed: of the first tokens and of the draws; another device or version of torch draws other texts.
        openings: beginnings that the texts have in turn instead of a random token, such as `CODE_OPENINGS` for source
            code: beside a novel it halves what codebooks lose on code, as real code does (`evaluation/LOG.md`).

    Raises:
        ValueError: nothing to write, or an opening that has no token or leaves no room for others.
    """
    if count < 1 or length < 2:
        raise ValueError(f"{count} texts of {length} tokens are nothing to write; set at least 1 of 2")
    if openings:
        first = [tokenizer(text, add_special_tokens=False).input_ids for text in openings]
        for text, ids in zip(openings, first, strict=True):
            if not 1 <= len(ids) < length:
                raise ValueError(f"the opening {text!r} has {len(ids)} tokens; set one of 1 to {length - 1}")
        first = [first[i % len(first)] for i in range(count)]
    else:
        first = torch.randint(len(tokenizer), (count, 1), generator=torch.Generator().manual_seed(seed)).tolist()
    if tokenizer.bos_token_id is not None:
        first = [[tokenizer.bos_token_id, *ids] for ids in first]
    longest = max(map(len, first))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in first], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in first], device=model.device)
    more = length - longest + (tokenizer.bos_token_id is not None)
    devices = [ids.device] if ids.is_cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        whole = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=more,
            min_new_tokens=more,
            pad_token_id=pad,
        )
    return [text.strip() for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]
