// The end of a row: merge the warps of a block, then the blocks that share the row. No torch.
#pragma once
#include "pq_lookup.cuh"
#include "pq_maps.cuh"

namespace pqlab {

// Merging, a lane has four dimensions of every 128 of them.
template <typename Cfg>
constexpr int kSlices = (Cfg::DP + 127) / 128;

// What a warp has of a row: sums(word, 0 or 1, g) of the dimensions DIM::of(word, lane) and the next, and for every query
// vector its maximum and the lane's part of the sum of weights. Into its ring, which is empty then.
template <typename Cfg, int U, typename DIM, typename SUM>
__device__ __forceinline__ void leave_part(const Place<Cfg>& at, const float (&top)[Cfg::HG],
                                           const float (&total)[Cfg::HG], SUM&& sums) {
  __syncwarp();
  float* const mine = at.sums(at.warp);
#pragma unroll
  for (int g = 0; g < Cfg::HG; ++g) {
    float x = total[g];
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    if (at.lane == 0) at.totals()[at.warp * Cfg::HG + g] = make_float2(top[g], x);
    if (at.lane < Cfg::V::MP)
#pragma unroll
      for (int w = 0; w < U; ++w)
        *reinterpret_cast<float2*>(mine + g * Cfg::DP + DIM::of(w, at.lane)) =
            make_float2(sums(w, 0, g), sums(w, 1, g));
  }
}

// Parts [blocks][HG][D + 4] that blocks left for one row (maximum, sum, two floats of nothing, D sums) -> the places of
// the warps' parts, at most NW: warp n takes parts n, n + NW, ...
template <typename Cfg>
__device__ __forceinline__ void fetch_parts(const Place<Cfg>& at, const float* parts, int blocks) {
  constexpr int HG = Cfg::HG, NW = Cfg::NW, D = Cfg::D, SLICES = kSlices<Cfg>;
  constexpr int AHEAD = SLICES > 1 ? 2 : 1;  // long parts come in many rounds where a head has many blocks
  if (at.warp >= blocks || at.lane * 4 >= D) return;
  auto total_of = [&](int n, int g) {
    return __ldcg(reinterpret_cast<const float2*>(parts + static_cast<size_t>(n * HG + g) * (D + 4)));
  };
  auto sums_of = [&](int n, int g, int slice) {
    const float* const from = parts + static_cast<size_t>(n * HG + g) * (D + 4) + 4;
    return __ldcg(reinterpret_cast<const float4*>(from + slice * 128 + at.lane * 4));
  };
  float2 total[HG];
  float4 sums[HG][SLICES];
#pragma unroll
  for (int g = 0; g < HG; ++g) {  // all on their way before the first is used
    total[g] = total_of(at.warp, g);
#pragma unroll
    for (int i = 0; i < SLICES; ++i) sums[g][i] = sums_of(at.warp, g, i);
  }
#pragma unroll 1
  for (int n = at.warp + NW; n < blocks; n += AHEAD * NW) {
    float2 t[AHEAD][HG];
    float4 s[AHEAD][HG][SLICES];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        const int of = j ? min(n + j * NW, blocks - 1) : n;
        t[j][g] = total_of(of, g);
#pragma unroll
        for (int i = 0; i < SLICES; ++i) s[j][g][i] = sums_of(of, g, i);
      }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        const float best = fmaxf(total[g].x, t[j][g].x), f0 = exp2_approx(total[g].x - best);
        const float f1 = j == 0 || n + j * NW < blocks ? exp2_approx(t[j][g].x - best) : 0.f;
        total[g] = make_float2(best, total[g].y * f0 + t[j][g].y * f1);
#pragma unroll
        for (int i = 0; i < SLICES; ++i) {
          float4& sum = sums[g][i];
          const float4 more = s[j][g][i];
          sum.x = sum.x * f0 + more.x * f1, sum.y = sum.y * f0 + more.y * f1;
          sum.z = sum.z * f0 + more.z * f1, sum.w = sum.w * f0 + more.w * f1;
        }
      }
  }
#pragma unroll
  for (int g = 0; g < HG; ++g) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i)
      *reinterpret_cast<float4*>(at.sums(at.warp) + g * Cfg::DP + i * 128 + at.lane * 4) = sums[g][i];
    if (at.lane == 0) at.totals()[at.warp * HG + g] = total[g];
  }
}

// The map of the results, out of code space; see DecodeParams::map. A warp has every NW-th of the matrix's rows, a lane
// four columns. Batches have no such thing: a block that finishes many short rows would do it for each of them, while the
// others wait; theirs is pq_home_kernel.
template <typename Cfg, bool HERE>
struct HomeMap {
  static constexpr int D = Cfg::D, NW = Cfg::NW, HG = Cfg::HG, DP = Cfg::DP, ROWS = (D + NW - 1) / NW;
  static_assert(D * Cfg::HS * 4 <= Cfg::NP * Cfg::pair_bytes, "results wait where the pairs had their scores");
  Four<__half> raw[ROWS];

  static __device__ __forceinline__ bool wanted(const DecodeParams& p) { return HERE && p.map != nullptr; }
  static __device__ __forceinline__ const __half* matrix(const DecodeParams& p, const Place<Cfg>& at) {
    return p.map + static_cast<int64_t>(at.h) * D * D;
  }
  // To L2: some microseconds of codes have gone through it since the last step.
  static __device__ __forceinline__ void prefetch(const DecodeParams& p, const Place<Cfg>& at) {
    if (wanted(p))
      for (int i = threadIdx.x; i < D * D * 2 / 128; i += NW * 32) prefetch_l2(matrix(p, at) + i * 64);
  }
  // To registers.
  __device__ __forceinline__ void fetch(const DecodeParams& p, const Place<Cfg>& at) {
    if (!wanted(p)) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = at.warp + NW * r;
      if (row < D && at.lane * 4 < D) raw[r] = load_four(matrix(p, at) + row * D + at.lane * 4);
    }
  }
  // What is to be mapped, float [D][HS].
  static __device__ __forceinline__ float* results(const Place<Cfg>& at) {
    return reinterpret_cast<float*>(at.smem + Cfg::pair_offset);
  }
  // Called by all threads when results are written.
  __device__ __forceinline__ void store(const DecodeParams& p, const Place<Cfg>& at, int b) const {
    using T = typename Cfg::T;
    __syncthreads();
    float4 sum[HG] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = at.warp + NW * r;
      if (row >= D) continue;
      const float4 w = raw[r].floats();
      float x[HG];
      load<HG>(results(at) + row * Cfg::HS, x);
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        sum[g].x = fmaf(x[g], w.x, sum[g].x), sum[g].y = fmaf(x[g], w.y, sum[g].y);
        sum[g].z = fmaf(x[g], w.z, sum[g].z), sum[g].w = fmaf(x[g], w.w, sum[g].w);
      }
    }
    if (at.lane * 4 < D)
#pragma unroll
      for (int g = 0; g < HG; ++g)
        *reinterpret_cast<float4*>(at.sums(at.warp) + g * DP + at.lane * 4) = sum[g];
    __syncthreads();
    for (int i = threadIdx.x; i < HG * D; i += NW * 32) {
      const int g = i / D, dim = i % D;
      if (at.first_vector + g >= at.vectors) break;
      float y = 0.f;
#pragma unroll
      for (int n = 0; n < NW; ++n) y += at.sums(n)[g * DP + dim];
      const size_t vector = (static_cast<size_t>(b) * p.H + at.h) * at.vectors + at.first_vector + g;
      static_cast<T*>(p.out)[vector * D + dim] = from_float<T>(y);
    }
  }
};

// Called by all threads of a block after its warps left their parts. The
// last of the blocks that share a row, found by drawing tickets, merges what they left in memory, by the same code: no
// second kernel, no waiting.
template <typename Cfg, bool ONE>
__device__ __forceinline__ void finish_row(const DecodeParams& p, const Place<Cfg>& at, const Share& share, int b) {
  using T = typename Cfg::T;
  constexpr int HG = Cfg::HG, NW = Cfg::NW, D = Cfg::D, DP = Cfg::DP;
  static_assert(NW <= 32, "a lane a part");
  int* const last = reinterpret_cast<int*>(at.totals() + NW * HG);
  const int row_group = (b * p.H + at.h) * gridDim.z + blockIdx.z;
  // Parts of one (kv head, group) lie one after the other: split + b is different for all of them.
  float* const parts = p.partial + static_cast<size_t>(at.h * gridDim.z + blockIdx.z) * (p.splits + p.B) * HG * (D + 4);
  int first = Cfg::first_part, end = NW;
  bool final = share.blocks == 1;
  HomeMap<Cfg, ONE> home;
  if (final)
    home.fetch(p, at);
  else
    home.prefetch(p, at);
#pragma unroll 1
  while (true) {
    __syncthreads();
#pragma unroll 1
    for (int i = at.warp; i < HG * kSlices<Cfg>; i += NW) {  // a warp a vector, or 128 dimensions of it
      const int g = i / kSlices<Cfg>, dim = i % kSlices<Cfg> * 128 + at.lane * 4;
      const float2 total =
          at.lane >= first && at.lane < end ? at.totals()[at.lane * HG + g] : make_float2(-1e30f, 0.f);
      float best = total.x;
#pragma unroll
      for (int o = 16; o; o >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
      const float factor = exp2_approx(total.x - best);
      float all = factor * total.y;
#pragma unroll
      for (int o = 16; o; o >>= 1) all += __shfl_xor_sync(~0u, all, o);
      float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
      for (int n = first; n < end; ++n) {
        const float f = __shfl_sync(~0u, factor, n);
        const float4 x = *reinterpret_cast<const float4*>(at.sums(n) + g * DP + (dim < DP ? dim : 0));
        value.x += f * x.x, value.y += f * x.y, value.z += f * x.z, value.w += f * x.w;
      }
      if (dim >= D) continue;
      if (!final) {
        float* const to = parts + (static_cast<size_t>(blockIdx.x + b) * HG + g) * (D + 4);
        *reinterpret_cast<float4*>(to + 4 + dim) = value;
        if (dim == 0) *reinterpret_cast<float2*>(to) = make_float2(best, all);
      } else if (at.first_vector + g < at.vectors) {
        const size_t vector = (static_cast<size_t>(b) * p.H + at.h) * at.vectors + at.first_vector + g;
        T* const to = static_cast<T*>(p.out) + vector * D + dim;
        const float one = __fdividef(1.f, all);
        if (dim == 0) p.lse[vector] = (best + __log2f(all)) * kLn2;
        if (home.wanted(p)) {
          const float result[4] = {value.x * one, value.y * one, value.z * one, value.w * one};
#pragma unroll
          for (int i = 0; i < 4; ++i) home.results(at)[(dim + i) * Cfg::HS + g] = result[i];
          continue;
        }
        to[0] = from_float<T>(value.x * one), to[1] = from_float<T>(value.y * one);
        to[2] = from_float<T>(value.z * one), to[3] = from_float<T>(value.w * one);
      }
    }
    if (final) {
      if (home.wanted(p)) home.store(p, at, b);
      break;
    }
    __syncthreads();  // all of the part is written before the ticket is drawn
    if (threadIdx.x == 0) {
      const bool is_last = draw_ticket(p.tickets + row_group) == share.blocks - 1;
      if (is_last) p.tickets[row_group] = 0;
      *last = is_last;
    }
    __syncthreads();
    if (!*last) break;
    home.fetch(p, at);
    fetch_parts(at, parts + static_cast<size_t>(share.block0 + b) * HG * (D + 4), share.blocks);
    first = 0, end = min(share.blocks, NW), final = true;
  }
}

// A row that stores nothing: out 0, lse -inf.
template <typename Cfg>
__device__ __forceinline__ void store_nothing(const DecodeParams& p, const Place<Cfg>& at, int b) {
  constexpr int D = Cfg::D;
#pragma unroll 1
  for (int i = threadIdx.x; i < Cfg::HG * D; i += Cfg::NW * 32) {
    const int g = i / D, dim = i % D;
    if (at.first_vector + g >= at.vectors) continue;
    const size_t vector = (static_cast<size_t>(b) * p.H + at.h) * at.vectors + at.first_vector + g;
    static_cast<typename Cfg::T*>(p.out)[vector * D + dim] = from_float<typename Cfg::T>(0.f);
    if (dim == 0) p.lse[vector] = -INFINITY;
  }
}

// The map of a batch's results. Blocks: slices of a head's map and heads; vectors, kMapVectors at a time.
template <typename Cfg>
__global__ void __launch_bounds__(kMapThreads) pq_home_kernel(const __grid_constant__ DecodeParams p) {
  using T = typename Cfg::T;
  constexpr int D = Cfg::D, slices = D / kMapSlice;
  __shared__ float smem[kMapSmem / 4];
  struct Places {
    const DecodeParams& p;
    int h, first, v[kMapVectors / kMapWarps];
    __device__ __forceinline__ int64_t of(int v) const {
      const int each = p.G * p.S, b = (first + v) / each;
      return ((static_cast<int64_t>(b) * p.H + h) * each + (first + v - b * each)) * D;
    }
    __device__ __forceinline__ void read(int j, int of_v) { v[j] = of_v; }
    __device__ __forceinline__ T* place(int j) const { return static_cast<T*>(p.out) + of(v[j]); }
  } places{p, static_cast<int>(blockIdx.x / slices), static_cast<int>(blockIdx.y * kMapVectors)};
  const int n = min(kMapVectors, p.B * p.G * p.S - places.first);
  const auto at = [&](int v) { return static_cast<const T*>(p.unmapped) + places.of(v); };
  const __half* const map = p.map + static_cast<int64_t>(places.h) * D * D;
  map_rows<4, __half, T>(map, D, blockIdx.x % slices, n, smem, at, places);
}

}  // namespace pqlab
