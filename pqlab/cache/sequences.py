"""Which token lies where: the state that all quantized layers of a cache share, and the plan of one step.

Every row keeps its own real tokens; pads are counted as columns (so that transformers' masks fit) and stored nowhere::

    columns      [ pad pad | t0 t1 t2 ...                                        ]   what transformers counts
    tokens       [0, sinks) exact | [sinks, sinks+coded) codes in pages | [.., n) exact ring

A token behind the sinks has the code index u = token - num_sinks. Code u lies in page `table[row, u // P]`, slot
`u % P`; an exact token with index u lies in ring slot `u % W`, W = R + P. So neither a flush nor a crop moves a token.

The layers of a model arrive one after the other. The first one to bring a step has it planned, pages and all, before
anything is written; the others follow the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

import torch

from ..config import CacheConfig
from ..errors import PageAllocationError, UnsupportedModelError
from ..paging import PagePool, PageTable


def plain_state(method: Callable) -> Callable:
    """Let a method make ordinary tensors even inside `torch.inference_mode()`.

    What a cache keeps has to be changeable inside and outside of inference mode alike: people generate in one and
    crop in the other.
    """

    @wraps(method)
    def wrapped(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class Flush:
    """Tokens of one row that leave the exact part: codes [first, first + count) go to `page_ids` from `first_slot`."""

    row: int
    first: int
    count: int
    page_ids: torch.Tensor  # int32 [pages]
    first_slot: int


@dataclass(frozen=True)
class StepPlan:
    """What one step of `num_columns` new columns does to every row.

    Attributes:
        start: columns before the step.
        num_columns: S, new columns.
        real: bool [B, S], False at pads; None when there is no pad.
        tokens: real tokens of each row before the step.
        counts: real tokens each row gains.
        before, after: int32 [B, 3] (sinks, coded, window) of each row before and after.
        flushes: what leaves the window in this step.
    """

    start: int
    num_columns: int
    real: torch.Tensor | None
    tokens: tuple[int, ...]
    counts: tuple[int, ...]
    before: torch.Tensor
    after: torch.Tensor
    flushes: tuple[Flush, ...]
    is_causal: bool | None = None  # of a first chunk's mask, once it was looked at
    code_indexes: torch.Tensor | None = None  # of the new tokens, once a layer has asked

    @property
    def starts_empty(self) -> bool:
        return not any(self.tokens)


class SequenceGroup:
    """Token counts and page table of a group of layers that keep the same tokens (all full-attention layers).

    Args:
        pool: the page pool; the group takes and returns pages, it never touches their bytes except through it.
        config: page size, residual length, sinks.
        device: where the length tensors live.
    """

    def __init__(self, pool: PagePool, config: CacheConfig, device: torch.device | str = "cpu") -> None:
        self.pool = pool
        self.config = config
        self.device = torch.device(device)
        self.table = PageTable(pool, config.page_size)
        self.columns = 0
        self.tokens: list[int] = []
        self.plan: StepPlan | None = None
        self.lengths = torch.zeros(0, 3, dtype=torch.int32, device=self.device)
        self._real = torch.zeros(0, 0, dtype=torch.bool)  # [B, capacity], on the CPU; grows by doubling
        self._any_pad = False
        self._announced: torch.Tensor | None = None
        self.probe: Callable | None = None
        """Called by every layer after every step with (layer, plan, query, keys, values, output, scaling)."""

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def real(self) -> torch.Tensor:
        """bool [B, columns], False at pads."""
        return self._real[:, : self.columns]

    @property
    def has_pads(self) -> bool:
        return self._any_pad

    @property
    def has_announced_mask(self) -> bool:
        return self._announced is not None

    def coded(self, row: int) -> int:
        """Tokens of a row that are codes in pages."""
        return self.table.num_tokens(row)

    def row_pages(self, row: int) -> Sequence[int]:
        """Page ids of a row in token order."""
        return self.table.pages(row)

    def as_frame(self, first_token: int):
        """`PageTable.as_frame`; `first_token` is the number of sinks before the first page."""
        return self.table.as_frame(first_token)

    def split(self, tokens: int, coded: int) -> tuple[int, int, int]:
        """(sinks, coded, window) of a row of `tokens` real tokens, `coded` of them in pages."""
        sinks = min(tokens, self.config.num_sinks)
        return sinks, coded, tokens - sinks - coded

    def admit_step(self, start: int, batch: int, real: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """What the first layer of a step asks before it has the step planned: is it one that may follow? Changes
        nothing where it is refused.

        Args:
            start, batch, real: as in `plan_step`; real on the CPU.
            mask: bool [B, 1, S, start + S], or None.

        Raises:
            RuntimeError: the step before was not run by all layers.
            ValueError: another number of sequences, or of rows in the announced mask.
            UnsupportedModelError: the mask hides stored tokens from the new ones.
        """
        self._require_next(start, batch)
        if real is not None and self._announced is not None and len(real) != batch:
            times = "" if batch % len(real) else f": mask.repeat_interleave({batch // len(real)}, 0) for beams"
            raise ValueError(
                f"the announced mask has {len(real)} rows and the model brings {batch}: announce one of {batch} rows "
                f"with cache.announce_mask before generation{times}"
            )
        if mask is not None and start:
            self._check_mask(start, real, mask)
        self.plan = None  # what may be left of a step that began at the same column

    def plan_step(self, start: int, num_columns: int, batch: int, real: torch.Tensor | None) -> StepPlan:
        """The plan of the step that begins at column `start`; made by the first layer that asks, read by the others.

        Args:
            start: columns the asking layer has seen.
            num_columns: S.
            batch: B.
            real: bool [B, S] on any device, False at pads; None when all columns are tokens.

        Raises:
            PageAllocationError: PQC001; nothing was changed, the same step may be tried again after pages were freed.
        """
        plan = self.plan
        if plan is not None and plan.start == start and self.columns == start + num_columns:
            return plan
        return self._plan_step(start, num_columns, batch, real)

    @plain_state
    def _plan_step(self, start: int, num_columns: int, batch: int, real: torch.Tensor | None) -> StepPlan:
        self._require_next(start, batch)
        is_new = not self.num_rows
        if is_new:
            self._add_rows(batch)
        if real is not None:
            real = real.to("cpu")
            if bool(real.all()):
                real = None
        counts = [num_columns] * batch if real is None else real.sum(1).tolist()

        flushed = []
        for row in range(batch):
            _, _, window = self.split(self.tokens[row] + counts[row], self.coded(row))
            flushed.append(self.config.flush_count(self.coded(row), window))
        first = [self.coded(row) for row in range(batch)]
        if any(flushed):
            try:
                self._extend(flushed)  # the only thing that can fail; it changes nothing when it does
            except PageAllocationError:
                if is_new:
                    self._drop_rows()
                raise

        before = self._snapshot()
        tokens = tuple(self.tokens)
        self._record_columns(real, num_columns)
        self.tokens = [n + c for n, c in zip(self.tokens, counts, strict=True)]
        self.columns += num_columns
        self._refresh_lengths()
        self.plan = StepPlan(
            start=start,
            num_columns=num_columns,
            real=real,
            tokens=tokens,
            counts=tuple(counts),
            before=before,
            after=self.lengths,
            flushes=tuple(self._flush(row, first[row], count) for row, count in enumerate(flushed) if count),
        )
        return self.plan

    def page_table(self) -> torch.Tensor:
        """int32 [B, n]: page ids of every row in token order, -1 behind its last page."""
        return self.table.as_tensor(self.device)

    def announce_mask(self, mask: torch.Tensor) -> None:
        """Say which columns are tokens, [B, columns so far or to come], for attentions that do not pass their mask."""
        if mask.dim() != 2:
            raise ValueError(
                f"announce_mask takes the tokenizer's mask [B, columns], not one of shape {list(mask.shape)}"
            )
        self._announced = mask.to("cpu").bool()

    def take_announced(self, start: int, num_columns: int) -> torch.Tensor | None:
        """bool [B, num_columns] of the announced mask from column `start`; columns it does not reach are tokens."""
        if self._announced is None:
            return None
        part = self._announced[:, start : start + num_columns]
        return torch.nn.functional.pad(part, (0, num_columns - part.shape[1]), value=True)

    def first_chunk_mask(self, plan: StepPlan, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of a chunk with nothing before it, or None where it is plainly causal: that needs no mask, and the
        fastest attentions take none. A static cache gets a mask for every prompt, S x S bytes of it.

        Args:
            plan: the step.
            mask: bool [B, 1, S, columns before + S] or None; columns before the chunk are pads, if there are any.

        Returns:
            bool [B, 1, S, S] or None.
        """
        mask = None if mask is None else mask[..., plan.start :]
        if mask is None or plan.real is not None:
            return mask
        if plan.is_causal is None:  # once a step, not once a layer
            causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
            object.__setattr__(plan, "is_causal", bool((mask == causal).all()))
        return None if plan.is_causal else mask

    def code_indexes(self, plan: StepPlan) -> tuple[torch.Tensor, int]:
        """Code indexes of a step's new tokens, int64 [B, 1, S], below 0 for sinks, and a bound for them.

        Pads have that of the token before them.
        """
        if plan.code_indexes is None:  # once a step, not once a layer
            first = torch.tensor(plan.tokens) - self.config.num_sinks  # [B]
            if plan.real is None:
                index = first[:, None] + torch.arange(plan.num_columns)
            else:
                index = first[:, None] + plan.real.long().cumsum(1) - 1
            object.__setattr__(plan, "code_indexes", index[:, None].to(self.device))
        return plan.code_indexes, max(plan.tokens) - self.config.num_sinks + plan.num_columns

    def _require_next(self, start: int, batch: int) -> None:
        if start != self.columns:
            raise RuntimeError(
                f"a layer stands at column {start} while the cache stands at {self.columns}: the layers of the last "
                "step were not all run (it raised midway, or layers were skipped); call cache.reset() before going on"
            )
        if self.num_rows:
            self._require_batch(batch)

    def _require_batch(self, batch: int) -> None:
        if batch != self.num_rows:
            raise ValueError(
                f"the cache holds {self.num_rows} sequences and was given {batch}; select rows with "
                "cache.batch_select_indices / batch_repeat_interleave, or make a new cache"
            )

    def _check_mask(self, start: int, real: torch.Tensor | None, mask: torch.Tensor) -> None:
        """Every token sees all stored ones before it, or is a pad."""
        past = mask[:, 0, :, :start].to("cpu")
        pad = torch.zeros(1, 1, 1, dtype=torch.bool) if real is None else ~real[..., None]
        if not bool(((past == self.real[:, None, :start]) | pad).all()):
            raise UnsupportedModelError(
                "the attention mask hides stored tokens from new ones (a packed, block or sliding pattern), which a "
                "paged PQ layer does not do; use a plain causal mask with padding, or an exact cache for this model"
            )

    def _flush(self, row: int, first: int, count: int) -> Flush:
        size = self.config.page_size
        pages = self.row_pages(row)[first // size : -(-(first + count) // size)]
        return Flush(row, first, count, torch.tensor(pages, dtype=torch.int32, device=self.device), first % size)

    @plain_state
    def crop(self, num_columns: int) -> None:
        """Forget the newest `num_columns` columns of every row: from the window first, then from the last pages."""
        num_columns = min(num_columns, self.columns)
        gone = self.real[:, self.columns - num_columns :].sum(1).tolist()
        for row, count in enumerate(gone):
            self.tokens[row] -= count
            codes = max(0, self.tokens[row] - self.config.num_sinks)
            if codes < self.table.num_tokens(row):
                self.table.truncate(row, codes)
        self.columns -= num_columns
        self._after_surgery()

    @plain_state
    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of the old row rows[i]: pages are shared, not copied."""
        self.table.select(rows)
        self.tokens = [self.tokens[row] for row in rows]
        self._real = self._real[list(rows)]
        if self._announced is not None:
            self._announced = self._announced[list(rows)]
        self._after_surgery()

    @plain_state
    def reset(self) -> None:
        """Forget all sequences and give their pages back."""
        self.columns, self._announced = 0, None
        self._drop_rows()
        self._after_surgery()

    def column_to_token(self) -> torch.Tensor:
        """int64 [B, columns]: the token of each column; a pad points to the token before it (or to 0)."""
        return (self.real.long().cumsum(1) - 1).clamp_min(0)

    def check_integrity(self) -> None:
        """Raise AssertionError when counts, table and pool disagree."""
        self.table.check_integrity()
        assert len(self.tokens) == self.table.num_seqs, (len(self.tokens), self.table.num_seqs)
        for row, tokens in enumerate(self.tokens):
            sinks, coded, window = self.split(tokens, self.table.num_tokens(row))
            assert tokens == int(self.real[row].sum()), (row, tokens)
            assert 0 <= window < self.config.window_length, (row, sinks, coded, window)
            assert self.lengths[row].tolist() == [sinks, coded, window], (row, self.lengths[row])

    def _extend(self, flushed: list[int]) -> None:
        self.table.extend(flushed)

    def _snapshot(self) -> torch.Tensor:
        return self.lengths  # `_refresh_lengths` makes a new tensor

    def _after_surgery(self) -> None:
        self.plan = None
        self._refresh_lengths()

    def _refresh_lengths(self) -> None:
        rows = [self.split(n, self.coded(row)) for row, n in enumerate(self.tokens)]
        self.lengths = torch.tensor(rows, dtype=torch.int32, device=self.device).view(-1, 3)

    def _add_rows(self, count: int) -> None:
        for _ in range(count):
            self.table.add_sequence()
        self.tokens = [0] * count
        self._real = torch.ones(count, 64, dtype=torch.bool)
        self._refresh_lengths()

    def _drop_rows(self) -> None:
        self.table.select([])
        self.tokens, self._any_pad = [], False
        self._real = self._real.new_zeros(0, 0)
        self._refresh_lengths()

    def _record_columns(self, real: torch.Tensor | None, num_columns: int) -> None:
        end = self.columns + num_columns
        if end > self._real.shape[1]:
            grown = torch.ones(self.num_rows, max(end, 2 * self._real.shape[1]), dtype=torch.bool)
            grown[:, : self.columns] = self.real
            self._real = grown
        self._real[:, self.columns : end] = True if real is None else real
        self._any_pad = self._any_pad or real is not None
