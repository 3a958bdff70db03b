// Sums of values: looked-up centroids of a chunk times the weights of its tokens, on the tensor cores. No torch.
#pragma once
#include "pq_lookup.cuh"

namespace pqlab {

// The dimensions a lane owns: of pairs (words) of them, U.
template <typename Cfg>
struct OwnDims {
  using V = typename Cfg::V;
  static constexpr int VR = V::MP >= 32 ? V::MP / 32 : 1;  // entries
  static constexpr int U = VR * V::EW;
  static __device__ __forceinline__ int of(int word, int lane) {
    return V::MP >= 32 || lane < V::MP ? (word / V::EW * 32 + lane) * V::DM + word % V::EW * 2 : Cfg::D;
  }
};

// Two ways to fill the tensor cores. One query vector: a word (two dimensions of a token) is two columns of A, the
// two rows of B are diagonal; A's lower rows are the lane's second word. More: the words of two tokens are
// shuffled to pairs of tokens, rows are one dimension and the other, and columns of B are two vectors. That takes half
// a word at a time, so it is the way, too, where a word is looked up with two codes.
template <typename Cfg>
struct Sums {
  using V = typename Cfg::V;
  static constexpr int HG = Cfg::HG, VR = OwnDims<Cfg>::VR, U = OwnDims<Cfg>::U, NHP = (HG + 1) / 2;
  static constexpr int CODES = V::CODES;
  static constexpr bool kWords = HG == 1 && U % 2 == 0 && CODES == 1;
  // Both codes of a word lie side by side, 32 bytes. Every other four lanes take the second first, or they would meet
  // the four before them in their banks; the word's two dimensions change places there while chunks are added.
  static constexpr bool kTurn = CODES == 2 && V::C == 256;

  float acc[kWords ? U / 2 : U][NHP][4] = {};
  uint32_t low;  // of the lane's lookups
  uint32_t even_token, odd_token;
  uint32_t first_dim, second_dim;  // of two tokens' words
  uint32_t from[NHP];  // where the lane's weights begin

  // Dimension `dim` of a word of the lane's, for query vector g.
  __device__ __forceinline__ float& operator()(int word, int dim, int g) {
    return kWords ? acc[word >> 1][0][(word & 1) * 2 + dim] : acc[word][g >> 1][dim * 2 + (g & 1)];
  }
  static __device__ __forceinline__ bool turned(const Place<Cfg>& at) { return kTurn && at.lane & 4; }
  // Dimensions change places: before the first chunk, after the last.
  __device__ __forceinline__ void turn(const Place<Cfg>& at) {
    if constexpr (kTurn) {
#pragma unroll
      for (int word = 0; word < U; ++word)
#pragma unroll
        for (int g = 0; g < HG; ++g) {
          const float first = (*this)(word, 0, g), second = (*this)(word, 1, g);
          (*this)(word, 0, g) = turned(at) ? second : first, (*this)(word, 1, g) = turned(at) ? first : second;
        }
    }
  }
  // Once, before chunks. buffer: as for Scores.
  __device__ __forceinline__ void start(const Place<Cfg>& at, uint32_t buffer = 0) {
    low = V::entry_offset(at.lane % (V::MP < 32 ? V::MP : 32)) | buffer << 24;
    keep(low);
    even_token = at.odd ? 0x1044u : 0x4410u, odd_token = at.odd ? 0x3244u : 0x4432u;
    if constexpr (kWords) keep(even_token), keep(odd_token);
    first_dim = turned(at) ? 0x7632u : 0x5410u, second_dim = turned(at) ? 0x5410u : 0x7632u;
    if constexpr (kTurn) keep(first_dim), keep(second_dim);
  }
  // The weights [HG][32] of the chunks that follow. Lanes beside the diagonal read zeros.
  __device__ __forceinline__ void take_weights(const Place<Cfg>& at, const __half* weights) {
#pragma unroll
    for (int hp = 0; hp < NHP; ++hp) {
      const int g = kWords ? 0 : 2 * hp + at.odd;
      from[hp] = smem_address(at.diagonal && g < HG ? reinterpret_cast<const uint8_t*>(weights + g * kChunk)
                                                    : at.smem + Cfg::zero_offset);
      keep(from[hp]);
    }
  }
  // Adds a chunk, whose codes lie at `codes` until `release`.
  template <typename RELEASE>
  __device__ __forceinline__ void add(const Place<Cfg>& at, uint32_t codes, RELEASE&& release) {
    uint4 vc[CODES][2][VR];  // the 16 codes of tile j of entry 32 r + lane
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < VR; ++r) {
        constexpr int entries = V::M / CODES;
        const int mine = V::MP < 32 ? at.lane % V::MP : r * 32 + at.lane;
        const int sub = V::MP == entries || mine < entries ? mine : 0;
        const uint32_t tile = codes + j * V::tile_bytes;
        if constexpr (kTurn) {
#pragma unroll
          for (int c = 0; c < 2; ++c) vc[c][j][r] = load_shared_16(tile + sub * 32 + (turned(at) == (c == 0) ? 16 : 0));
        } else if constexpr (CODES == 2) {
          const uint4 both = load_shared_16(tile + sub * 16);
          vc[0][j][r] = spread_nibbles(make_uint2(both.x, both.y));
          vc[1][j][r] = spread_nibbles(make_uint2(both.z, both.w));
        } else if constexpr (V::C == 256) {
          vc[0][j][r] = load_shared_16(tile + sub * 16);
        } else {
          vc[0][j][r] = spread_nibbles(load_shared_8(tile + sub * 8));
        }
      }
    release();

    uint4 pf[NHP];  // weights of eight tokens at a time
    unrolled<2 * 8>([&](auto step) {
      constexpr int j = step.value >> 3, u = step.value & 7;  // tokens 2u, 2u + 1 of tile j
      if constexpr (u % 4 == 0)
#pragma unroll
        for (int hp = 0; hp < NHP; ++hp) pf[hp] = load_shared_16(from[hp] + j * kTile * 2 + u * 4);
      if constexpr (kWords || u % 2 == 0) {
        constexpr int tokens = kWords ? 2 : 4;
        uint32_t x[CODES][tokens][U];
        unrolled<CODES * tokens * VR>([&](auto i) {
          constexpr int n = i.value % (tokens * VR), by = i.value / (tokens * VR), r = n % VR, t = 2 * u + n / VR;
          constexpr int span = V::EW;  // blocks that 32 entries span
          const uint4 c = vc[by][j][r];
          uint32_t entry[V::EW];
          lookup<V::EW, Cfg::value_books + V::block_offset(r * span)>(
              entry, at.smem, entry_address<V>(t < 4 ? c.x : t < 8 ? c.y : t < 12 ? c.z : c.w, t & 3, low, 0));
#pragma unroll
          for (int e = 0; e < V::EW; ++e) x[by][n / VR][r * V::EW + e] = entry[e];
        });
        if constexpr (kWords) {
          const uint32_t f = u % 4 == 0 ? pf[0].x : u % 4 == 1 ? pf[0].y : u % 4 == 2 ? pf[0].z : pf[0].w;
          const uint32_t b0 = prmt(f, 0, even_token), b1 = prmt(f, 0, odd_token);
#pragma unroll
          for (int n = 0; n < U; n += 2)
            mma_16816(acc[n / 2][0], x[0][0][n], x[0][0][n + 1], x[0][1][n], x[0][1][n + 1], b0, b1);
        } else {
          const auto &y = x[0], &z = x[CODES - 1];  // by the first code, by the second
#pragma unroll
          for (int n = 0; n < U; ++n) {
            const uint32_t a0 = prmt(y[0][n], y[1][n], first_dim), a1 = prmt(z[0][n], z[1][n], second_dim);
            const uint32_t a2 = prmt(y[2][n], y[3][n], first_dim), a3 = prmt(z[2][n], z[3][n], second_dim);
#pragma unroll
            for (int hp = 0; hp < NHP; ++hp)
              mma_16816(acc[n][hp], a0, a1, a2, a3, u & 2 ? pf[hp].z : pf[hp].x, u & 2 ? pf[hp].w : pf[hp].y);
          }
        }
      }
    });
  }
};

// Of what is summed up; the rest starts anew.
template <typename Cfg>
__device__ __forceinline__ void swap(Sums<Cfg>& a, Sums<Cfg>& b) {
  auto& from = a.acc;
  auto& to = b.acc;
#pragma unroll
  for (int i = 0; i < sizeof(from) / sizeof(from[0]); ++i)
#pragma unroll
    for (int j = 0; j < Sums<Cfg>::NHP; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = from[i][j][k];
        from[i][j][k] = to[i][j][k], to[i][j][k] = x;
      }
}

}  // namespace pqlab
