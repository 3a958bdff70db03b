// The queries that a step asks of anchored keys: turned back by the anchor of every span, and mapped. No torch, sm_80
// and newer.
//
// A context of 32 thousand tokens has some hundred spans, so this is a product of matrices for each kv head, and the
// tensor cores' work: fp16 in, which is what scores are made of, too, and fp32 sums. A block takes 32 vectors, those of
// a span side by side, through all of a head's map. Spans that no row has reached are left out, by the lengths: the host
// only knows how many there may be.
#pragma once
#include "pq_append_shape.cuh"
#include "pq_maps.cuh"

namespace pqlab {

constexpr int kAskedThreads = 128, kAskedWarps = kAskedThreads / 32;
constexpr int kAskedVectors = 32;  // of a block
constexpr int kAskedMost = 128;    // of D, which is a multiple of 32

// fp16 between two vectors in shared memory: eight lanes read 64 bytes of each of two, from different banks.
__host__ __device__ constexpr int asked_stride(int D) { return D % 64 ? D : D + 32; }
// Behind the vectors: of every one a part of its offset by each warp.
constexpr int kAskedSmem = kAskedVectors * (asked_stride(kAskedMost) * 2 + kAskedWarps * 4);

inline int asked_blocks(const AppendParams& p) {
  return (p.spans * p.B * p.G * p.S + kAskedVectors - 1) / kAskedVectors * p.H;
}

// A query vector of a kv head: those of the first span, then those of the next; of a span row by row.
struct Asked {
  int span, b, vector;  // of G * S
  __device__ __forceinline__ Asked(const AppendParams& p, int n) {
    const int each = p.G * p.S;
    span = divide(n, p.span_inverse);
    const int rest = n - span * p.B * each;
    b = divide(rest, p.each_inverse), vector = rest - b * each;
  }
  // Among those of all heads, [spans, B, H, G * S].
  __device__ __forceinline__ int64_t place(const AppendParams& p, int h) const {
    return ((static_cast<int64_t>(span) * p.B + b) * p.H + h) * p.G * p.S + vector;
  }
};

// The vectors from `first` on, turned back, to shared memory; a warp has every fourth, a lane two pairs of dimensions.
template <typename T>
__device__ __forceinline__ void turn_queries(const AppendParams& p, int h, int first, int count, __half* to) {
  const int half = p.D / 2, i = (threadIdx.x & 31) * 2, warp = threadIdx.x >> 5;
  if (i >= half) return;
#pragma unroll 4
  for (int v = warp; v < count; v += kAskedWarps) {
    const Asked asked(p, first + v);
    const int g = divide(asked.vector, p.steps_inverse), s = asked.vector - g * p.S;
    const T* const q = static_cast<const T*>(p.q) + asked.b * p.q_stride[0] + (h * p.G + g) * p.q_stride[1] +
                       s * p.q_stride[2] + i;
    const float* const by = p.turns + static_cast<int64_t>(asked.span) * p.D + i;
    const float2 low = load_float2(q), high = load_float2(q + half), c = load_float2(by), d = load_float2(by + half);
    uint32_t* const at = reinterpret_cast<uint32_t*>(to + v * asked_stride(p.D) + i);
    at[0] = pack_half2(low.x * c.x + high.x * d.x, low.y * c.y + high.y * d.y);
    at[half / 2] = pack_half2(high.x * c.x - low.x * d.x, high.y * c.y - low.y * d.y);
  }
}

// A warp has 16 outputs of 64 for all of the block's vectors. The order of the columns in a product is free if it is the
// same for both: a lane's eight of 32 lie side by side. So is that of the outputs: a lane is left with four neighbours.
template <typename T>
__device__ __forceinline__ void ask_spans(const AppendParams& p, int block, float* smem) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, col = lane >> 2, quad = lane & 3;
  const int chunk = divide(block, p.heads_inverse), h = block - chunk * p.H, first = chunk * kAskedVectors;
  const int count = min(kAskedVectors, p.spans * p.B * p.G * p.S - first);
  const __half* const map = p.q_map + static_cast<int64_t>(h) * p.D * p.D;

  for (int i = threadIdx.x; i < p.D * p.D / 64; i += kAskedThreads) prefetch_l2(map + i * 64);
  const int from = Asked(p, first).span << p.span_shift;  // code index that a row has to reach
  bool wanted = from == 0;                                // sinks are asked, too
  for (int b = lane; b < p.B; b += 32) wanted |= p.after[3 * b + 1] + p.after[3 * b + 2] > from;
  if (!__any_sync(~0u, wanted)) return;

  __half* const turned = reinterpret_cast<__half*>(smem);
  float* const parts = reinterpret_cast<float*>(turned + kAskedVectors * asked_stride(p.D));  // [vectors][warps]
  static_assert(kAskedVectors * kAskedWarps == kAskedThreads, "a part a thread");
  parts[threadIdx.x] = 0.f;
  turn_queries<T>(p, h, first, count, turned);
  __syncthreads();

  const uint32_t x = smem_address(turned + col * asked_stride(p.D) + quad * 8), eight = 16 * asked_stride(p.D);
#pragma unroll 1
  for (int output = warp * 16; output < p.D; output += kAskedWarps * 16) {
    constexpr int ROUNDS = kAskedMost / 32;
    uint4 m[ROUNDS][2] = {};
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int row = output + 4 * (col >> 1) + 2 * t + (col & 1);
        if (k * 32 < p.D) m[k][t] = *reinterpret_cast<const uint4*>(map + row * p.D + k * 32 + quad * 8);
      }
#pragma unroll 1
    for (int v = 0; v < count; v += 16) {
      float d[2][2][4] = {};  // two sums each: a product does not have to wait for the one before it
#pragma unroll
      for (int k = 0; k < ROUNDS; ++k) {
        if (k * 32 >= p.D) break;
        const uint32_t at = x + v / 8 * eight + k * 64;
        const uint4 a = load_shared_16(at), b = load_shared_16(at + eight);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          mma_16816(d[t][0], a.x, b.x, a.y, b.y, m[k][t].x, m[k][t].y);
          mma_16816(d[t][1], a.z, b.z, a.w, b.w, m[k][t].z, m[k][t].w);
        }
      }
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int mine = v + col + 8 * upper;
        const Asked asked(p, first + min(mine, count - 1));
        const int64_t fit = (static_cast<int64_t>(asked.b) * p.H + h) * p.D + output + quad * 4;
        struct alignas(4 * sizeof(T)) {
          T x[4];
        } four;
        float part = 0.f;  // of what is asked, so with its rounding: it meets the shift in what is stored
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 2 * upper + (i & 1);
          const float y = d[i >> 1][0][n] + d[i >> 1][1][n];
          four.x[i] = from_float<T>(p.k_scale == nullptr ? y : y / p.k_scale[fit + i]);
          if (p.offsets != nullptr) part += to_float(four.x[i]) * p.k_shift[fit + i];
        }
        if (mine < count)
          *reinterpret_cast<decltype(four)*>(static_cast<T*>(p.mapped_q) + asked.place(p, h) * p.D + output + quad * 4) =
              four;
        part += __shfl_xor_sync(~0u, part, 1);
        part += __shfl_xor_sync(~0u, part, 2);
        if (quad == 0) parts[mine * kAskedWarps + warp] += part;
      }
    }
  }
  if (p.offsets == nullptr) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    const float4 all = reinterpret_cast<const float4*>(parts)[threadIdx.x];
    p.offsets[Asked(p, first + threadIdx.x).place(p, h)] = -(all.x + all.y + all.z + all.w);
  }
}

}  // namespace pqlab
