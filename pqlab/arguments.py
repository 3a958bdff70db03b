"""What several commands ask for, with one name, one default and one sentence in all of them.

Model and device, settings of the cache, anchors, texts, codebooks, and kinds of values: whole numbers, files, folders.
The report's command line has underscores where most have dashes: both spellings are taken (`CACHE_FLAGS`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .config import REPORT_RANGES, CacheConfig
from .errors import ConfigError
from .models.hub import offline_unless_hub_answers
from .models.load import check_device
from .models.named import FoundModel, find_model, is_on_hub, names, source_of
from .models.texts import check_text, text_names
from .quantization import SPAN
from .quantization.anchors import check_span

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# -- the model ------------------------------------------------------------------------------------------------------


def add_model_name(
    parser: argparse.ArgumentParser, *, random: bool = True, default: str | None = "default", note: str = ""
) -> None:
    """Add -f/--model and, where time and memory are measured, --random-weights.

    Args:
        random: what the command measures can be measured of random weights. Otherwise there is no such option, and a
            name that means random weights is refused; the parsed `random_weights` is False.
        default, note: what is taken when no model is named, and what the help says of it.
    """
    add = parser.add_argument
    known = [name for name in names() if random or not _is_random(name)]
    add("-f", "--model", default=default, type=str if random else _with_weights,
        help=f"{', '.join(known)}, a Hugging Face id or a model folder{note}")  # fmt: skip
    if random:
        add("--random-weights", action="store_true", help="random weights of the model's shape: time and memory only")
    else:
        parser.set_defaults(random_weights=False)


def add_device(parser: argparse.ArgumentParser, *, numbered: bool = True) -> None:
    """Add --device: cuda where there is one, else cpu.

    Args:
        numbered: the command also runs on a GPU that is not the current one.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    said = "cpu, cuda or cuda:N" if numbered else "cpu or cuda"
    where = {} if numbered else {"choices": ("cpu", "cuda"), "metavar": "DEVICE"}
    parser.add_argument(
        "--device", default=default, **where, help=f"{said} (default: cuda where there is one, else cpu)"
    )


def add_model_arguments(
    parser: argparse.ArgumentParser, *, random: bool = True, half: bool = True, **options: Any
) -> None:
    """Add -f/--model, --random-weights, --half and --device.

    Args:
        half: offer --half; otherwise the parsed `half` is False.
        random, options: of `add_model_name`.
    """
    add_model_name(parser, random=random, **options)
    if half:
        parser.add_argument("--half", action="store_true", help="the model in fp16 (default: fp32)")
    else:
        parser.set_defaults(half=False)
    add_device(parser)


def load(args: argparse.Namespace) -> tuple[FoundModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the arguments name: what was found, and what `FoundModel.load` gives.

    A hub that does not answer is asked once, not for a minute.

    Raises:
        ConfigError: this torch cannot use the device. What `find_model` raises: no such model.
    """
    check_device(args.device)
    far = is_on_hub(args.model, args.random_weights)
    with offline_unless_hub_answers() if far else nullcontext():
        found = find_model(args.model, random=args.random_weights)
        return found, *found.load(torch.float16 if args.half else torch.float32, args.device)


def _is_random(name: str) -> bool:
    return not source_of(name)


def _with_weights(name: str) -> str:
    """The name as `load_model` takes it; refused when it means random weights."""
    if _is_random(name):
        raise argparse.ArgumentTypeError(f"{name} has random weights, of which only time and memory mean something")
    return source_of(name)


# -- the cache ------------------------------------------------------------------------------------------------------

CACHE_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "page_size": ("--page-size", "--page_size"),
        "residual": ("--residual", "--extended-residual", "--extended_residual"),
        "sinks": ("--sinks",),
        "max_pages": ("--max-pages", "--max_pages"),
        "M": ("-M",),
        "nbits": ("--nbits",),
        "policy": ("--policy",),
    }
)
"""Spellings of every setting, the report's among them; the key is where its value is found."""

_CACHE_HELP = {
    "page_size": "tokens of a page",
    "residual": "newest tokens that stay exact",
    "sinks": "first tokens that stay exact",
    "max_pages": "pages of the pool",
}
_UNITS = {"page_size": "TOKENS", "residual": "TOKENS", "sinks": "TOKENS", "max_pages": "PAGES", "nbits": "BITS"}
_REPORTED = {"residual": "extended_residual"}
_LIBRARY = CacheConfig()
_DEFAULTS = {
    "page_size": _LIBRARY.page_size, "residual": _LIBRARY.residual_length, "sinks": _LIBRARY.num_sinks
}  # fmt: skip


def add_cache_arguments(parser: argparse.ArgumentParser, *settings: str, **reported: int) -> None:
    """Add settings of a cache, one value each, in tokens or pages.

    Args:
        settings: keys of `CACHE_FLAGS` with the library's defaults.
        reported: settings with other defaults, which the command holds to the report's ranges; their help says these.
    """
    for name in settings:
        _add_setting(parser, name, type=int, default=_DEFAULTS[name], help=_CACHE_HELP[name])
    for name, default in reported.items():
        said = f"{_CACHE_HELP[name]}: {REPORT_RANGES[_REPORTED.get(name, name)]}"
        _add_setting(parser, name, type=int, default=default, help=said)


def add_cache_choices(parser: argparse.ArgumentParser, **helps: str) -> None:
    """Add settings that take several values to choose from; None when they are not given, of which `helps` speak."""
    for name, said in helps.items():
        kind = {"type": str, "metavar": "NAME"} if name == "policy" else {"type": int}
        _add_setting(parser, name, nargs="+", **kind, help=said)


def add_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """Add --new-tokens: how many a timed generation makes."""
    parser.add_argument("--new-tokens", "--new_tokens", type=int, default=default, metavar="TOKENS",
                        help="tokens that a row of the timed generation makes, at least 2")  # fmt: skip


def add_span(
    parser: argparse.ArgumentParser, default: int | None = 0, note: str = "0: as the model makes them"
) -> None:
    """Add --span: tokens whose keys share an anchor (`quantization.anchors`), checked."""
    parser.add_argument(
        "--span", type=valid_span, default=default, metavar="TOKENS", help="keys of so many tokens are turned back to "
        f"one anchor before they are coded, a power of two from 64, e.g. {SPAN}; {note}",
    )  # fmt: skip


def _add_setting(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    options = {"metavar": _UNITS.get(name), **options}
    parser.add_argument(*CACHE_FLAGS[name], dest=name, **options)


# -- texts and files --------------------------------------------------------------------------------------------------


def add_text(
    parser: argparse.ArgumentParser, default: str = "pride", what: str = "text to measure on", flag: str = "--text"
) -> None:
    """Add an option that takes the name of a shipped text or a text file."""
    said = f"{what}: {', '.join(text_names())} or a UTF-8 text file"
    parser.add_argument(flag, default=default, type=known_text, metavar="TEXT", help=said)


def add_codebooks(parser: argparse.ArgumentParser, what: str, default: str = "none") -> None:
    """Add --codebooks: files, several behind one option or each behind its own; a list of paths."""
    parser.add_argument(
        "--codebooks", nargs="+", action="extend", default=[], type=input_file, metavar="FILE",
        help=f"{what}: files of `pqlab plan`, `pqlab run` or Codebooks.save (default: {default})",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="also print one JSON object, on the last line")


# -- kinds of values --------------------------------------------------------------------------------------------------


def whole(least: int = 1) -> Callable[[str], int]:
    """A kind of argument: whole numbers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is out of range (at least {least})")
        return value

    return number


def above_zero(text: str) -> float:
    """A kind of argument: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range (above 0)")
    return value


def valid_span(text: str) -> int:
    """A kind of argument: tokens that share an anchor, or 0."""
    value = whole(0)(text)
    if value:
        _checked(check_span, value)
    return value


def known_text(name: str) -> str:
    """A kind of argument: a text that there is."""
    _checked(check_text, name)
    return name


def input_file(text: str) -> Path:
    """A kind of argument: a file that there is."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def output_file(text: str) -> Path:
    """A kind of argument: a file that can be written when the work is done, as far as its folder tells."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder for {path}; make it first")
    return path


def output_folder(text: str) -> Path:
    """A kind of argument: a folder, which the command makes where it is missing."""
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file; name a folder")
    return path


def _checked(check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except (ConfigError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
