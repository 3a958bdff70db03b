"""`trace_decode`: run a model twice side by side, with a paged PQ cache and exactly, and write down what happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..attention import NAME, handed_over
from ..cache import PagedPQCache
from ..config import CacheConfig
from ..errors import ConfigError
from ..kernels import dispatch
from ..kernels.reference import attend_dense
from ..quantization import Codebooks
from ..results.provenance import versions
from ..transformers_api import cache_argument
from .data import DecodeTrace


@torch.inference_mode()
def trace_decode(
    model,
    tokenizer,
    prompt: str | torch.Tensor,
    steps: int = 64,
    *,
    codebooks: Codebooks,
    config: CacheConfig | None = None,
    layers: Iterable[int] | None = None,
    capture: bool = True,
    follow: str = "paged",
    top: int = 10,
    progress: bool = False,
) -> DecodeTrace:
    """Greedy decode of one prompt, token by token, with a paged PQ cache beside an exact cache on the same tokens.

    Args:
        model: a Hugging Face causal LM; its attention is switched to "pqlab" for the run and back.
        tokenizer: its tokenizer; None where token ids are given, tokens then show as their ids.
        prompt: text, or int64 [1, n] token ids.
        steps: tokens to decode after the prompt.
        codebooks, config: of the paged cache.
        layers: model layers whose queries, K, V and outputs are kept; default: all quantized ones.
        capture: False keeps no attention, only tokens, pages and distributions.
        follow: which run chooses the next token, "paged" or "exact"; both are fed with it.
        top: next tokens kept of each run at each step.
        progress: show a progress bar.

    Returns:
        DecodeTrace. The model and its settings are as before.

    Raises:
        ConfigError: settings that cannot be traced; said before anything runs.
        ValueError: a prompt that is none or exceeds the model's context with its steps, or layers that have no codes.
    """
    _check_settings(steps, top, follow, config)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; give one, or token ids [1, n]")
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    else:
        ids = prompt.to(model.device)
    if ids.shape[0] != 1 or not ids.shape[1]:
        raise ValueError(f"trace_decode takes one prompt of at least one token, got ids of shape {list(ids.shape)}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and ids.shape[1] + steps > limit:
        raise ValueError(f"{ids.shape[1]} prompt tokens and {steps} steps exceed the model's context of {limit}")
    cache = PagedPQCache(model, codebooks, config, context=ids.shape[1] + steps)
    kept = [layer.index for layer in cache.quantized_layers] if layers is None else sorted(set(layers))
    unknown = set(kept) - {layer.index for layer in cache.quantized_layers}
    if unknown:
        raise ValueError(f"layers {sorted(unknown)} are not quantized in this model; {cache.layer_kinds()}")
    kept = kept if capture else []

    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        return _run(model, tokenizer, ids, steps, cache, kept, follow, top, progress)
    finally:
        model.set_attn_implementation(before)


def _check_settings(steps: int, top: int, follow: str, config: CacheConfig | None) -> None:
    for name, value, low in (("steps", steps, 0), ("top", top, 1)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"{name} = {value!r} is not a whole number")
        if value < low:
            raise ConfigError(f"{name} = {value} is out of range (at least {low}); the nearest good value is {low}")
    if follow not in ("paged", "exact"):
        raise ConfigError(f'follow = {follow!r} is unknown; "paged" or "exact"')
    if config is not None and config.mode != "eager":
        raise ConfigError(
            f'a trace shows pages as they are taken, and mode = "{config.mode}" takes all at the start; trace with '
            'dataclasses.replace(config, mode="eager"), which chooses the same tokens'
        )


def _run(model, tokenizer, ids, steps, cache, kept, follow, top, progress) -> DecodeTrace:
    import pandas as pd

    ran_before = dispatch.runs()
    paged_probe, exact_probe = _PagedProbe(kept), _ExactProbe(kept)
    exact = _probed_exact_cache(model, exact_probe)
    if kept:
        cache.group.probe = paged_probe
    events: list[dict] = []
    step = 0
    cache.table.listener = lambda event: events.append({"step": step, **vars(event)})
    rows, tops, tables = [], [], []
    fed, prompt_tokens = ids, ids.shape[1]
    numbers = range(steps + 1)
    if progress:
        from tqdm.auto import tqdm

        numbers = tqdm(numbers, desc="tracing", unit="token")
    for step in numbers:  # noqa: B007 (the listener reads it)
        paged_logits = model(fed, **cache_argument(model, cache), logits_to_keep=1).logits[0, -1].float()
        exact_logits = model(fed, **cache_argument(model, exact), logits_to_keep=1).logits[0, -1].float()
        p, q = exact_logits.log_softmax(-1), paged_logits.log_softmax(-1)
        chosen = int((q if follow == "paged" else p).argmax())
        sinks, coded, window = cache.lengths[0].tolist()
        rows.append(
            {
                "step": step,
                "token_id": int(fed[0, -1]),
                "next_id": chosen,
                "exact_id": int(p.argmax()),
                "agree": bool(p.argmax() == q.argmax()),
                "kl": float((p.exp() * (p - q)).sum().clamp_min(0)),
                "num_tokens": cache.get_seq_length(),
                "sinks": sinks,
                "coded": coded,
                "window": window,
                "num_pages": len(cache.table.pages(0)),
                "free_pages": cache.pool.num_free,
            }
        )
        for run, logs in (("exact", p), ("paged", q)):
            best = logs.topk(min(top, len(logs)))
            for rank, (value, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                probability = float(torch.tensor(value).exp())
                tops.append({"step": step, "run": run, "rank": rank, "token_id": token, "probability": probability})
        tables.append(list(cache.table.pages(0)))
        if step < steps:
            fed = torch.tensor([[chosen]], device=ids.device)
            ids = torch.cat([ids, fed], 1)

    decode = _as_ids if tokenizer is None else tokenizer.decode
    tokens = _texts(decode, ids[0].tolist())
    frame, tops_frame = pd.DataFrame(rows), pd.DataFrame(tops)
    for column in ("token", "next", "exact"):
        source = "token_id" if column == "token" else f"{column}_id"
        name = "token" if column == "token" else f"{column}_token"
        frame[name] = [decode([i]) for i in frame[source]]
    tops_frame["token"] = [decode([i]) for i in tops_frame.token_id]
    width = max(map(len, tables), default=0)
    table = torch.full((len(tables), width), -1, dtype=torch.int32)
    for i, pages in enumerate(tables):
        table[i, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return DecodeTrace(
        meta=_meta(model, cache, prompt_tokens, follow, paged_probe.scaling) | {"kernels": _kernels(ran_before)},
        token_ids=ids[0].cpu(),
        tokens=tokens,
        steps=frame,
        events=pd.DataFrame(events, columns=["step", "kind", "page", "seq", "first_token", "count"]),
        tables=table,
        top=tops_frame,
        layers=kept,
        tensors=_tensors(cache, kept, paged_probe, exact, exact_probe, prompt_tokens) if kept else {},
    )


class _PagedProbe:
    """Collects, per kept layer, queries and outputs of each step, the exact K and V, and the isolated outputs."""

    def __init__(self, kept: list[int]) -> None:
        self.kept = kept
        self.scaling: float | None = None
        self.k, self.v = ({i: [] for i in kept} for _ in range(2))
        self.query, self.output, self.isolated = ({i: [] for i in kept} for _ in range(3))

    def __call__(self, layer, plan, query, keys, values, output, scaling) -> None:
        i = layer.index
        if i not in self.k:
            return
        self.scaling = scaling
        self.k[i].append(keys[0].float().cpu())
        self.v[i].append(values[0].float().cpu())
        last, k, v = query[:1, :, -1:].float().cpu(), torch.cat(self.k[i], 1), torch.cat(self.v[i], 1)
        self.k[i], self.v[i] = [k], [v]
        self.query[i].append(last[0, :, 0])
        self.output[i].append(output[0, :, -1].float().cpu())
        isolated, _ = attend_dense(last, k[None], v[None], None, scaling)
        self.isolated[i].append(isolated[0, :, 0])


class _ExactProbe:
    """The same for the exact run: queries and outputs (its K stay in its cache)."""

    def __init__(self, kept: list[int]) -> None:
        self.kept = set(kept)
        self.query, self.output = ({i: [] for i in kept} for _ in range(2))


class _ProbedLayer(DynamicLayer):
    """transformers' exact layer; the "pqlab" attention asks it for the output as it asks a paged layer."""

    def __init__(self, index: int, probe: _ExactProbe) -> None:
        super().__init__()
        self.index, self.probe = index, probe

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return handed_over(keys, self), values

    def attend(self, query, mask, scaling):
        groups = query.shape[1] // self.keys.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (self.keys, self.values))
        causal = mask is None and query.shape[2] > 1
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, mask, scale=scaling, is_causal=causal)
        if self.index in self.probe.kept:
            self.probe.query[self.index].append(query[0, :, -1].float().cpu())
            self.probe.output[self.index].append(out[0, :, -1].float().cpu())
        return out


def _probed_exact_cache(model, probe: _ExactProbe) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _ProbedLayer(i, probe)
    return cache


def _tensors(
    cache, kept, paged: _PagedProbe, exact: DynamicCache, probe: _ExactProbe, prompt_tokens: int
) -> dict[str, torch.Tensor]:
    def by_step(lists):
        return torch.stack([torch.stack(lists[i]) for i in kept], 1)  # [steps, L, Hq, d]

    layers = {layer.index: layer for layer in cache.quantized_layers}
    tensors = {
        "query": by_step(paged.query),
        "output": by_step(paged.output),
        "isolated_output": by_step(paged.isolated),
        "exact_query": by_step(probe.query),
        "exact_output": by_step(probe.output),
        "k": torch.stack([paged.k[i][0] for i in kept]),
        "v": torch.stack([paged.v[i][0] for i in kept]),
        "exact_k_tail": torch.stack([exact.layers[i].keys[0, :, prompt_tokens:].float().cpu() for i in kept]),
    }
    if anchors := layers[kept[0]].codec.k.anchors if kept else None:
        tensors["frequencies"] = anchors.frequencies.cpu()
    for position, i in enumerate(kept):
        codec, fit = layers[i].codec, layers[i].fit
        for side, codes, codec_of_side in zip("kv", layers[i].codes(0), (codec.k, codec.v), strict=True):
            tensors[f"codes_{side}.{position}"] = codes.cpu().contiguous()
            books, backward = codec_of_side.centroids, codec_of_side.backward
            if side == "k" and fit is not None:  # (y - shift) / scale: the shift in the books, the scale in the map
                books = books.float() - fit.shift[0].unflatten(-1, (codec_of_side.num_subspaces, 1, -1))
                backward = backward.float() / fit.scale[0, :, :, None]
            tensors[f"books_{side}.{position}"] = books.cpu().contiguous()
            if backward is not None:
                tensors[f"map_{side}.{position}"] = backward.cpu()
    return tensors


def _as_ids(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def _texts(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """The text each token adds; tokens that end inside a character add it with the token that completes it."""
    texts, done = [], ""
    window: list[int] = []
    for token in ids:
        window.append(token)
        whole = decode(window)
        if whole.endswith("\ufffd"):  # a character's first bytes: wait for the rest
            texts.append("")
            continue
        texts.append(whole[len(done) :] if whole.startswith(done) else decode([token]))
        window, done = window[-4:], decode(window[-4:])
    return texts


def _kernels(before: dict[tuple[str, str, str], int]) -> list[dict]:
    """What ran since then: operation, backend, reason, calls."""
    now = {key: count - before.get(key, 0) for key, count in dispatch.runs().items()}
    columns = ("operation", "backend", "reason")
    return [dict(zip(columns, key, strict=True)) | {"calls": count} for key, count in now.items() if count]


def _meta(model, cache: PagedPQCache, prompt_tokens: int, follow: str, scaling: float | None) -> dict:
    text = model.config.get_text_config()
    return {
        "model": getattr(model.config, "_name_or_path", "") or model.config.model_type,
        "model_type": model.config.model_type,
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": cache.quantized_layers[0].codec.k.num_heads,
        "head_dim": cache.quantized_layers[0].codec.k.head_dim,
        "layer_kinds": cache.layer_kinds(),
        "scaling": scaling,
        "prompt_tokens": prompt_tokens,
        "follow": follow,
        "page_size": cache.settings.page_size,
        "residual_length": cache.settings.residual_length,
        "num_sinks": cache.settings.num_sinks,
        "max_pages": cache.pool.max_pages,
        "page_bytes": cache.pool.layout.page_bytes,
        "span": cache.codebooks.span,
        "pqlab": versions().get("pqlab", ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
