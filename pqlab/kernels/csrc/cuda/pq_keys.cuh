// The key warps of pq_decode: codes -> scores. No torch.
#pragma once
#include "pq_scores.cuh"
#include "pq_stream.cuh"

namespace pqlab {

// Reads the codes of a tile of keys from shared memory into the order in which a lane looks them up.
template <typename Cfg>
struct KeyTile {
  using K = typename Cfg::K;
  static constexpr int CODES = K::CODES, kRot = Scores<Cfg>::kRot;
  static constexpr int NY = K::MP < 16 ? 1 : K::MP / 16;  // registers of four codes, per token; of 8 entries half of one
  uint32_t select;   // codes of the first token in the rotated order
  uint32_t key_row;  // the row of the lane's address
  bool swap;

  __device__ __forceinline__ explicit KeyTile(const Place<Cfg>& at) {
    const int lane = at.lane, rot = at.col & (kRot - 1);
    select = kRot >= 4 ? 0 : rot ? 0x4602u : 0x6420u;
    if constexpr (kRot >= 4)
#pragma unroll
      for (int n = 0; n < 4; ++n) select |= (((n ^ (rot & 3)) >> 1) * 4 + ((n ^ rot) & 1) * 2) << (4 * n);
    swap = rot & 4;
    // Row r of matrix m is entry 4 (2m + (r & 1)) + (r >> 1): quad position i then receives groups 2m, 2m + 1. Of two
    // codes an entry, odd rows take the second, other matrices the other one: eight rows then lie in different banks.
    key_row = ((4 * (2 * (lane >> 3) + (lane & 1)) + (lane & 7) / 2) * CODES + (lane & (CODES - 1))) * 16;
    keep(select), keep(key_row);
  }
  // Tile j of a chunk of bytes -> y[c][t][n]: for token 2 col + t of the tile, the codes of lookups 4n .. 4n + 3.
  __device__ __forceinline__ void read(uint32_t codes, int j, uint32_t (&y)[CODES][2][NY]) const {
    constexpr int bytes = K::M * 16;
    uint32_t x[CODES][2][NY];
#pragma unroll
    for (int c = 0; c < CODES; ++c)
#pragma unroll
      for (int n = 0; n < NY; n += 2) {
        uint32_t m[4];
        const uint32_t first = n * CODES * 256, row = key_row ^ c * 16;
        // Padded entries, and those that there are not, read row 0: any code does, they are 0 or not looked up.
        if constexpr (NY == 1) {
          const int mine = row & 255;
          ldmatrix_x2_trans(m[0], m[1], codes + j * bytes + (bytes >= 256 || mine < bytes ? mine : 0));
        } else {
          const bool inside = (n + 2) * CODES * 256 <= bytes || static_cast<int>(first + row) < bytes;
          ldmatrix_x4_trans(m, codes + j * bytes + (inside ? first + row : 0));
        }
#pragma unroll
        for (int i = 0; i < (NY == 1 ? 1 : 2); ++i) {
          x[c][0][n + i] = prmt(m[2 * i], m[2 * i + 1], select);
          x[c][1][n + i] = prmt(m[2 * i], m[2 * i + 1], select | 0x1111);
        }
      }
#pragma unroll
    for (int c = 0; c < CODES; ++c)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int n = 0; n < NY; ++n) y[c][t][n] = kRot == 8 && swap ? x[c][t][n ^ (kRot == 8)] : x[c][t][n];
  }
  // Spreads the nibbles of a chunk to bytes at `wide`: a row per subspace and tile, as ldmatrix needs.
  static __device__ __forceinline__ void spread(uint32_t codes, uint32_t wide, int lane) {
    for (int s = lane; s < 2 * K::M; s += 32)
      store_shared(wide + s * 16, spread_nibbles(load_shared_8(codes + s * 8)));
  }
};

// Scores of the block's share of a row, chunk after chunk into the pair's buffers.
template <typename Cfg>
__device__ __forceinline__ void key_warp(const DecodeParams& p, const Place<Cfg>& at, int b, const Row& row,
                                         const Share& share, CodeStream<Cfg>& stream, Turn& turn,
                                         const Query<Cfg>& query, const int* early) {
  using K = typename Cfg::K;
  stream.start(p, b, row.coded, share, early);
  if (stream.chunks == 0) {  // making the scores' operands would only keep the other warps from it
    mbarrier_wait(at.key_books, 0);
    return;
  }
  const KeyTile<Cfg> tile(at);
  Scores<Cfg> scores(at);
  const auto take = [&](int k) {
    uint32_t codes = stream.wait();
    if constexpr (K::C == 16) {
      const uint32_t wide = smem_address(at.scores) + Cfg::pair_spread;
      tile.spread(codes, wide, at.lane);
      stream.release(p, k);
      codes = wide;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t y[K::CODES][2][KeyTile<Cfg>::NY];
      tile.read(codes, j, y);
      if (j == 1 && K::C == 256) stream.release(p, k);
      scores.tile(y, at.scores + (turn.buffer * kChunk + j * kTile) * Cfg::HS, [&] {
        if (j == 0) mbarrier_wait(at.free + 8 * turn.buffer, turn.round ^ 1);
      });
    }
    __syncwarp();
    if (at.lane < kArrivals) mbarrier_arrive(at.full + 8 * turn.buffer);
    turn.next();
  };
  if constexpr (Cfg::ANCHORED) {
    const int last = stream.first + stream.chunks;
#pragma unroll 1
    for (int chunk = stream.first; chunk < last;) {
      const int index = chunk * kChunk, border = (((index >> p.span_shift) + 1) << p.span_shift) / kChunk;
      const int span = p.span_of(index);
      scores.ask([&](int g, int i) {
        const auto* const from = at.query(p, b, g, span) + 2 * i;
        return Cfg::D == Cfg::DP || 2 * i < Cfg::D ? to_half2(load_raw(from)) : 0u;
      });
      scores.move([&](int g) { return at.offset(p, b, g, span); });
      mbarrier_wait(at.key_books, 0);
#pragma unroll 1
      for (const int end = min(border, last); chunk < end; ++chunk) take(chunk - stream.first);
    }
  } else {
    scores.ask(query.spread(at), Cfg::DP / 2);
    __syncwarp();  // the query is read, scores may follow
    mbarrier_wait(at.key_books, 0);
#pragma unroll 1
    for (int k = 0; k < stream.chunks; ++k) take(k);
  }
}

}  // namespace pqlab
