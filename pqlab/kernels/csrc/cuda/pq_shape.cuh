// What a configuration of the decode kernel is: sizes, places in shared memory, arguments. No torch.
#pragma once
#include <cstdint>

#include "pq_ptx.cuh"

namespace pqlab {

constexpr int kTile = 16;            // tokens per tile, as in paging/layout.py
constexpr int kChunk = 32;           // tokens a warp takes at a time: two tiles
constexpr int kReservedSmem = 1024;  // shared memory that CUDA keeps for itself in front of a block's (sm_90)
constexpr int kPlanBytes = 80;       // of Plan
constexpr float kLn2 = 0.6931471805599453f;

// One side (keys or values) of a codebook in shared memory: entries of DM fp16; the entries of one code are a row of
// `blocks` blocks of 128 bytes. An entry is a subspace's centroid; subspaces of one dimension go in pairs, an entry is
// then looked up with both CODES and half of what is found counts. Two forms, each with an address that takes one
// instruction:
//  * pairs of blocks, C rows of 256 bytes: code << 8 | low byte, a byte permute;
//  * one block after the other, C rows of 128 bytes, where there are no pairs: code * 128 + low, a dot product of bytes.
template <int D, int M_, int NBITS>
struct Side {
  static constexpr int M = M_;
  static_assert(D % M == 0, "M must divide the head size");
  static_assert(NBITS == 8 || NBITS == 4, "codes of 8 or 4 bits");
  static constexpr int CODES = D == M ? 2 : 1;  // an entry
  static constexpr int DM = D / M * CODES;
  static_assert(DM == 2 || DM == 4 || DM == 8, "1, 2, 4 or 8 dimensions a subspace");
  static constexpr int EW = DM / 2;  // 32-bit words an entry
  static constexpr int C = 1 << NBITS;
  static constexpr int blocks = (2 * D + 127) / 128;
  static constexpr int DP = blocks * 64;        // head size, padded to whole blocks
  static constexpr int MP = DP / DM;            // entries a row, padded likewise; the padding is zero
  static constexpr int tile_bytes = M * 2 * NBITS;
  static_assert(tile_bytes % 16 == 0, "copied 16 bytes at a time");
  static constexpr int rotations = 8 / EW;      // groups of 4 entries in a block
  static constexpr bool PAIRS = blocks % 2 == 0;
  static constexpr int book_bytes = blocks * C * 128;
  // Byte offset of block b in the side's part of the books, code 0.
  static __host__ __device__ constexpr int block_offset(int b) {
    return PAIRS ? (b >> 1) * C * 256 + (b & 1) * 128 : b * C * 128;
  }
  // Byte offset of an entry in it.
  static __host__ __device__ constexpr int entry_offset(int entry) {
    return block_offset(entry * EW * 4 >> 7) + (entry * EW * 4 & 127);
  }
  static constexpr int row_bytes = PAIRS ? 256 : 128;
};

// T: element type of queries and exact tokens. HG: query vectors a block works for. NW: warps; the first half looks up
// keys, the second half values. SLOTS: chunks of codes that are on their way to a warp. ANCHORED: keys are turned back
// by the anchor of their span of tokens, so there are query vectors for every span.
template <typename T_, int D_, int KM, int KBITS, int VM, int VBITS, int HG_, int NW_, int SLOTS_, bool ANCHORED_>
struct DecodeConfig {
  using T = T_;
  using K = Side<D_, KM, KBITS>;
  using V = Side<D_, VM, VBITS>;
  static constexpr int D = D_, HG = HG_, NW = NW_, NP = NW_ / 2, SLOTS = SLOTS_;
  static constexpr bool ANCHORED = ANCHORED_;
  static_assert(HG >= 1 && HG <= 4 && NW % 2 == 0, "at most four query vectors a block, pairs of warps");
  static constexpr int DP = K::DP;
  static constexpr int first_part = NP;  // warps behind this one have parts of the result
  static constexpr int DEALT = 8;        // blocks that are dealt the first chunks of a single row, see begin_of_one
  static constexpr int own_words = (V::MP >= 32 ? V::MP / 32 : 1) * V::EW;  // pairs of dimensions a lane of it sums
  // Exact tokens a value warp has on their way: they are in registers.
  static constexpr int exact_room = 16 / (own_words * static_cast<int>(sizeof(T))), exact_most = HG > 2 ? 2 : 4;
  static constexpr int EXACT = exact_room < 1 ? 1 : exact_room < exact_most ? exact_room : exact_most;
  static constexpr int book_bytes = K::book_bytes + V::book_bytes;  // keys, then values
  static constexpr int value_image = K::book_bytes;                 // where values' begin in what is prepared,
  static constexpr int value_books = K::book_bytes;                 // and in shared memory
  static constexpr int ring_offset = book_bytes;
  // Shared memory: books | ring of every warp | of every pair: two buffers of scores, weights, spread keys | barriers
  static constexpr int max_tile = K::tile_bytes > V::tile_bytes ? K::tile_bytes : V::tile_bytes;
  static constexpr int slot_bytes = 2 * max_tile;
  static constexpr int merge_bytes = HG * DP * 4;  // a warp's results take the place of its ring
  static constexpr int ring_bytes = SLOTS * slot_bytes > merge_bytes ? SLOTS * slot_bytes : merge_bytes;
  static constexpr int HS = HG == 3 ? 4 : HG;  // scores of a token, padded to a power of two
  static constexpr int score_bytes = kChunk * HS * 4;
  static constexpr int pair_offset = ring_offset + NW * ring_bytes;
  static constexpr int pair_weights = 2 * score_bytes;
  static constexpr int pair_spread = pair_weights + HG * kChunk * 2;
  static constexpr int pair_bytes = pair_spread + (KBITS == 8 ? 0 : 2 * KM * 16);
  static constexpr int total_offset = pair_offset + NP * pair_bytes;  // float2 [NW][HG]: maxima and sums of parts
  static constexpr int plan_offset = total_offset + (NW + 2) * HG * 8;  // Plan, of batches
  static constexpr int zero_offset = plan_offset + kPlanBytes;         // as many zeros as a vector has weights
  static_assert(zero_offset % 16 == 0, "read 16 bytes at a time");
  static constexpr int barrier_offset = zero_offset + 2 * kChunk;
  // Barriers: key books, value books | every pair: scores full (2), scores free (2) | every warp: slots
  static constexpr int pair_barriers = 2, ring_barriers = pair_barriers + 4 * NP;
  static constexpr int barriers = ring_barriers + NW * SLOTS;
  static constexpr int smem_bytes = barrier_offset + 8 * barriers;
};

struct DecodeParams {
  const void* q;            // [B, H * G, S, D] of T, last dimension dense; of anchored keys [spans, B, H * G, S, D]
  int64_t q_stride[3];      // elements
  const uint8_t* k_pages;   // [max_pages][H][T][KM][2 * KBITS]
  const uint8_t* v_pages;
  const int* page_table;    // [B][table_stride]
  int table_stride;
  const int* lengths;       // [B][3]: sinks, coded, window
  const uint8_t* books;     // [H][book_bytes], made by pqlab_prepare_books
  const void* sink_k;       // [B, H, n, D] of T, last dimension dense
  const void* sink_v;       // strides as sink_k
  int64_t sink_stride[3];
  const void* window_k;     // [B, H, W, D] of T, a ring
  const void* window_v;
  int64_t window_stride[3];
  int window_slots;
  void* out;                // [B, H * G, S, D] of T, dense
  float* lse;               // [B, H * G, S]
  float* partial;           // [H][groups][splits + B][jobs][floats], see Slices
  int* tickets;             // [B * H * groups][jobs], zero before and after
  const __half* map;        // [H, D, D]: the result is out map[h], in the head space; null: out
  void* unmapped;           // with a map: room for as much as `out`, where B > 1
  int B, H, G, S;
  int tiles_per_page;
  uint32_t page_magic;      // tile / tiles_per_page == umulhi(tile, page_magic); 0: a page is a tile
  int splits;               // blocks per (kv head, group of query vectors)
  float scale_log2;         // softmax scale * log2(e), > 0
  // Filled in by the launcher, to spare the kernel divisions:
  uint32_t turn_magic;      // chunks / (splits * NP) == umulhi(chunks, turn_magic), unless that is 1
  uint32_t step_magic;      // vector / S == vector * step_magic >> 16
  // Of anchored keys:
  int64_t span_stride;      // of q, elements
  const float* offsets;     // [parts][spans][B, H * G, S], dense: to be added to scores; null: nothing
  float offset_unit;        // of which they are, in scores ahead of the softmax scale
  int spans, span_shift;    // the token with code index u is in span u >> span_shift
  int offset_parts;         // 1, 2 or 4, which add up

  // There is none behind the last, whatever the lengths say.
  __device__ __forceinline__ int span_of(int index) const { return min(index >> span_shift, spans - 1); }
};

// One row of the batch as work: units of about equal bytes, chunks of codes and exact tokens side by side.
struct Row {
  int sinks, coded, exact, chunks, units;
  __device__ __forceinline__ Row(int sinks_, int coded_, int window) : sinks(sinks_), coded(coded_) {
    exact = sinks + window;
    chunks = (coded + kChunk - 1) / kChunk;
    units = chunks + (exact + kChunk / 2 - 1) / (kChunk / 2);  // an exact token is worth two of codes
  }
  __device__ __forceinline__ Row(const DecodeParams& p, int b)
      : Row(p.lengths[3 * b], p.lengths[3 * b + 1], p.lengths[3 * b + 2]) {}
};

// floor(total * part / parts); rows have less than 2^16 units, so the product fits.
__device__ __forceinline__ int share(int total, int part, int parts) {
  return static_cast<int>(static_cast<uint32_t>(total) * static_cast<uint32_t>(part) / static_cast<uint32_t>(parts));
}

// Where a block begins: pair n of its warps with chunk first + n * apart.
struct Begin {
  int first, apart;
};

// What a block does of a row: the chunks with which it begins, then those `step` further on, below `end`; exact tokens
// [e0, e1). `blocks` blocks share the row, from block `block0` on. Of anchored keys a block has all chunks from the
// first to `end`, a part for each pair of its warps: chunks side by side mostly have the same query vectors.
struct Share {
  Begin begin;
  int step, end, e0, e1, block0, blocks;
};

// A batch of one row: blocks take turns, NP chunks each, so that the first chunks of a block do not depend on how long
// the row is. The first DEALT blocks are dealt those of a turn one by one: a short row then keeps few warps of each
// busy, which are faster than many of few blocks, and yet leaves few parts to merge.
template <typename Cfg>
__device__ __forceinline__ Begin begin_of_one(const DecodeParams& p) {
  const int x = blockIdx.x, dealt = min(p.splits, Cfg::DEALT);
  return x < dealt ? Begin{x, dealt} : Begin{x * Cfg::NP, 1};
}

// No block without a chunk for one pair of warps at least; exact tokens take as many blocks as let a pair read its own,
// EXACT, at once.
template <typename Cfg>
__device__ __forceinline__ Share share_of_one(const DecodeParams& p, const Row& row) {
  constexpr int NP = Cfg::NP, exact_each = NP * Cfg::EXACT;
  const int of_chunks = max(min(row.chunks, Cfg::DEALT), (row.chunks + NP - 1) / NP);
  const int useful = max(of_chunks, (row.exact + exact_each - 1) / exact_each);
  const int blocks = max(1, min(p.splits, useful)), x = blockIdx.x;
  const int e0 = share(row.exact, x, blocks), e1 = share(row.exact, x + 1, blocks);
  if constexpr (Cfg::ANCHORED)
    return {{share(row.chunks, x, blocks), 1}, 1, share(row.chunks, x + 1, blocks), e0, e1, 0, blocks};
  else
    return {begin_of_one<Cfg>(p), p.splits * NP, row.chunks, e0, e1, 0, blocks};
}

// More rows: the units of all rows, one after the other, are cut into equal parts, one a block.
struct Part {
  int per_block, begin, end;  // this block's units
  int row, before;            // the row in which they begin, units of all rows before it

  template <int NP>
  __device__ __forceinline__ void find(const DecodeParams& p, int lane) {
    int total = 0;
    for (int b = lane; b < p.B; b += 32) total += Row(p, b).units;
#pragma unroll
    for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
    // A chunk a pair of warps at least, and no second block for so few: merging would cost more than it saves.
    per_block = total <= 2 * NP ? max(total, 1) : max((total + p.splits - 1) / p.splits, NP);
    begin = blockIdx.x * per_block, end = min(begin + per_block, total);
    row = before = 0;
    for (int b0 = 0; begin < end; b0 += 32) {
      int upto = b0 + lane < p.B ? Row(p, b0 + lane).units : 0;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int other = __shfl_up_sync(~0u, upto, o);
        if (lane >= o) upto += other;
      }
      const unsigned past = __ballot_sync(~0u, before + upto > begin);
      if (past) {
        const int first = __ffs(past) - 1;
        row = b0 + first;
        before += first ? __shfl_sync(~0u, upto, first - 1) : 0;
        break;
      }
      before += __shfl_sync(~0u, upto, 31);
    }
  }

  __device__ __forceinline__ bool more() const { return begin < end && before < end; }

  template <int NP>
  __device__ __forceinline__ Share share_of(const Row& r) const {
    const int u0 = max(begin - before, 0), u1 = min(end - before, r.units), block0 = before / per_block;
    return {{share(r.chunks, u0, r.units), 1}, NP, share(r.chunks, u1, r.units),
            share(r.exact, u0, r.units),  share(r.exact, u1, r.units),
            block0, (before + r.units - 1) / per_block - block0 + 1};
  }
};

// What a block does next, in shared memory, where it costs no registers: one thread plans, all read.
struct Plan {
  Part part;
  int b;  // row, -1: nothing is left
  int sinks, coded, window;
  Share share;

  template <int NP>
  __device__ __forceinline__ void advance(const DecodeParams& p) {
    Part at = part;
    b = -1;
    while (at.more() && b < 0) {
      const Row row(p, at.row);
      if (row.units > 0) b = at.row, sinks = row.sinks, coded = row.coded, window = row.exact - row.sinks;
      if (row.units > 0) share = at.template share_of<NP>(row);
      at.before += row.units, ++at.row;
    }
    part = at;
  }
  // One of its numbers, read in a way that says that it is the same for all lanes.
  __device__ __forceinline__ int uniform(const int& x) const {
    return __shfl_sync(~0u, *const_cast<const volatile int*>(&x), 0);
  }
  __device__ __forceinline__ bool more() const {  // of the block's work, behind this row
    const int end = uniform(part.end);
    return uniform(part.begin) < end && uniform(part.before) < end;
  }
  __device__ __forceinline__ Row row() const { return Row(uniform(sinks), uniform(coded), uniform(window)); }
  __device__ __forceinline__ Share shared() const {
    return {{uniform(share.begin.first), 1}, uniform(share.step), uniform(share.end), uniform(share.e0),
            uniform(share.e1), uniform(share.block0), uniform(share.blocks)};
  }
};
static_assert(sizeof(Plan) <= kPlanBytes, "see DecodeConfig");

}  // namespace pqlab
