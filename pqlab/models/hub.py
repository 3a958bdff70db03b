"""Is the Hugging Face hub there? Its client retries for half a minute per file before it says no."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

FLAG = "HF_HUB_OFFLINE"


def hub_answers(timeout: float = 3.0) -> bool:
    """One short request, through the proxies of the environment; any answer counts, a refusal too."""
    from huggingface_hub import constants

    if getattr(constants, FLAG):
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


@contextmanager
def offline_unless_hub_answers() -> Iterator[bool]:
    """Inside, a hub that does not answer is not asked again: its client and `datasets` read their caches. Yields
    whether it answers."""
    answers = hub_answers()
    with ExitStack() as stack:
        for name in () if answers else ("huggingface_hub.constants", "datasets.config"):
            try:
                module = import_module(name)
            except ImportError:  # datasets is an extra
                continue
            stack.callback(setattr, module, FLAG, getattr(module, FLAG))
            setattr(module, FLAG, True)
        yield answers
