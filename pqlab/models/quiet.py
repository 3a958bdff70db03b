"""Keep transformers' load chatter (progress bars, advice) out of notebooks while pqlab loads a model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, no bars; the settings of before come back afterwards.

    One bar of the GGUF reader knows no switch: it writes to sys.stderr, which goes nowhere meanwhile.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
