// The key warps of pq_decode: codes -> scores. No torch.
#pragma once
#include "pq_lookup.cuh"
#include "pq_stream.cuh"

namespace pqlab {

// Scores of the block's share [u0, u1) of a row's units, chunk after chunk into the pair's buffers.
template <typename Cfg>
__device__ __forceinline__ void key_warp(const DecodeParams& p, const Place<Cfg>& at, const Row& row, int b, int u0,
                                         int u1, CodeStream<Cfg::NP, Cfg::SLOTS>& stream, Turn& turn) {
  using T = typename Cfg::T;
  using K = typename Cfg::K;
  constexpr int HG = Cfg::HG, HS = Cfg::HS, D = Cfg::D, DP = Cfg::DP;
  const int lane = at.lane, col = at.col, quad = at.quad;
  const bool diagonal = at.diagonal, odd = at.odd;
  constexpr int NY = K::MP / 16;  // registers of four codes, per token
  constexpr int kRot = K::rotations;
  const int rot = col & (kRot - 1);
  // Low parts of addresses: of lookup j, group j ^ rot of a block, subspace quad of the group. As bytes three to a
  // register, the top byte zero, or each in its own.
  constexpr int kPack = K::PAIRS ? 3 : 1;
  uint32_t low[(kRot + kPack - 1) / kPack] = {};
#pragma unroll
  for (int j = 0; j < kRot; ++j) low[j / kPack] |= (((j ^ rot) * 4 + quad) * K::EW * 4) << (8 * (j % kPack));
  uint32_t select = kRot >= 4 ? 0 : rot ? 0x4602u : 0x6420u;  // codes of the first token in the rotated order
  if constexpr (kRot >= 4)
#pragma unroll
    for (int n = 0; n < 4; ++n) select |= (((n ^ (rot & 3)) >> 1) * 4 + ((n ^ rot) & 1) * 2) << (4 * n);
  const bool swap = rot & 4;
  // Row r of matrix m is subspace 4 (2m + (r & 1)) + (r >> 1): quad position i then receives groups 2m, 2m + 1.
  uint32_t key_row = (4 * (2 * (lane >> 3) + (lane & 1)) + (lane & 7) / 2) * 16;
  for (uint32_t& x : low) keep(x);
  keep(select), keep(key_row);

  // The query as B operands: bq[g][m] are the words 2m, 2m + 1 of what lane (col, quad) looks up.
  uint32_t bq[HG][DP / 16][2];
#pragma unroll
  for (int g = 0; g < HG; ++g) {
    const T* q = at.query(p, b, g);
#pragma unroll
    for (int w = 0; w < DP / 8; ++w) {
      const int l = w / K::EW, word = w % K::EW;
      const int sub = ((l & ~(kRot - 1)) + ((l & (kRot - 1)) ^ rot)) * 4 + quad;
      const int dim = sub * K::DM + 2 * word;
      bq[g][w >> 1][w & 1] = D == DP || dim < D ? load_half2(q + dim) : 0u;
    }
  }
  // After the query's loads, which are on their way meanwhile.
  stream.start(p, b, row.coded, share(row.chunks, u0, row.units), share(row.chunks, u1, row.units));
  mbarrier_wait(at.key_books, 0);

#pragma unroll 1
  for (int k = 0; k < stream.chunks; ++k) {
    uint32_t codes = stream.wait();
    if constexpr (K::C == 16) {  // spread nibbles to bytes: a row per subspace, as ldmatrix needs
      const uint32_t wide = smem_address(at.scores) + Cfg::pair_spread;
      for (int s = lane; s < 2 * D / K::DM; s += 32)
        store_shared(wide + s * 16, spread_nibbles(load_shared_8(codes + s * 8)));
      stream.release(p, k);
      codes = wide;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // Codes: y[t][n] holds, for token 2 col + t of the tile, those of lookups 4n .. 4n + 3 of this lane.
      constexpr int bytes = D / K::DM * 16;
      uint32_t x[2][NY], y[2][NY];
#pragma unroll
      for (int n = 0; n < NY; n += 2) {
        uint32_t m[4];
        if constexpr (NY == 1) {
          ldmatrix_x2_trans(m[0], m[1], codes + j * bytes + (key_row & 255));
        } else {  // padded subspaces read row 0: any code does, their entries are 0
          const bool inside = (n + 2) * 256 <= bytes || static_cast<int>(n * 256 + key_row) < bytes;
          ldmatrix_x4_trans(m, codes + j * bytes + (inside ? n * 256 + key_row : 0));
        }
#pragma unroll
        for (int i = 0; i < (NY == 1 ? 1 : 2); ++i) {
          x[0][n + i] = prmt(m[2 * i], m[2 * i + 1], select);
          x[1][n + i] = prmt(m[2 * i], m[2 * i + 1], select | 0x1111);
        }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int n = 0; n < NY; ++n) y[t][n] = kRot == 8 && swap ? x[t][n ^ (kRot == 8)] : x[t][n];
      if (j == 1 && K::C == 256) stream.release(p, k);

      // One lookup gives EW words; words 2m, 2m + 1 of both tokens are the A operand of the m-th mma.
      float d[HG][4];
#pragma unroll
      for (int g = 0; g < HG; ++g) d[g][0] = d[g][1] = d[g][2] = d[g][3] = 0.f;
      unrolled<DP / 8 / (K::EW > 2 ? K::EW : 2)>([&](auto step) {
        constexpr int per = K::EW > 2 ? 1 : 2 / K::EW;  // lookups a step, for each token
        uint32_t z[2][per][K::EW];
        unrolled<2 * per>([&](auto i) {
          constexpr int t = i.value & 1, l = step.value * per + (i.value >> 1), r = l % kRot;
          lookup<K::EW, K::block_offset(l / kRot)>(
              z[t][i.value >> 1], at.smem, entry_address<K>(y[t][l >> 2], l & 3, low[r / kPack], r % kPack));
        });
        unrolled<per * K::EW / 2>([&](auto n) {
          constexpr int w = 2 * n.value, m = step.value * (per * K::EW / 2) + n.value;
          constexpr int l0 = w / K::EW, e0 = w % K::EW, l1 = (w + 1) / K::EW, e1 = (w + 1) % K::EW;
#pragma unroll
          for (int g = 0; g < HG; ++g)
            mma_16816(d[g], z[0][l0][e0], z[1][l0][e0], z[0][l1][e1], z[1][l1][e1], bq[g][m][0], bq[g][m][1]);
        });
      });
      if (j == 0) mbarrier_wait(at.free + 8 * turn.buffer, turn.round ^ 1);
      if (diagonal) {  // rows of 16 bytes (HG = 4) of the eight lanes side by side: no bank conflicts
        float first[HG], second[HG];
#pragma unroll
        for (int g = 0; g < HG; ++g) {
          first[g] = odd ? d[g][1] : d[g][0];
          second[g] = odd ? d[g][3] : d[g][2];
        }
        float* to = at.scores + (turn.buffer * kChunk + j * kTile + col) * HS;
        store(to, first);
        store(to + 8 * HS, second);
      }
    }
    __syncwarp();
    if (lane < kArrivals) mbarrier_arrive(at.full + 8 * turn.buffer);
    turn.next();
  }
}

}  // namespace pqlab
