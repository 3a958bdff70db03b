// One new token a row, and the codes of what leaves the window in the same step; with maps also the queries, for the
// pq_decode that follows. No torch, sm_80 and newer.
#pragma once
#include "pq_asked.cuh"
#include "pq_encode.cuh"
#include "pq_maps.cuh"

namespace pqlab {

// Mostly no row flushes and all blocks end at once, so what counts is how many there are and how many fit: small ones
// of few registers, each of which has two rounds to go when there is something to encode.
constexpr int kAppendWarps = 4, kAppendRounds = 2, kAppendBlocksAnSm = 5;
constexpr int kMappingSmem = kAskedSmem > kMapSmem ? kAskedSmem : kMapSmem;
template <int DM, int C>
constexpr int kAppendSmem =
    kAppendWarps * C * (DM + 1) * 4 > kMappingSmem ? kAppendWarps * C * (DM + 1) * 4 : kMappingSmem;
static_assert(kMapThreads == kAppendWarps * 32 && kAskedThreads == kMapThreads, "the same blocks");

// Where a row's new token goes; read first and asked for later, so that what is between does not wait for the lengths.
struct TokenLengths {
  int before[3], after[3];
  __device__ __forceinline__ TokenLengths() {}
  __device__ __forceinline__ TokenLengths(const AppendParams& p, int b) {
#pragma unroll
    for (int i = 0; i < 3; ++i) before[i] = p.before[3 * b + i], after[i] = p.after[3 * b + i];
  }
  // Code index of the new token; below 0 it is a sink.
  __device__ __forceinline__ int index(const AppendParams& p) const {
    return before[0] + before[1] + before[2] - p.num_sinks;
  }
  // Null if the row has no new token. row: of batch and heads.
  template <typename T>
  __device__ __forceinline__ T* place(const AppendParams& p, const AppendSide& side, int row) const {
    const int u = index(p), token = u + p.num_sinks;
    if (after[0] + after[1] + after[2] == token) return nullptr;
    if (u < 0) return static_cast<T*>(side.sink) + (static_cast<int64_t>(row) * p.num_sinks + token) * p.D;
    const int slot = u - divide(u, p.slots_inverse) * p.slots;
    return static_cast<T*>(side.window) + (static_cast<int64_t>(row) * p.slots + slot) * p.D;
  }
};

// Blocks that map: slices of a head's map, heads, vectors of keys, of values, of queries (those of spans: pq_asked).

template <typename T>
__device__ __forceinline__ void map_tokens(const AppendParams& p, int block, float* smem) {
  const int slices = p.D / kMapSlice, rest = divide(block, p.slices_inverse), slice = block - rest * slices;
  int chunk = divide(rest, p.heads_inverse);
  const int h = rest - chunk * p.H, each = map_chunks(p.B);
  const bool second = p.side[0].map == nullptr || chunk >= each;
  const AppendSide& side = p.side[second];
  if (second && p.side[0].map != nullptr) chunk -= each;
  const int b = chunk * kMapVectors, n = min(kMapVectors, p.B - b);
  const T* const x = static_cast<const T*>(side.x) + b * side.x_stride[0] + h * side.x_stride[1];
  const auto at = [&](int v) { return x + v * side.x_stride[0]; };
  struct Tokens {
    const AppendParams& p;
    const AppendSide& side;
    int b, h, row[2];
    TokenLengths lengths[2];
    __device__ __forceinline__ void read(int j, int v) { lengths[j] = TokenLengths(p, b + v), row[j] = (b + v) * p.H + h; }
    __device__ __forceinline__ T* place(int j) const { return lengths[j].template place<T>(p, side, row[j]); }
  } tokens{p, side, b, h};
  struct Fit {
    const Tokens& tokens;
    bool is_there, turns;
    __device__ __forceinline__ void turn(int j, float* x) const {  // by a warp
      const AppendParams& p = tokens.p;
      const int index = tokens.lengths[j].index(p), half = p.D / 2;
      if (index < 0) return;
      const float* const by = p.turn_of(index);
#pragma unroll 2
      for (int i = threadIdx.x & 31; i < half; i += 32) {
        const float low = x[i], high = x[i + half], c = by[i], s = by[i + half];
        x[i] = low * c + high * s, x[i + half] = high * c - low * s;
      }
    }
    __device__ __forceinline__ int64_t at(int j, int dim) const {
      return static_cast<int64_t>(tokens.row[j]) * tokens.p.D + dim;
    }
    __device__ __forceinline__ void prefetch(int j, int dim) const {
      if (is_there) prefetch_l2(tokens.p.k_scale + at(j, dim)), prefetch_l2(tokens.p.k_shift + at(j, dim));
    }
    __device__ __forceinline__ float of(int j, int dim, float y) const {
      return is_there ? fmaf(y, tokens.p.k_scale[at(j, dim)], tokens.p.k_shift[at(j, dim)]) : y;
    }
  } fit{tokens, p.k_scale != nullptr && !second, p.turns != nullptr && !second};
  const int64_t head = static_cast<int64_t>(h) * p.D * p.D;
  const auto* const eight = static_cast<const int8_t*>(side.map) + head;
  const auto* const half = static_cast<const __half*>(side.map) + head;
  if (n == 1) {
    side.eight ? map_rows<1, int8_t, T>(eight, p.D, slice, n, smem, at, tokens, fit)
               : map_rows<1, __half, T>(half, p.D, slice, n, smem, at, tokens, fit);
  } else {
    side.eight ? map_rows<4, int8_t, T>(eight, p.D, slice, n, smem, at, tokens, fit)
               : map_rows<4, __half, T>(half, p.D, slice, n, smem, at, tokens, fit);
  }
}

template <typename T>
__device__ __forceinline__ void map_queries(const AppendParams& p, int block, float* smem) {
  const int slices = p.D / kTransposedSlice, rest = divide(block, 0.5f * p.slices_inverse);
  const int slice = block - rest * slices, chunk = divide(rest, p.heads_inverse), h = rest - chunk * p.H;
  const int each = p.G * p.S, first = chunk * kMapVectors, n = min(kMapVectors, p.B * each - first);
  const auto at = [&](int v) {
    const int b = divide(first + v, p.each_inverse), r = first + v - b * each, g = divide(r, p.steps_inverse);
    return static_cast<const T*>(p.q) + b * p.q_stride[0] + (h * p.G + g) * p.q_stride[1] +
           (r - g * p.S) * p.q_stride[2];
  };
  const auto to = [&](int v) {
    const int b = divide(first + v, p.each_inverse);
    return static_cast<T*>(p.mapped_q) + (static_cast<int64_t>(b * p.H + h) * each + (first + v - b * each)) * p.D;
  };
  const auto divisor = [&](int v, int row) {
    if (p.k_scale == nullptr) return 1.f;
    return p.k_scale[(static_cast<int64_t>(divide(first + v, p.each_inverse)) * p.H + h) * p.D + row];
  };
  const __half* const map = p.q_map + static_cast<int64_t>(h) * p.D * p.D;
  if (n == 1)
    map_transposed<1, T>(map, p.D, slice, n, smem, at, to, divisor);
  else
    map_transposed<4, T>(map, p.D, slice, n, smem, at, to, divisor);
}

// One new token a row to its sink or its slot of the ring, and, where a row flushes, the codes of ring tokens
// [before.coded, after.coded). The newest token is never among them: the window keeps one at least. All decisions are
// made here, from the lengths: the host knows nothing, so a graph can replay it. Blocks of rows that do not flush end
// at once. A block is one of those that map, or belongs to a side, a row of the batch and a kv head; `shares` blocks
// share its subspaces and tiles.
template <typename T, int DM, int NBITS, int SPLIT>
__global__ void __launch_bounds__(kAppendWarps * 32, kAppendBlocksAnSm)
    pq_append_kernel(const __grid_constant__ AppendParams p) {
  constexpr int C = 1 << NBITS, kThreads = kAppendWarps * 32;
  extern __shared__ float smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = lane % SPLIT;
  if (static_cast<int>(blockIdx.x) < p.query_blocks)
    return p.turns != nullptr ? ask_spans<T>(p, blockIdx.x, smem) : map_queries<T>(p, blockIdx.x, smem);
  if (static_cast<int>(blockIdx.x) < p.map_blocks) return map_tokens<T>(p, blockIdx.x - p.query_blocks, smem);
  const int block = blockIdx.x - p.map_blocks, at = divide(block, p.shares_inverse), share = block - at * p.shares;
  const int which = divide(at, p.rows_inverse), row = at - which * p.B * p.H;
  const int b = divide(row, p.heads_inverse), h = row - b * p.H;
  const AppendSide& side = p.side[which];
  if (block == 0)
    for (int i = threadIdx.x; i < p.num_tickets; i += kThreads) p.tickets[i] = 0;
  const int first = p.before[3 * b + 1], n = p.after[3 * b + 1] - first;
  if (share == 0 && side.map == nullptr) {
    const T* const x = static_cast<const T*>(side.x) + b * side.x_stride[0] + h * side.x_stride[1];
    T* const to = TokenLengths(p, b).place<T>(p, side, row);
    if (to != nullptr)
      for (int i = threadIdx.x; i < p.D; i += kThreads) to[i] = x[i];
  }
  if (n <= 0) return;
  float* const entries = smem + warp * C * (DM + 1);
  const T* const ring = static_cast<const T*>(side.window) + static_cast<int64_t>(row) * p.slots * p.D;
  constexpr int kTiles = 32 / SPLIT;  // that a warp takes at a time
  const int tiles = (first % 16 + n + 15) / 16, items = p.M * ((tiles + kTiles - 1) / kTiles);
  for (int item = share * kAppendWarps + warp; item < items; item += p.shares * kAppendWarps) {
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
