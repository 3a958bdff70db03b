// Paged flash-decoding over product-quantized keys and values. No torch, sm_80 and newer.
//
// A block works for one kv head and up to HG query vectors that share it; it holds both codebooks of the head in
// shared memory and walks over its share of all rows' tokens. Warps work in pairs: the first looks up keys and leaves
// scores in shared memory, the second turns scores into weights and looks up values. A pair takes chunks of 32 tokens,
// keeps its own running maximum and sum, and the pairs' results are merged once per row. Of a row that several blocks
// share, a slice of the result is finished by whichever of them comes last with its part of it.
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

// ONE: the batch is one row.
template <typename Cfg, bool ONE>
__global__ void __launch_bounds__(Cfg::NW * 32, 1) pq_decode_kernel(const __grid_constant__ DecodeParams p) {
  using K = typename Cfg::K;
  using V = typename Cfg::V;
  constexpr int NW = Cfg::NW, NP = Cfg::NP, NT = NW * 32;
  using Stream = CodeStream<Cfg>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const Place<Cfg> at(p, smem);
  const uint32_t ring_barriers = at.key_books + 8 * (Cfg::ring_barriers + at.warp * Cfg::SLOTS);
  const uint8_t* const books = p.books + static_cast<size_t>(at.h) * Cfg::book_bytes;

  // What everything waits for: lengths, page table, codes, query. The first chunks of a single row do not depend on its
  // length (but with anchored keys), so its page table is asked for at once; a table that is longer than the row says
  // nothing there, which is then not used. Asked for before the codebooks, or they would stand in line behind them.
  int lengths[3] = {}, early[2] = {};
  Query<Cfg> query;
  if constexpr (ONE) {
#pragma unroll
    for (int i = 0; i < 3; ++i) lengths[i] = load_now(p.lengths + i);
    if (!Cfg::ANCHORED && p.table_stride > 0)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int page = Stream::page_of(p, Stream::early_tile(p, at.pair, 16 * i + at.lane / 2, at.lane));
        early[i] = load_now(p.page_table + min(page, p.table_stride - 1));
      }
    if (at.keys) query.load(p, at, 0);
  } else if (at.warp == NW - 1 && at.lane < (p.B * 3 + 31) / 32) {
    prefetch_l2(p.lengths + at.lane * 32);
  }

  if (threadIdx.x < kChunk / 2) reinterpret_cast<uint32_t*>(smem + Cfg::zero_offset)[threadIdx.x] = 0;
  if (at.lane == 0) {  // dealt to the warps: making one takes 40 cycles
    if (at.warp == 0) mbarrier_init(at.key_books, kBulk ? 1 : NT);
    if (at.warp == NP) mbarrier_init(at.value_books, kBulk ? 1 : NT);
    for (int i = 0; i < 2; ++i) mbarrier_init((at.keys ? at.full : at.free) + 8 * i, kArrivals);
    for (int i = 0; i < Cfg::SLOTS; ++i) mbarrier_init(ring_barriers + 8 * i, 1);
    fence_barrier_init();
  }
  if constexpr (!kBulk) __syncthreads();  // else the thread that asks has made the barrier
  const uint32_t to = smem_address(smem);
  fetch_books<NT>(books, to, K::book_bytes, at.key_books, threadIdx.x, 0);
  fetch_books<NT>(books + K::book_bytes, to + K::book_bytes, V::book_bytes, at.value_books, threadIdx.x, NP * 32);
  if constexpr (kBulk) __syncthreads();
  if constexpr (ONE)  // needed from here on, not before: the compiler would wait for them ahead of the barrier
    for (int* x : {lengths, lengths + 1, lengths + 2, early, early + 1}) asm volatile("" : "+r"(*x));

  Plan* const plan = reinterpret_cast<Plan*>(smem + Cfg::plan_offset);
  if (!ONE && at.warp == 0) {
    Part part = {};
    part.find<NP>(p, at.lane);
    if (at.lane == 0) plan->part = part;
  }
  Stream stream;
  stream.pages = at.keys ? p.k_pages : p.v_pages;
  stream.tile_bytes = at.keys ? K::tile_bytes : V::tile_bytes;
  stream.ring = smem_address(smem) + Cfg::book_bytes + at.warp * Cfg::ring_bytes;
  stream.slot_bytes = Cfg::slot_bytes;
  stream.barriers = ring_barriers;
  stream.lane = at.lane, stream.pair = at.pair, stream.head = at.h;
  keep(stream.ring), keep(stream.barriers);
  Turn turn;
  bool worked = false;

  if constexpr (ONE) {
    const Row row(lengths[0], lengths[1], lengths[2]);
    const Share share = share_of_one<Cfg>(p, row);
    worked = row.units > 0 && static_cast<int>(blockIdx.x) < share.blocks;
    if (worked) {
      if (at.keys)
        key_warp<Cfg>(p, at, 0, row, share, stream, turn, query, Cfg::ANCHORED ? nullptr : early);
      else
        value_warp<Cfg>(p, at, 0, row, share, stream, turn, Cfg::ANCHORED ? nullptr : early);
      finish_row<Cfg, ONE>(p, at, share, 0);
    } else if (row.units == 0 && blockIdx.x == 0) {
      store_nothing<Cfg>(p, at, 0);
    }
  } else {
#pragma unroll 1
    while (true) {
      if (threadIdx.x == 0) plan->advance<NP>(p);
      __syncthreads();
      const int b = plan->uniform(plan->b);
      if (b < 0) break;
      if (at.keys) {
        Query<Cfg> asked;
        asked.load(p, at, b);
        key_warp<Cfg>(p, at, b, plan->row(), plan->shared(), stream, turn, asked, nullptr);
      } else {
        value_warp<Cfg>(p, at, b, plan->row(), plan->shared(), stream, turn, nullptr);
      }
      finish_row<Cfg, ONE>(p, at, plan->shared(), plan->uniform(plan->b));
      worked = true;
      fence_async();  // the rings are free again, for the copy engine too
      __syncthreads();
    }
  }
  if (!worked) {  // the copies must not outlive the block
    mbarrier_wait(at.key_books, 0);
    mbarrier_wait(at.value_books, 0);
  }
  if constexpr (!kBulk) cp_async_wait<0>();
  if constexpr (!ONE)
    for (int b = blockIdx.x; b < p.B; b += p.splits)
      if (Row(p, b).units == 0) store_nothing<Cfg>(p, at, b);
}

}  // namespace pqlab
