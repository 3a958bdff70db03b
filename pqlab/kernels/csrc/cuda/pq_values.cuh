// The value warps of pq_decode: scores -> weights, exact tokens and codes -> sums. No torch.
#pragma once
#include "pq_exact.cuh"
#include "pq_merge.cuh"
#include "pq_stream.cuh"
#include "pq_sums.cuh"

namespace pqlab {

// Sums over the block's share of a row: left in the warp's ring and in the totals, for finish_row.
template <typename Cfg>
__device__ __forceinline__ void value_warp(const DecodeParams& p, const Place<Cfg>& at, int b, const Row& row,
                                         const Share& share, CodeStream<Cfg>& stream, Turn& turn,
                                         const int* early) {
  constexpr int HG = Cfg::HG, HS = Cfg::HS;
  using Dim = OwnDims<Cfg>;
  constexpr int U = Dim::U;
  const int lane = at.lane;
  ExactTokens<Cfg, Dim::U, Dim> exact(p, at, row, b, share.e0, share.e1);  // first: their rows come from far away
  stream.start(p, b, row.coded, share, early);
  Sums<Cfg> sums;
  float top[HG], sum[HG];  // running maximum (log2 units, the same in all lanes), the lane's part of the sum
#pragma unroll
  for (int g = 0; g < HG; ++g) top[g] = -1e30f, sum[g] = 0.f;
  exact.attend(p, at, b, top, sum, sums);
  sums.turn(at);
  mbarrier_wait(at.value_books, 0);

  sums.start(at);
  sums.take_weights(at, at.weights);
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

    sums.add(at, stream.wait(), [&] { stream.release(p, k); });  // its barrier also shows the weights to all lanes
  }

  sums.turn(at);
  leave_part<Cfg, U, Dim>(at, top, sum, sums);
}

}  // namespace pqlab
