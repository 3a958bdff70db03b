"""Static mode's token counts: tensors at fixed addresses, which a captured or compiled step advances on the device.

Every row owns its pages from the start. A step counts its tokens in `advance`, and the flush inside `ops.step_` happens
where the counts say so. The host reads them once a chunk (prompts); of the steps that Python runs it keeps an account
of its own, for what has to be refused before anything is changed.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers.utils import is_torchdynamo_compiling

from ..config import CacheConfig
from ..cost import max_pages_for
from ..errors import ResidualOverflowError, UnsupportedModelError
from ..paging import PagePool
from .sequences import SequenceGroup, plain_state


def advance(lengths: torch.Tensor, config: CacheConfig) -> torch.Tensor:
    """int32 [B, 3] (sinks, coded, window) after one more token in every row; `CacheConfig.flush_count` as tensors."""
    sinks, coded, window = lengths.unbind(1)
    to_sink = (sinks < config.num_sinks).int()
    window = window + 1 - to_sink
    spare = window - config.residual_length
    flush = torch.where(window >= config.window_length, spare - (coded + spare) % config.page_size, 0)
    return torch.stack([sinks + to_sink, coded + flush, window - flush], 1)


class StaticGroup(SequenceGroup):
    """A group whose lengths, position and page table are tensors at fixed addresses.

    Args:
        capacity: columns (tokens and pads) a row may reach.
    """

    def __init__(self, pool: PagePool, config: CacheConfig, device: torch.device | str, capacity: int) -> None:
        super().__init__(pool, config, device)
        self.capacity = capacity
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self.before = self.lengths
        self.is_midway = False  # a step that Python runs has begun, and its last layer is still to come
        self._pages = torch.zeros(0, 0, dtype=torch.int32, device=self.device)
        self._page_lists: list[list[int]] = []

    # a decode step, on the device

    def begin_decode(self, batch: int, follows_exact: bool = False) -> None:
        """Called by the first layer of a step, before anything is counted.

        Args:
            batch: sequences of the step.
            follows_exact: layers in front have stored the step by now, in place: where it is refused, they stay ahead.

        A compiled or replayed step runs no Python: nothing stops it halfway here, and it is not counted on the host. On
        a CPU the device's count is read for that; on a GPU, which would have to be waited for, `columns` is then too
        small until the next chunk, and the assertion in `advance` remains.

        Raises:
            RuntimeError: the step or chunk before was cut short.
            ValueError: another batch than the cache was made for.
            ResidualOverflowError: PQC003, the cache is full; nothing was changed.
        """
        if self.is_midway:
            raise self._cut_short()
        if is_torchdynamo_compiling() or self._is_capturing():
            return
        self.is_midway = follows_exact
        self._require_batch(batch)
        if self.device.type == "cpu":
            self.columns = int(self.position)
        self._require_room(self.columns, 1)
        self.is_midway = True
        self.columns += 1

    def end_decode(self) -> None:
        """The last layer of a step is done. Also called where the last layer is compiled and the first is not."""
        self.is_midway = False

    def advance(self) -> None:
        """Count one more token in every row. Called by the first layer of a step; no host synchronization."""
        self.before.copy_(self.lengths)
        self.lengths.copy_(advance(self.lengths, self.config))
        self.position.add_(1)
        fits = self.position <= self.capacity
        torch._assert_async(
            fits, f"[PQC003] a static cache of {self.capacity} tokens is full; make it with a larger context"
        )

    # chunks, on the host

    @plain_state
    def begin_chunk(self, num_columns: int, is_first: bool, follows_exact: bool = False) -> int:
        """Columns before the chunk. The first layer reads the device's counts, the others follow its plan.

        Args:
            num_columns: of the chunk; follows_exact: as in `begin_decode`.

        Raises:
            RuntimeError: layers are missing: of this chunk, or of the step or chunk before it.
            ResidualOverflowError: PQC003, the chunk does not fit; nothing was changed.
        """
        if self.is_midway or is_first == (self.plan is not None):
            raise self._cut_short()
        if not is_first:
            return self.plan.start
        if self.num_rows:
            self.tokens = self.lengths.sum(1).tolist()
            self._coded = self.lengths[:, 1].tolist()
            self.columns = int(self.position)
        self.is_midway = follows_exact
        self._require_room(self.columns, num_columns)
        self.is_midway = False
        return self.columns

    def end_chunk(self) -> None:
        """The last layer of a chunk is done: counts may move on the device again."""
        self.plan = None

    def coded(self, row: int) -> int:
        return int(self._coded[row])

    def page_table(self) -> torch.Tensor:
        return self._pages

    def row_pages(self, row: int) -> list[int]:
        used = -(-self.coded(row) // self.config.page_size)
        return self._page_lists[row][:used]

    def as_frame(self, first_token: int):
        """The page table as `PageTable.as_frame` gives it; reads the lengths from the device."""
        import pandas as pd

        size, layout, rows = self.config.page_size, self.pool.layout, []
        for row, coded in enumerate(self.lengths[:, 1].tolist()):
            for i, page in enumerate(self._page_lists[row][: -(-coded // size)]):
                count = min(size, coded - i * size)
                where = (layout.page_bytes, layout.offset(0, 0, page))
                rows.append((page, row, first_token + i * size, count, count / size, 1, *where))
        names = ["page", "sequence", "first_token", "tokens", "fill", "shared_by", "bytes", "address"]
        return pd.DataFrame(rows, columns=names)

    @plain_state
    def reset(self) -> None:
        """Forget all tokens; rows keep their pages and tensors their addresses, which graphs may hold.

        The pages go back to the pool when the group is garbage.
        """
        self.columns, self.tokens, self.plan, self._any_pad, self._announced = 0, [0] * self.num_rows, None, False, None
        self._coded = [0] * self.num_rows
        self.is_midway = False
        self._real.fill_(True)  # steps on the device record no columns, so none may be left over
        self.lengths.zero_()
        self.position.zero_()

    def select(self, rows) -> None:
        raise UnsupportedModelError('beams and row selection move pages, which static mode does not; set mode="eager"')

    def crop(self, num_columns: int) -> None:
        raise UnsupportedModelError('static mode does not crop; set mode="eager"')

    def check_integrity(self) -> None:
        for row, (sinks, coded, window) in enumerate(self.lengths.tolist()):
            assert 0 <= window < self.config.window_length, (row, sinks, coded, window)
            assert sinks <= self.config.num_sinks and coded <= len(self._page_lists[row]) * self.config.page_size

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _require_next(self, start: int, batch: int) -> None:
        if self.num_rows:
            self._require_batch(batch)
        super()._require_next(start, batch)

    def _require_batch(self, batch: int) -> None:
        if batch != self.num_rows:
            raise ValueError(
                f"a static cache keeps the batch of its first prompt, even when it was reset: it holds {self.num_rows} "
                f"sequences and was given {batch}; make a new cache"
            )

    def _require_room(self, start: int, num_columns: int) -> None:
        if start + num_columns > self.capacity:
            raise ResidualOverflowError(
                f"A static cache of {self.capacity} tokens holds {start} and cannot take {num_columns} more.",
                f'Make the cache with context={start + num_columns} or more, or set mode="eager".',
            )

    @staticmethod
    def _cut_short() -> RuntimeError:
        return RuntimeError(
            "the layers of the last step were not all run (it raised midway, or layers were skipped); "
            "call cache.reset() before going on"
        )

    # what the base class asks for

    _coded: list[int] = []

    def _add_rows(self, count: int) -> None:
        per_row = max_pages_for(self.capacity, 1, self.config)
        pages = self.pool.allocate(count * per_row)
        self.pool.give_back_with(self, partial(self.pool.free, pages))
        self._page_lists = [pages[i * per_row : (i + 1) * per_row] for i in range(count)]
        self._pages = torch.tensor(self._page_lists, dtype=torch.int32, device=self.device)
        self.tokens, self._coded = [0] * count, [0] * count
        self._real = torch.ones(count, self.capacity, dtype=torch.bool)
        self.lengths = torch.zeros(count, 3, dtype=torch.int32, device=self.device)
        self.before = torch.zeros_like(self.lengths)
        for tensor in (self._pages, self.lengths, self.before, self.position):
            torch._dynamo.mark_static_address(tensor)

    def _extend(self, flushed: list[int]) -> None:
        self._coded = [old + new for old, new in zip(self._coded, flushed, strict=True)]

    def _snapshot(self) -> torch.Tensor:
        return self.lengths.clone()

    def _refresh_lengths(self) -> None:
        rows = [self.split(n, self.coded(row)) for row, n in enumerate(self.tokens)]
        self.lengths.copy_(torch.tensor(rows, dtype=torch.int32).view(-1, 3))
        self.position.fill_(self.columns)
