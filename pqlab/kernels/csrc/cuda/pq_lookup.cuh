// Reading entries of the codebooks, and what warps of a pair share. No torch.
#pragma once
#include <type_traits>

#include "pq_shape.cuh"

namespace pqlab {

// One lane arrives for its warp, after __syncwarp. compute-sanitizer's racecheck does not see through that: for it all
// lanes arrive.
#ifdef PQ_RACECHECK
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif

// Reads N words of shared memory at byte OFFSET + `at` of the dynamic part. On sm_90 the compiler would add the start
// of the dynamic part to every address (it depends on the place in a cluster); outside clusters it is a constant, the
// memory that CUDA reserves, and fits into the instruction. The launcher checks it.
template <int N, int OFFSET>
__device__ __forceinline__ void lookup(uint32_t (&x)[N], const uint8_t* smem, uint32_t at) {
#if __CUDA_ARCH__ >= 900
  if constexpr (N == 1)
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(x[0]) : "r"(at), "n"(OFFSET + kReservedSmem));
  else if constexpr (N == 2)
    asm("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(x[0]), "=r"(x[1]) : "r"(at), "n"(OFFSET + kReservedSmem));
  else
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "r"(at), "n"(OFFSET + kReservedSmem));
#else
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = *reinterpret_cast<const uint32_t*>(smem + OFFSET + at + 4 * i);
#endif
}

template <int I>
struct Int {
  static constexpr int value = I;
};
// f(Int<0>()), f(Int<1>()), ... f(Int<N - 1>()): a loop whose index is a constant.
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (I < N) {
    f(Int<I>());
    unrolled<N, I + 1>(f);
  }
}

// Address of the entry of byte `byte` of `codes`, less the block's offset; see Side. `low` is a plain number, or for
// pairs of blocks a register whose byte `at` is the low byte and whose top byte says how many times 64 KiB further on.
template <typename S>
__device__ __forceinline__ uint32_t entry_address(uint32_t codes, int byte, uint32_t low, int at) {
  if constexpr (S::PAIRS)
    return prmt(codes, low, 0xF704u + at + (byte << 4));
  else
    return __dp4a(codes, 128u << (8 * byte), low);
}

// Asks for a codebook; the barrier completes when it is there. Called by threads 0 .. THREADS - 1, of which `one` works
// for all where there is a copy engine. Blocks of the same head start at different places, or they would all ask the same
// slices of L2 at a time.
template <int THREADS>
__device__ __forceinline__ void fetch_books(const uint8_t* books, uint32_t to, uint32_t bytes, uint32_t barrier,
                                            int thread, int one) {
#if __CUDA_ARCH__ >= 900
  if (thread == one) {
    const uint32_t at = blockIdx.x % 8 * (bytes / 8);  // asking costs 100 cycles and more: two copies, not eight
    mbarrier_expect(barrier, bytes);
    bulk_copy(to + at, books + at, bytes - at, barrier);
    if (at) bulk_copy(to, books, at, barrier);
  }
#else
  for (uint32_t i = thread * 16; i < bytes; i += THREADS * 16) cp_async_16(to + i, books + i);
  cp_async_arrive(barrier);
#endif
}

// Who a thread is and where its things lie; the same for keys and values.
template <typename Cfg>
struct Place {
  int lane, warp, pair;
  bool keys;
  int col, quad;          // mma row / column of this lane, position in its quad
  bool diagonal, odd;     // of an 8x8 result this lane holds element (col, col); col is odd
  int h, first_vector, vectors;
  uint8_t* smem;
  float* scores;          // [2][32][HS]
  __half* weights;        // [HG][32]
  uint32_t key_books, value_books, full, free;  // barriers; full and free: two each, one a buffer of scores

  __device__ __forceinline__ Place(const DecodeParams& p, uint8_t* smem_) : smem(smem_) {
    const int tid = threadIdx.x;
    lane = tid & 31;
    warp = __shfl_sync(~0u, tid >> 5, 0);  // says that it is uniform: addresses then take uniform registers
    keys = warp < Cfg::NP;
    pair = keys ? warp : warp - Cfg::NP;
    col = lane >> 2, quad = lane & 3;
    diagonal = quad == col >> 1;
    odd = col & 1;
    h = blockIdx.y;
    vectors = p.G * p.S, first_vector = blockIdx.z * Cfg::HG;
    uint8_t* const shared = smem + Cfg::pair_offset + pair * Cfg::pair_bytes;
    scores = reinterpret_cast<float*>(shared);
    weights = reinterpret_cast<__half*>(shared + Cfg::pair_weights);
    const uint32_t barriers = smem_address(smem + Cfg::barrier_offset);
    key_books = barriers, value_books = barriers + 8;
    full = barriers + 8 * (Cfg::pair_barriers + 4 * pair);
    keep(full);
    free = full + 16;
  }

  // The part of a warp, once it is through with its codes: sums [HG][DP], in place of its ring; (maximum, sum) of every
  // warp and query vector.
  __device__ __forceinline__ float* sums(int of_warp) const {
    return reinterpret_cast<float*>(smem + Cfg::ring_offset + of_warp * Cfg::ring_bytes);
  }
  __device__ __forceinline__ float2* totals() const { return reinterpret_cast<float2*>(smem + Cfg::total_offset); }

  // Query vector g of the block, in one row of the batch; of anchored keys for one of their spans.
  __device__ __forceinline__ const typename Cfg::T* query(const DecodeParams& p, int row, int g, int span = 0) const {
    const int v = first_vector + g < vectors ? first_vector + g : 0, head = v * p.step_magic >> 16;
    return static_cast<const typename Cfg::T*>(p.q) + row * p.q_stride[0] +
           static_cast<int64_t>(h * p.G + head) * p.q_stride[1] + (v - head * p.S) * p.q_stride[2] +
           (Cfg::ANCHORED ? span * p.span_stride : 0);
  }
  // What is added to its scores in a span of anchored keys.
  __device__ __forceinline__ float offset(const DecodeParams& p, int row, int g, int span) const {
    if (p.offsets == nullptr || first_vector + g >= vectors) return 0.f;
    const float* const x = p.offsets + (static_cast<int64_t>(span * p.B + row) * p.H + h) * vectors + first_vector + g;
    const int64_t part = static_cast<int64_t>(p.spans) * p.B * p.H * vectors;
    float more = p.offset_parts > 1 ? x[part] : 0.f;
    if constexpr (Cfg::D > 128)
      if (p.offset_parts > 2) more += x[2 * part] + x[3 * part];
    return (*x + more) * p.offset_unit;
  }
};

// Whose turn it is among the two buffers of scores.
struct Turn {
  int buffer = 0;
  uint32_t round = 0;  // parity of the buffer's barriers
  __device__ __forceinline__ void next() {
    buffer ^= 1;
    if (buffer == 0) round ^= 1;
  }
};

}  // namespace pqlab
