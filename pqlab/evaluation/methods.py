"""What is evaluated: a method is what storage does to K and V, and what this storage weighs.

Methods have names (`make("kivi-4", setting)`). pqlab's own are codebooks, the default ones (`pq-4`) or any others
(`from_codebooks`); the peers are in `pqlab.evaluation.peers`. All are measured with the same exact tokens, unless a
method says that it is another cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from ..cache import PagedPQCache
from ..config import CacheConfig, PQConfig
from ..cost import EXACT_BYTES, FLOAT32, INT32, coded_tokens
from ..errors import ConfigError
from ..quantization import SPAN, Codebooks, attention_geometry, default_codebooks
from ..quantization.defaults import CALIBRATION_TEXT
from ..quantization.geometry import Geometry
from . import teacher_forced
from .teacher_forced import Quantize


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is made for.

    Args:
        model, tokenizer: the pair that is evaluated.
        config: sinks, residual length and page size.
        calibration: name or path of the text for methods that are trained; never the text of the evaluation.
        progress: show bars while a method is trained.
    """

    model: Any
    tokenizer: Any
    config: CacheConfig = field(default_factory=CacheConfig)
    calibration: str = CALIBRATION_TEXT
    progress: bool = False

    @property
    def geometry(self) -> Geometry:
        """{layer: (kv heads, head size)} of the layers that are quantized."""
        return attention_geometry(self.model)


@dataclass(frozen=True, eq=False)
class Method:
    """One way to store keys and values.

    Args:
        name: for people and tables.
        quantize: (layer, K [H, n, d], V [H, n, d]) -> both as they come back; n is a multiple of the page size, and
            what comes back for a token does not depend on tokens of later pages.
        config: sinks, residual length and page size of this method.
        token_elements: elements of one token, K and V of all quantized layers.
        page_bytes: of K and V of all quantized layers as stored: codes, scales, zero points.
        constant_bytes: codebooks and maps, shared by all sequences.
        fit_bytes: of a sequence, what its keys are fitted with (`cache.key_fit`).
        note: how the method was brought to equal terms; "" when there is nothing to say.
        cache: tokens that a sequence may reach -> a real cache, for the "pqlab" attention, whose codebooks are copies
            of its own; None for a method that is only simulated.
    """

    name: str
    quantize: Quantize
    config: CacheConfig
    token_elements: int
    page_bytes: int
    constant_bytes: int = 0
    fit_bytes: int = 0
    note: str = ""
    cache: Callable[[int], PagedPQCache] | None = None

    @property
    def token_bits(self) -> float:
        """Bits stored for a quantized token over its elements: codes, scales, zero points."""
        return 8 * self.page_bytes / (self.config.page_size * self.token_elements)

    @property
    def exact_tokens(self) -> int:
        """Sinks and R; up to page_size - 1 more while the next page fills."""
        return self.config.num_sinks + self.config.residual_length

    def total_bytes(self, context: int) -> int:
        """`sequence_bytes` of this method."""
        more = self.constant_bytes + self.fit_bytes
        return sequence_bytes(context, self.config, self.page_bytes, self.token_elements, more)


def sequence_bytes(context: int, config: CacheConfig, page_bytes: int, token_elements: int, more_bytes: int = 0) -> int:
    """Bytes of one sequence of `context` tokens: pages, page table, sinks, window, and what has one size at any length
    (model constants, fits).

    The window counts as it is allocated, R + page_size tokens in fp16. Sliding-window layers, the same for every
    method, do not count. The other arguments are those of `Method`.
    """
    pages = coded_tokens(context, config) // config.page_size
    exact = (config.num_sinks + config.window_length) * token_elements * EXACT_BYTES
    return pages * page_bytes + INT32 * (pages + 3) + exact + more_bytes


Maker = Callable[[Setting], Method]

_MAKERS: dict[str, Maker] = {}


def register(name: str) -> Callable[[Maker], Maker]:
    """Decorator: `make(name, setting)` calls the function. Raises ValueError when the name is taken."""

    def keep(maker: Maker) -> Maker:
        if name in _MAKERS:
            raise ValueError(f"there is a method {name} already; register this one under another name")
        _MAKERS[name] = maker
        return maker

    return keep


def names() -> list[str]:
    """Every name that `make` knows: pqlab's own, then the peers in alphabetical order of their files."""
    from . import before_rotary, peers  # noqa: F401  importing them registers their methods

    return list(_MAKERS)


def default_names() -> list[str]:
    """The default codebooks and the peers at 4 bits."""
    return [name for name in names() if name.endswith("-4")]


def check_names(chosen: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that `make` does not know; the message lists those it knows."""
    for name in chosen:
        if name not in names():
            close = get_close_matches(name, names(), n=1)
            hint = f'did you mean "{close[0]}"? ' if close else ""
            raise ConfigError(f'there is no method "{name}"; {hint}The methods are {", ".join(names())}')


def make(name: str, setting: Setting) -> Method:
    """The method of this name for a model and cache.

    Raises:
        ConfigError: no such method, or it cannot be used at this page size or head size.
        ImportError: it needs a package that is not installed; the message names it.
    """
    check_names([name])
    return _MAKERS[name](setting)


def from_codebooks(
    name: str, codebooks: Codebooks, setting: Setting, *, config: CacheConfig | None = None, note: str = ""
) -> Method:
    """Product quantization with these codebooks; `config` is the method's own cache, if it is not the setting's.

    Model constants are counted on the codebooks as they are given: a GPU's copy is wider than what is stored.

    Raises `CodebookError` when the codebooks are not for the model's layers and heads.
    """
    codebooks.check_fits(setting.model, name)
    config = config or setting.config
    return Method(
        name=name,
        quantize=teacher_forced.from_codebooks(codebooks.to(setting.model.device), config.page_size),
        config=config,
        token_elements=token_elements(setting.geometry),
        page_bytes=_page_bytes(codebooks, config.page_size),
        constant_bytes=codebooks.nbytes,
        fit_bytes=fit_bytes(codebooks),
        note=note,
        cache=lambda context: PagedPQCache(setting.model, deepcopy(codebooks), config, context=context),
    )


def stored_bytes(codebooks: Codebooks, config: CacheConfig, context: int) -> int:
    """`sequence_bytes` of a cache with these codebooks."""
    elements = token_elements(codebooks.geometry | codebooks.exact)
    more = codebooks.nbytes + fit_bytes(codebooks)
    return sequence_bytes(context, config, _page_bytes(codebooks, config.page_size), elements, more)


def fit_bytes(codebooks: Codebooks) -> int:
    """A float32 scale and shift for every dimension of the keys."""
    fitted = (layer.k for layer in codebooks.layers.values() if layer.k.can_fit)
    return sum(2 * FLOAT32 * codec.num_heads * codec.head_dim for codec in fitted)


def _page_bytes(codebooks: Codebooks, page_size: int) -> int:
    """Of a page's tokens in all full-attention layers: codes, and fp16 in the layers that are left exact."""
    codes = sum(k.page_bytes + v.page_bytes for k, v in codebooks.layouts(page_size))
    return codes + token_elements(codebooks.exact) * page_size * EXACT_BYTES


def token_elements(geometry: Geometry) -> int:
    """Elements of one token, K and V of all layers."""
    return sum(2 * heads * head_dim for heads, head_dim in geometry.values())


def default_pq(setting: Setting, bits: int) -> PQConfig:
    """M and nbits of `pq-4`, `pq-3` and `pq-2`. Raises `ConfigError` where heads of several sizes have no common M."""
    sizes = sorted({head_dim for _, head_dim in setting.geometry.values()})
    if bits == 2 and len(sizes) > 1:
        raise ConfigError(f"pq-2 has one M for all layers; heads of {sizes} elements need codebooks of their own")
    return {4: PQConfig(), 3: PQConfig(nbits=6), 2: PQConfig(M=max(1, sizes[0] // 4))}[bits]


def _default_codebooks(setting: Setting, bits: int, scope: str = "head", *, fit: bool = True, span: int = 0) -> Method:
    """The codebooks of `pqlab.default_codebooks`: M = d/2 with 8 or 6 bits a code, M = d/4 with 8 bits a code."""
    options = {"text": setting.calibration, "scope": scope, "span": span, "progress": setting.progress}
    books = default_codebooks(setting.model, setting.tokenizer, default_pq(setting, bits), **options)
    if not fit:
        return from_codebooks(f"pq-{bits}-unfitted", books.unfitted(), setting, note="keys are not fitted to the text")
    if span:
        note = f"keys turned back to the anchors of {span} tokens each"
        return from_codebooks(f"pq-{bits}-anchored", books, setting, note=note)
    if scope == "head":
        return from_codebooks(f"pq-{bits}", books, setting)
    return from_codebooks(f"pq-{bits}-per-{scope}", books, setting, note=f"the kv heads of a {scope} share a codebook")


for _bits in (4, 3, 2):
    register(f"pq-{_bits}")(partial(_default_codebooks, bits=_bits))
for _bits in (4, 2):
    register(f"pq-{_bits}-anchored")(partial(_default_codebooks, bits=_bits, span=SPAN))
    register(f"pq-{_bits}-unfitted")(partial(_default_codebooks, bits=_bits, fit=False))
    register(f"pq-{_bits}-per-layer")(partial(_default_codebooks, bits=_bits, scope="layer"))
