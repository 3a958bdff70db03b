"""What a model writes by itself: text to calibrate on where none is at hand, or beside texts of one kind.

It is like what the model has read, code and other languages among it, which a novel is not (text that a model draws to
quantize itself: Liu et al. 2023, "LLM-QAT", section 3.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sampled_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int = 16, length: int = 1024, seed: int = 0
) -> list[str]:
    """Texts that the model continues from one random token each, drawn from its distribution as it is.

    Args:
        count: texts, generated as one batch.
        length: tokens of each, the first one included.
        seed: of the first tokens and of the draws; another device or version of torch draws other texts.

    Raises:
        ValueError: nothing to write.
    """
    if count < 1 or length < 2:
        raise ValueError(f"{count} texts of {length} tokens are nothing to write; set at least 1 of 2")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(tokenizer), (count, 1), generator=generator)
    if tokenizer.bos_token_id is not None:
        first = torch.cat([torch.full_like(first, tokenizer.bos_token_id), first], 1)
    ids = first.to(model.device)
    devices = [ids.device] if ids.is_cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return [text.strip() for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]
