"""Where a byte lies: the only place that computes addresses inside pages and inside the pool.

One page holds the codes of `page_size` tokens for one (layer, side); side is K or V. In the pool the same page id
addresses the same slot of every layer and side::

    pool     [ layer 0 K | layer 0 V | layer 1 K | ... ]                    one uint8 buffer
    one side [ page 0 | page 1 | ... | page max_pages-1 ]                   page_bytes each
    one page [ head 0 | head 1 | ... ]                                      head_bytes each
    tiled    [ tile of 16 tokens ][ subspace ][ 16 codes, bit-packed ]      the layout of the kernels
    row_major  [ token ][ subspace ]                                        as a decoder writes it
    transposed [ subspace ][ token ]                                        MILLION's V layout

A tile packs 16 codes of one subspace little-endian into `2 * nbits` bytes: code t occupies the bits
[t * nbits, (t + 1) * nbits). So 8-bit codes are plain bytes and 4-bit codes lie two to a byte, low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import out_of_range

TILE = 16
"""Tokens per tile: one 16-byte load holds one subspace of a tile at 8 bits."""

Order = Literal["tiled", "row_major", "transposed"]
ORDERS: tuple[Order, ...] = ("tiled", "row_major", "transposed")
SIDES = ("k", "v")


@dataclass(frozen=True)
class PageLayout:
    """Byte layout of one page of one (layer, side).

    Args:
        page_size: tokens per page, a multiple of 16.
        num_heads: kv heads.
        num_subspaces: M, codes per (token, head).
        nbits: bits per code, 1 to 8; 32 is the identity codec (one float per dimension, M = head size).
        order: "tiled" is what the cache and the kernels use; the other two exist for comparison.
    """

    page_size: int
    num_heads: int
    num_subspaces: int
    nbits: int
    order: Order = "tiled"

    def __post_init__(self) -> None:
        if self.page_size <= 0 or self.page_size % TILE:
            raise ValueError(f"page_size must be a positive multiple of {TILE}, got {self.page_size}")
        if self.nbits not in (*range(1, 9), 32):
            raise ValueError(f"nbits must be 1..8 (or 32, the identity codec), got {self.nbits}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")

    @property
    def num_tiles(self) -> int:
        return self.page_size // TILE

    @property
    def tile_bytes(self) -> int:
        """Bytes of one subspace of one tile: 16 codes of nbits."""
        return 2 * self.nbits

    @property
    def head_bytes(self) -> int:
        return self.num_tiles * self.num_subspaces * self.tile_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_heads * self.head_bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one tiled page as bytes: [heads, tiles, subspaces, tile_bytes]."""
        return self.num_heads, self.num_tiles, self.num_subspaces, self.tile_bytes

    def bit_address(self, slot: int, head: int, subspace: int) -> int:
        """First bit of a code inside its page; divide by 8 for the byte. `slot` is the token's place in the page."""
        self._check("slot", slot, self.page_size)
        self._check("head", head, self.num_heads)
        self._check("subspace", subspace, self.num_subspaces)
        if self.order == "tiled":
            tile, lane = divmod(slot, TILE)
            index = (tile * self.num_subspaces + subspace) * TILE + lane
        elif self.order == "row_major":
            index = slot * self.num_subspaces + subspace
        else:
            index = subspace * self.page_size + slot
        return head * self.head_bytes * 8 + index * self.nbits

    def address(self, slot: int, head: int, subspace: int) -> tuple[int, int]:
        """(byte, bit in that byte) of a code inside its page."""
        return divmod(self.bit_address(slot, head, subspace), 8)

    @staticmethod
    def _check(name: str, value: int, limit: int) -> None:
        if not 0 <= value < limit:
            raise IndexError(out_of_range(name, value, limit))


@dataclass(frozen=True)
class PoolLayout:
    """Byte layout of a whole pool: for every layer a K and a V `PageLayout`, `max_pages` pages each."""

    layers: tuple[tuple[PageLayout, PageLayout], ...]
    max_pages: int

    def __post_init__(self) -> None:
        sizes = {side.page_size for layer in self.layers for side in layer}
        if len(sizes) > 1:
            raise ValueError(f"all layers of a pool share one page_size, got {sorted(sizes)}")

    @property
    def page_bytes(self) -> int:
        """Bytes that one page id stands for, over all layers, K and V."""
        return sum(side.page_bytes for layer in self.layers for side in layer)

    @property
    def num_bytes(self) -> int:
        return self.page_bytes * self.max_pages

    def offset(self, layer: int, side: int, page: int = 0) -> int:
        """First byte of a page of (layer, side) in the pool buffer; side 0 is K, 1 is V."""
        before = sum(s.page_bytes for pair in self.layers[:layer] for s in pair)
        before += sum(s.page_bytes for s in self.layers[layer][:side])
        return before * self.max_pages + page * self.layers[layer][side].page_bytes

    def view(self, buffer: torch.Tensor, layer: int, side: int) -> torch.Tensor:
        """uint8 [max_pages, heads, tiles, M, tile_bytes]: the pages of (layer, side) as a view of the pool buffer."""
        page = self.layers[layer][side]
        start = self.offset(layer, side)
        return buffer[start : start + self.max_pages * page.page_bytes].view(self.max_pages, *page.shape)


def pack_codes(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes [..., 16] (uint8, or int32 at nbits 32) into tiles, uint8 [..., 2 * nbits]."""
    if codes.shape[-1] != TILE:
        raise ValueError(f"a tile packs {TILE} codes, got {codes.shape[-1]}")
    if nbits == 8:
        return codes.contiguous()
    if nbits == 32:
        return codes.contiguous().view(torch.uint8)
    shifts = torch.arange(nbits, device=codes.device, dtype=torch.uint8)
    bits = (codes[..., None] >> shifts) & 1  # [..., 16, nbits], low bit first
    weights = 2 ** torch.arange(8, device=codes.device, dtype=torch.int32)
    return (bits.flatten(-2).unflatten(-1, (-1, 8)).int() * weights).sum(-1).to(torch.uint8)


def unpack_codes(tiles: torch.Tensor, nbits: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 [..., 2 * nbits] to codes [..., 16] (uint8, or int32 at nbits 32)."""
    if tiles.shape[-1] != 2 * nbits:
        raise ValueError(f"a tile of {nbits}-bit codes has {2 * nbits} bytes, got {tiles.shape[-1]}")
    if nbits == 8:
        return tiles
    if nbits == 32:
        return tiles.contiguous().view(torch.int32)
    shifts = torch.arange(8, device=tiles.device, dtype=torch.uint8)
    bits = (tiles[..., None] >> shifts) & 1  # [..., 2 * nbits, 8]
    weights = 2 ** torch.arange(nbits, device=tiles.device, dtype=torch.int32)
    return (bits.flatten(-2).unflatten(-1, (-1, nbits)).int() * weights).sum(-1).to(torch.uint8)


def read_pages(pages: torch.Tensor, page_ids: torch.Tensor, nbits: int) -> torch.Tensor:
    """Codes [..., heads, num_pages * page_size, M] of the listed pages, in the order of the list.

    Args:
        pages: uint8 [max_pages, heads, tiles, M, tile_bytes], a view of the pool (`PoolLayout.view`).
        page_ids: integer [..., num_pages].
    """
    codes = unpack_codes(pages[page_ids.long()], nbits)  # [..., n, H, T, M, 16]
    *batch, n, heads, tiles, m, lane = codes.shape
    order = (*range(len(batch)), -4, -5, -3, -1, -2)  # [..., H, n, T, 16, M]
    return codes.permute(order).reshape(*batch, heads, n * tiles * lane, m)


def write_pages(pages: torch.Tensor, codes: torch.Tensor, page_ids: torch.Tensor, first_slot: int, nbits: int) -> None:
    """Write codes into consecutive slots of the listed pages, in place; slots outside keep their codes.

    Args:
        pages: uint8 [max_pages, heads, tiles, M, tile_bytes], a view of the pool, mutated.
        codes: [heads, n, M] (uint8, or int32 at nbits 32).
        page_ids: integer [num_pages]: `n` tokens starting at `first_slot` of the first page fill them in order.
        first_slot: place of the first token in the first page.
    """
    heads, n, m = codes.shape
    page_size = pages.shape[2] * TILE
    num_pages = page_ids.numel()
    if not 0 <= first_slot < page_size or first_slot + n > num_pages * page_size:
        raise ValueError(f"{n} tokens from slot {first_slot} do not fit into {num_pages} pages of {page_size}")
    if first_slot or n % page_size:
        whole = read_pages(pages, page_ids, nbits).clone()  # a tile may mix old and new codes: read, change, write
        whole[:, first_slot : first_slot + n] = codes
        codes = whole
    tiles = codes.view(heads, num_pages, page_size // TILE, TILE, m).permute(1, 0, 2, 4, 3)
    pages[page_ids.long()] = pack_codes(tiles, nbits)
