// One new token a row, and the codes of what leaves the window in the same step. No torch, sm_80 and newer.
#pragma once
#include "pq_encode.cuh"

namespace pqlab {

struct AppendSide {
  void* sink;           // [B, H, num_sinks, D] of T, dense
  void* window;         // [B, H, W, D] of T, dense
  const void* x;        // [B, H, 1, D] of T, last dimension dense
  int64_t x_stride[2];
  const float* books;   // [H, M, C, DM]
  uint8_t* pages;       // [max_pages][H][T][M][2 * NBITS]
};

struct AppendParams {
  AppendSide side[2];
  const int* page_table;  // [B][table_stride]
  const int* before;      // [B][3]: sinks, coded, window
  const int* after;
  int table_stride;
  int sides, B, H, D, M, num_sinks, slots, tiles_per_page;
  int num_tickets;
  int* tickets;  // set to zero for the pq_decode that follows, if any
};

// Mostly no row flushes and all blocks end at once, so what counts is how many there are and how many fit: small ones
// of few registers, each of which has two rounds to go when there is something to encode.
constexpr int kAppendWarps = 4, kAppendRounds = 2, kAppendBlocksAnSm = 5;
template <int DM, int C>
constexpr int kAppendSmem = kAppendWarps * C * (DM + 1) * 4;

// One new token a row to its sink or its slot of the ring, and, where a row flushes, the codes of ring tokens
// [before.coded, after.coded). The newest token is never among them: the window keeps one at least. All decisions are
// made here, from the lengths: the host knows nothing, so a graph can replay it. Blocks of rows that do not flush end
// at once. blockIdx.x is a side, a row of the batch and a kv head; the blocks along y share its subspaces and tiles.
template <typename T, int DM, int NBITS, int SPLIT>
__global__ void __launch_bounds__(kAppendWarps * 32, kAppendBlocksAnSm)
    pq_append_kernel(const __grid_constant__ AppendParams p) {
  constexpr int C = 1 << NBITS, kThreads = kAppendWarps * 32;
  extern __shared__ float smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = lane % SPLIT;
  const int row = blockIdx.x % (p.B * p.H), b = row / p.H, h = row % p.H;
  const AppendSide& side = p.side[blockIdx.x / (p.B * p.H)];
  const int* const before = p.before + 3 * b;
  const int* const after = p.after + 3 * b;
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int i = threadIdx.x; i < p.num_tickets; i += kThreads) p.tickets[i] = 0;
  const int first = before[1], token = before[0] + first + before[2], n = after[1] - first;
  if (blockIdx.y == 0 && after[0] + after[1] + after[2] != token) {
    const T* const x = static_cast<const T*>(side.x) + b * side.x_stride[0] + h * side.x_stride[1];
    T* const to = token < p.num_sinks
                      ? static_cast<T*>(side.sink) + (static_cast<int64_t>(row) * p.num_sinks + token) * p.D
                      : static_cast<T*>(side.window) +
                            (static_cast<int64_t>(row) * p.slots + (token - p.num_sinks) % p.slots) * p.D;
    for (int i = threadIdx.x; i < p.D; i += kThreads) to[i] = x[i];
  }
  if (n <= 0) return;
  float* const entries = smem + warp * C * (DM + 1);
  const T* const ring = static_cast<const T*>(side.window) + static_cast<int64_t>(row) * p.slots * p.D;
  constexpr int kTiles = 32 / SPLIT;  // that a warp takes at a time
  const int tiles = (first % 16 + n + 15) / 16, items = p.M * ((tiles + kTiles - 1) / kTiles);
  for (int item = blockIdx.y * kAppendWarps + warp; item < items; item += gridDim.y * kAppendWarps) {
    const int m = item % p.M, tile = item / p.M * kTiles + lane / SPLIT, t0 = tile * 16 - first % 16;
    __syncwarp();  // all have read the entries of the last item
    load_entries<DM, C>(entries, side.books + (static_cast<int64_t>(h) * p.M + m) * C * DM, lane);
    uint32_t packed[4];
    nearest16<DM, C, SPLIT, DM <= 2 ? 8 : 4>(
        entries, part, t0, n,
        [&](int t) { return ring + static_cast<int64_t>((first + t) % p.slots) * p.D + m * DM; }, packed);
    if (part != 0 || t0 >= n) continue;
    const int place = first / 16 + tile;
    const int page = p.page_table[static_cast<int64_t>(b) * p.table_stride + place / p.tiles_per_page];
    const int64_t at = (static_cast<int64_t>(page) * p.H + h) * p.tiles_per_page + place % p.tiles_per_page;
    store_tile<NBITS>(side.pages + (at * p.M + m) * (2 * NBITS), packed, t0, n);
  }
}

}  // namespace pqlab
