// The end of a row: merge the warps of a block, then the blocks that share the row. No torch.
#pragma once
#include "pq_lookup.cuh"
#include "pq_maps.cuh"

namespace pqlab {

// The merge by slices: a warp has a query vector, or 128 dimensions of it, a lane four of them; lanes that are left
// over take other parts beside those.
template <typename Cfg>
struct Slices {
  static constexpr int dims = Cfg::DP < 128 ? Cfg::DP : 128, count = Cfg::DP / dims, jobs = Cfg::HG * count;
  static constexpr int lanes = dims / 4, beside = 32 / lanes;  // of a part; parts that a warp reads side by side
  static constexpr int floats = 4 + dims;  // of a part in memory: maximum, sum of weights, two of nothing, sums
};

// What parts of a row come to, in one slice.
struct Merged {
  float top = -1e30f, total = 0.f;  // maximum (log2 units), sum of weights
  float4 sums = make_float4(0.f, 0.f, 0.f, 0.f);

  __device__ __forceinline__ void add(float f, const float4& x) {
    sums.x += f * x.x, sums.y += f * x.y, sums.z += f * x.z, sums.w += f * x.w;
  }
  __device__ __forceinline__ void shrink(float to) {
    const float f = exp2_approx(top - to);
    top = to, total *= f;
    sums.x *= f, sums.y *= f, sums.z *= f, sums.w *= f;
  }
  // Of lanes that have the same dimensions.
  template <int LANES>
  __device__ __forceinline__ void fold() {
    float best = top;
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
    if constexpr (LANES < 32) shrink(best);
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) {
      total += __shfl_xor_sync(~0u, total, o);
      sums.x += __shfl_xor_sync(~0u, sums.x, o), sums.y += __shfl_xor_sync(~0u, sums.y, o);
      sums.z += __shfl_xor_sync(~0u, sums.z, o), sums.w += __shfl_xor_sync(~0u, sums.w, o);
    }
  }
};

// N parts on their way to a lane: n, n + BESIDE, .. below `end`.
template <int N, int BESIDE>
struct Parts {
  float2 total[N];  // maximum, sum of weights
  float4 sums[N];

  template <typename TOTAL, typename SUMS>
  __device__ __forceinline__ void read(int n, int end, TOTAL&& total_of, SUMS&& sums_of) {
#pragma unroll
    for (int j = 0; j < N; ++j, n += BESIDE) {
      total[j] = make_float2(-1e30f, 0.f), sums[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (n < end) total[j] = total_of(n), sums[j] = sums_of(n);
    }
  }
  __device__ __forceinline__ void add_to(Merged& merged) const {
    float best = merged.top;
#pragma unroll
    for (int j = 0; j < N; ++j) best = fmaxf(best, total[j].x);
    merged.shrink(best);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float f = exp2_approx(total[j].x - best);
      merged.total += f * total[j].y;
      merged.add(f, sums[j]);
    }
  }
};

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

// What the block's warps left of slice `job`.
template <typename Cfg>
__device__ __forceinline__ Merged merge_warps(const Place<Cfg>& at, int job) {
  using Of = Slices<Cfg>;
  constexpr int first = Cfg::first_part, NW = Cfg::NW;
  const int g = job / Of::count, dim = job % Of::count * Of::dims + at.lane % Of::lanes * 4;
  Parts<(NW - first + Of::beside - 1) / Of::beside, Of::beside> parts;
  parts.read(
      first + at.lane / Of::lanes, NW, [&](int n) { return at.totals()[n * Cfg::HG + g]; },
      [&](int n) { return *reinterpret_cast<const float4*>(at.sums(n) + g * Cfg::DP + dim); });
  Merged merged;
  parts.add_to(merged);
  merged.template fold<Of::lanes>();
  return merged;
}

// What `blocks` blocks left of slice `job` in memory, [blocks][jobs][floats]: a round is on its way while one is added.
template <typename Cfg>
__device__ __forceinline__ Merged merge_blocks(const Place<Cfg>& at, const float* from, int job, int blocks) {
  using Of = Slices<Cfg>;
  constexpr int N = Cfg::D % 64 ? 6 : 8;  // kernels of heads of 32 and 96 have no registers for two rounds of eight
  constexpr int apart = Of::jobs * Of::floats;
  const float* const total = from + job * Of::floats;
  const float* const sums = total + 4 + at.lane % Of::lanes * 4;
  Parts<N, Of::beside> now, next;
  auto read = [&](Parts<N, Of::beside>& parts, int n) {
    parts.read(
        n + at.lane / Of::lanes, blocks,
        [&](int i) { return __ldcg(reinterpret_cast<const float2*>(total + i * apart)); },
        [&](int i) { return __ldcg(reinterpret_cast<const float4*>(sums + i * apart)); });
  };
  Merged merged;
  read(now, 0);
#pragma unroll 1
  for (int n = N * Of::beside; n < blocks; n += N * Of::beside) {
    read(next, n);
    now.add_to(merged);
    now = next;
  }
  now.add_to(merged);
  merged.template fold<Of::lanes>();
  return merged;
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

// Whether the caller is the last of `blocks` that draw this ticket.
__device__ __forceinline__ bool draws_last(int* ticket, int blocks) {
  const bool last = draw_ticket(ticket) == blocks - 1;
  if (last) *ticket = 0;
  return last;
}

// Called by all threads of a block after its warps left their parts. Of the blocks that share a row, the warp that is
// the last with a slice, found by drawing tickets, merges what all left of it in memory: no second kernel, no waiting, no
// barrier of a block. Only a map needs all slices of a row in one block.
template <typename Cfg, bool ONE>
__device__ __forceinline__ void finish_row(const DecodeParams& p, const Place<Cfg>& at, const Share& share, int b) {
  using T = typename Cfg::T;
  using Of = Slices<Cfg>;
  constexpr int HG = Cfg::HG, NW = Cfg::NW, D = Cfg::D;
  const int group = at.h * gridDim.z + blockIdx.z;
  int* const tickets = p.tickets + (b * p.H * static_cast<int>(gridDim.z) + group) * Of::jobs;
  // Parts of one (kv head, group) lie one after the other: split + b is different for all of them.
  float* const parts = p.partial + (static_cast<size_t>(group) * (p.splits + p.B) + b) * Of::jobs * Of::floats;
  const float* const of_row = parts + share.block0 * Of::jobs * Of::floats;
  const bool alone = share.blocks == 1;
  HomeMap<Cfg, ONE> home;
  const auto store = [&](int job, const Merged& merged) {
    const int g = job / Of::count, dim = job % Of::count * Of::dims + at.lane * 4;
    if (at.lane >= Of::lanes || dim >= D || at.first_vector + g >= at.vectors) return;
    const size_t vector = (static_cast<size_t>(b) * p.H + at.h) * at.vectors + at.first_vector + g;
    const float one = __fdividef(1.f, merged.total);
    const float result[4] = {merged.sums.x * one, merged.sums.y * one, merged.sums.z * one, merged.sums.w * one};
    if (dim == 0) p.lse[vector] = (merged.top + __log2f(merged.total)) * kLn2;
    T* const to = static_cast<T*>(p.out) + vector * D + dim;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (home.wanted(p))
        home.results(at)[(dim + i) * Cfg::HS + g] = result[i];
      else
        to[i] = from_float<T>(result[i]);
  };
  if (alone)
    home.fetch(p, at);
  else
    home.prefetch(p, at);
  __syncthreads();
#pragma unroll 1
  for (int job = at.warp; job < Of::jobs; job += NW) {
    Merged merged = merge_warps<Cfg>(at, job);
    if (!alone) {
      float* const to = parts + (blockIdx.x * Of::jobs + job) * Of::floats;
      if (at.lane < Of::lanes) *reinterpret_cast<float4*>(to + 4 + at.lane * 4) = merged.sums;
      if (at.lane == 0) *reinterpret_cast<float2*>(to) = make_float2(merged.top, merged.total);
      if (home.wanted(p)) continue;
      __syncwarp();
      const bool last = __any_sync(~0u, at.lane == 0 && draws_last(tickets + job, share.blocks));
      __syncwarp();
      if (!last) continue;
      merged = merge_blocks<Cfg>(at, of_row, job, share.blocks);
    }
    store(job, merged);
  }
  if (!home.wanted(p)) return;
  if (!alone) {
    int* const last = reinterpret_cast<int*>(at.totals() + NW * HG);
    __syncthreads();  // all of the part is written before the ticket is drawn
    if (threadIdx.x == 0) *last = draws_last(tickets, share.blocks);
    __syncthreads();
    if (!*last) return;
    home.fetch(p, at);
#pragma unroll 1
    for (int job = at.warp; job < Of::jobs; job += NW) store(job, merge_blocks<Cfg>(at, of_row, job, share.blocks));
  }
  home.store(p, at, b);
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
