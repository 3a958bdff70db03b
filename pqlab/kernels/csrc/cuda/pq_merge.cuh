// The end of a row: merge the pairs of warps of a block, then the blocks that share the row. No torch.
#pragma once
#include "pq_shape.cuh"

namespace pqlab {

// Merges the parts [blocks][HG][D + 4] that blocks left for one row: maximum, sum, two floats of nothing, D sums each.
// Writes the first `vectors` results.
template <typename T, int HG, int D, int NT>
__device__ __forceinline__ void merge_parts(const float* parts, int blocks, int vectors, T* out, float* lse) {
  constexpr int AT_ONCE = 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < HG * D; i += NT) {  // lanes 4q .. 4q + 3 share four dimensions, each has every fourth part
    const int sub = i & 3, g = i / D, dim = i % D & ~3;
    float best = -1e30f, all = 0.f;
    float x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int n0 = sub; n0 < blocks; n0 += 4 * AT_ONCE) {
      float2 ml[AT_ONCE];
      float4 a[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        const float* one = parts + static_cast<size_t>(min(n0 + 4 * n, blocks - 1) * HG + g) * (D + 4);
        ml[n] = __ldcg(reinterpret_cast<const float2*>(one));
        a[n] = __ldcg(reinterpret_cast<const float4*>(one + 4 + dim));
        if (n0 + 4 * n >= blocks) ml[n] = make_float2(-1e30f, 0.f);
      }
      float now = best;
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) now = fmaxf(now, ml[n].x);
      const float keep = exp2_approx(best - now);
      best = now, all *= keep;
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] *= keep;
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        const float f = ml[n].x > -1e30f ? exp2_approx(ml[n].x - now) : 0.f;
        all += ml[n].y * f;
        x[0] += a[n].x * f, x[1] += a[n].y * f, x[2] += a[n].z * f, x[3] += a[n].w * f;
      }
    }
    float top = best;
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float f = exp2_approx(best - top);
    all *= f;
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[c] *= f;
      x[c] += __shfl_xor_sync(~0u, x[c], 1);
      x[c] += __shfl_xor_sync(~0u, x[c], 2);
    }
    if (g < vectors) {
      out[i] = from_float<T>((sub == 0 ? x[0] : sub == 1 ? x[1] : sub == 2 ? x[2] : x[3]) / all);
      if (dim + sub == 0) lse[g] = (top + log2f(all)) * kLn2;
    }
  }
}

// Called by all threads of a block after its value warps left sums in their rings and (maximum, sum) in the totals.
// The last of the blocks that share a row, found by drawing tickets, merges their parts: no second kernel, no waiting.
template <typename Cfg>
__device__ __forceinline__ void finish_row(const DecodeParams& p, uint8_t* smem, const Part& part, const Row& row, int b) {
  using T = typename Cfg::T;
  constexpr int HG = Cfg::HG, NP = Cfg::NP, NT = Cfg::NW * 32, D = Cfg::D, DP = Cfg::DP;
  const int tid = threadIdx.x, h = blockIdx.y, group = blockIdx.z;
  const int vectors = p.G * p.S, first_vector = group * HG;
  float2* const totals = reinterpret_cast<float2*>(smem + Cfg::total_offset);  // [NP][HG], and one more [HG]
  auto sums = [&](int n) { return reinterpret_cast<const float*>(smem + Cfg::book_bytes + (NP + n) * Cfg::ring_bytes); };

  const int block0 = part.before / part.per_block, blocks = (part.before + row.units - 1) / part.per_block - block0 + 1;
  // Parts of one (kv head, group) lie one after the other: split + b is different for all of them.
  float* const parts = p.partial + static_cast<size_t>(h * gridDim.z + group) * (p.splits + p.B) * HG * (D + 4);
  const int vectors_here = min(vectors - first_vector, HG);
  const size_t vector = (static_cast<size_t>(b) * p.H + h) * vectors + first_vector;
  T* const out = static_cast<T*>(p.out) + vector * D;
  float* const lse = p.lse + vector;

  __syncthreads();
  for (int i = tid; i < HG * D; i += NT) {
    const int g = i / D, dim = i % D;
    float best = -1e30f, all = 0.f, value = 0.f;
#pragma unroll
    for (int n = 0; n < NP; ++n) best = fmaxf(best, totals[n * HG + g].x);
#pragma unroll
    for (int n = 0; n < NP; ++n) {
      const float f = exp2_approx(totals[n * HG + g].x - best);
      all += f * totals[n * HG + g].y;
      value += f * sums(n)[g * DP + dim];
    }
    if (blocks == 1) {
      if (g < vectors_here) {
        out[i] = from_float<T>(value / all);
        if (dim == 0) lse[g] = (best + log2f(all)) * kLn2;
      }
    } else {
      float* to = parts + (static_cast<size_t>(blockIdx.x + b) * HG + g) * (D + 4);
      to[4 + dim] = value;
      if (dim == 0) to[0] = best, to[1] = all;
    }
  }

  if (blocks > 1) {
    int* const last = reinterpret_cast<int*>(totals + NP * HG);
    __syncthreads();  // all of the part is written before the ticket is drawn
    if (tid == 0) {
      int* ticket = p.tickets + (static_cast<size_t>(b) * p.H + h) * gridDim.z + group;
      const bool is_last = draw_ticket(ticket) == blocks - 1;
      if (is_last) *ticket = 0;
      *last = is_last;
    }
    __syncthreads();
    if (*last)
      merge_parts<T, HG, D, NT>(parts + static_cast<size_t>(block0 + b) * HG * (D + 4), blocks, vectors_here, out, lse);
  }
  fence_async();    // the rings are free again, for the copy engine too
  __syncthreads();
}

}  // namespace pqlab
