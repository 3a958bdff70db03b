// The queries that a step asks of anchored keys: turned back by the anchor of every span, and mapped. No torch, sm_80
// and newer.
//
// A context of 32 thousand tokens has some hundred spans, so this is a product of matrices for each kv head, and the
// tensor cores' work: fp16 in, which is what scores are made of, too, and fp32 sums. There is little of it, and decode
// waits for it, so it is cut small: a block takes 16 vectors, those of a span side by side, through 64 outputs of a
// head's map, and nothing in it is done twice in a row. (32 vectors and all outputs a block took 5 to 10 us more.) Spans
// that no row has reached are left out, by the lengths: the host only knows how many there may be.
#pragma once
#include "pq_append_shape.cuh"
#include "pq_maps.cuh"

namespace pqlab {

constexpr int kAskedThreads = 128, kAskedWarps = kAskedThreads / 32;
constexpr int kAskedVectors = 16, kAskedOutputs = 16 * kAskedWarps;  // of a block
constexpr int kAskedMost = 256;      // of D, which is a multiple of 32
constexpr int kAskedAtOnce = 128;    // dimensions whose columns of the map a lane has in registers

// fp16 between two vectors in shared memory: eight lanes read 64 bytes of each of two, from different banks.
__host__ __device__ constexpr int asked_stride(int D) { return D % 64 ? D : D + 32; }
// Behind the vectors: of every one a part of its offset by each warp.
constexpr int kAskedSmem = kAskedVectors * (asked_stride(kAskedMost) * 2 + kAskedWarps * 4);

// Blocks that share the outputs of a vector, 1, 2 or 4; each leaves a part of its offset.
__host__ __device__ inline int asked_parts(int D) { return D <= kAskedOutputs ? 1 : D <= 2 * kAskedOutputs ? 2 : 4; }

inline int asked_blocks(const AppendParams& p) {
  return (p.spans * p.B * p.G * p.S + kAskedVectors - 1) / kAskedVectors * p.H * asked_parts(p.D);
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
  const int half = p.D / 2, warp = threadIdx.x >> 5;
#pragma unroll 1
  for (int i = (threadIdx.x & 31) * 2; i < half; i += 64) {
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
}

// What queries are multiplied by, and stored keys were moved by, in four neighbouring dimensions of a row and head.
struct Fit {
  float inverse[4] = {1.f, 1.f, 1.f, 1.f}, shift[4] = {};
  __device__ __forceinline__ void read(const AppendParams& p, int row, int h, int dim) {
    if (p.k_scale == nullptr) return;
    const int64_t at = (static_cast<int64_t>(row) * p.H + h) * p.D + dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) inverse[i] = p.k_scale[at + i], shift[i] = p.k_shift[at + i];
#pragma unroll
    for (int i = 0; i < 4; ++i) inverse[i] = 1.f / inverse[i];
  }
};

// A warp has 16 outputs for all of the block's vectors. The order of the columns in a product is free if it is the same
// for both: a lane's eight of 32 lie side by side. So is that of the outputs: a lane is left with four neighbours.
template <typename T>
__device__ __forceinline__ void ask_spans(const AppendParams& p, int block, float* smem) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, col = lane >> 2, quad = lane & 3;
  const int parts = asked_parts(p.D), part = block & (parts - 1), at = block >> (parts >> 1);
  const int chunk = divide(at, p.heads_inverse), h = at - chunk * p.H, first = chunk * kAskedVectors;
  const int all = p.spans * p.B * p.G * p.S, count = min(kAskedVectors, all - first);
  const int output = part * kAskedOutputs + warp * 16, mine = output + quad * 4;  // of the warp, of the lane
  const bool has = output < p.D;

  // What comes from far is asked for at once. The first vector's row stands for all: more rows have more to hide behind.
  constexpr int ROUNDS = kAskedAtOnce / 32;
  uint4 m[ROUNDS][2] = {};
  const __half* const map = p.q_map + static_cast<int64_t>(h) * p.D * p.D;
  const auto read_map = [&](int begin) {
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int row = output + 4 * (col >> 1) + 2 * t + (col & 1), column = begin + k * 32;
        if (has && column < p.D) m[k][t] = *reinterpret_cast<const uint4*>(map + row * p.D + column + quad * 8);
      }
  };
  read_map(0);
  const int row = Asked(p, first).b;
  Fit known;
  if (has) known.read(p, row, h, mine);
  const int from = Asked(p, first).span << p.span_shift;  // code index that a row has to reach
  bool wanted = from == 0;                                // sinks are asked, too
  for (int b = lane; b < p.B; b += 32) wanted |= p.after[3 * b + 1] + p.after[3 * b + 2] > from;
  if (!__any_sync(~0u, wanted)) return;

  __half* const turned = reinterpret_cast<__half*>(smem);
  float* const sums = reinterpret_cast<float*>(turned + kAskedVectors * asked_stride(p.D));  // [vectors][warps]
  if (threadIdx.x < kAskedVectors * kAskedWarps) sums[threadIdx.x] = 0.f;
  turn_queries<T>(p, h, first, count, turned);
  __syncthreads();

  const uint32_t x = smem_address(turned + col * asked_stride(p.D) + quad * 8), eight = 16 * asked_stride(p.D);
  float d[2][2][4] = {};  // two sums each: a product does not have to wait for the one before it
#pragma unroll 1
  for (int begin = 0; begin < p.D; begin += kAskedAtOnce) {
    if (begin) read_map(begin);
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (begin + k * 32 >= p.D) break;
      const uint32_t from = x + (begin + k * 32) * 2;
      const uint4 a = load_shared_16(from), b = load_shared_16(from + eight);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        mma_16816(d[t][0], a.x, b.x, a.y, b.y, m[k][t].x, m[k][t].y);
        mma_16816(d[t][1], a.z, b.z, a.w, b.w, m[k][t].z, m[k][t].w);
      }
    }
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int v = col + 8 * upper;
    const Asked asked(p, first + min(v, count - 1));
    Fit fit = known;
    if (has && asked.b != row) fit.read(p, asked.b, h, mine);
    struct alignas(4 * sizeof(T)) {
      T x[4];
    } four;
    float sum = 0.f;  // of what is asked, so with its rounding: it meets the shift in what is stored
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * upper + (i & 1);
      four.x[i] = from_float<T>((d[i >> 1][0][n] + d[i >> 1][1][n]) * fit.inverse[i]);
      sum += to_float(four.x[i]) * fit.shift[i];
    }
    if (has && v < count)
      *reinterpret_cast<decltype(four)*>(static_cast<T*>(p.mapped_q) + asked.place(p, h) * p.D + mine) = four;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (has && quad == 0) sums[v * kAskedWarps + warp] = sum;
  }
  if (p.offsets == nullptr) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    const float4 s = reinterpret_cast<const float4*>(sums)[threadIdx.x];
    float* const to = p.offsets + static_cast<int64_t>(part) * all * p.H;
    to[Asked(p, first + threadIdx.x).place(p, h)] = -(s.x + s.y + s.z + s.w);
  }
}

}  // namespace pqlab
