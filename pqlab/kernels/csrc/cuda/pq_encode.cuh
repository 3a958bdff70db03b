// Nearest centroid of every subvector, written as packed tiles of pages or as plain codes. No torch, sm_80 and newer.
//
// A warp works for one subspace, a thread for a tile of 16 tokens and 1 / SPLIT of the centroids (few tokens: SPLIT > 1,
// more threads). Distances are compared in the short form |c|^2 - 2 x c, two multiply-adds for two dimensions, and only
// the minimum of every eight centroids is looked at; the eight that hold the least are compared again in the long form
// |x - c|^2, which is what the reference computes. Where another eight come so close that rounding of the short form
// could have chosen wrongly, all centroids are compared in the long form.
#pragma once
#include "pq_ptx.cuh"

namespace pqlab {

constexpr int kEncodeWarps = 8;  // subspaces a block

// A warp's entries in shared memory, DM + 1 floats each: -2 c, |c|^2.
template <int DM, int C>
__device__ __forceinline__ void load_entries(float* entries, const float* book, int lane) {
  for (int c = lane; c < C; c += 32) {
    float cc = 0.f;
#pragma unroll
    for (int i = 0; i < DM; ++i) {
      const float v = book[c * DM + i];
      entries[c * (DM + 1) + i] = -2.f * v;
      cc = fmaf(v, v, cc);
    }
    entries[c * (DM + 1) + DM] = cc;
  }
  __syncwarp();
}

// Codes of the 16 tokens t0 .. t0 + 15, a byte each, in all SPLIT lanes of the tile. at(t) is the subvector of token t;
// tokens outside [0, n) are read as the nearest inside. AT_ONCE tokens are in registers.
template <int DM, int C, int SPLIT, int AT_ONCE = (DM <= 2 ? 16 : DM == 4 ? 8 : 4), typename F>
__device__ __forceinline__ void nearest16(const float* entries, int part, int t0, int n, F&& at, uint32_t (&packed)[4]) {
  constexpr int EIGHTS = C / 8 / SPLIT, STRIDE = DM + 1;
  static_assert(EIGHTS >= 1, "a thread compares eight centroids at least");
  const int c0 = part * EIGHTS * 8;
  auto exact = [&](const float (&v)[DM], int c) {  // as the reference adds: no fused multiply-add
    float d = 0.f;
#pragma unroll
    for (int i = 0; i < DM; ++i) {
      const float e = v[i] + 0.5f * entries[c * STRIDE + i];
      d = __fadd_rn(d, __fmul_rn(e, e));
    }
    return d;
  };
  packed[0] = packed[1] = packed[2] = packed[3] = 0;
#pragma unroll
  for (int group = 0; group < 16 / AT_ONCE; ++group) {
    float v[AT_ONCE][DM], best[AT_ONCE], second[AT_ONCE];
    int eight[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const auto* x = at(min(max(t0 + group * AT_ONCE + i, 0), n - 1));
      if constexpr (DM == 1) {
        v[i][0] = to_float(*x);
      } else {
#pragma unroll
        for (int j = 0; j < DM; j += 2) {
          const float2 two = load_float2(x + j);
          v[i][j] = two.x, v[i][j + 1] = two.y;
        }
      }
      best[i] = second[i] = INFINITY;
      eight[i] = 0;
    }
#pragma unroll 1
    for (int e = 0; e < EIGHTS; ++e) {
      float least[AT_ONCE];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float entry[STRIDE];
#pragma unroll
        for (int j = 0; j < STRIDE; ++j) entry[j] = entries[(c0 + e * 8 + k) * STRIDE + j];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          float d = entry[DM];
#pragma unroll
          for (int j = 0; j < DM; ++j) d = fmaf(v[i][j], entry[j], d);
          least[i] = k ? fminf(least[i], d) : d;
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        second[i] = fminf(second[i], fmaxf(best[i], least[i]));
        eight[i] = least[i] < best[i] ? e : eight[i];
        best[i] = fminf(best[i], least[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      float xx = 0.f;
#pragma unroll
      for (int j = 0; j < DM; ++j) xx = fmaf(v[i][j], v[i][j], xx);
      const bool close = second[i] - best[i] <= 6e-7f * (xx + fabsf(best[i]));  // rounding of both: 7.5 * 2^-24 each
      const int from = close ? c0 : c0 + eight[i] * 8, count = close ? EIGHTS * 8 : 8;
      float distance = INFINITY;
      int code = from;
      for (int k = 0; k < count; ++k) {  // every lane begins elsewhere: eights all begin in the same few banks
        const int c = from + ((k + threadIdx.x) & (count - 1));
        const float d = exact(v[i], c);
        if (d < distance || (d == distance && c < code)) distance = d, code = c;
      }
#pragma unroll
      for (int o = 1; o < SPLIT; o <<= 1) {  // ties go to the lowest code
        const float d = __shfl_xor_sync(~0u, distance, o);
        const int c = __shfl_xor_sync(~0u, code, o);
        if (d < distance || (d == distance && c < code)) distance = d, code = c;
      }
      const int slot = group * AT_ONCE + i;
      packed[slot >> 2] |= static_cast<uint32_t>(code) << (8 * (slot & 3));
    }
  }
}

// Writes a tile's 16 codes packed; those of tokens outside [0, n) stay as they are.
template <int NBITS>
__device__ __forceinline__ void store_tile(uint8_t* to, uint32_t (&packed)[4], int t0, int n) {
  if (t0 < 0 || t0 + 16 > n) {
    uint4 old;
    if constexpr (NBITS == 8)
      old = *reinterpret_cast<const uint4*>(to);
    else
      old = spread_nibbles(*reinterpret_cast<const uint2*>(to));
    const uint32_t before[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t mask = 0xFFu << (8 * (i & 3));
      if (t0 + i < 0 || t0 + i >= n) packed[i >> 2] = (packed[i >> 2] & ~mask) | (before[i >> 2] & mask);
    }
  }
  if constexpr (NBITS == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  } else {  // two codes to a byte, low nibble first
    auto pairs = [](uint32_t w) { return (w | w >> 4) & 0x00FF00FFu; };
    *reinterpret_cast<uint2*>(to) = make_uint2(prmt(pairs(packed[0]), pairs(packed[1]), 0x6420),
                                               prmt(pairs(packed[2]), pairs(packed[3]), 0x6420));
  }
}

struct EncodeParams {
  const void* x;        // [G, n, D] of T, last dimension dense
  int64_t x_stride[2];  // elements
  const float* books;   // [G, M, C, DM]
  uint8_t* codes;       // pages [max_pages][G][T][M][2 * NBITS], or without page ids plain codes [G, n, M]
  const int* page_ids;  // token t lies in page page_ids[(first_slot + t) / page_size]; or null
  int G, n, M;
  int first_slot;
  int tiles_per_page;
};

template <typename T, int DM, int NBITS, int SPLIT>
__global__ void __launch_bounds__(kEncodeWarps * 32) pq_encode_kernel(const __grid_constant__ EncodeParams p) {
  constexpr int C = 1 << NBITS;
  extern __shared__ float smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = lane % SPLIT;
  const int m = blockIdx.y * kEncodeWarps + warp, g = blockIdx.z;
  if (m >= p.M) return;
  float* const entries = smem + warp * C * (DM + 1);
  load_entries<DM, C>(entries, p.books + (static_cast<int64_t>(g) * p.M + m) * C * DM, lane);
  const int tile = blockIdx.x * (32 / SPLIT) + lane / SPLIT;
  const int t0 = tile * 16 - p.first_slot % 16;  // token of the tile's first slot; may be negative
  const T* const x = static_cast<const T*>(p.x) + g * p.x_stride[0] + m * DM;
  uint32_t packed[4];
  nearest16<DM, C, SPLIT>(entries, part, t0, p.n, [&](int t) { return x + t * p.x_stride[1]; }, packed);
  if (part != 0 || t0 >= p.n) return;
  if (p.page_ids == nullptr) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (t0 + i >= 0 && t0 + i < p.n)
        p.codes[(static_cast<int64_t>(g) * p.n + t0 + i) * p.M + m] = packed[i >> 2] >> (8 * (i & 3));
    return;
  }
  const int place = p.first_slot / 16 + tile, page = place / p.tiles_per_page;
  const int64_t at = (static_cast<int64_t>(p.page_ids[page]) * p.G + g) * p.tiles_per_page + place % p.tiles_per_page;
  store_tile<NBITS>(p.codes + (at * p.M + m) * (2 * NBITS), packed, t0, p.n);
}

}  // namespace pqlab
