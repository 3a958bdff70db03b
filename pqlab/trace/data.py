"""`DecodeTrace`: everything that happened in a traced decode, as data that needs no model to be read.

Attention is not stored as weights but as what weights are made of: the queries of every step, the exact K and V, and
the codes with their codebooks. Since a token is encoded once and never again, the final codes serve every step, and
any step, layer and head can be looked at afterwards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import in_runs, out_of_range
from ..kernels.reference import dequantize
from ..quantization import Anchors

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
KINDS = ("isolated", "end to end")


@dataclass(eq=False)
class DecodeTrace:
    """A decode of one sequence, step by step, paged PQ beside exact.

    Step 0 is the prompt (one exact chunk); step k > 0 feeds the token chosen at step k - 1. n is the number of tokens
    after the last step, L the captured layers, H kv heads, Hq query heads.

    Attributes:
        meta: settings, model, versions; plain JSON values.
        token_ids: int64 [n], prompt and fed tokens.
        tokens: their texts.
        steps: one row a step: step, token_id and token (fed last), next_id and next_token (chosen by the followed
            run), exact_id and exact_token (the exact run's choice), agree, kl (nats, exact to paged), num_tokens,
            sinks, coded, window (tokens), num_pages, free_pages.
        events: one row a page event: step, kind, page, seq, first_token (code index), count.
        tables: int32 [steps, pages], the page table after each step, -1 where there is none.
        top: one row a (step, run, rank): token_id, token, probability.
        layers: the captured model layers, in the order of the tensors' L axis.
        tensors: per-layer data (empty without capture): "query", "exact_query" [steps, L, Hq, d]; "output",
            "isolated_output", "exact_output" [steps, L, Hq, d]; "k", "v" [L, H, n, d] exact; "exact_k_tail" [L, H,
            n - prompt, d] of the exact run (its prompt part equals k); "codes_k.i", "codes_v.i" [H, coded, M] and
            "books_k.i", "books_v.i" [H, M, C, dm] of layer layers[i], where there is a map with "map_k.i", "map_v.i"
            [H, d, d] to head space; "frequencies" [d/2] of anchored keys.
    """

    meta: dict
    token_ids: torch.Tensor
    tokens: list[str]
    steps: pd.DataFrame
    events: pd.DataFrame
    tables: torch.Tensor
    top: pd.DataFrame
    layers: list[int]
    tensors: dict[str, torch.Tensor]

    # -- what happened ------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.meta["num_heads"]

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return "".join(self.tokens)

    def lengths(self, step: int) -> tuple[int, int, int]:
        """(sinks, coded, window) tokens after `step`."""
        row = self.steps.iloc[self._step(step)]
        return int(row.sinks), int(row.coded), int(row.window)

    def pages(self, step: int) -> pd.DataFrame:
        """The page table after `step`: page, first_token, tokens, fill, text."""
        import pandas as pd

        sinks, coded, _ = self.lengths(step)
        size = self.meta["page_size"]
        rows = []
        for i, page in enumerate(p for p in self.tables[step].tolist() if p >= 0):
            first, count = sinks + i * size, min(size, coded - i * size)
            text = "".join(self.tokens[first : first + count])
            rows.append({"page": page, "first_token": first, "tokens": count, "fill": count / size, "text": text})
        return pd.DataFrame(rows, columns=["page", "first_token", "tokens", "fill", "text"])

    def topk(self, step: int) -> pd.DataFrame:
        """Most likely next tokens after `step` under both runs: run, rank, token_id, token, probability."""
        return self.top[self.top.step == self._step(step)].drop(columns="step").reset_index(drop=True)

    def kernels(self) -> pd.DataFrame:
        """Which backend ran what, and why it and none before it: operation, backend, reason, calls."""
        import pandas as pd

        return pd.DataFrame(self.meta.get("kernels", []), columns=["operation", "backend", "reason", "calls"])

    # -- attention ----------------------------------------------------------------------------------------------

    def attention(self, step: int, layer: int, head: int, kind: str = "isolated") -> pd.DataFrame:
        """Attention weights of one query head at one step, paged beside exact.

        Args:
            step: 0 is the last token of the prompt, whose chunk both runs see exactly.
            layer: a captured model layer.
            head: query head.
            kind: "isolated" gives the paged run's own query and tokens to both; "end to end" compares with the exact
                run, whose query and generated tokens are its own.

        Returns:
            DataFrame: position, token, exact, paged (weights, each sums to 1), region (sink, code or window).
        """
        import pandas as pd

        if kind not in KINDS:
            raise ValueError(f"kind = {kind!r} is unknown; one of {KINDS}")
        if not 0 <= head < self.num_heads:
            raise IndexError(f"{out_of_range('head', head, self.num_heads)}, the model's query heads")
        i = self._layer(layer)
        n = int(self.steps.num_tokens[self._step(step)])
        kv_head = head // (self.num_heads // self.tensors["k"].shape[1])
        k = self.tensors["k"][i, kv_head, :n]
        query = self.tensors["query"][step, i, head]
        paged_k, region = self._as_stored(step, "k", i, kv_head)
        if kind == "isolated":
            exact = self._weights(query, k)
        else:
            prompt = self.meta["prompt_tokens"]
            tail = self.tensors["exact_k_tail"][i, kv_head, : n - prompt]
            exact = self._weights(self.tensors["exact_query"][step, i, head], torch.cat([k[:prompt], tail]))
        return pd.DataFrame(
            {
                "position": range(n),
                "token": self.tokens[:n],
                "exact": exact.numpy(),
                "paged": self._weights(query, paged_k).numpy(),
                "region": region,
            }
        )

    def output_error(self, step: int | None = None) -> pd.DataFrame:
        """Relative error |paged - exact| / |exact| of every head's attention output: step, layer, head, kind, error."""
        import pandas as pd

        self._need_capture()
        paged = self.tensors["output"]
        frames = []
        wanted = range(self.num_steps) if step is None else [self._step(step)]
        for kind, name in zip(KINDS, ("isolated_output", "exact_output"), strict=True):
            exact = self.tensors[name]
            error = (paged - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-12)  # [steps, L, Hq]
            for s in wanted:
                frame = pd.DataFrame(error[s].numpy(), index=self.layers).rename_axis("layer").reset_index()
                frame = frame.melt("layer", var_name="head", value_name="error")
                frames.append(frame.assign(step=s, kind=kind))
        return pd.concat(frames, ignore_index=True)[["step", "layer", "head", "kind", "error"]]

    def _as_stored(self, step: int, side: str, i: int, kv_head: int) -> tuple[torch.Tensor, list[str]]:
        """K or V [n, d] of one head as attention saw it at `step`, and the region of each token."""
        n = int(self.steps.num_tokens[step])
        stored = self.tensors[side][i, kv_head, :n].clone()
        sinks, coded, _ = self.lengths(step)
        if step == 0:  # the prompt is one chunk and sees itself exactly
            return stored, ["sink"] * sinks + ["window"] * (n - sinks)
        codes = self.tensors[f"codes_{side}.{i}"][kv_head : kv_head + 1, :coded]
        books = self.tensors[f"books_{side}.{i}"][kv_head : kv_head + 1]
        if coded:
            x = self._unmap(dequantize(codes, books), side, i, kv_head)[0]
            if side == "k" and "frequencies" in self.tensors:
                x = Anchors(self.meta["span"], self.tensors["frequencies"]).forth(x, torch.arange(coded))
            stored[sinks : sinks + coded] = x
        return stored, ["sink"] * sinks + ["code"] * coded + ["window"] * (n - sinks - coded)

    def _unmap(self, y: torch.Tensor, side: str, i: int, kv_head: int) -> torch.Tensor:
        backward = self.tensors.get(f"map_{side}.{i}")
        return y if backward is None else y @ backward[kv_head].float()

    def _weights(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.softmax(keys @ query * self.meta["scaling"], dim=0)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; tables go into its JSON header. No pickle."""
        path = Path(path)
        header = {
            "pqlab": "decode trace",
            "schema_version": str(SCHEMA_VERSION),
            "meta": json.dumps(self.meta),
            "tokens": json.dumps(self.tokens),
            "layers": json.dumps(self.layers),
            **{name: getattr(self, name).to_json(orient="split") for name in ("steps", "events", "top")},
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors | {"token_ids": self.token_ids, "tables": self.tables}, path, metadata=header)
        return path

    @classmethod
    def load(cls, path: str | Path) -> DecodeTrace:
        """Read what `save` wrote; needs neither the model nor a tokenizer."""
        import pandas as pd

        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("pqlab") != "decode trace":
                raise ValueError(f"{path} is not a decode trace; make one with trace_decode(...).save(path)")
            if header["schema_version"] != str(SCHEMA_VERSION):
                raise ValueError(
                    f"{path} has schema version {header['schema_version']}, this pqlab reads {SCHEMA_VERSION}; "
                    "trace the decode again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        frames = {}
        for name in ("steps", "events", "top"):
            frames[name] = pd.DataFrame(**json.loads(header[name]))
        return cls(
            meta=json.loads(header["meta"]),
            token_ids=tensors.pop("token_ids"),
            tokens=json.loads(header["tokens"]),
            tables=tensors.pop("tables"),
            layers=json.loads(header["layers"]),
            tensors=tensors,
            **frames,
        )

    # -- checks -------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise IndexError(out_of_range("step", step, self.num_steps))
        return step

    def _layer(self, layer: int) -> int:
        self._need_capture()
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not captured; captured are {in_runs(self.layers)}")
        return self.layers.index(layer)

    def _need_capture(self) -> None:
        if not self.layers:
            raise ValueError("this trace holds no attention; trace with layers=... (capture=True captures all)")

    def __repr__(self) -> str:
        agree = self.steps.agree.mean() if len(self.steps) else float("nan")
        return (
            f"DecodeTrace({self.meta['model']}, {self.meta['prompt_tokens']} prompt tokens, {self.num_steps} steps, "
            f"mean KL {self.steps.kl.mean():.4f}, agreement {agree:.0%}, {len(self.layers)} layers captured)"
        )
