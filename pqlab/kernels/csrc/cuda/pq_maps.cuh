// The codec's maps in a decode step: new tokens and queries into code space, results out of it. No torch.
//
// A map is a D x D matrix a kv head, fp16, or int8 in units of 1/127; vectors are T, sums are fp32. At batch 1 all that
// counts is that every matrix is on its way at once, and few instructions: a block takes 32 or 16 outputs of one head's
// map, and up to eight vectors, for which it reads the matrix once. D is a multiple of 32, up to 256 (cuda_config.py).
#pragma once
#include "pq_ptx.cuh"

namespace pqlab {

constexpr int kMapThreads = 128, kMapWarps = kMapThreads / 32, kMapVectors = 8;
constexpr int kMapMost = 256, kMapRound = 128;  // of D; rows (columns) of the matrix that are in registers at a time
constexpr int kMapSlice = 32, kTransposedSlice = 16;  // outputs a block
constexpr int kMapSmem = kMapVectors * (kMapMost + kMapWarps * kMapSlice) * 4;

__host__ __device__ inline int map_chunks(int vectors) { return (vectors + kMapVectors - 1) / kMapVectors; }

// x / n for 0 <= x < 2^21, in four instructions; `inverse` is 1 / n.
__device__ __forceinline__ int divide(int x, float inverse) { return __float2int_rz((x + 0.5f) * inverse); }

// Four neighbouring elements of a matrix.
template <typename E>
struct Four;
template <>
struct Four<int8_t> {
  uint32_t x;
  static constexpr float unit = 1.f / 127.f;
  __device__ __forceinline__ float4 floats() const {  // bytes as mantissas behind 2^23: conversions are slow
    const uint32_t biased = x ^ 0x80808080u;
    auto byte = [&](int i) { return __uint_as_float(prmt(biased, 0x4B000000u, 0x7650u + i)) - 8388736.f; };
    return make_float4(byte(0), byte(1), byte(2), byte(3));
  }
};
template <>
struct Four<__half> {
  uint2 x;
  static constexpr float unit = 1.f;
  __device__ __forceinline__ float4 floats() const {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&x.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&x.y));
    return make_float4(a.x, a.y, b.x, b.y);
  }
};
template <typename E>
__device__ __forceinline__ Four<E> load_four(const E* x) { return *reinterpret_cast<const Four<E>*>(x); }

// y[0 .. HALF * 2 - 1] of lanes that differ in bits LANE * HALF and below, down to LANE: a lane is left with one sum.
template <int HALF, int LANE, int COUNT>
__device__ __forceinline__ void fold(float (&y)[COUNT], int lane) {
  const bool upper = lane & LANE * HALF;
#pragma unroll
  for (int k = 0; k < HALF; ++k) {
    const float kept = upper ? y[HALF + k] : y[k], other = upper ? y[k] : y[HALF + k];
    y[k] = kept + __shfl_xor_sync(~0u, other, LANE * HALF);
  }
  if constexpr (HALF > 1) fold<HALF / 2, LANE>(y, lane);
}

// Vectors to shared memory as floats, kMapMost apart, zeros behind D up to whole rounds, N at a time; at(v) is where
// vector v begins.
template <int N, typename F>
__device__ __forceinline__ void map_vectors(float* smem, int n, int D, F&& at) {
#pragma unroll 1
  for (int r = threadIdx.x; r < (D + kMapRound - 1) / kMapRound * kMapRound; r += kMapThreads)
#pragma unroll 1
    for (int v = 0; v < n; v += N)
#pragma unroll
      for (int i = 0; i < N; ++i)
        smem[(v + i) * kMapMost + r] = r < D ? to_float(at(min(v + i, n - 1))[r]) : 0.f;
}

// What becomes of vectors ahead of the map, and of results where they are stored: nothing.
struct AsMapped {
  static constexpr bool turns = false;
  __device__ __forceinline__ void turn(int, float*) const {}
  __device__ __forceinline__ void prefetch(int, int) {}
  __device__ __forceinline__ float of(int, int, float y) const { return y; }
};

// y = x M: a thread has four columns of the slice, of every 16th row. `map` is the head's; at(v) is where vector v
// begins, `token` knows where results go: token.read(j, v) asks for it, token.place(j) says it, null for nowhere; `fit`
// what they become there: fit.prefetch(j, dimension), fit.of(j, dimension, y), and if fit.turns what x becomes ahead of
// it, in place: fit.turn(j, x).
template <int N, typename E, typename T, typename F, typename G, typename H = AsMapped>
__device__ __forceinline__ void map_rows(const E* map, int D, int slice, int n, float* smem, F&& at, G& token,
                                         H fit = {}) {
  constexpr int EACH = kMapVectors / kMapWarps;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = threadIdx.x >> 3, dim = slice * kMapSlice + lane;
  const E* const m = map + row * D + slice * kMapSlice + (threadIdx.x & 7) * 4;
  Four<E> raw[8] = {};
  auto ask = [&](int first) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + row + 16 * i < D) raw[i] = load_four(m + (first + 16 * i) * D);
  };
  ask(0);
#pragma unroll
  for (int j = 0; j < (N == 1 ? 1 : EACH); ++j)
    if (warp + kMapWarps * j < n) token.read(j, warp + kMapWarps * j), fit.prefetch(j, dim);
  map_vectors<N>(smem, n, D, at);
  if (fit.turns) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < (N == 1 ? 1 : EACH); ++j)
      if (warp + kMapWarps * j < n) fit.turn(j, smem + (warp + kMapWarps * j) * kMapMost);
  }
  __syncthreads();
  float* const parts = smem + kMapVectors * kMapMost;  // [vectors][warps][slice]
#pragma unroll 1
  for (int first = 0; first < D; first += kMapRound) {
    float4 w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = raw[i].floats();
    if (first + kMapRound < D) ask(first + kMapRound);
#pragma unroll 1
    for (int v = 0; v < n; v += N) {
      float y[N][4] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float x = smem[(v + k) * kMapMost + first + row + 16 * i];
          y[k][0] = fmaf(x, w[i].x, y[k][0]), y[k][1] = fmaf(x, w[i].y, y[k][1]);
          y[k][2] = fmaf(x, w[i].z, y[k][2]), y[k][3] = fmaf(x, w[i].w, y[k][3]);
        }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        fold<2, 8>(y[k], lane);
        float& part = parts[((v + k) * kMapWarps + warp) * kMapSlice + (lane & 7) * 4 + (lane >> 3)];
        part = first ? part + y[k][0] : y[k][0];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < (N == 1 ? 1 : EACH); ++j) {
    const int v = warp + kMapWarps * j;
    T* const to = v < n ? token.place(j) : nullptr;
    if (to == nullptr) continue;
    float y = 0.f;
#pragma unroll
    for (int k = 0; k < kMapWarps; ++k) y += parts[(v * kMapWarps + k) * kMapSlice + lane];
    to[dim] = from_float<T>(fit.of(j, dim, y * Four<E>::unit));
  }
}

// y = x M^T: a warp has four rows of the slice, a lane four columns; to(v) is where vector v's result goes, divided
// by divisor(v, row).
template <int N, typename T, typename F, typename G, typename H>
__device__ __forceinline__ void map_transposed(const __half* map, int D, int slice, int n, float* smem, F&& at, G&& to,
                                               H&& divisor) {
  constexpr int ROWS = kTransposedSlice / kMapWarps;
  static_assert(ROWS == 4 && kMapVectors == 8, "see fold, and who stores what");
  const int lane = threadIdx.x & 31, row = slice * kTransposedSlice + (threadIdx.x >> 5) * ROWS;
  constexpr int ROUNDS = kMapMost / kMapRound;
  Four<__half> raw[ROUNDS][ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r)
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      if (r * kMapRound + 4 * lane < D) raw[r][i] = load_four(map + (row + i) * D + r * kMapRound + 4 * lane);
  const int mine = lane & 7, my_row = row + (lane >> 3);  // the result that this lane stores
  const float by = mine < n ? divisor(mine, my_row) : 1.f;
  float result = 0.f;
  map_vectors<N>(smem, n, D, at);
  __syncthreads();
#pragma unroll 1
  for (int v = 0; v < n; v += N) {
    float y[N][ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      if (r * kMapRound >= D) break;
      float4 w[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) w[i] = raw[r][i].floats();
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float4 x = *reinterpret_cast<const float4*>(smem + (v + k) * kMapMost + r * kMapRound + 4 * lane);
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
          y[k][i] = fmaf(x.x, w[i].x, fmaf(x.y, w[i].y, fmaf(x.z, w[i].z, fmaf(x.w, w[i].w, y[k][i]))));
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      fold<2, 8>(y[k], lane);
#pragma unroll
      for (int o = 4; o; o >>= 1) y[k][0] += __shfl_xor_sync(~0u, y[k][0], o);
      if (mine == v + k) result = y[k][0];
    }
  }
  if (mine < n) to(mine)[my_row] = from_float<T>(result / by);
}

}  // namespace pqlab
