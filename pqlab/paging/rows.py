"""The page table as a tensor, kept up to date entry by entry: what the kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

NO_PAGE = -1
"""Fills unused entries."""


class PageRows:
    """int32 [row capacity, page capacity] of page ids that grows by doubling; a copy per device, made when stale."""

    def __init__(self) -> None:
        self._replace(np.full((0, 0), NO_PAGE, dtype=np.int32))
        self._version = 0  # counts changes, so that a copy on a device knows whether it is stale
        self._copies: dict[torch.device, tuple[torch.Tensor, int, torch.Tensor]] = {}  # , version, rows last asked for

    def __getstate__(self) -> tuple[np.ndarray, int]:
        return self._array, self._version  # tensors of the same memory would be copied apart from it

    def __setstate__(self, state: tuple[np.ndarray, int]) -> None:
        array, self._version = state
        self._replace(array)
        self._copies = {}

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self._host.shape
        return rows, width

    def write(self, row: int, start: int, pages: Sequence[int]) -> None:
        """Set entries [start, start + len(pages)) of a row; room is made for them."""
        self.reserve(row + 1, start + len(pages))
        self._array[row, start : start + len(pages)] = pages
        self._version += 1

    def erase(self, row: int, start: int, stop: int) -> None:
        self._array[row, start:stop] = NO_PAGE
        self._version += 1

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was; rows past the last are erased."""
        chosen = self._array[list(rows)]  # a copy
        self._array.fill(NO_PAGE)
        self.reserve(len(rows), 0)
        self._array[: len(rows)] = chosen
        self._version += 1

    def reserve(self, num_rows: int, width: int) -> None:
        """Make room for so many rows and pages a row. Doubles, so that growing by one costs O(1) on average."""
        rows, columns = self.shape
        if num_rows <= rows and width <= columns:
            return
        rows = max(num_rows, 2 * rows) if num_rows > rows else rows
        columns = max(width, 2 * columns, 8) if width > columns else columns
        grown = np.full((rows, columns), NO_PAGE, dtype=np.int32)
        grown[: self._array.shape[0], : self._array.shape[1]] = self._array
        self._replace(grown)
        self._version += 1

    def as_tensor(self, num_rows: int, device: str | torch.device) -> torch.Tensor:
        """int32 [num_rows, page capacity]: the live tensor on a CPU, else the device's copy, brought up to date."""
        device = torch.device(device)
        if device.type == "cpu":
            if self._live.shape[0] != num_rows:
                self._live = self._host[:num_rows]
            return self._live
        copy, version, live = self._copies.get(device, (None, -1, None))
        if version == self._version and live.shape[0] == num_rows:  # mostly: every layer of a step asks
            return live
        with torch.inference_mode(False):  # made inside inference mode, it could not be updated outside of it
            if copy is None or copy.shape != self._host.shape:
                copy, version = torch.empty_like(self._host, device=device), -1
            if version != self._version:
                copy.copy_(self._host)
            live = copy[:num_rows]
        self._copies[device] = (copy, self._version, live)
        return live

    def _replace(self, array: np.ndarray) -> None:
        self._array = array  # all changes go through numpy: faster for single entries
        self._host = self._live = torch.from_numpy(array)  # the same memory; `_live`: the rows last asked for
