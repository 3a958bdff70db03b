// Nearest centroid in the plane, for many tokens: a grid over the centroids with a list of candidates for every cell.
//
// pq_grid_kernel makes a Grid for every subspace of two dimensions. A cell lists every centroid that may be the nearest
// one of some point in it, in ascending order, so that a point compares a handful instead of all 256: the list of its
// cell, as the reference computes distances, and the first least one wins. The outermost cells reach far out. Points
// beyond them, and cells whose list found no room, take the list of all.
//
// A centroid is left out of a cell when another one is nearer everywhere in it: the difference of two squared distances
// is linear, so its least value over the cell lies in a corner. The cell is taken a little too large and the difference
// has to pass a margin, both far above what rounding can do, so no list misses the centroid that the reference finds.
#pragma once
#include "pq_encode.cuh"

namespace pqlab {

constexpr int kCoarse = 16, kFine = 3, kSide = kCoarse * kFine;  // cells of cells along a side, cells in those
constexpr int kReach = 4;                                        // outermost cells reach so many grids farther out
constexpr int kPlane = 256;                                      // centroids of a subspace
constexpr int kListWords = 3072;                                 // of four candidates
constexpr uint32_t kAll = (kPlane / 4) << 16;                    // the list of all centroids comes first

struct Grid {
  static constexpr int dims = 2, together = 4, many = 7168;  // see pq_find.cuh
  float low[2], cells_a_unit[2];
  uint32_t cell[kSide * kSide];  // first word of the list | words << 16
  uint32_t list[kListWords];
  float2 centroid[kPlane];
};

struct Candidates {
  uint32_t word[kPlane / 32];  // a bit for each centroid
};

// f(index, its bit) in ascending order for the candidates among centroids 32 w .. 32 w + 31; without any: for all.
template <typename F>
__device__ __forceinline__ void each(const Candidates* some, int w, F&& f) {
  if (some == nullptr) {
#pragma unroll 8
    for (int n = 0; n < 32; ++n) f(w * 32 + n, 1u << n);
  } else {
    for (uint32_t bits = some->word[w]; bits; bits &= bits - 1) f(w * 32 + __ffs(bits) - 1, bits & -bits);
  }
}

// A rectangle: |x - middle.x| <= half.x, |y - middle.y| <= half.y.
struct Box {
  float2 middle, half;
};

// Leaves in `to` those of `from` (null: all) that may be the nearest of a point in the box.
__device__ __forceinline__ void find_candidates(const float2* centroid, const Candidates* from, const Box& box,
                                                float margin, Candidates& to) {
  auto distance = [&](float2 c) {
    const float x = box.middle.x - c.x, y = box.middle.y - c.y;
    return x * x + y * y;
  };
  float nearest = INFINITY, second = INFINITY;  // of the middle: they rule out most of the others
  int a = 0, b = 0;
#pragma unroll 1
  for (int w = 0; w < kPlane / 32; ++w)
    each(from, w, [&](int i, uint32_t) {
      const float d = distance(centroid[i]);
      if (d < nearest)
        second = nearest, b = a, nearest = d, a = i;
      else if (d < second)
        second = d, b = i;
    });
  const float2 ca = centroid[a], cb = centroid[b];
  nearest = distance(ca), second = distance(cb);
  auto farther = [&](float d, float2 c, float of, float2 than) {  // everywhere in the box
    return d - of > 2.f * (fabsf(c.x - than.x) * box.half.x + fabsf(c.y - than.y) * box.half.y) + margin;
  };
#pragma unroll 1
  for (int w = 0; w < kPlane / 32; ++w) {
    uint32_t kept = 0;
    each(from, w, [&](int i, uint32_t bit) {
      const float2 c = centroid[i];
      const float d = distance(c);
      if (!farther(d, c, nearest, ca) && !farther(d, c, second, cb)) kept |= bit;
    });
    to.word[w] = kept;
  }
}

// A block for every subspace: books [blocks][256] -> grids [blocks].
constexpr int kGridThreads = 256;
__global__ void __launch_bounds__(kGridThreads)
    pq_grid_kernel(const float2* __restrict__ books, Grid* __restrict__ grids) {
  __shared__ float2 centroid[kPlane];
  __shared__ Candidates coarse[kCoarse * kCoarse], own[kGridThreads];
  __shared__ float4 extent;  // low, high
  __shared__ int used;
  Grid& grid = grids[blockIdx.x];
  const int tid = threadIdx.x;
  static_assert(kGridThreads == kPlane && kGridThreads == kCoarse * kCoarse, "a thread a centroid, a thread a cell");
  grid.centroid[tid] = centroid[tid] = books[static_cast<int64_t>(blockIdx.x) * kPlane + tid];
  if (tid < kPlane / 4) grid.list[tid] = 0x03020100u + 0x04040404u * tid;
  if (tid == 0) used = kPlane / 4;
  __syncthreads();
  if (tid < 32) {
    float4 e = make_float4(INFINITY, INFINITY, -INFINITY, -INFINITY);
    for (int i = tid; i < kPlane; i += 32) {
      const float2 c = centroid[i];
      e = make_float4(fminf(e.x, c.x), fminf(e.y, c.y), fmaxf(e.z, c.x), fmaxf(e.w, c.y));
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      e.x = fminf(e.x, __shfl_xor_sync(~0u, e.x, o)), e.y = fminf(e.y, __shfl_xor_sync(~0u, e.y, o));
      e.z = fmaxf(e.z, __shfl_xor_sync(~0u, e.z, o)), e.w = fmaxf(e.w, __shfl_xor_sync(~0u, e.w, o));
    }
    if (tid == 0) extent = e;
  }
  __syncthreads();
  // The grid is a little larger than its centroids, and has some width if they lie on a line.
  const float2 most = make_float2(fmaxf(fabsf(extent.x), fabsf(extent.z)), fmaxf(fabsf(extent.y), fabsf(extent.w)));
  const float2 room = make_float2((extent.z - extent.x) * 0.125f + most.x * 1e-3f + 1e-15f,
                                  (extent.w - extent.y) * 0.125f + most.y * 1e-3f + 1e-15f);
  const float2 low = make_float2(extent.x - room.x, extent.y - room.y);
  const float2 width = make_float2(extent.z + room.x - low.x, extent.w + room.y - low.y);
  if (tid == 0) {
    grid.low[0] = low.x, grid.low[1] = low.y;
    grid.cells_a_unit[0] = kSide / width.x, grid.cells_a_unit[1] = kSide / width.y;
  }
  auto find = [&](const Candidates* from, int x, int y, int parts, Candidates& to) {  // cell (x, y) of parts^2
    auto side = [&](int i, float begin, float all, float most, float& middle, float& half) {
      const float from = begin + (i == 0 ? -kReach : 1.f * i / parts) * all;
      const float upto = begin + (i == parts - 1 ? 1 + kReach : (i + 1.f) / parts) * all;
      middle = 0.5f * (from + upto), half = 0.5f * (upto - from) + 0.01f * all / parts + 1e-6f * most;
    };
    Box box;
    side(x, low.x, width.x, most.x, box.middle.x, box.half.x);
    side(y, low.y, width.y, most.y, box.middle.y, box.half.y);
    const float far_x = width.x + 2.f * box.half.x, far_y = width.y + 2.f * box.half.y;  // as far as any two points are
    find_candidates(centroid, from, box, 4e-6f * (far_x * far_x + far_y * far_y), to);
  };
  find(nullptr, tid % kCoarse, tid / kCoarse, kCoarse, coarse[tid]);
  __syncthreads();
  for (int i = tid; i < kSide * kSide; i += kGridThreads) {  // neighbouring threads share a coarse cell
    const int inside = i % (kFine * kFine), outer = i / (kFine * kFine);
    const int x = outer % kCoarse * kFine + inside % kFine, y = outer / kCoarse * kFine + inside / kFine;
    Candidates& mine = own[tid];
    find(coarse + outer, x, y, kSide, mine);
    int count = 0;
#pragma unroll
    for (const uint32_t word : mine.word) count += __popc(word);
    const int words = (count + 3) / 4, first = atomicAdd(&used, words);
    const bool fits = first + words <= kListWords;
    grid.cell[y * kSide + x] = fits ? first | words << 16 : kAll;
    if (!fits) continue;
    uint8_t* to = reinterpret_cast<uint8_t*>(grid.list + first);
    int last = 0;
    for (int w = 0; w < kPlane / 32; ++w) each(&mine, w, [&](int c, uint32_t) { *to++ = last = c; });
    for (; count % 4; ++count) *to++ = last;
  }
}

// The index of the centroid nearest to the point at `p`, the lowest of equals.
template <typename T>
__device__ __forceinline__ int nearest(const Grid& grid, const T* p) {
  const float2 v = load_float2(p);
  const float x = (v.x - grid.low[0]) * grid.cells_a_unit[0], y = (v.y - grid.low[1]) * grid.cells_a_unit[1];
  auto near = [](float i) { return i > (0.1f - kReach) * kSide && i < (0.9f + kReach) * kSide; };  // false for NaN
  auto column = [](float i) { return static_cast<int>(fminf(fmaxf(i, 0.f), kSide - 1.f)); };
  const uint32_t cell = near(x) && near(y) ? grid.cell[column(y) * kSide + column(x)] : kAll;
  const uint32_t* list = grid.list + (cell & 0xFFFF);
  float least = INFINITY;
  int code = 0;
#pragma unroll 1
  for (int words = cell >> 16; words; --words) {
    const uint32_t four = *list++;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = four >> (8 * j) & 0xFF;
      const float2 at = grid.centroid[c];
      const float ex = v.x - at.x, ey = v.y - at.y;
      const float d = __fadd_rn(__fmul_rn(ex, ex), __fmul_rn(ey, ey));  // as the reference: no fused multiply-add
      if (d < least) least = d, code = c;
    }
  }
  return code;
}

}  // namespace pqlab
