"""A budget in, a plan out: which M every layer and side gets, chosen by what its error does to the next token.

    p = plan(model, tokenizer, text, bits=2.25)
    p = plan(model, tokenizer, text, mib=20, context=8192)  # and how many tokens stay exact: sinks, residual length
    cache = p.cache(model)  # PagedPQCache(model, p.codebooks, p.config)
    p.choices; p.certificate  # what was chosen and what was measured

    planner = Planner(model, tokenizer, text)  # several budgets, calibrated once
    planner.plan(bits=2.25); planner.plan(kl=0.002)

What a choice costs is predicted, not tried: `predicted_kl` by layer and side, `exact_tokens` for sinks and window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from ..config import CacheConfig, PQConfig
from ..errors import ConfigError
from ..memory import MIB
from ..quantization import Codebooks, LayerCodec, anchors_of, attention_geometry, collect_kv, origin_of, train
from ..quantization.samples import NUM_TOKENS
from ..quantization.sensitivity import value_metrics
from ..results.provenance import device_name
from .allocation import Chosen, allocate, rows_of, worst_layers
from .evaluate import check_window
from .exact_tokens import ExactTokens, exact_sizes, measured
from .fidelity import compare, summarize, text_windows
from .methods import fit_bytes, stored_bytes
from .options import Option, Options, check_budget, check_room, records
from .plan_file import Plan
from .predicted_kl import predict_kl
from .teacher_forced import from_codebooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BITS = (1, 2, 4, 8)
"""Bits per element that a side can get: codes of 8 bits, d/M = 8 / bits."""
DEFAULT_BITS = (1, 2, 4, 8)

LENGTH, CONTEXT_LENGTH = 1024, 2048
"""Tokens of the windows that are measured on: under budgets of token bits, and for a context at most."""

_WIDE, _WIDE_SHARE = 8, 0.25  # bits that only this share of the layers may get: training them takes twice the time
_TRIES, _NEAR = 6, 0.03  # plans measured for a KL at most, and by how much predictions may be off in the end
_HELD_OUT = 0.2  # of the text, from its end: costs and certificate are not measured on what was trained on


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    bits: float | None = None,
    mib: float | None = None,
    kl: float | None = None,
    context: int | None = None,
    **settings,
) -> Plan:
    """Choose M by layer and side under a budget, train the codebooks, and measure the result.

    Args:
        bits, mib, kl: the budget; see `Planner.plan`. context, settings: of `Planner`.
    """
    check_budget(bits, mib, kl, context)
    if mib is not None:
        sizes = (settings.get("choices", DEFAULT_BITS), settings.get("sinks"), settings.get("residuals"))
        page_size = (settings.get("config") or CacheConfig()).page_size
        check_room(model, mib, context, *sizes, page_size)
    return Planner(model, tokenizer, text, context=context, **settings).plan(bits=bits, mib=mib, kl=kl)


class Planner:
    """Candidates for every layer and side, trained, and what each would cost: plans for any budget follow at once.

    Args:
        text: one or several; the first four fifths of each are calibrated on, the rest is measured on.
        config: sinks, residual length and page size that the measurements are to hold for; with a context, those that
            sinks and windows are measured beside.
        context: tokens of a sequence whose bytes the budgets are for; plans then choose sinks and residual length, too.
            None: budgets are of token bits, and those of `config` are taken.
        sinks, residuals: to choose from for a context; None takes `SINKS` and `RESIDUALS`, of which windows that are
            shorter than the context can tell up to a quarter of their length.
        choices: bits per element that a side can get, of `BITS`; 8 only in the quarter of the layers that lose most by
            the next smaller choice.
        span: tokens whose keys are turned back to one anchor (`quantization.anchors`), 0 for none.
        num_tokens: to calibrate on.
        windows, length: of every text, in tokens, for `costs`, and as many again for certificates. A length of None is
            `LENGTH`. For a context it is the context, `CONTEXT_LENGTH` at most, and costs take the first `LENGTH`
            tokens: sinks and windows are measured on all.

    Attributes:
        length: of the windows.
        costs: `predict_kl`.
        options: what sinks and window do to these costs, and what fits a budget.

    Raises:
        ConfigError: unknown choices, sinks and residuals that cannot be chosen from, windows in which nothing is
            quantized, or a span that the model cannot have. ValueError: the text is too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Sequence[str],
        *,
        config: CacheConfig | None = None,
        context: int | None = None,
        sinks: Sequence[int] | None = None,
        residuals: Sequence[int] | None = None,
        choices: Sequence[int] = DEFAULT_BITS,
        span: int = 0,
        num_tokens: int = NUM_TOKENS,
        windows: int = 2,
        length: int | None = None,
        text_name: str = "",
        progress: bool = True,
    ) -> None:
        choices = sorted(set(choices))
        if not choices or not set(choices) <= set(BITS):
            raise ConfigError(f"choices = {choices} are not of {BITS}")
        config = config or CacheConfig()
        length = length or (LENGTH if context is None else min(context, CONTEXT_LENGTH))
        configs = exact_sizes(config, sinks, residuals, context, length)
        for one in configs:
            check_window(windows, length, 1, 0, one, model)
        every = [text] if isinstance(text, str) else list(text)
        ends = [int(len(one) * (1 - _HELD_OUT)) for one in every]
        # text_windows says so when a text is too short
        held_out = [
            text_windows(tokenizer, one[end:], length, 2 * windows) for one, end in zip(every, ends, strict=True)
        ]
        weighed = [ids for of_one in held_out for ids in of_one[:windows]]
        shorter = weighed if context is None else [ids[:, :LENGTH] for ids in weighed]
        text = [one[:end] for one, end in zip(every, ends, strict=True)]
        self.model, self.config, self.context, self.length = model, config, context, length
        where = "the end of" if len(every) == 1 else f"the end of each of the {len(every)} texts of"
        self._measured_on = f"{windows} x {length} tokens of {where} {text_name or 'the text'}"
        self._windows = [ids for of_one in held_out for ids in of_one[windows:]]
        anchors = anchors_of(model, span)
        samples = collect_kv(model, tokenizer, text, num_tokens=num_tokens)
        metrics = value_metrics(model)
        self._geometry = attention_geometry(model)
        self.origin = replace(origin_of(model, text, samples, text_name), span=span)
        self.candidates: dict[int, dict[int, LayerCodec]] = {}
        narrow = [choice for choice in choices if choice != _WIDE]
        costs = []
        for group in filter(None, (narrow, choices[len(narrow) :])):
            if costs:
                count = max(1, round(_WIDE_SHARE * len(self._geometry)))
                samples = samples.of(worst_layers(costs[0], count))
            made = {}
            for choice in tqdm(group, desc="train codebooks", unit="choice", disable=not progress):
                settings = {i: (PQConfig(M=d * choice // 8, nbits=8),) * 2 for i, (_, d) in self._geometry.items()}
                made[choice] = train(samples, settings, value_metrics=metrics, anchors=anchors)
            self.candidates |= made
            costs.append(predict_kl(model, shorter, made, config))
        self.costs = pd.concat(costs, ignore_index=True)
        every = [Codebooks(layers) for layers in self.candidates.values()]
        constants = pd.concat([books.summary() for books in every])
        self.options = Options(
            self.costs,
            self._exact_tokens(configs, weighed, progress),
            context,
            int(constants.groupby(["layer", "side"]).bytes.max().sum()) + max(map(fit_bytes, every)),
        )

    def plan(self, *, bits: float | None = None, mib: float | None = None, kl: float | None = None) -> Plan:
        """The plan for one budget, measured on windows that nothing was chosen by.

        Args:
            bits: token bits that may be spent (codes per element, mean over layers and sides), without a context; or
            mib: of one sequence of `context` tokens as it is stored: codes, sinks, window, and the model constants; or
            kl: nats that the next-token distributions may diverge, on average; the fewest bits that keep it, measured,
                and for a context the fewest bytes. Where the largest choice of every side does not, the fewest layers
                are left exact with which it does.

        Raises:
            ConfigError: no budget or several, one that the planner's context does not go with, or one that no choice
                meets.
        """
        check_budget(bits, mib, kl, self.context)
        if bits is not None:
            return self._of_bits(bits)
        return self._of_bytes(mib) if mib is not None else self._of_kl(kl)

    def _of_bits(self, bits: float) -> Plan:
        if bits < self.options.lowest:
            raise ConfigError(f"bits = {bits} is below the smallest choice, {self.options.lowest}; give at least that")
        return self._made(self.options.at(self.options.exact[0], bits))

    def _of_bytes(self, mib: float) -> Plan:
        fitting = self.options.within(mib * MIB)
        if not fitting:
            least, constants = (n / MIB for n in (self.options.least_bytes(), self.options.constant_bytes))
            raise ConfigError(
                f"mib = {mib} is below the smallest plan of {self.context} tokens, {least:.2f} MiB ({constants:.2f} of "
                "them model constants); give at least that, a shorter context, or smaller choices or residuals"
            )
        return self._made(min(fitting, key=lambda option: (option.kl, option.size)), tried=fitting)

    def _of_kl(self, kl: float) -> Plan:
        best, ratio = None, 1.0  # of measured to predicted
        for _ in range(_TRIES):
            enough = self.options.keeping(kl / ratio)
            option = min(enough, key=lambda option: option.size) if enough else self._largest
            found = self._made(option, tried=enough)
            is_kept = found.certificate["kl"] <= kl
            if is_kept and (best is None or self._size(found) < self._size(best)):
                best = found
            before, ratio = ratio, found.certificate["kl"] / max(found.certificate["predicted_kl"], 1e-12)
            if is_kept and abs(ratio / before - 1) < _NEAR or not is_kept and not enough:
                break
            if not is_kept:  # a step at least, or a miss by a hair would be tried again
                ratio = max(ratio, before * (1 + _NEAR))
        return best or self._with_exact_layers(kl)

    @property
    def _largest(self) -> Option:
        """The largest choices beside the exact tokens with which they diverge least."""
        return self.options.at(min(self.options.exact, key=lambda exact: exact.factor), self.options.highest)

    def _size(self, made: Plan) -> float:
        return made.bits if self.context is None else made.total_bytes(self.context)

    def _with_exact_layers(self, kl: float) -> Plan:
        """The plan with the fewest exact layers that keeps `kl`: those that lose most, the others at their largest."""
        lost = rows_of(self.costs, allocate(self.costs, self.options.highest))
        order = list(lost.groupby("layer").kl.sum().sort_values(ascending=False).index)
        low, high, best = 0, len(order) - 1, None  # one layer at least stays quantized
        while low <= high:
            count = (low + high) // 2
            found = self._made(self._largest, order[:count])
            if found.certificate["kl"] <= kl:
                best, high = found, count - 1
            else:
                low, reached = count + 1, found
        if best is None:
            raise ConfigError(
                f"kl = {kl} is not reached: with all layers but one exact, the plan of {reached.bits:.3g} bits "
                f"measures {reached.certificate['kl']:.2g}; allow that, give larger choices (of {BITS}), or "
                + ("a cache with a larger residual_length" if self.context is None else "larger residuals")
            )
        return best

    def _exact_tokens(self, configs: Sequence[CacheConfig], windows: list[Tensor], progress: bool) -> list[ExactTokens]:
        """Measured at the middle of the choices: what exact tokens change depends little on the codes beside them."""
        if self.context is None:
            return [ExactTokens(self.config)]
        middle = allocate(self.costs, (self.costs.bits.min() * self.costs.bits.max()) ** 0.5)
        quantize = from_codebooks(self._books(middle).to(self.model.device), self.config.page_size)
        predicted = float(rows_of(self.costs, middle).kl.sum())
        options = {"context": self.context, "progress": progress}
        return measured(self.model, windows, quantize, predicted, self.config, configs, **options)

    def _books(self, chosen: Chosen, exact: Sequence[int] = ()) -> Codebooks:
        layers = {
            i: LayerCodec(self.candidates[chosen[i, "k"]][i].k, self.candidates[chosen[i, "v"]][i].v)
            for i in self._geometry
            if i not in exact
        }
        return Codebooks(layers, self.origin, {i: self._geometry[i] for i in exact})

    def _made(self, option: Option, exact: Sequence[int] = (), tried: Sequence[Option] = ()) -> Plan:
        chosen, config = allocate(self.costs, option.budget), option.exact.config
        books = self._books(chosen, exact)
        quantize = from_codebooks(books.to(self.model.device), config.page_size)
        frame = compare(self.model, self._windows, {"plan": quantize}, config)
        row = summarize(frame).iloc[0]
        table = rows_of(self.costs, chosen)
        table["kl"] *= option.exact.factor
        table.loc[table.layer.isin(exact), ["M", "nbits", "bits", "kl"]] = (0, 0, 16, 0.0)
        certificate = {
            "on": self._measured_on,
            "predicted_kl": float(table.kl.sum()),
            **{name: float(row[name]) for name in ("kl", "kl_error", "change", "agreement", "worst_kl")},
            "residual_length": config.residual_length,
            "num_sinks": config.num_sinks,
            "device": device_name(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if self.context is not None:
            size = stored_bytes(books, config, self.context)
            certificate |= {"context": self.context, "bytes": size, "tried": records(tried)}
        return Plan(books, config, table, certificate)
