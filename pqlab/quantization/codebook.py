"""Codebooks of a whole model: a codec per (layer, side), where they come from, and the file they live in.

The file is one safetensors file. Its metadata holds a JSON text under "pqlab" (`Codebooks.header`); its tensors are
named `layers.<layer>.<k|v>.<centroids|forward|backward|mean|spread|frequencies>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import PQConfig
from ..errors import ConfigError
from ..models import fingerprint
from ..paging.layout import SIDES, PageLayout
from .anchors import Anchors
from .codebook_file import CodebookError, read, write
from .codec import Codec, IdentityCodec, PQCodec
from .geometry import Geometry, PQSpec, attention_geometry, describe, num_layers, setting
from .maps import compact_map

if TYPE_CHECKING:
    import pandas as pd

_PARTS = ("centroids", "forward", "backward", "mean", "spread")
_DEFAULT = PQConfig()


@dataclass(frozen=True)
class LayerCodec:
    """The two codecs of one layer."""

    k: Codec
    v: Codec

    @property
    def geometry(self) -> tuple[int, int]:
        return self.k.num_heads, self.k.head_dim

    def to(self, device: torch.device | str) -> LayerCodec:
        return LayerCodec(self.k.to(device), self.v.to(device))


@dataclass(frozen=True)
class Origin:
    """What codebooks were made for and from. `fingerprint` is `pqlab.models.fingerprint`; "" means unknown."""

    model: str = ""
    fingerprint: str = ""
    num_layers: int = 0  # of the model, sliding and other layers included
    text: str = ""
    text_sha256: str = ""
    num_samples: int = 0  # vectors per (layer, kv head, side)
    num_sinks: int = 0  # first tokens of every window, left out of the samples
    window: int = 0
    maps: bool = False
    weighted: bool = False
    scope: str = "head"
    iterations: int = 0
    span: int = 0  # tokens whose keys share an anchor; 0: without anchors
    seed: int = 0
    pqlab_version: str = ""


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Codecs of the full-attention layers of one model, by the model's layer index.

    Args:
        exact: {layer: (kv heads, head size)} of full-attention layers that a cache leaves as they are, in fp16.
    """

    layers: Mapping[int, LayerCodec]
    origin: Origin = field(default_factory=Origin)
    exact: Geometry = field(default_factory=dict)
    _moved: dict[torch.device, Codebooks] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))
        object.__setattr__(self, "exact", {i: tuple(shape) for i, shape in sorted(self.exact.items())})
        spans = {i: layer.k.anchors.span if layer.k.anchors else 0 for i, layer in self.layers.items()}
        if len(set(spans.values())) > 1:
            raise ValueError(f"keys of all layers share one span, or none; these have {spans}")
        if turned := [i for i, layer in self.layers.items() if layer.v.anchors]:
            raise ValueError(f"layer {turned[0]}: values are not turned by their position, so they have no anchors")
        if not self.layers:
            raise CodebookError("codebooks of no layer at all")
        if both := self.layers.keys() & self.exact.keys():
            raise CodebookError(f"layers {sorted(both)} have codecs and are left exact; drop one of both")
        for i, layer in self.layers.items():
            if layer.geometry != (layer.v.num_heads, layer.v.head_dim):
                raise CodebookError(f"layer {i}: K has (heads, d) = {layer.geometry}, V differs")

    @classmethod
    def identity(cls, model: Any, num_heads: int | None = None, head_dim: int | None = None) -> Codebooks:
        """Exact codecs, for a model or config, or as `identity(num_layers, num_heads, head_dim)`. Cannot be saved."""
        geometry, origin = _target(model, num_heads, head_dim)
        return cls({i: LayerCodec(IdentityCodec(*hd), IdentityCodec(*hd)) for i, hd in geometry.items()}, origin)

    @classmethod
    def random(
        cls,
        model: Any,
        num_heads: int | None = None,
        head_dim: int | None = None,
        *,
        pq: PQSpec = _DEFAULT,
        seed: int = 0,
        maps: bool = False,
        span: int = 0,
    ) -> Codebooks:
        """Normally distributed centroids (with maps also what keys are fitted by, and usual anchors where there is a
        span), seeded, without calibration: lossy codecs for tests."""
        geometry, origin = _target(model, num_heads, head_dim)
        if span and not maps:
            raise ConfigError(f"span = {span} goes with maps only; give maps=True, or leave span at 0")
        generator = torch.Generator().manual_seed(seed)
        anchors = {
            d: Anchors(span, 10000 ** -torch.linspace(0, 1, d // 2)) for _, d in geometry.values() if span
        }  # one table of turns for all layers

        def codec(one: PQConfig, heads: int, d: int, side: str) -> PQCodec:
            m = one.num_subspaces(d)
            centroids = torch.randn(heads, m, 2**one.nbits, d // m, generator=generator)
            if not maps:
                return PQCodec(centroids).half()
            rotation = torch.linalg.qr(torch.randn(heads, d, d, generator=generator)).Q
            stretch = torch.rand(heads, 1, d, generator=generator) + 0.5
            moments = {}
            if side == "k":
                moments = {"mean": torch.randn(heads, d, generator=generator) / 4}
                moments["spread"] = torch.rand(heads, d, generator=generator) + 0.5
                moments["anchors"] = anchors.get(d)
            return PQCodec(centroids, *compact_map(rotation * stretch, m), **moments).half()

        layers = {}
        for i, (heads, d) in geometry.items():
            k, v = setting(pq, i)
            layers[i] = LayerCodec(codec(k, heads, d, "k"), codec(v, heads, d, "v"))
        return cls(layers, replace(origin, seed=seed, span=span))

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return tuple(self.layers)

    @property
    def geometry(self) -> Geometry:
        return {i: layer.geometry for i, layer in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the model constants: centroids and maps, those that codecs share counted once."""
        return sum({t.data_ptr(): _stored_bytes(t) for t in self.tensors().values()}.values())

    @property
    def bits_per_element(self) -> float:
        """Token bits (codes, and 16 of exact layers), averaged over layers and sides."""
        codecs = [codec for layer in self.layers.values() for codec in (layer.k, layer.v)]
        exact = 2 * sum(heads * head_dim for heads, head_dim in self.exact.values())
        bits = sum(codec.num_heads * codec.num_subspaces * codec.nbits for codec in codecs)
        return (bits + 16 * exact) / (sum(codec.num_heads * codec.head_dim for codec in codecs) + exact)

    def layer(self, index: int) -> LayerCodec:
        """Codecs of a layer by the model's layer index."""
        if index in self.exact:
            raise CodebookError(f"layer {index} is left exact and has no codec")
        if index not in self.layers:
            raise CodebookError(f"no codebook for layer {index}; these are for {describe(self.geometry)}")
        return self.layers[index]

    def layouts(self, page_size: int) -> tuple[tuple[PageLayout, PageLayout], ...]:
        """A (K, V) page layout per layer, in the order of `layer_ids`, as `PoolLayout` takes them."""
        return tuple((c.k.page_layout(page_size), c.v.page_layout(page_size)) for c in self.layers.values())

    def unfitted(self) -> Codebooks:
        """The same codecs for keys as they are: a cache does not fit them to its sequences (`PQCodec.fit`)."""
        layers = {
            i: replace(layer, k=replace(layer.k, mean=None, spread=None)) if layer.k.can_fit else layer
            for i, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def to(self, device: torch.device | str) -> Codebooks:
        """The same on a device, made once: all caches there share its constants, and what kernels prepare of them."""
        device = torch.empty(0, device=device).device  # with its number
        if device not in self._moved:
            moved = self._moved[device] = self._to(device)
            moved._moved[device] = moved
        return self._moved[device]

    def __deepcopy__(self, memo: dict) -> Codebooks:
        return replace(self, layers=deepcopy(self.layers, memo))

    def _to(self, device: torch.device) -> Codebooks:
        layers = {i: layer.to(device) for i, layer in self.layers.items()}
        anchors = {id(layer.k.anchors): layer.k.anchors for layer in self.layers.values() if layer.k.anchors}
        moved = {key: one.to(device) for key, one in anchors.items()}  # one table of turns for all layers again
        layers = {
            i: replace(layer, k=replace(layer.k, anchors=moved[id(self.layers[i].k.anchors)]))
            if layer.k.anchors
            else layer
            for i, layer in layers.items()
        }
        return Codebooks(layers, self.origin, self.exact)

    @property
    def span(self) -> int:
        """Tokens whose keys share an anchor, 0 without anchors; the same in all layers."""
        return next((layer.k.anchors.span for layer in self.layers.values() if layer.k.anchors), 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every stored tensor by its name in the file."""
        found = {}
        for i, layer in self.layers.items():
            for side, codec in zip(SIDES, (layer.k, layer.v), strict=True):
                found |= {f"layers.{i}.{side}.{name}": tensor for name, tensor in _parts(codec).items()}
        return found

    def check_fits(self, model_or_config: Any, name: str = "codebooks") -> None:
        """Raise `CodebookError`, naming both sides, unless layers, kv heads and head size are those of the model."""
        wanted = attention_geometry(model_or_config)
        have = dict(sorted((self.geometry | self.exact).items()))
        if have != wanted:
            made_for = f" for {self.origin.model}" if self.origin.model else ""
            raise CodebookError(
                f"{name} made{made_for} for {describe(have)}, but the model has {describe(wanted)}; "
                "calibrate codebooks for this model"
            )

    def header(self) -> dict[str, Any]:
        """What the file says about itself, as JSON types."""
        layers = []
        for i, layer in self.layers.items():
            heads, d = layer.geometry
            sides = {
                s: {"M": c.num_subspaces, "nbits": c.nbits, **({"span": c.anchors.span} if c.anchors else {})}
                for s, c in zip(SIDES, (layer.k, layer.v), strict=True)
            }
            layers.append({"layer": i, "heads": heads, "head_dim": d, **sides})
        exact = [{"layer": i, "heads": heads, "head_dim": d} for i, (heads, d) in self.exact.items()]
        return {"origin": asdict(self.origin), "layers": layers, **({"exact": exact} if exact else {})}

    def save(self, path: str | Path, more: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file; an existing file is replaced at once, never left half written.

        Args:
            more: JSON types that the header is to hold beside the codebooks' own.
        """
        if not all(isinstance(codec, PQCodec) for layer in self.layers.values() for codec in (layer.k, layer.v)):
            raise CodebookError("only product-quantization codebooks are saved; identity codecs need no file")
        write(path, {**(more or {}), **self.header()}, self.tensors())

    @classmethod
    def load(cls, path: str | Path, model_or_fingerprint: Any = None) -> Codebooks:
        """Read what `save` wrote.

        Args:
            path: the file.
            model_or_fingerprint: refuse codebooks that were not made for this model (weights and shape), for the model
                of this fingerprint, or for a model of this config's shape; None takes any.

        Raises:
            CodebookError: damaged, foreign, of another schema, or made for another model.
        """
        name = Path(path).name
        header, tensors = read(path)
        try:
            made: dict[tuple[int, int], Anchors] = {}
            layers = {entry["layer"]: _layer(entry, tensors, made) for entry in header["layers"]}
            exact = {entry["layer"]: (entry["heads"], entry["head_dim"]) for entry in header.get("exact", ())}
            books = cls(layers, Origin(**header["origin"]), exact)
        except (KeyError, TypeError, ValueError) as error:
            raise CodebookError(f"{name}: header and tensors do not belong together ({error!r})") from error
        if isinstance(model_or_fingerprint, str):
            books._check_fingerprint(model_or_fingerprint, name)
        elif model_or_fingerprint is not None:
            books.check_fits(model_or_fingerprint, name)
            if hasattr(model_or_fingerprint, "parameters"):  # a config has a shape but no weights
                books._check_fingerprint(fingerprint(model_or_fingerprint), name)
        return books

    def _check_fingerprint(self, expected: str, name: str) -> None:
        if self.origin.fingerprint != expected:
            made_for = f"{self.origin.model or 'a model'} (fingerprint {self.origin.fingerprint or 'unknown'})"
            raise CodebookError(
                f"{name} was made for {made_for}, but the model has fingerprint {expected}; "
                "calibrate codebooks for this model"
            )

    def summary(self) -> pd.DataFrame:
        """One row per (layer, side): heads, head_dim, M, nbits, bits per element, map, bytes of model constants (what
        several share counts with the first of them)."""
        import pandas as pd

        rows, counted = [], set()
        for i, layer in self.layers.items():
            for side, codec in zip(SIDES, (layer.k, layer.v), strict=True):
                parts = _parts(codec)
                own = {t.data_ptr(): _stored_bytes(t) for t in parts.values() if t.data_ptr() not in counted}
                counted |= own.keys()
                rows.append(
                    {
                        "layer": i,
                        "side": side,
                        "heads": codec.num_heads,
                        "head_dim": codec.head_dim,
                        "M": codec.num_subspaces,
                        "nbits": codec.nbits,
                        "bits_per_element": codec.num_subspaces * codec.nbits / codec.head_dim,
                        "map": "forward" in parts,
                        "bytes": sum(own.values()),
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        bits = f"{self.bits_per_element:.3g} bits per element"
        turned = f", keys anchored every {self.span} tokens" if self.span else ""
        left = f", layers {', '.join(map(str, self.exact))} exact" if self.exact else ""
        return f"Codebooks({describe(self.geometry)}{left}, {bits}{turned}, {self.nbytes / 2**20:.1f} MiB of constants)"


def _parts(codec: Codec) -> dict[str, torch.Tensor]:
    if not isinstance(codec, PQCodec):
        return {}
    parts = {name: tensor for name in _PARTS if (tensor := getattr(codec, name)) is not None}
    return parts | ({"frequencies": codec.anchors.frequencies} if codec.anchors else {})


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes in memory: dimensions of stride 0 (one codebook expanded to all heads) count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def _layer(
    entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], made: dict[tuple[int, int], Anchors]
) -> LayerCodec:
    """One layer of a file; its tensors have to be what its header entry says.

    Args:
        made: anchors of earlier layers: those of one table of frequencies are one object, which knows its turns.
    """
    pair = []
    for side in SIDES:
        prefix = f"layers.{entry['layer']}.{side}."
        parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if (frequencies := parts.pop("frequencies", None)) is not None:
            span = entry[side]["span"]
            parts["anchors"] = made.setdefault((span, frequencies.data_ptr()), Anchors(span, frequencies))
        codec = PQCodec(**parts)
        span = codec.anchors.span if codec.anchors else 0
        have = (codec.num_heads, codec.head_dim, codec.num_subspaces, codec.nbits, span)
        said = (entry["heads"], entry["head_dim"], entry[side]["M"], entry[side]["nbits"], entry[side].get("span", 0))
        if have != said:
            raise ValueError(f"{prefix} header says (heads, d, M, nbits, span) = {said}, tensors say {have}")
        pair.append(codec)
    return LayerCodec(*pair)


def _target(model: Any, num_heads: int | None, head_dim: int | None) -> tuple[Geometry, Origin]:
    if isinstance(model, int):
        if num_heads is None or head_dim is None:
            raise TypeError("give a model or config, or num_layers, num_heads and head_dim")
        return dict.fromkeys(range(model), (num_heads, head_dim)), Origin(num_layers=model)
    return attention_geometry(model), Origin(num_layers=num_layers(model))
