// Paged flash-decoding like pq_decode, for heads of 256 dimensions in halves; see pq_halves_shape.cuh. No torch.
//
// Every warp takes its own chunks through all four phases, so its scores, its maximum and its weights are its own, and
// nothing but the codebooks makes warps wait for each other.
#pragma once
#include "pq_exact.cuh"
#include "pq_halves_shape.cuh"
#include "pq_keys.cuh"
#include "pq_merge.cuh"

namespace pqlab {

// The block's query vectors of a row, on their way to shared memory.
template <typename Cfg>
struct HalvesQuery {
  static constexpr int each = Cfg::D / 2, words = Cfg::HG * each, threads = Cfg::NW * 32;
  static constexpr int N = (words + threads - 1) / threads;
  Raw<typename Cfg::T> x[N] = {};

  // f(n, g, word): the thread's n-th is this word of vector g.
  template <typename F>
  static __device__ __forceinline__ void mine(F&& f) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int i = threadIdx.x + n * threads;
      if (i < words) f(n, i / each, i % each);
    }
  }
  __device__ __forceinline__ void load(const DecodeParams& p, const Place<Cfg>& at, int row) {
    if constexpr (!Cfg::ANCHORED)  // else read when a warp comes to their span
      mine([&](int n, int g, int word) { x[n] = load_raw(at.query(p, row, g) + 2 * word); });
  }
  static __device__ __forceinline__ uint32_t* shared(const Place<Cfg>& at, int half) {
    return reinterpret_cast<uint32_t*>(at.smem + Cfg::query_offset) + half * Cfg::HG * Cfg::query_words;
  }
  __device__ __forceinline__ void store(const Place<Cfg>& at) const {
    if constexpr (!Cfg::ANCHORED)
      mine([&](int n, int g, int word) {
        shared(at, word / (each / 2))[g * Cfg::query_words + word % (each / 2)] = to_half2(x[n]);
      });
  }
};

// Scores of a half of the keys of the warp's n chunks, of which the first is `chunk` of row b, added to those of the
// first half.
template <typename Cfg>
__device__ __forceinline__ void key_phase(const DecodeParams& p, const Place<Cfg>& at, int b, int chunk, int n,
                                          bool second, HalvesStream<Cfg>& stream, BookTurns<Cfg>& books) {
  using K = typename Cfg::K;
  if (n <= 0) {  // making the scores' operands would only keep the other warps from it
    books.wait();
    books.leave();
    return;
  }
  const KeyTile<Cfg> tile(at);
  Scores<Cfg> scores(at, books.buffer());
  const auto take = [&](int k) {
    uint32_t codes = stream.wait();
    if constexpr (K::C == 16) {
      const uint32_t wide = smem_address(at.scores) + Cfg::pair_spread;
      tile.spread(codes, wide, at.lane);
      stream.release(p);
      codes = wide;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t y[K::CODES][2][KeyTile<Cfg>::NY];
      tile.read(codes, j, y);
      if (j == 1 && K::C == 256) stream.release(p);
      scores.tile(y, at.scores + (k * kChunk + j * kTile) * Cfg::HS, [] {}, second);
    }
    if constexpr (K::C == 16) __syncwarp();  // the spread keys are read
  };
  if constexpr (Cfg::ANCHORED) {
#pragma unroll 1
    for (int k = 0; k < n;) {
      const int index = (chunk + k) * kChunk, span = p.span_of(index);
      const int border = (((index >> p.span_shift) + 1) << p.span_shift) / kChunk - chunk;
      scores.ask([&](int g, int i) { return to_half2(load_raw(at.query(p, b, g, span) + second * K::DP + 2 * i)); });
      scores.move([&](int g) { return second ? 0.f : at.offset(p, b, g, span); });
      books.wait();
#pragma unroll 1
      for (const int end = min(border, n); k < end; ++k) take(k);
    }
  } else {
    scores.ask(HalvesQuery<Cfg>::shared(at, second), Cfg::query_words);
    books.wait();
#pragma unroll 1
    for (int k = 0; k < n; ++k) take(k);
  }
  books.leave();
}

// Scores [n][32][HS] of the warp's chunks -> weights [n][HG][32] in the first part of every chunk's place. `token`: the
// lane's of the first chunk. Raises the maxima; shrink(g, factor) does what follows for the sums so far.
template <typename Cfg, typename F>
__device__ __forceinline__ void softmax(const DecodeParams& p, const Place<Cfg>& at, int n, int token, int step,
                                        int coded, float (&top)[Cfg::HG], float (&total)[Cfg::HG], F&& shrink) {
  constexpr int HG = Cfg::HG;
  const int own = (at.lane & 16) + (at.lane & 1) * 8 + (at.lane & 15) / 2;  // as the lanes of the product had them
  auto read = [&](int k, float (&s)[HG]) {
    load(at.scores + (k * kChunk + own) * Cfg::HS, s);
#pragma unroll
    for (int g = 0; g < HG; ++g) s[g] = token + k * step < coded ? s[g] * p.scale_log2 : -INFINITY;
  };
  float best[HG];
#pragma unroll
  for (int g = 0; g < HG; ++g) best[g] = top[g];
#pragma unroll 2
  for (int k = 0; k < n; ++k) {
    float s[HG];
    read(k, s);
#pragma unroll
    for (int g = 0; g < HG; ++g) best[g] = fmaxf(best[g], s[g]);
  }
#pragma unroll
  for (int g = 0; g < HG; ++g) {
#pragma unroll
    for (int o = 16; o; o >>= 1) best[g] = fmaxf(best[g], __shfl_xor_sync(~0u, best[g], o));
    const float factor = exp2_approx(top[g] - best[g]);
    top[g] = best[g], total[g] *= factor;
    shrink(g, factor);
  }
#pragma unroll 2
  for (int k = 0; k < n; ++k) {
    float s[HG];
    read(k, s);
    __syncwarp();
    __half* const weights = reinterpret_cast<__half*>(at.scores + k * kChunk * Cfg::HS) + at.lane;
#pragma unroll
    for (int g = 0; g < HG; ++g) {
      s[g] = exp2_approx(s[g] - top[g]);
      total[g] += s[g];
      weights[g * kChunk] = __float2half_rn(s[g]);
    }
  }
  __syncwarp();
}

// The block's share of a row: exact tokens, then codes, segment after segment. Leaves the warp's part for finish_row.
template <typename Cfg>
__device__ __forceinline__ void halves_warp(const DecodeParams& p, const Place<Cfg>& at, int b, const Row& row,
                                            const Share& share, bool more, const HalvesQuery<Cfg>& query,
                                            HalvesStream<Cfg>& stream, BookTurns<Cfg>& books, const int* early) {
  constexpr int HG = Cfg::HG, U = OwnHalves<Cfg>::U, half = OwnHalves<Cfg>::half;
  ExactTokens<Cfg, U, OwnHalves<Cfg>> exact(p, at, row, b, share.e0, share.e1);
  stream.start(p, b, row.coded, share, early);
  query.store(at);
  __syncthreads();  // ahead of the exact tokens: warps that have none go on to codes
  Sums<Cfg> sums[2];  // the second is that of the half whose turn it is not
  auto both = [&](int word, int dim, int g) -> float& { return sums[word / half](word % half, dim, g); };
  float top[HG], total[HG];
#pragma unroll
  for (int g = 0; g < HG; ++g) top[g] = -1e30f, total[g] = 0.f;
  exact.attend(p, at, b, top, total, both);

  const int most = Cfg::ANCHORED ? (share.end - share.begin.first + Cfg::NP - 1) / Cfg::NP
                                 : stream.chunks_from(p, share, share.begin.first);  // of a warp
  const int segments = (most + Cfg::CHUNKS - 1) / Cfg::CHUNKS;
  books.take(segments, more);
#pragma unroll 1
  for (int first = 0; first < segments * Cfg::CHUNKS; first += Cfg::CHUNKS) {
    const int n = min(Cfg::CHUNKS, stream.chunks - first), chunk = stream.first + stream.step * first;  // maybe none
#pragma unroll 1
    for (int second = 0; second < 2; ++second) key_phase(p, at, b, chunk, n, second, stream, books);
    const int token = chunk * kChunk + at.lane;
    if (n > 0)
      softmax(p, at, n, token, stream.step * kChunk, row.coded, top, total, [&](int g, float factor) {
#pragma unroll
        for (int w = 0; w < U; ++w) both(w, 0, g) *= factor, both(w, 1, g) *= factor;
      });
#pragma unroll 1
    for (int second = 0; second < 2; ++second) {
      sums[0].start(at, books.buffer());
      books.wait();
#pragma unroll 1
      for (int k = 0; k < n; ++k) {
        sums[0].take_weights(at, reinterpret_cast<__half*>(at.scores + k * kChunk * Cfg::HS));
        sums[0].add(at, stream.wait(), [&] { stream.release(p); });
      }
      books.leave();
      swap(sums[0], sums[1]);
    }
  }
  leave_part<Cfg, U, OwnHalves<Cfg>>(at, top, total, both);
}

// ONE: the batch is one row.
template <typename Cfg, bool ONE>
__global__ void __launch_bounds__(Cfg::NW * 32, 1) pq_halves_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int NW = Cfg::NW;
  using Stream = HalvesStream<Cfg>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const Place<Cfg> at(p, smem);
  const uint32_t barriers = smem_address(smem + Cfg::barrier_offset);

  // As in pq_decode: what everything waits for is asked for before the books.
  int lengths[3] = {}, early[1] = {};
  HalvesQuery<Cfg> query;
  if constexpr (ONE) {
#pragma unroll
    for (int i = 0; i < 3; ++i) lengths[i] = load_now(p.lengths + i);
    if (!Cfg::ANCHORED && p.table_stride > 0) {
      const int page = Stream::page_of(p, Stream::early_tile(p, at.pair, at.lane / 2, at.lane));
      early[0] = load_now(p.page_table + min(page, p.table_stride - 1));
    }
    query.load(p, at, 0);
  } else if (at.warp == NW - 1 && at.lane < (p.B * 3 + 31) / 32) {
    prefetch_l2(p.lengths + at.lane * 32);
  }

  BookTurns<Cfg> books{p.books + static_cast<size_t>(at.h) * Cfg::book_bytes, smem_address(smem), barriers, at.lane};
  books.start(at.warp);
  Stream stream;
  stream.ring = smem_address(smem) + Cfg::ring_offset + at.warp * Cfg::ring_bytes;
  stream.slot_bytes = Cfg::slot_bytes;
  stream.barriers = barriers + 8 * (Cfg::ring_barriers + at.warp * Cfg::SLOTS);
  stream.lane = at.lane, stream.pair = at.pair, stream.head = at.h;
  keep(stream.ring), keep(stream.barriers);
  if (threadIdx.x < kChunk / 2) reinterpret_cast<uint32_t*>(smem + Cfg::zero_offset)[threadIdx.x] = 0;
  if (at.lane == 0) {
    for (int i = 0; i < Cfg::SLOTS; ++i) mbarrier_init(stream.barriers + 8 * i, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (ONE)  // needed from here on, not before
    for (int* x : {lengths, lengths + 1, lengths + 2, early}) asm volatile("" : "+r"(*x));

  if constexpr (ONE) {
    const Row row(lengths[0], lengths[1], lengths[2]);
    const Share share = share_of_one<Cfg>(p, row);
    if (row.units > 0 && static_cast<int>(blockIdx.x) < share.blocks) {
      halves_warp<Cfg>(p, at, 0, row, share, false, query, stream, books, Cfg::ANCHORED ? nullptr : early);
      finish_row<Cfg, false>(p, at, share, 0);
    } else if (row.units == 0 && blockIdx.x == 0) {
      store_nothing<Cfg>(p, at, 0);
    }
  } else {
    Plan* const plan = reinterpret_cast<Plan*>(smem + Cfg::plan_offset);
    if (at.warp == 0) {
      Part part = {};
      part.find<NW>(p, at.lane);
      if (at.lane == 0) plan->part = part;
    }
#pragma unroll 1
    while (true) {
      if (threadIdx.x == 0) plan->advance<NW>(p);
      __syncthreads();
      const int b = plan->uniform(plan->b);
      if (b < 0) break;
      HalvesQuery<Cfg> asked;  // of its own: one for all rows would be carried from each to the next
      asked.load(p, at, b);
      halves_warp<Cfg>(p, at, b, plan->row(), plan->shared(), plan->more(), asked, stream, books, nullptr);
      finish_row<Cfg, false>(p, at, plan->shared(), plan->uniform(plan->b));
      fence_async();  // the rings are free again, for the copy engine too
      __syncthreads();
    }
  }
  books.finish();
  if constexpr (!kBulk) cp_async_wait<0>();
  if constexpr (!ONE)
    for (int b = blockIdx.x; b < p.B; b += p.splits)
      if (Row(p, b).units == 0) store_nothing<Cfg>(p, at, b);
}

}  // namespace pqlab
