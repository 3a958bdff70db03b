"""The text of a traced decode, marked with where each token lies."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from .theme import BAD, GOOD, REGIONS

if TYPE_CHECKING:
    from ..trace import DecodeTrace


def text_html(trace: DecodeTrace, step: int, num_tokens: int = 260) -> str:
    """The last `num_tokens` tokens of the text after `step`, as HTML: sinks, pages, window by colour and on hover."""
    sinks, coded, window = trace.lengths(step)
    size, end = trace.meta["page_size"], sinks + coded + window
    pages = [page for page in trace.tables[step].tolist() if page >= 0]
    start = max(0, end - num_tokens)
    parts = [f"<i>… {start} tokens before …</i> "] if start else []
    runs: list[tuple[str, str, int, int]] = [("sink", "exact sinks", 0, sinks)]
    for i, page in enumerate(pages):
        runs.append(("code", f"page {page}: codes", sinks + i * size, min(sinks + (i + 1) * size, sinks + coded)))
    runs.append(("window", "exact window", sinks + coded, end))
    for number, (region, said, first, last) in enumerate(runs):
        text = "".join(trace.tokens[max(first, start) : last - (last == end)])
        if text:
            shade = "55" if number % 2 else "33"
            style = f"background:{REGIONS[region]}{shade}; border-left: 2px solid {REGIONS[region]}"
            parts.append(f'<span title="{said}" style="{style}">{_lines(text)}</span>')
    row = trace.steps.iloc[step]
    fed = f'<b title="fed at this step" style="border-bottom: 2px solid">{_lines(trace.tokens[end - 1])}</b>'
    colour = GOOD if row.agree else BAD
    other = "" if row.agree else f" (exact: {_lines(row.exact_token)})"
    following = f'<span title="chosen next" style="border: 1px dashed {colour}">{_lines(row.next_token)}</span>{other}'
    body = "".join(parts) + fed + following
    scroll = "max-height:12.5em; overflow-y:auto; display:flex; flex-direction:column-reverse"  # shows the end first
    inner = "line-height:1.5; white-space:normal; padding-right:1em"
    return f'<div style="{scroll}"><div style="{inner}">{body}</div></div>'


def _lines(text: str) -> str:
    return html.escape(text).replace("\n\n", " ¶ ").replace("\n", " ")
