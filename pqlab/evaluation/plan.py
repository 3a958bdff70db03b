"""A budget in, a plan out: which M every layer and side gets, chosen by what its error does to the next token.

    p = plan(model, tokenizer, text, bits=2.25)
    cache = p.cache(model)        # PagedPQCache(model, p.codebooks, p.config)
    p.choices; p.certificate      # what was chosen and what was measured

    planner = Planner(model, tokenizer, text)  # several budgets, calibrated once
    planner.plan(bits=2.25); planner.plan(kl=0.002)

What a choice costs is predicted, not tried: `predicted_kl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..errors import ConfigError, UnsupportedModelError
from ..models import calibration_text, load_model
from ..models.defaults import CALIBRATION_TEXT
from ..quantization import Codebooks, LayerCodec, attention_geometry, collect_kv, origin_of, train
from ..quantization.codebook_file import read
from ..quantization.samples import NUM_TOKENS
from ..quantization.sensitivity import value_metrics
from ..results.provenance import device_name
from .fidelity import compare, summarize, text_windows
from .predicted_kl import COLUMNS, predict_kl
from .teacher_forced import from_codebooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BITS = (1, 2, 4, 8)
"""Bits per element that a side can get: codes of 8 bits, d/M = 8 / bits."""
DEFAULT_BITS = (1, 2, 4, 8)

_WIDE, _WIDE_SHARE = 8, 0.25  # bits that only this share of the layers may get: training them takes twice the time
_HELD_OUT = 0.2  # of the text, from its end: costs and certificate are not measured on what was trained on


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` chose.

    Attributes:
        codebooks: a codec per (layer, side), with the M that was chosen.
        config: sinks, residual length and page size that the measurements hold for.
        choices: layer, side, M, nbits (both 0 for an exact layer), bits (per element), kl (nats; predicted, of this
            side alone).
        certificate: what was measured, on what, with which error bars.
    """

    codebooks: Codebooks
    config: CacheConfig
    choices: pd.DataFrame
    certificate: Mapping[str, Any]

    @property
    def bits(self) -> float:
        """Token bits: codes per element, averaged over layers and sides."""
        return self.codebooks.bits_per_element

    def cache(self, model: PreTrainedModel, **settings) -> PagedPQCache:
        """A cache of this plan; settings are those of `PagedPQCache`."""
        return PagedPQCache(model, self.codebooks, self.config, **settings)

    def save(self, path: str | Path) -> None:
        """One file, which `Codebooks.load` reads too."""
        choices = self.choices.to_dict("records")
        self.codebooks.save(path, {"config": asdict(self.config), "choices": choices, "certificate": self.certificate})

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Plan:
        """Read what `save` wrote; refused like `Codebooks.load` when it is not for `model`."""
        codebooks = Codebooks.load(path, model)
        header, _ = read(path)
        if "choices" not in header:
            raise ConfigError(f"{Path(path).name} holds codebooks without a plan; use Codebooks.load")
        choices = pd.DataFrame(header["choices"])[COLUMNS]
        return cls(codebooks, CacheConfig(**header["config"]), choices, header["certificate"])

    def __repr__(self) -> str:
        kl, error = (self.certificate[name] for name in ("kl", "kl_error"))
        around = "" if isnan(error) else f" +- {error:.5f}"  # one window has no error
        return f"Plan({self.bits:.3g} bits per element, KL {kl:.5f}{around} nats on {self.certificate['on']})"


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    bits: float | None = None,
    kl: float | None = None,
    **settings,
) -> Plan:
    """Choose M by layer and side under a budget, train the codebooks, and measure the result.

    Args:
        bits, kl: the budget; see `Planner.plan`. settings: of `Planner`.
    """
    _check_budget(bits, kl)
    return Planner(model, tokenizer, text, **settings).plan(bits=bits, kl=kl)


class Planner:
    """Candidates for every layer and side, trained, and what each would cost: plans for any budget follow at once.

    Args:
        text: one or several; the first four fifths of each are calibrated on, the rest is measured on.
        config: sinks, residual length and page size that the measurements are to hold for.
        choices: bits per element that a side can get, of `BITS`; 8 only in the quarter of the layers that lose most by
            the next smaller choice.
        num_tokens: to calibrate on.
        windows, length: of every text, in tokens, for `costs`, and as many again for certificates.

    Attributes:
        costs: `predict_kl`.

    Raises:
        ConfigError: unknown choices. ValueError: the text is too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Sequence[str],
        *,
        config: CacheConfig | None = None,
        choices: Sequence[int] = DEFAULT_BITS,
        num_tokens: int = NUM_TOKENS,
        windows: int = 2,
        length: int = 1024,
        text_name: str = "",
        progress: bool = True,
    ) -> None:
        choices = sorted(set(choices))
        if not choices or not set(choices) <= set(BITS):
            raise ConfigError(f"choices = {choices} are not of {BITS}")
        every = [text] if isinstance(text, str) else list(text)
        ends = [int(len(one) * (1 - _HELD_OUT)) for one in every]
        # text_windows says so when a text is too short
        held_out = [
            text_windows(tokenizer, one[end:], length, 2 * windows) for one, end in zip(every, ends, strict=True)
        ]
        weighed = [ids for of_one in held_out for ids in of_one[:windows]]
        text = [one[:end] for one, end in zip(every, ends, strict=True)]
        self.model, self.config = model, config or CacheConfig()
        where = "the end of" if len(every) == 1 else f"the end of each of the {len(every)} texts of"
        self._measured_on = f"{windows} x {length} tokens of {where} {text_name or 'the text'}"
        self._windows = [ids for of_one in held_out for ids in of_one[windows:]]
        samples = collect_kv(model, tokenizer, text, num_tokens=num_tokens)
        metrics = value_metrics(model)
        geometry = attention_geometry(model)
        self.origin = origin_of(model, text, samples, text_name)
        self.candidates: dict[int, dict[int, LayerCodec]] = {}
        narrow = [choice for choice in choices if choice != _WIDE]
        costs = []
        for group in filter(None, (narrow, choices[len(narrow) :])):
            if costs:
                samples = samples.of(_worst_layers(costs[0], max(1, round(_WIDE_SHARE * len(geometry)))))
            made = {}
            for choice in tqdm(group, desc="train codebooks", unit="choice", disable=not progress):
                settings = {i: (PQConfig(M=d * choice // 8, nbits=8),) * 2 for i, (_, d) in geometry.items()}
                made[choice] = train(samples, settings, value_metrics=metrics)
            self.candidates |= made
            costs.append(predict_kl(model, weighed, made, self.config))
        self.costs = pd.concat(costs, ignore_index=True)

    def plan(self, *, bits: float | None = None, kl: float | None = None) -> Plan:
        """The plan for one budget, measured on windows that nothing was chosen by.

        Args:
            bits: token bits that may be spent (codes per element, mean over layers and sides); or
            kl: nats that the next-token distributions may diverge, on average; the fewest bits that keep it, measured.
                Where the largest choice of every side does not, the fewest layers are left exact with which it does.

        Raises:
            ConfigError: no budget or two, or one that no choice meets.
        """
        _check_budget(bits, kl)
        lowest, highest = int(self.costs.bits.min()), int(self.costs.bits.max())
        if bits is not None:
            if bits < lowest:
                raise ConfigError(f"bits = {bits} is below the smallest choice, {lowest}; give at least that")
            return self._made(bits)
        best, ratio = None, 1.0  # of measured to predicted
        for _ in range(4):
            budgets = torch.linspace(lowest, highest, 57).tolist()
            enough = (b for b in budgets if ratio * _total(self.costs, allocate(self.costs, b)) <= kl)
            found = self._made(next(enough, highest))
            if found.certificate["kl"] <= kl and (best is None or found.bits < best.bits):
                best = found
            before, ratio = ratio, found.certificate["kl"] / max(found.certificate["predicted_kl"], 1e-12)
            if abs(ratio / before - 1) < 0.03:
                break
        return best or self._with_exact_layers(kl)

    def _with_exact_layers(self, kl: float) -> Plan:
        """The plan with the fewest exact layers that keeps `kl`: those that lose most, the others at their largest."""
        highest = int(self.costs.bits.max())
        chosen = allocate(self.costs, highest)
        lost = pd.Series({key: r.kl for r in self.costs.itertuples() if chosen[key := (r.layer, r.side)] == r.bits})
        order = list(lost.groupby(level=0).sum().sort_values(ascending=False).index)
        low, high, best = 0, len(order) - 1, None  # one layer at least stays quantized
        while low <= high:
            count = (low + high) // 2
            found = self._made(highest, order[:count])
            if found.certificate["kl"] <= kl:
                best, high = found, count - 1
            else:
                low, reached = count + 1, found
        if best is None:
            raise ConfigError(
                f"kl = {kl} is not reached: with all layers but one exact, the plan of {reached.bits:.3g} bits "
                f"measures {reached.certificate['kl']:.2g}; allow that, give larger choices (of {BITS}), or a cache "
                "with a larger residual_length"
            )
        return best

    def _made(self, bits: float, exact: Sequence[int] = ()) -> Plan:
        chosen = allocate(self.costs, bits)
        geometry = attention_geometry(self.model)
        layers = {
            i: LayerCodec(self.candidates[chosen[i, "k"]][i].k, self.candidates[chosen[i, "v"]][i].v)
            for i in geometry
            if i not in exact
        }
        books = Codebooks(layers, self.origin, {i: geometry[i] for i in exact})
        methods = {"plan": from_codebooks(books.to(self.model.device))}
        frame = compare(self.model, self._windows, methods, self.config)
        row = summarize(frame).iloc[0]
        costs = self.costs
        table = costs[[chosen[r.layer, r.side] == r.bits for r in costs.itertuples()]].reset_index(drop=True)
        table.loc[table.layer.isin(exact), ["M", "nbits", "bits", "kl"]] = (0, 0, 16, 0.0)
        certificate = {
            "on": self._measured_on,
            "predicted_kl": float(table.kl.sum()),
            **{name: float(row[name]) for name in ("kl", "kl_error", "change", "agreement", "worst_kl")},
            "residual_length": self.config.residual_length,
            "num_sinks": self.config.num_sinks,
            "device": device_name(self.model.device),
        }
        return Plan(books, self.config, table, certificate)


def _worst_layers(costs: pd.DataFrame, count: int) -> list[int]:
    """Layers, in their order, that lose most by the largest choice of each side."""
    largest = costs[costs.bits == costs.bits.max()]
    return sorted(largest.groupby("layer").kl.sum().nlargest(count).index)


def _check_budget(bits: float | None, kl: float | None) -> None:
    if (bits is None) == (kl is None):
        raise ConfigError("give one budget: bits= (per element) or kl= (nats)")
    name, value = ("bits", bits) if kl is None else ("kl", kl)
    if not 0 < value < inf:
        raise ConfigError(f"{name} = {value} is no budget; give a number above 0")


def _total(costs: pd.DataFrame, chosen: Mapping[tuple[int, str], int]) -> float:
    return sum(r.kl for r in costs.itertuples() if chosen[r.layer, r.side] == r.bits)


def allocate(costs: pd.DataFrame, bits: float) -> dict[tuple[int, str], int]:
    """Bits of every (layer, side) such that their mean is at most `bits` and the sum of the KLs is small.

    Greedy on the lower convex hulls of the (size, KL) curves, which is optimal up to the last step taken.

    Args:
        costs: `predict_kl`: layer, side, bits, elements, kl.
    """
    chosen: dict[tuple[int, str], int] = {}
    steps = []  # (nats saved per bit, key, to, bits it costs)
    elements = {}
    for key, group in costs.sort_values("bits").groupby(["layer", "side"], sort=False):
        points = list(zip(group.bits, group.kl, strict=True))
        elements[key] = int(group.elements.iloc[0])
        at = points[0]
        chosen[key] = int(at[0])
        while True:
            better = [p for p in points if p[0] > at[0] and p[1] < at[1]]
            if not better:
                break
            to = max(better, key=lambda p, at=at: (at[1] - p[1]) / (p[0] - at[0]))
            price = (to[0] - at[0]) * elements[key]
            steps.append(((at[1] - to[1]) / price, key, int(to[0]), price))
            at = to
    left = bits * sum(elements.values()) - sum(chosen[key] * n for key, n in elements.items())
    closed = set()  # a side whose next step did not fit takes no later one: it would start from elsewhere
    for _, key, to, price in sorted(steps, key=lambda step: -step[0]):
        if key in closed or price > left + 1e-6:
            closed.add(key)
            continue
        chosen[key], left = to, left - price
    return chosen


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="as pqlab.load_model takes it")
    parser.add_argument("--device", default="cpu", help="torch device that the model runs on")
    parser.add_argument("--text", default=CALIBRATION_TEXT, help="name of a shipped text or mix, or a file")
    parser.add_argument("--bits", nargs="+", type=float, default=[], help="budgets, bits per element")
    parser.add_argument("--kl", nargs="+", type=float, default=[], help="budgets, nats")
    parser.add_argument("--choices", nargs="+", type=int, default=list(DEFAULT_BITS), help=f"of {BITS}")
    parser.add_argument("--residual", type=int, default=CacheConfig().residual_length, help="exact newest tokens")
    parser.add_argument("--sinks", type=int, default=CacheConfig().num_sinks, help="exact first tokens")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for plan-<budget>.safetensors")


def run(args: argparse.Namespace) -> int:
    """Plan every budget, print what was measured, write the files; the exit status."""
    if not args.bits and not args.kl:
        print("pqlab plan: give budgets: --bits 2.25 or --kl 0.002")
        return 2
    budgets = [*(("bits", b) for b in args.bits), *(("kl", k) for k in args.kl)]
    try:
        for name, budget in budgets:
            _check_budget(**{"bits": None, "kl": None, name: budget})
        if args.bits and min(args.bits) < min(args.choices):
            raise ConfigError(f"bits = {min(args.bits):g} is below the smallest choice, {min(args.choices)}")
        args.out.mkdir(parents=True, exist_ok=True)
        config = CacheConfig(residual_length=args.residual, num_sinks=args.sinks)
        model, tokenizer = load_model(args.model, device=args.device)
        named = {"choices": args.choices, "config": config, "text_name": Path(args.text).name}
        planner = Planner(model, tokenizer, calibration_text(args.text), **named)
        for name, budget in budgets:
            found = planner.plan(**{name: budget})
            path = args.out / f"plan-{name}-{budget:g}.safetensors"
            found.save(path)
            print(f"{path.name}: {found}", flush=True)
    except (UnsupportedModelError, ValueError, OSError) as error:
        print(f"pqlab plan: {error}")
        return 2
    return 0
