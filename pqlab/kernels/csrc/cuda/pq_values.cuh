// The value warps of pq_decode: scores -> weights, exact tokens and codes -> sums. No torch.
#pragma once
#include "pq_lookup.cuh"
#include "pq_stream.cuh"

namespace pqlab {

// Sums over the block's share [u0, u1) of a row's units: left in the warp's ring and in the totals, for finish_row.
template <typename Cfg>
__device__ __forceinline__ void value_warp(const DecodeParams& p, const Place<Cfg>& at, const Row& row, int b, int u0,
                                           int u1, CodeStream<Cfg::NP, Cfg::SLOTS>& stream, Turn& turn,
                                           const uint8_t* books, bool have_books) {
  using T = typename Cfg::T;
  using K = typename Cfg::K;
  using V = typename Cfg::V;
  constexpr int HG = Cfg::HG, HS = Cfg::HS, NP = Cfg::NP, NT = Cfg::NW * 32, D = Cfg::D, DP = Cfg::DP;
  constexpr int VR = V::MP >= 32 ? V::MP / 32 : 1;  // subspaces a lane owns
  constexpr int U = VR * V::EW;                     // words (pairs of dimensions) of them
  const int lane = at.lane, warp = at.warp, pair = at.pair, h = at.h;
  const bool diagonal = at.diagonal, odd = at.odd;
  __half* const weights = at.weights;
  stream.start(p, b, row.coded, share(row.chunks, u0, row.units), share(row.chunks, u1, row.units));
  if (kBulk && !have_books)  // only now: before, they would stand in the way of the page table and the query
    fetch_books<V, NT>(books + K::book_bytes, smem_address(at.smem) + K::book_bytes, at.value_books, NP * 32);
  // Two ways to fill the tensor cores. One query vector: a word (two dimensions of a token) is two columns of A, the
  // two rows of B are diagonal; A's lower rows are the lane's second word. More: the words of two tokens are
  // shuffled to pairs of tokens, rows are one dimension and the other, and columns of B are two vectors.
  constexpr bool kWords = HG == 1 && U % 2 == 0;
  constexpr int NHP = (HG + 1) / 2;
  float acc[kWords ? U / 2 : U][NHP][4] = {};
  float top[HG], sum[HG];  // running maximum (log2 units, the same in all lanes), the lane's part of the sum
#pragma unroll
  for (int g = 0; g < HG; ++g) top[g] = -1e30f, sum[g] = 0.f;
  auto sums = [&](int word, int dim, int g) -> float& {
    return kWords ? acc[word >> 1][0][(word & 1) * 2 + dim] : acc[word][g >> 1][dim * 2 + (g & 1)];
  };
  auto dim_of = [&](int word) { return (word / V::EW * 32 + lane) * V::DM + word % V::EW * 2; };
  const bool owner = lane < V::MP;

  // Sinks and window: few tokens, plain arithmetic while codes and codebooks are on their way.
  const int e0 = share(row.exact, u0, row.units), e1 = share(row.exact, u1, row.units);
  if (e0 + pair < e1) {
    auto read = [&](const T* from, float2 (&x)[U]) {
#pragma unroll
      for (int w = 0; w < U; ++w)
        x[w] = owner && (D == DP || dim_of(w) < D) ? load_float2(from + dim_of(w)) : make_float2(0.f, 0.f);
    };
    float2 qx[HG][U];
#pragma unroll
    for (int g = 0; g < HG; ++g) read(at.query(p, b, g), qx[g]);
    constexpr int AT_ONCE = HG > 2 ? 2 : 4;
#pragma unroll 1
    for (int e = e0 + pair; e < e1; e += NP * AT_ONCE) {
      float2 kx[AT_ONCE][U], vx[AT_ONCE][U];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int token = min(e + NP * j, e1 - 1);
        const bool sink = token < row.sinks;
        const int64_t n = sink ? token : (row.coded + token - row.sinks) % p.window_slots;
        const int64_t* st = sink ? p.sink_stride : p.window_stride;
        const int64_t from = b * st[0] + h * st[1] + n * st[2];
        read(static_cast<const T*>(sink ? p.sink_k : p.window_k) + from, kx[j]);
        read(static_cast<const T*>(sink ? p.sink_v : p.window_v) + from, vx[j]);
      }
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        float s[AT_ONCE], best = top[g];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          s[j] = 0.f;
#pragma unroll
          for (int w = 0; w < U; ++w) s[j] += qx[g][w].x * kx[j][w].x + qx[g][w].y * kx[j][w].y;
#pragma unroll
          for (int o = 16; o; o >>= 1) s[j] += __shfl_xor_sync(~0u, s[j], o);
          s[j] = e + NP * j < e1 ? s[j] * p.scale_log2 : -INFINITY;
          best = fmaxf(best, s[j]);
        }
        const float shrink = exp2_approx(top[g] - best);
        top[g] = best;
        sum[g] *= shrink;
#pragma unroll
        for (int w = 0; w < U; ++w) sums(w, 0, g) *= shrink, sums(w, 1, g) *= shrink;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float weight = exp2_approx(s[j] - best);
          if (lane == 0) sum[g] += weight;
#pragma unroll
          for (int w = 0; w < U; ++w) sums(w, 0, g) += weight * vx[j][w].x, sums(w, 1, g) += weight * vx[j][w].y;
        }
      }
    }
  }
  mbarrier_wait(at.value_books, 0);

  uint32_t low = V::entry_offset(lane % (V::MP < 32 ? V::MP : 32));  // of the lane's lookups
  keep(low);
  uint32_t even_token = odd ? 0x1044u : 0x4410u, odd_token = odd ? 0x3244u : 0x4432u;
  if constexpr (kWords) keep(even_token), keep(odd_token);
  uint4 pf[NHP];  // weights of eight tokens; only the diagonal lanes ever load any, the others stay zero
#pragma unroll
  for (int hp = 0; hp < NHP; ++hp) pf[hp] = make_uint4(0, 0, 0, 0);
  // Scores lie as the key warp's lanes had them: tokens 0, 2, .. 14 of a tile, then 1, 3, .. 15.
  uint32_t own = (lane & 16) + (lane & 1) * 8 + (lane & 15) / 2;
  keep(own);
  int token = (stream.chunk0 + pair) * kChunk + lane;

#pragma unroll 1
  for (int k = 0; k < stream.chunks; ++k, token += NP * kChunk) {
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
      weights[g * kChunk + lane] = __float2half_rn(w[g]);
    }

    const uint32_t codes = stream.wait();
    uint4 vc[2][VR];  // the 16 codes of tile j of subspace 32 r + lane
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < VR; ++r) {
        const int mine = V::MP < 32 ? lane % V::MP : r * 32 + lane, sub = D == DP || mine < D / V::DM ? mine : 0;
        if constexpr (V::C == 256)
          vc[j][r] = load_shared_16(codes + j * V::tile_bytes + sub * 16);
        else
          vc[j][r] = spread_nibbles(load_shared_8(codes + j * V::tile_bytes + sub * 8));
      }
    stream.release(p, k);  // its barrier also shows the weights to all lanes

    unrolled<2 * 8>([&](auto step) {
      constexpr int j = step.value >> 3, u = step.value & 7;  // tokens 2u, 2u + 1 of tile j
      if constexpr (u % 4 == 0)
#pragma unroll
        for (int hp = 0; hp < NHP; ++hp)
          if (diagonal && (kWords || 2 * hp + odd < HG))
            pf[hp] = *reinterpret_cast<const uint4*>(weights + (kWords ? 0 : 2 * hp + odd) * kChunk + j * kTile + u * 2);
      if constexpr (kWords || u % 2 == 0) {
        constexpr int tokens = kWords ? 2 : 4;
        uint32_t x[tokens][U];
        unrolled<tokens * VR>([&](auto i) {
          constexpr int r = i.value % VR, t = 2 * u + i.value / VR;
          constexpr int span = V::EW;  // blocks that 32 subspaces span
          const uint4 c = vc[j][r];
          uint32_t entry[V::EW];
          lookup<V::EW, K::book_bytes + V::block_offset(r * span)>(
              entry, at.smem, entry_address<V>(t < 4 ? c.x : t < 8 ? c.y : t < 12 ? c.z : c.w, t & 3, low, 0));
#pragma unroll
          for (int e = 0; e < V::EW; ++e) x[i.value / VR][r * V::EW + e] = entry[e];
        });
        if constexpr (kWords) {
          const uint32_t f = u % 4 == 0 ? pf[0].x : u % 4 == 1 ? pf[0].y : u % 4 == 2 ? pf[0].z : pf[0].w;
          const uint32_t b0 = prmt(f, 0, even_token), b1 = prmt(f, 0, odd_token);
#pragma unroll
          for (int n = 0; n < U; n += 2) mma_16816(acc[n / 2][0], x[0][n], x[0][n + 1], x[1][n], x[1][n + 1], b0, b1);
        } else {
#pragma unroll
          for (int n = 0; n < U; ++n) {
            const uint32_t a0 = prmt(x[0][n], x[1][n], 0x5410), a1 = prmt(x[0][n], x[1][n], 0x7632);
            const uint32_t a2 = prmt(x[2][n], x[3][n], 0x5410), a3 = prmt(x[2][n], x[3][n], 0x7632);
#pragma unroll
            for (int hp = 0; hp < NHP; ++hp)
              mma_16816(acc[n][hp], a0, a1, a2, a3, u & 2 ? pf[hp].z : pf[hp].x, u & 2 ? pf[hp].w : pf[hp].y);
          }
        }
      }
    });
  }

  // What this warp has: into its ring, which is empty now.
  __syncwarp();
  float* const mine = reinterpret_cast<float*>(at.smem + Cfg::book_bytes + warp * Cfg::ring_bytes);  // [HG][DP]
  float2* const totals = reinterpret_cast<float2*>(at.smem + Cfg::total_offset);                     // [NP][HG]
#pragma unroll
  for (int g = 0; g < HG; ++g) {
    float x = sum[g];
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
    if (lane == 0) totals[pair * HG + g] = make_float2(top[g], x);
    if (owner)
#pragma unroll
      for (int w = 0; w < U; ++w)
        *reinterpret_cast<float2*>(mine + g * DP + dim_of(w)) = make_float2(sums(w, 0, g), sums(w, 1, g));
  }
}

}  // namespace pqlab
