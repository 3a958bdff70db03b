"""What a setting is measured on: a model behind a prompt of a real text, its next tokens, a real decode, and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from .. import kernels
from ..benchmarks.decode_steps import captured, decode_step, exact_step
from ..config import CacheConfig
from ..cost import CacheCost
from ..errors import ConfigError
from ..evaluation.continuation import Continuation
from ..evaluation.fidelity import text_windows
from ..evaluation.teacher_forced import from_codebooks
from ..models import fingerprint
from ..presets import Preset
from ..quantization import Codebooks, anchors_of, default_codebooks
from ..results.provenance import commit, device_name, today
from ..shapes import ModelShape
from .space import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT, POSITIONS, ROUNDS = 2048, 256, 3
PLAIN = 6
"""Steps before the one that flushes, of which the first is not timed."""


@dataclass(frozen=True)
class Measurement:
    """What a setting costs: milliseconds a token with its error, KL to the exact cache (nats), and bytes of the cache.

    `milliseconds` is a plain step and the flush of a page, shared by its tokens. `kl` is NaN where the model's weights
    are random.
    """

    milliseconds: float
    milliseconds_error: float
    flush_milliseconds: float
    kl: float
    bytes: int


class Workload:
    """See the module.

    Args:
        context: tokens of the prompt, at which time, KL and bytes are taken; as many pages are reserved as it needs.
        positions: tokens behind it that the KL is a mean of.
        rounds: caches that are made and timed for a setting.
        calibration: text for the codebooks, which are made once for each M and nbits and kept (`default_codebooks`).
        span: tokens whose keys share an anchor (see `calibrate`), in all codebooks; 0 for none.
        random_weights: the model's; then codebooks are random, too, and no KL is measured, since it means nothing.

    Raises:
        ValueError: the text is too short. ConfigError: the model's context is, or the model cannot have the span.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        context: int = CONTEXT,
        positions: int = POSITIONS,
        rounds: int = ROUNDS,
        calibration: str | None = None,
        span: int = 0,
        random_weights: bool = False,
        progress: bool = False,
    ) -> None:
        limit = ModelShape.from_config(model).max_context
        if limit and context + positions > limit:
            raise ConfigError(f"context = {context} and {positions} positions are more than the model's {limit}; set "
                              f"context to at most {limit - positions}")  # fmt: skip
        self.model, self.tokenizer, self.context, self.rounds = model, tokenizer, context, rounds
        self.positions, self.span, self.random_weights, self.progress = positions, span, random_weights, progress
        if not random_weights:
            anchors_of(model, span)  # raises before the prompt is run
        self._calibration = {} if calibration is None else {"text": calibration}
        self._shape = ModelShape.from_config(model)
        self._text = sha256(text.encode()).hexdigest()[:16]
        ids = text_windows(tokenizer, text, context + positions, 1)[0]
        self.text = Continuation(model, ids, context)
        self._books: dict[tuple[int, int], Codebooks] = {}
        kernels.wait()

    def about(self) -> dict[str, Any]:
        """All that makes measurements comparable: those of another model, text or device are none of this study."""
        return {
            "model": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "text": self._text,
            "context": self.context,
            "positions": self.positions,
            **({"weights": "random"} if self.random_weights else {}),
            **({"span": self.span} if self.span else {}),  # studies of before had none
            "device": device_name(self.model.device),
            "threads": torch.get_num_threads() if self.model.device.type == "cpu" else 0,
        }

    def codebooks(self, setting: Setting) -> Codebooks:
        key = setting.M, setting.nbits
        if key not in self._books:
            if self.random_weights:
                made = Codebooks.random(self.model, pq=setting.pq(), maps=True, span=self.span)
            else:
                options = {"span": self.span, "progress": self.progress, **self._calibration}
                made = default_codebooks(self.model, self.tokenizer, setting.pq(), **options)
            self._books[key] = made.to(self.model.device)
        return self._books[key]

    def bytes(self, setting: Setting) -> int:
        """Of the cache for `context` tokens, pool, exact tokens and model constants; known without measuring."""
        element = torch.empty(0, dtype=self.model.dtype).element_size()
        cost = CacheCost(self._shape, setting.pq(), setting.cache(), self.context, exact_bytes=element)
        return cost.reserved_bytes + cost.constant_bytes + self._turns_bytes()

    def _turns_bytes(self) -> int:
        """Of the anchors' cosines and sines, float32, which all layers share."""
        spans = -(-self.context // self.span) if self.span else 0
        return spans * self._shape.head_dim * 4

    def kl(self, setting: Setting) -> float:
        """Nats, mean over the positions; NaN where weights are random."""
        if self.random_weights:
            return nan
        frame = self.text.frame(from_codebooks(self.codebooks(setting), setting.page_size), setting.cache())
        return float(frame.kl.mean())

    def measure(self, setting: Setting) -> Measurement:
        """Time, KL and bytes of a setting."""
        times = DecodeTimes()
        for _ in range(1 if self.model.device.type == "cuda" else self.rounds):
            self.time_round(setting, times)
        return Measurement(
            times.milliseconds(setting.page_size), times.error(), times.flush(), self.kl(setting), self.bytes(setting)
        )

    def in_turns(self, settings: Sequence[Setting], rounds: int = 5) -> pd.DataFrame:
        """Settings and the exact cache timed again, taking turns, so that whatever else runs meets all alike.

        Returns:
            DataFrame: setting ("exact" first, where it can be timed alike), milliseconds, milliseconds_error.
        """
        exact = [None] if self.text.is_all_quantized or self.model.device.type == "cpu" else []  # no graph for others
        times: dict[Setting | None, DecodeTimes] = {s: DecodeTimes() for s in (*exact, *settings)}
        for _ in range(rounds):
            for setting, found in times.items():
                self.time_round(setting, found)
        rows = [(str(s or "exact"), t.milliseconds(s.page_size if s else 1), t.error()) for s, t in times.items()]
        return pd.DataFrame(rows, columns=["setting", "milliseconds", "milliseconds_error"])

    def time_round(self, setting: Setting | None, times: DecodeTimes) -> None:
        """Decode on behind the prompt with a new cache (None: the exact one); adds the steps' seconds to `times`."""
        before = self.model.config._attn_implementation
        try:
            if self.model.device.type == "cuda":
                self._time_graph(setting, times)
            else:
                self._time_steps(setting, times)
        finally:
            self.model.set_attn_implementation(before)

    def _time_steps(self, setting: Setting | None, times: DecodeTimes) -> None:
        """Steps on a CPU: plain ones, then one that flushes a page."""
        if setting is None:
            tokens, cache, attention = self.context, deepcopy(self.text.prompt), "sdpa"
        else:
            tokens = self._before_flush(setting.cache())
            cache = self.text.cache(self.codebooks(setting), setting.cache(), tokens, room=PLAIN + setting.page_size)
            attention = "pqlab"
        step = decode_step(self.model, cache, attention, tokens)
        taken = [_seconds(step) for _ in range(PLAIN)]
        times.plain += taken[1:]
        if setting is None or not self._flushes(setting.cache()):
            return
        coded = int(cache.lengths[0, 1])
        times.flushing.append(_seconds(step))
        assert int(cache.lengths[0, 1]) > coded, "this step was to flush a page"

    def _time_graph(self, setting: Setting | None, times: DecodeTimes) -> None:
        """One CUDA graph a step, a whole page of them, flush included."""
        if setting is None:
            step, count = exact_step(self.model, self.context, "flash"), 64
        else:
            count = max(64, setting.page_size)
            config = setting.cache("static")
            cache = self.text.cache(self.codebooks(setting), config, self.context, room=count + 16)
            if not cache.is_compileable:
                raise ConfigError("steps do not run on the CUDA kernels here, the log says why; they are not timed")
            step = decode_step(self.model, cache, "pqlab", self.context)
            step()
            kernels.wait()  # for the kernels that the prompt has asked for
        replay = captured(step)
        taken = []
        for _ in range(count):
            taken.append(_seconds(replay, torch.cuda.synchronize))
        times.pages.append(taken)

    def _flushes(self, config: CacheConfig) -> bool:
        return self.context >= config.num_sinks + config.window_length

    def _before_flush(self, config: CacheConfig) -> int:
        """The count of tokens nearest to the context behind which the step after `PLAIN` others flushes."""
        if not self._flushes(config):
            return self.context
        exact = config.num_sinks + config.window_length - 1 - PLAIN
        page = config.page_size
        tokens = exact + max(0, round((self.context - exact) / page)) * page
        longest = self.text.ids.shape[1]
        return tokens if tokens <= longest else tokens - page


class DecodeTimes:
    """Seconds of decode steps: plain ones and those that flush a page (on a CPU), or whole pages of them (on a GPU)."""

    def __init__(self) -> None:
        self.plain: list[float] = []
        self.flushing: list[float] = []
        self.pages: list[list[float]] = []

    def milliseconds(self, page_size: int) -> float:
        """A token's: the median plain step, and what a flush takes longer, shared by the tokens of a page; or the mean
        step of a page, the median of the pages."""
        if self.pages:
            return 1e3 * statistics.median(map(statistics.mean, self.pages))
        return 1e3 * statistics.median(self.plain) + self.flush() / page_size

    def error(self) -> float:
        """Standard error in milliseconds: of the median step, from the quartiles as if normal; where there are whole
        pages, of the mean of all their steps, which a page that was disturbed makes larger."""
        if self.pages:
            steps = [step for page in self.pages for step in page]
            return 1e3 * statistics.stdev(steps) / len(steps) ** 0.5
        low, _, high = statistics.quantiles(self.plain, n=4)
        return 1e3 * 1.25 * (high - low) / 1.35 / len(self.plain) ** 0.5

    def flush(self) -> float:
        """What the flush of a page takes longer than a plain step, in milliseconds; 0 where it is not timed apart."""
        if not self.flushing:
            return 0.0
        return 1e3 * max(0.0, statistics.median(self.flushing) - statistics.median(self.plain))


def preset_of(workload: Workload, setting: Setting, measured: dict[str, Any] | None = None) -> Preset:
    """The setting as a preset for this model and context, with what was measured of it."""
    shape = workload._shape
    cost = CacheCost(shape, setting.pq(), setting.cache(), workload.context)
    cache = CacheConfig(
        setting.page_size, setting.residual_length, max_pages=max(1, cost.max_pages), policy=setting.policy
    )
    name = Path(shape.name).name
    about = f"tuned for {name} at {workload.context} tokens on {device_name(workload.model.device)}"
    about += f", keys anchored every {workload.span} tokens" if workload.span else ""
    made = {"date": today(), "commit": commit(), **workload.about(), "span": workload.span, "setting": asdict(setting)}
    made |= measured or {}
    return Preset(f"tuned:{name}", about, cache, setting.pq(), made)


def _seconds(step: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    begin = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begin
