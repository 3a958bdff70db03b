"""One harness for all methods: the same windows, the same exact tokens, bits and bytes as stored.

    result = evaluate(model, tokenizer, ["pq-4", "kivi-4"], windows=2)
    result.table()  # a row a method: token bits, bytes, perplexity, KL with its error, agreement, worst 1 %
    result.by_position()  # KL along the text
    result.versus("kivi-4")  # the difference of every other method to it, window by window
    result.frame  # every position of every window

Windows of `length` tokens follow each other without overlap (the stride is the length) and are independent sequences.
Every window is run teacher-forced in the decode path (`teacher_forced`): the first `prompt` tokens are prefilled, every
later position sees codes, sinks and window as token-by-token generation would, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from ..config import CacheConfig
from ..cost import EXACT_BYTES
from ..errors import ConfigError
from ..memory import MIB
from ..models import fingerprint, load_text
from ..models.texts import check_apart
from ..quantization import Codebooks, attention_geometry
from ..quantization.defaults import CALIBRATION_TEXT
from ..quantization.geometry import text_config
from ..results.provenance import commit, device_name, file_sha256, text_record, today, versions
from . import fidelity, methods
from .methods import Method, Setting, token_elements
from .peak import Peak, cache_peaks
from .plan_file import planned_config
from .teacher_forced import schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXTS = (2048, 8192, 32768)
"""Tokens for which a table gives bytes."""

RANGE = 512
"""Positions of a range in tables of KL along the text."""

EXACT = "exact"
"""The first row of every table: the fp16 cache that the others are compared with."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        frame: every position of every window and method, as `fidelity.compare` returns it.
        methods: those that could be made, by name.
        failures: why a method has no numbers, by name.
        order: names as they were asked for.
        peaks: what real caches took of the device at their most, by name; see `peak.cache_peaks`.
        unwatched: why a method that has a real cache has no peak, by name.
        settings: everything that the numbers depend on, as JSON types.
        exact_token_bytes: bytes of one exact fp16 token in all quantized layers, K and V.
    """

    frame: pd.DataFrame
    methods: Mapping[str, Method]
    failures: Mapping[str, str]
    order: tuple[str, ...]
    peaks: Mapping[str, Peak]
    unwatched: Mapping[str, str]
    settings: Mapping[str, Any]
    exact_token_bytes: int

    def table(self, contexts: Iterable[int] = CONTEXTS) -> pd.DataFrame:
        """One row a method, the exact cache first.

        Returns:
            DataFrame: method; token_bits (stored for a quantized token, per element); exact_tokens (sinks + R);
            constants_mib (codebooks and maps, shared by all sequences); bytes_<context>, of one sequence with its
            window and the model constants; peak_mib, the most that the device held above the model while a real cache
            decoded the end of the first window, and prompt_peak_mib, while its beginning was prefilled (NaN for
            methods that are only simulated); the columns of `fidelity.summarize`; note, which for a method without
            numbers says why it has none, and of a peak which fallbacks it had.
        """
        sizes = {f"bytes_{context}": context * self.exact_token_bytes for context in contexts}
        rows: list[dict[str, Any]] = [{"method": EXACT, "token_bits": 8.0 * EXACT_BYTES, "constants_mib": 0.0, **sizes}]
        notes = ["fp16"]
        for name in self.order:
            row: dict[str, Any] = {"method": name}
            if method := self.methods.get(name):
                row |= {
                    "token_bits": method.token_bits,
                    "exact_tokens": method.exact_tokens,
                    "constants_mib": method.constant_bytes / MIB,
                    **{f"bytes_{context}": method.total_bytes(context) for context in contexts},
                }
            rows.append(row)
            notes.append(self.failures.get(name) or (method.note if method else ""))
        for i, row in enumerate(rows):
            if peak := self.peaks.get(row["method"]):
                row |= {"peak_mib": peak.decode / MIB, "prompt_peak_mib": peak.prompt / MIB}
                if peak.fallback:
                    notes[i] = f"{notes[i]}; peak with fallbacks ({peak.fallback})".removeprefix("; ")
            if why := self.unwatched.get(row["method"]):
                notes[i] = f"{notes[i]}; no peak: {why}".removeprefix("; ")
        columns = ["method", "token_bits", "exact_tokens", "constants_mib", *sizes, "peak_mib", "prompt_peak_mib"]
        stored = pd.DataFrame(rows, columns=columns)
        measured = fidelity.summarize(self.frame)
        if len(measured):
            one = measured.iloc[0]
            exact = {"perplexity": one.exact_perplexity, "exact_perplexity": one.exact_perplexity, "change": 0.0}
            exact |= {"kl": 0.0, "agreement": 1.0, "worst_kl": 0.0, "positions": one.positions}
            measured = pd.concat([pd.DataFrame([{"method": EXACT, **exact}]), measured], ignore_index=True)
        measured = measured.reindex(columns=fidelity.SUMMARY)
        return stored.merge(measured, on="method", how="left").assign(note=notes)

    def by_position(self, width: int = RANGE) -> pd.DataFrame:
        """KL in ranges of `width` positions; see `fidelity.by_position`."""
        return fidelity.by_position(self.frame, width)

    def versus(self, name: str) -> pd.DataFrame:
        """Every method beside one of them, window by window; see `fidelity.versus`."""
        return fidelity.versus(self.frame, name)

    def record(self) -> dict[str, Any]:
        """Settings, versions and tables as JSON types; numbers that do not exist (one window's error) are null."""
        ranges = plain_records(self.by_position()) if len(self.frame) else []
        by_window = self.frame.groupby(["method", "window"], sort=False).kl.mean() if len(self.frame) else {}
        if ranges:
            cells = self.frame.groupby(["method", self.frame.position // RANGE, "window"]).kl.mean()
            for part in ranges:
                part["kl_by_window"] = [plain(kl) for kl in cells[part["method"], part["start"] // RANGE]]
        rows = plain_records(self.table())
        for row in rows:
            row["error"] = self.failures.get(row["method"])
            measured = row["method"] in self.methods and row["kl"] is not None
            row["kl_by_window"] = [plain(kl) for kl in by_window[row["method"]]] if measured else []
            row["by_position"] = [
                {key: value for key, value in part.items() if key != "method"}
                for part in ranges
                if part["method"] == row["method"]
            ]
        return {"command": "eval", **self.settings, "methods": rows}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str] | None = None,
    *,
    codebooks: Mapping[str, Codebooks | str | Path] | None = None,
    text: str = "pride",
    calibration: str = CALIBRATION_TEXT,
    windows: int = 2,
    length: int = 2048,
    skip: int = 0,
    config: CacheConfig | None = None,
    prompt: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Every method on the same windows of a text.

    Args:
        model, tokenizer: a pair as `pqlab.load_model` gives it.
        names: methods by name (`methods.names()`); None takes `methods.default_names()`.
        codebooks: more methods, name -> codebooks or the file that holds them.
        text: name of a shipped text or path of a file; `calibration` likewise, for methods that are trained.
        windows, length: windows of `length` tokens, one behind the other, after the first `skip` tokens.
        config: sinks, residual length and page size of all methods that do not bring their own; MILLION and plans for a
            context do.
        prompt: tokens that are prefilled as one chunk and not counted; 1 counts every position that is decoded.
        progress: show bars.

    A method that cannot be made or that fails while it runs is a row of the table that says why, and the others go on.

    Raises:
        ConfigError: an unknown name, settings under which no token would ever be quantized or counted, or a text that
            the methods are calibrated on.
        ValueError: the text is too short for the windows, or the exact model gives values that are not finite.
        FileNotFoundError: no such text.
    """
    config = config or CacheConfig()
    codebooks = dict(codebooks or {})
    chosen = list(dict.fromkeys(methods.default_names() if names is None else names))
    methods.check_names(chosen)
    if any(name.startswith(("pq-", "million-")) for name in chosen):
        check_apart(text, calibration)
    if taken := [name for name in codebooks if name in chosen]:
        raise ConfigError(f"{taken[0]} names a method and codebooks; give the codebooks another name")
    check_window(windows, length, prompt, skip, config, model)
    ids = fidelity.text_windows(tokenizer, load_text(text), length, windows, skip)
    setting = Setting(model, tokenizer, config, calibration, progress)

    made: dict[str, Method] = {}
    errors: dict[str, Exception] = {}
    for name in tqdm([*chosen, *codebooks], desc="preparing", unit="method", disable=not progress):
        try:
            books = codebooks.get(name)
            method = methods.make(name, setting) if books is None else _from_given(name, books, setting)
            check_window(windows, length, prompt, skip, method.config, model)
            made[name] = method
        except Exception as error:
            errors[name] = error
    frame = fidelity.compare(
        model,
        ids,
        {name: method.quantize for name, method in made.items()},
        config,
        prompt=prompt,
        progress=progress,
        own_configs={name: method.config for name, method in made.items()},
        failures=errors,
    )
    caches = {EXACT: (lambda context: DynamicCache(config=model.config), model.config._attn_implementation)}
    caches |= {name: (m.cache, "pqlab") for name, m in made.items() if m.cache and name not in errors}
    peaks, unwatched = cache_peaks(model, ids[0], caches, progress=progress)
    settings = {
        "date": today(),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(model.device),
        "model": {
            "name": Path(str(model.config._name_or_path)).name or type(model).__name__,
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "text": text_record(text),
        "calibration": text_record(calibration),
        "windows": windows,
        "length": length,
        "stride": length,
        "skip": skip,
        "prompt": prompt,
        "cache": {name: asdict(config)[name] for name in ("page_size", "residual_length", "num_sinks")},
        "codebooks": {n: file_sha256(f) for n, f in codebooks.items() if isinstance(f, str | Path) and n in made},
    }
    return Evaluation(
        frame=frame,
        methods=made,
        failures={name: _why(error) for name, error in errors.items()},
        order=(*chosen, *codebooks),
        peaks=peaks,
        unwatched={name: _why(error) for name, error in unwatched.items()},
        settings=settings,
        exact_token_bytes=token_elements(setting.geometry) * EXACT_BYTES,
    )


def _from_given(name: str, books: Codebooks | str | Path, setting: Setting) -> Method:
    """A plan for a context is measured with the sinks and the window that were chosen for it."""
    own = None
    if not isinstance(books, Codebooks):
        own, books = planned_config(books), Codebooks.load(books, setting.model)
    note = f"its own {own.num_sinks} sinks and R {own.residual_length}" if own else ""
    return methods.from_codebooks(name, books, setting, config=own, note=note)


def check_window(windows: int, length: int, prompt: int, skip: int, config: CacheConfig, model: Any) -> None:
    """Raise `ConfigError` for windows in which nothing would be quantized or counted, or that the model cannot take.

    Args:
        model: the model or its config; the others are those of `evaluate`.
    """
    for name, value, least in (("windows", windows, 1), ("prompt", prompt, 1), ("skip", skip, 0)):
        if value < least:
            raise ConfigError(f"{name} = {value} is out of range (at least {least}); the nearest good value is {least}")
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit and length > limit:
        raise ConfigError(f"length = {length} is more than the model's {limit} positions; set it to at most {limit}")
    if length < prompt + 2:
        less = f" or prompt to at most {length - 2}" if length > 2 else ""
        raise ConfigError(
            f"length = {length} leaves no position to count behind a prompt of {prompt}; set length to at least "
            f"{prompt + 2}{less}"
        )
    # the last position predicts a token outside of the window and is not counted
    first = config.num_sinks + config.window_length
    if not any(segment.coded for segment in schedule(length - 1, prompt, config)):
        raise ConfigError(
            f"length = {length} quantizes nothing: {config.num_sinks} sinks and a window of {config.residual_length} "
            f"+ {config.page_size} tokens are exact; set length to at least {max(first, prompt + 1) + 1}, or residual "
            "or page size lower"
        )
    attention_geometry(model)  # raises when there is nothing to quantize


def _why(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def plain_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON types; numbers that do not exist are null."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{key: plain(value) for key, value in row.items()} for row in rows]


def plain(value: Any) -> Any:
    """A number as JSON has it: six significant digits tell more than any window does."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) > 99 else float(f"{value:.6g}")
    return value
