// The value warps of pq_decode: scores -> weights, exact tokens and codes -> sums. No torch.
#pragma once
#include "pq_exact.cuh"
#include "pq_stream.cuh"

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
// Sums over the block's share of a row: left in the warp's ring and in the totals, for finish_row.
template <typename Cfg>
__device__ __forceinline__ void value_warp(const DecodeParams& p, const Place<Cfg>& at, int b, const Row& row,
                                         const Share& share, CodeStream<Cfg::NP, Cfg::SLOTS>& stream, Turn& turn,
                                         const int* early) {
  using K = typename Cfg::K;
  using V = typename Cfg::V;
  constexpr int HG = Cfg::HG, HS = Cfg::HS, D = Cfg::D, DP = Cfg::DP;
  using Dim = OwnDims<Cfg>;
  constexpr int VR = Dim::VR, U = Dim::U, CODES = V::CODES;
  const int lane = at.lane;
  const bool diagonal = at.diagonal, odd = at.odd;
  ExactTokens<Cfg, Dim::U, Dim> exact(p, at, row, b, share.e0, share.e1);  // first: their rows come from far away
  stream.start(p, b, row.coded, share, early);
  // Two ways to fill the tensor cores. One query vector: a word (two dimensions of a token) is two columns of A, the
  // two rows of B are diagonal; A's lower rows are the lane's second word. More: the words of two tokens are
  // shuffled to pairs of tokens, rows are one dimension and the other, and columns of B are two vectors. That takes
  // half a word at a time, so it is the way, too, where a word is looked up with two codes.
  constexpr bool kWords = HG == 1 && U % 2 == 0 && CODES == 1;
  constexpr int NHP = (HG + 1) / 2;
  float acc[kWords ? U / 2 : U][NHP][4] = {};
  float top[HG], sum[HG];  // running maximum (log2 units, the same in all lanes), the lane's part of the sum
#pragma unroll
  for (int g = 0; g < HG; ++g) top[g] = -1e30f, sum[g] = 0.f;
  auto sums = [&](int word, int dim, int g) -> float& {
    return kWords ? acc[word >> 1][0][(word & 1) * 2 + dim] : acc[word][g >> 1][dim * 2 + (g & 1)];
  };
  exact.attend(p, at, b, top, sum, sums);
  // Both codes of a word lie side by side, 32 bytes. Every other four lanes take the second first, or they would meet
  // the four before them in their banks; the word's two dimensions change places there until the end.
  constexpr bool kTurn = CODES == 2 && V::C == 256;
  const bool turned = kTurn && lane & 4;
  auto turn_dims = [&] {
    if constexpr (kTurn) {
#pragma unroll
      for (int word = 0; word < U; ++word)
#pragma unroll
        for (int g = 0; g < HG; ++g) {
          const float first = sums(word, 0, g), second = sums(word, 1, g);
          sums(word, 0, g) = turned ? second : first, sums(word, 1, g) = turned ? first : second;
        }
    }
  };
  turn_dims();
  uint32_t first_dim = turned ? 0x7632u : 0x5410u, second_dim = turned ? 0x5410u : 0x7632u;  // of two tokens' words
  if constexpr (kTurn) keep(first_dim), keep(second_dim);
  mbarrier_wait(at.value_books, 0);

  uint32_t low = V::entry_offset(lane % (V::MP < 32 ? V::MP : 32));  // of the lane's lookups
  keep(low);
  uint32_t even_token = odd ? 0x1044u : 0x4410u, odd_token = odd ? 0x3244u : 0x4432u;
  if constexpr (kWords) keep(even_token), keep(odd_token);
  // Weights of eight tokens at a time; lanes beside the diagonal read zeros.
  uint4 pf[NHP];
  uint32_t from[NHP];
#pragma unroll
  for (int hp = 0; hp < NHP; ++hp) {
    const int g = kWords ? 0 : 2 * hp + odd;
    from[hp] = smem_address(diagonal && g < HG ? reinterpret_cast<uint8_t*>(at.weights + g * kChunk)
                                               : at.smem + Cfg::zero_offset);
    keep(from[hp]);
  }
  // Scores lie as the key warp's lanes had them: tokens 0, 2, .. 14 of a tile, then 1, 3, .. 15.
  uint32_t own = (lane & 16) + (lane & 1) * 8 + (lane & 15) / 2;
  keep(own);
  int token = stream.first * kChunk + lane;

#pragma unroll 1
  for (int k = 0; k < stream.chunks; ++k, token += stream.step * kChunk) {
    mbarrier_wait(at.full + 8 * turn.buffer, turn.round);
    float w[HG], s[HG], most = 0.f;
    load(at.scores + (turn.buffer * kChunk + own) * HS, s);
    __syncwarp();
    if (lane < kArrivals) mbarrier_arrive(at.free + 8 * turn.buffer);
    turn.next();

    // Softmax: a token a lane. The maximum is raised only when a weight would pass 2^8, so mostly not: any maximum
    // gives the same result as long as nothing overflows fp16.
#pragma unroll
    for (int g = 0; g < HG; ++g) {
      s[g] = token < row.coded ? s[g] * p.scale_log2 : -INFINITY;
      w[g] = exp2_approx(s[g] - top[g]);
      most = fmaxf(most, w[g]);
    }
    if (__any_sync(~0u, most > 256.f)) {
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        float best = s[g];
#pragma unroll
        for (int o = 16; o; o >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
        best = fmaxf(best, top[g]);
        const float shrink = exp2_approx(top[g] - best);
        top[g] = best;
        sum[g] *= shrink;
        w[g] = exp2_approx(s[g] - best);
#pragma unroll
        for (int word = 0; word < U; ++word) sums(word, 0, g) *= shrink, sums(word, 1, g) *= shrink;
      }
    }
#pragma unroll
    for (int g = 0; g < HG; ++g) {
      sum[g] += w[g];
      at.weights[g * kChunk + lane] = __float2half_rn(w[g]);
    }

    const uint32_t codes = stream.wait();
    uint4 vc[CODES][2][VR];  // the 16 codes of tile j of entry 32 r + lane
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < VR; ++r) {
        const int mine = V::MP < 32 ? lane % V::MP : r * 32 + lane, sub = D == DP || mine < D / V::DM ? mine : 0;
        const uint32_t tile = codes + j * V::tile_bytes;
        if constexpr (kTurn) {
#pragma unroll
          for (int c = 0; c < 2; ++c) vc[c][j][r] = load_shared_16(tile + sub * 32 + (turned == (c == 0) ? 16 : 0));
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
    stream.release(p, k);  // its barrier also shows the weights to all lanes

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
          lookup<V::EW, K::book_bytes + V::block_offset(r * span)>(
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

  // What this warp has: into its ring, which is empty now.
  turn_dims();
  __syncwarp();
  float* const mine = at.sums(at.warp);
#pragma unroll
  for (int g = 0; g < HG; ++g) {
    float x = sum[g];
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    if (lane == 0) at.totals()[at.warp * HG + g] = make_float2(top[g], x);
    if (lane < V::MP)
#pragma unroll
      for (int w = 0; w < U; ++w)
        *reinterpret_cast<float2*>(mine + g * DP + Dim::of(w, lane)) = make_float2(sums(w, 0, g), sums(w, 1, g));
  }
}

}  // namespace pqlab
