// A warp's stream of codes: chunks of two tiles from the pages of a row to a small ring in shared memory. No torch.
#pragma once
#include "pq_shape.cuh"

namespace pqlab {

template <typename Cfg>
struct CodeStream {
  static constexpr int NP = Cfg::NP, SLOTS = Cfg::SLOTS;
  const uint8_t* pages;  // of one side
  int tile_bytes;
  uint32_t ring, slot_bytes, barriers;  // shared memory addresses; a barrier a slot (sm_90)
  int lane, pair, head;

  const int* table = nullptr;          // of the row
  int first = 0, step = 0, chunks = 0;  // of this warp: chunks first + step * k
  int last_tile = 0;                   // of the row
  uint32_t now = 0, next = 0;    // lane l: place of tile l % 2 of chunk 16 n + l / 2, in tiles from the pages' start
  int slot = 0;
  uint32_t parity = 0;           // of the slot's barrier

  // Page of a tile.
  static __device__ __forceinline__ uint32_t page_of(const DecodeParams& p, uint32_t tile) {
    return p.page_magic ? __umulhi(tile, p.page_magic) : tile;
  }
  // Where tile `tile` lies, in tiles from the start of the pages, if its page has this id.
  __device__ __forceinline__ uint32_t place_in(const DecodeParams& p, int id, uint32_t tile) const {
    return (id * p.H + head) * p.tiles_per_page + (tile - page_of(p, tile) * p.tiles_per_page);
  }
  __device__ __forceinline__ uint32_t place(const DecodeParams& p, int k) const {
    if (k >= chunks) return 0;
    const uint32_t tile = min(2 * (first + step * k) + (lane & 1), last_tile);
    return place_in(p, table[page_of(p, tile)], tile);
  }
  // The lane's tile of chunk k of a row whose shares do not depend on its length.
  static __device__ __forceinline__ uint32_t early_tile(const DecodeParams& p, int pair, int k, int lane) {
    const Begin begin = begin_of_one<Cfg>(p);
    return 2 * (begin.first + pair * begin.apart + p.splits * NP * k) + (lane & 1);
  }
  __device__ __forceinline__ uint32_t early_place(const DecodeParams& p, int k, int id) const {
    const uint32_t tile = early_tile(p, pair, k, lane), at = place_in(p, id, tile);
    const uint32_t before = __shfl_xor_sync(~0u, at, 1);
    return static_cast<int>(tile) > last_tile ? before : at;  // the last tile stands for one behind it
  }

  // Two tiles of `bytes` to a slot; `together`: they lie one after the other.
  __device__ __forceinline__ void copy(int to_slot, const uint8_t* first, const uint8_t* second, int bytes,
                                       bool together) const {
    const uint32_t to = ring + to_slot * slot_bytes;
#if __CUDA_ARCH__ >= 900
    const uint32_t bar = barriers + 8 * to_slot;
    if (together) {
      bulk_copy_one(to, first, 2 * bytes, bar, 2 * bytes);
    } else {
      bulk_copy_one(to, first, bytes, bar, 2 * bytes);
      bulk_copy_one(to + bytes, second, bytes, bar, 0);
    }
#else
    for (int i = lane * 16; i < 2 * bytes; i += 512) cp_async_16(to + i, (i < bytes ? first : second - bytes) + i);
#endif
  }

  __device__ __forceinline__ void fetch(const DecodeParams& p, int k, int to_slot) {
    if (k < chunks) {
      if ((k & 15) == 0 && k > 0) {
        now = next;
        next = place(p, k + 16 + lane / 2);
      }
      const uint32_t first = __shfl_sync(~0u, now, 2 * k & 31), second = __shfl_sync(~0u, now, (2 * k & 31) + 1);
      copy(to_slot, pages + static_cast<size_t>(first) * tile_bytes, pages + static_cast<size_t>(second) * tile_bytes,
           tile_bytes, second == first + 1);  // mostly: the same page
    }
#if __CUDA_ARCH__ < 900
    cp_async_commit();  // also when empty: the waits count groups
#endif
  }

  // Takes the warp's share of a row's chunks.
  __device__ __forceinline__ void take(const DecodeParams& p, int row, int coded, const Share& share) {
    table = p.page_table + static_cast<size_t>(row) * p.table_stride;
    last_tile = (coded - 1) / kTile;
    if constexpr (Cfg::ANCHORED) {
      const int n = share.end - share.begin.first, from = n * pair / NP;
      first = share.begin.first + from, step = 1;
      chunks = n * (pair + 1) / NP - from;
    } else {
      first = share.begin.first + pair * share.begin.apart, step = share.step;
      chunks = chunks_from(p, share, first);
    }
  }
  // How many chunks of a share a warp has whose first is this one.
  static __device__ __forceinline__ int chunks_from(const DecodeParams& p, const Share& share, int first) {
    const int left = max(0, share.end - first + share.step - 1);
    return share.step == NP ? left / NP : __umulhi(left, p.turn_magic);
  }

  // Takes a row, and asks for the first chunks. `early`: what the page table says of `early_tile` of the first 32 chunks,
  // if that was asked before the length of the row was known.
  __device__ __forceinline__ void start(const DecodeParams& p, int row, int coded, const Share& share,
                                        const int* early) {
    take(p, row, coded, share);
    now = early ? early_place(p, lane / 2, early[0]) : place(p, lane / 2);
    int s = slot;
#pragma unroll
    for (int k = 0; k < SLOTS; ++k) {
      fetch(p, k, s);
      s = s + 1 == SLOTS ? 0 : s + 1;
    }
    next = early ? early_place(p, 16 + lane / 2, early[1]) : place(p, 16 + lane / 2);
  }

  // Waits for the next chunk; its codes lie at the address that is returned until `release`.
  __device__ __forceinline__ uint32_t wait() {
#if __CUDA_ARCH__ >= 900
    mbarrier_wait(barriers + 8 * slot, parity);
#else
    cp_async_wait<SLOTS - 1>();
    __syncwarp();
#endif
    return ring + slot * slot_bytes;
  }

  // All lanes have read chunk k: its slot is filled with the one SLOTS further on.
  __device__ __forceinline__ void release(const DecodeParams& p, int k) {
    __syncwarp();
    fetch(p, k + SLOTS, slot);
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

}  // namespace pqlab
