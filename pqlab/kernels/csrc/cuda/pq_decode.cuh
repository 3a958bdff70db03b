// Paged flash-decoding over product-quantized keys and values. No torch, sm_80 and newer.
//
// A block works for one kv head and up to HG query vectors that share it; it holds both codebooks of the head in
// shared memory and walks over its share of all rows' tokens. Warps work in pairs: the first looks up keys and leaves
// scores in shared memory, the second turns scores into weights and looks up values. A pair takes chunks of 32 tokens,
// keeps its own running maximum and sum, and the pairs' results are merged once per row. Rows that several blocks share
// are finished by whichever of them comes last.
//
// What makes it fast (LOG.md has the counts):
//  * A lookup of one warp touches 32 different banks, for any codes. Values: lane l always looks up subspace l of a
//    group of 32. Keys: the lane of token pair p and quad position i looks up subspace 4 (j ^ p) + i at step j.
//  * Key tiles come out of shared memory through ldmatrix.trans, which turns [subspace][token] into what the tensor
//    cores want: tokens in rows. Step j's values are an A operand whose row p has its columns permuted by p; the B
//    operand holds the query with the permutation n in column n, so the scores are the diagonal of the product.
//  * Values: A holds the looked-up values, each lane's own subspace in its own columns; B holds the weights, zero
//    outside the columns of the lane's quad position. So the sums of a lane's subspace land in that lane, in fp32.
//  * Each warp has a stream of codes of its own: no block-wide barrier per chunk.
#pragma once
#include "pq_keys.cuh"
#include "pq_merge.cuh"
#include "pq_values.cuh"

namespace pqlab {

template <typename Cfg>
__global__ void __launch_bounds__(Cfg::NW * 32, 1) pq_decode_kernel(const __grid_constant__ DecodeParams p) {
  using T = typename Cfg::T;
  using K = typename Cfg::K;
  using V = typename Cfg::V;
  constexpr int HG = Cfg::HG, NW = Cfg::NW, NP = Cfg::NP, NT = NW * 32, D = Cfg::D;
  extern __shared__ __align__(1024) uint8_t smem[];
  const Place<Cfg> at(p, smem);
  const uint32_t ring_barriers = at.key_books + 8 * (Cfg::ring_barriers + at.warp * Cfg::SLOTS);

  // What everything waits for: lengths, then the page table, then codes.
  if (at.warp == NW - 1 && at.lane < (p.B * 3 + 31) / 32) prefetch_l2(p.lengths + at.lane * 32);
  if (at.warp == NW - 1 && p.B == 1) {  // the part of the table that is this block's if the row fills it
    const int entry = static_cast<int>(blockIdx.x) * p.table_stride / p.splits + at.lane * 32;
    if (entry < p.table_stride) prefetch_l2(p.page_table + entry);
  }

  if (at.lane == 0) {  // dealt to the warps: making one takes 40 cycles
    if (at.warp == 0) mbarrier_init(at.key_books, kBulk ? 1 : NT);
    if (at.warp == NP) mbarrier_init(at.value_books, kBulk ? 1 : NT);
    for (int i = 0; i < 2; ++i) mbarrier_init((at.keys ? at.full : at.free) + 8 * i, kArrivals);
    for (int i = 0; i < Cfg::SLOTS; ++i) mbarrier_init(ring_barriers + 8 * i, 1);
    fence_barrier_init();
  }
  __syncthreads();
  const uint8_t* books = p.books + static_cast<size_t>(at.h) * Cfg::book_bytes;
  fetch_books<K, NT>(books, smem_address(smem), at.key_books, 0);
  if constexpr (!kBulk) fetch_books<V, NT>(books + K::book_bytes, smem_address(smem) + K::book_bytes, at.value_books, 0);

  Part part = {};
  part.find<NP>(p, at.lane);
  CodeStream<NP, Cfg::SLOTS> stream;
  stream.pages = at.keys ? p.k_pages : p.v_pages;
  stream.tile_bytes = at.keys ? K::tile_bytes : V::tile_bytes;
  stream.ring = smem_address(smem) + Cfg::book_bytes + at.warp * Cfg::ring_bytes;
  stream.slot_bytes = Cfg::slot_bytes;
  stream.barriers = ring_barriers;
  stream.lane = at.lane, stream.pair = at.pair, stream.head = at.h;
  keep(stream.ring), keep(stream.barriers);
  Turn turn;
  bool have_books = false;

  while (part.begin < part.end && part.before < part.end) {
    const int b = part.row;
    const Row row(p, b);
    if (row.units == 0) {
      ++part.row;
      continue;
    }
    const int u0 = max(part.begin - part.before, 0), u1 = min(part.end - part.before, row.units);
    if (at.keys)
      key_warp<Cfg>(p, at, row, b, u0, u1, stream, turn);
    else
      value_warp<Cfg>(p, at, row, b, u0, u1, stream, turn, books, have_books);
    have_books = true;
    finish_row<Cfg>(p, smem, part, row, b);
    part.before += row.units;
    ++part.row;
  }
  if (!have_books) mbarrier_wait(at.key_books, 0);  // the copy must not outlive the block
  if constexpr (!kBulk) cp_async_wait<0>();

  // Rows that store nothing: out 0, lse -inf.
  for (int e = blockIdx.x; e < p.B; e += p.splits)
    if (Row(p, e).units == 0)
      for (int i = threadIdx.x; i < HG * D; i += NT) {
        const int g = i / D, dim = i % D;
        if (at.first_vector + g >= at.vectors) continue;
        const size_t vector = (static_cast<size_t>(e) * p.H + at.h) * at.vectors + at.first_vector + g;
        static_cast<T*>(p.out)[vector * D + dim] = from_float<T>(0.f);
        if (dim == 0) p.lse[vector] = -INFINITY;
      }
}

}  // namespace pqlab
