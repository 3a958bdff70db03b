// Nearest centroid on the line, for many tokens: the centroids in order, and a search among them.
#pragma once
#include "pq_encode.cuh"

namespace pqlab {

constexpr int kPoints = 256;  // centroids of a subspace

struct Line {
  static constexpr int dims = 1, together = 8, many = 1024;  // see pq_find.cuh
  float tree[kPoints];   // all but the greatest as a search tree: below node k lie 2k and 2k + 1; the root is 1
  float value[kPoints];  // in ascending order, equals by index
  uint8_t code[kPoints];
};

// A block for every subspace: books [blocks][256] -> lines [blocks].
constexpr int kLineThreads = kPoints;
__global__ void __launch_bounds__(kLineThreads)
    pq_line_kernel(const float* __restrict__ books, Line* __restrict__ lines) {
  __shared__ float centroid[kPoints], value[kPoints];
  Line& line = lines[blockIdx.x];
  const int tid = threadIdx.x;
  const float mine = centroid[tid] = books[static_cast<int64_t>(blockIdx.x) * kPoints + tid];
  __syncthreads();
  int at = 0;
#pragma unroll 8
  for (int i = 0; i < kPoints; ++i) at += centroid[i] < mine || (centroid[i] == mine && i < tid);
  line.value[at] = value[at] = mine, line.code[at] = tid;
  __syncthreads();
  if (tid > 0) {  // a node of the level that begins with `first`, whose nodes are 2 `half` apart in the order
    const int first = 1 << (31 - __clz(tid)), half = kPoints / 2 / first;
    line.tree[tid] = value[(2 * (tid - first) + 1) * half - 1];
  }
}

// The index of the centroid nearest to the number at `p`, the lowest of those that are as near after rounding: in the
// order, distances never fall on the way from the number to either side.
template <typename T>
__device__ __forceinline__ int nearest(const Line& line, const T* p) {
  const float v = to_float(*p);
  int node = 1;
#pragma unroll
  for (int level = 1; level < kPoints; level *= 2) node = 2 * node + (line.tree[node] < v);
  const int at = node - kPoints;  // so many are below v, of all but the greatest
  auto distance = [&](int i) {
    const float e = v - line.value[i];
    return __fmul_rn(e, e);
  };
  const float least = fminf(distance(at), distance(max(at - 1, 0)));
  int code = kPoints - 1;
  for (int i = at; i < kPoints && distance(i) == least; ++i) code = min(code, static_cast<int>(line.code[i]));
  for (int i = at - 1; i >= 0 && distance(i) == least; --i) code = min(code, static_cast<int>(line.code[i]));
  return code;
}

}  // namespace pqlab
