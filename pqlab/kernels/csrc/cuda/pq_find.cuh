// Codes of many tokens, by a table of every subspace that is made first: a Grid or a Line. Codes are the reference's.
//
// A table says how many `dims` a subspace has, how many subspaces a thread takes `together`, whose vectors are one
// aligned load, and above how `many` tokens it is worth to be made (LOG.md).
#pragma once
#include "pq_grid.cuh"
#include "pq_line.cuh"

namespace pqlab {

// A thread takes a token at a time.
constexpr int kFindThreads = 512;

template <typename T, typename TABLE>
__global__ void __launch_bounds__(kFindThreads)
    pq_find_kernel(const __grid_constant__ EncodeParams p, const TABLE* tables) {
  constexpr int together = TABLE::together, dims = TABLE::dims;
  struct alignas(16) Vectors {
    T of[dims * together];
  };
  extern __shared__ __align__(16) uint8_t shared[];  // TABLE [together]
  const TABLE* const table = reinterpret_cast<const TABLE*>(shared);
  const int g = blockIdx.z, m = blockIdx.y * together, page_size = 16 * p.tiles_per_page;
  const uint4* const from = reinterpret_cast<const uint4*>(tables + static_cast<int64_t>(g) * p.M + m);
  constexpr int words = together * sizeof(TABLE) / 16;
  for (int i = threadIdx.x; i < words; i += kFindThreads) reinterpret_cast<uint4*>(shared)[i] = from[i];
  __syncthreads();
  const T* const x = static_cast<const T*>(p.x) + g * p.x_stride[0] + m * dims;
  for (int t = blockIdx.x * kFindThreads + threadIdx.x; t < p.n; t += gridDim.x * kFindThreads) {
    const Vectors mine = *reinterpret_cast<const Vectors*>(x + t * p.x_stride[1]);
    const int place = p.first_slot + t;
    uint8_t* to = p.codes + (static_cast<int64_t>(g) * p.n + t) * p.M + m;
    if (p.page_ids) {
      const int page = place / page_size, slot = place % page_size;
      const int64_t tile = (static_cast<int64_t>(p.page_ids[page]) * p.G + g) * p.tiles_per_page + slot / 16;
      to = p.codes + (tile * p.M + m) * 16 + slot % 16;
    }
#pragma unroll
    for (int s = 0; s < together; ++s) to[s * (p.page_ids ? 16 : 1)] = nearest(table[s], mine.of + dims * s);
  }
}

}  // namespace pqlab
