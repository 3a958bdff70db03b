// Heads of 256, whose two codebooks do not fit into shared memory at once: configuration, turns of the codebooks, stream
// of codes. No torch.
//
// A head is two halves of 128 dimensions, side by side. Scores of the halves add up, and values of one half have nothing
// to do with those of the other. So a block goes through a segment of its tokens in four phases, first and second half of
// the keys, then of the values. Each needs a quarter of the codebooks, called a book here: 64 KiB, a pair of blocks (see
// Side).
#pragma once
#include "pq_lookup.cuh"
#include "pq_stream.cuh"
#include "pq_sums.cuh"

namespace pqlab {

constexpr int kPhases = 4;
constexpr int kBufferBytes = 1 << 16;  // of a book of 8 bits; smaller ones leave some of it, see entry_address

// BUFFERS: books that are in shared memory at a time, one of them in use. CHUNKS: of a warp in a segment; their scores
// wait in shared memory for the values. The rest as in DecodeConfig, but every warp looks up keys as well as values.
template <typename T_, int D_, int KM, int KBITS, int VM, int VBITS, int HG_, int NW_, int SLOTS_, int BUFFERS_,
          int CHUNKS_, bool ANCHORED_>
struct HalvesConfig {
  using T = T_;
  using K = Side<D_ / 2, KM / 2, KBITS>;  // of a half
  using V = Side<D_ / 2, VM / 2, VBITS>;
  static constexpr int D = D_, DP = D_, HG = HG_, NW = NW_, NP = NW_, SLOTS = SLOTS_;
  static constexpr int BUFFERS = BUFFERS_, CHUNKS = CHUNKS_;
  static constexpr bool ANCHORED = ANCHORED_;
  static_assert(HG >= 1 && HG <= 4, "at most four query vectors a block");
  static_assert(K::DP == 128 && D == 2 * K::DP, "a half is a pair of blocks");
  static_assert(K::CODES == 1 && V::CODES == 1, "a code for two dimensions at least");
  static_assert(SLOTS < kPhases * CHUNKS && CHUNKS <= 16, "a segment's places are in one register of a warp");
  static constexpr int first_part = 0, DEALT = 16;
  static constexpr int own_words = 2 * (V::MP >= 32 ? V::MP / 32 : 1) * V::EW;
  static constexpr int exact_room = 16 / (own_words * static_cast<int>(sizeof(T))), exact_most = HG > 2 ? 2 : 4;
  static constexpr int EXACT = exact_room < 1 ? 1 : exact_room < exact_most ? exact_room : exact_most;
  static constexpr int book_bytes = 2 * (K::book_bytes + V::book_bytes);  // in the order of the phases
  static constexpr int value_image = 2 * K::book_bytes, value_books = 0;
  // Shared memory: buffers | ring of every warp | of every warp: scores, whose place the weights take, and spread keys |
  // query vectors | (maximum, sum) of parts | Plan | zeros | barriers
  static constexpr int max_tile = K::tile_bytes > V::tile_bytes ? K::tile_bytes : V::tile_bytes;
  static constexpr int slot_bytes = 2 * max_tile;
  static constexpr int merge_bytes = HG * D * 4;
  static constexpr int ring_bytes = SLOTS * slot_bytes > merge_bytes ? SLOTS * slot_bytes : merge_bytes;
  static constexpr int HS = HG == 3 ? 4 : HG;
  static constexpr int score_bytes = kChunk * HS * 4;
  static constexpr int ring_offset = BUFFERS * kBufferBytes;
  static constexpr int pair_offset = ring_offset + NW * ring_bytes;
  static constexpr int pair_weights = 0, pair_spread = CHUNKS * score_bytes;
  static constexpr int pair_bytes = pair_spread + (KBITS == 8 ? 0 : 2 * K::M * 16);
  static constexpr int query_offset = pair_offset + NW * pair_bytes;  // [2 halves][HG][query_words], fp16
  static constexpr int query_words = D / 4 + 2;  // two more than there are: other vectors then lie in other banks
  static constexpr int total_offset = query_offset + 2 * HG * query_words * 4;
  static constexpr int plan_offset = total_offset + (NW + 2) * HG * 8;
  static constexpr int zero_offset = plan_offset + kPlanBytes;
  static_assert(zero_offset % 16 == 0, "read 16 bytes at a time");
  static constexpr int barrier_offset = zero_offset + 2 * kChunk;
  // Barriers: every buffer: full, free | every warp: slots
  static constexpr int pair_barriers = 0, ring_barriers = 2 * BUFFERS;
  static constexpr int barriers = ring_barriers + NW * SLOTS;
  static constexpr int smem_bytes = barrier_offset + 8 * barriers;
};

// The dimensions a lane owns, of the first half, then of the second.
template <typename Cfg>
struct OwnHalves {
  static constexpr int half = OwnDims<Cfg>::U, U = 2 * half;
  static __device__ __forceinline__ int of(int word, int lane) {
    return word / half * Cfg::V::DP + OwnDims<Cfg>::of(word % half, lane);
  }
};

// The books of a head take turns: phase n of a block reads book n % 4, in buffer n % BUFFERS. Whichever warp is the last
// to leave a phase asks for the book that has the buffer next.
template <typename Cfg>
struct BookTurns {
  static constexpr int BUFFERS = Cfg::BUFFERS;
  const uint8_t* books;  // of the head
  uint32_t buffers, barriers;
  int lane;
  int phase = 0;      // the one the warp is in
  int end = BUFFERS;  // books of the phases before are asked for, sooner or later

  __device__ __forceinline__ uint32_t buffer() const { return phase % BUFFERS; }
  __device__ __forceinline__ uint32_t full(int n) const { return barriers + 16 * (n % BUFFERS); }
  __device__ __forceinline__ uint32_t free(int n) const { return full(n) + 8; }
  static __device__ __forceinline__ uint32_t parity(int n) { return n / BUFFERS & 1; }

  __device__ __forceinline__ void ask(int n) const {  // by a warp
    const int book = n % kPhases, bytes = book < 2 ? Cfg::K::book_bytes : Cfg::V::book_bytes;
    const int at = book < 2 ? book * bytes : Cfg::value_image + (book - 2) * bytes;
    fetch_books<32>(books + at, buffers + n % BUFFERS * kBufferBytes, bytes, full(n), lane, 0);
  }
  // Before any other; warps BUFFERS and above have nothing to do.
  __device__ __forceinline__ void start(int warp) const {
    if (warp >= BUFFERS) return;
    if (lane == 0) {
      mbarrier_init(full(warp), kBulk ? 1 : 32);
      mbarrier_init(free(warp), Cfg::NW * kArrivals);
      fence_barrier_init();
    }
    __syncwarp();
    ask(warp);
  }
  // A row of so many segments, and whether there are more rows.
  __device__ __forceinline__ void take(int segments, bool more) {
    if (segments > 0) end = phase + kPhases * segments + (more ? BUFFERS : 0);
  }
  __device__ __forceinline__ void wait() const { mbarrier_wait(full(phase), parity(phase)); }
  __device__ __forceinline__ void leave() {
    __syncwarp();
    if (phase + BUFFERS < end) {
      if constexpr (kArrivals > 1) {  // the other lanes first, so that the last arrival of all is a lane 0's
        if (lane > 0) mbarrier_arrive(free(phase));
        __syncwarp();
      }
      const bool last = lane == 0 && mbarrier_arrive_last(free(phase));
      if (__any_sync(~0u, last)) {
        mbarrier_wait(free(phase), parity(phase));  // is complete: what the other warps read is behind it
        ask(phase + BUFFERS);
      }
    }
    ++phase;
  }
  // Copies must not outlive the block.
  __device__ __forceinline__ void finish() {
    for (; phase < end; ++phase) wait();
  }
};

// A warp's stream of codes through all phases of a row: of every segment the halves of keys, then those of values.
template <typename Cfg>
struct HalvesStream : CodeStream<Cfg> {
  using Base = CodeStream<Cfg>;
  using Base::chunks, Base::lane, Base::next, Base::now, Base::parity, Base::slot;
  int asked = 0, phase = 0;  // what is asked for next: chunk `asked` of the warp's, in this phase
  int segment = 0;           // its segment's first chunk

  __device__ __forceinline__ void fetch(const DecodeParams& p, int to_slot) {
    if (segment < chunks) {
      const int from = 2 * (asked - segment), side = phase >> 1;
      const uint32_t first = __shfl_sync(~0u, now, from), second = __shfl_sync(~0u, now, from + 1);
      const int bytes = side ? Cfg::V::tile_bytes : Cfg::K::tile_bytes;  // of half a tile
      const uint8_t* const pages = (side ? p.v_pages : p.k_pages) + (phase & 1) * bytes;
      Base::copy(to_slot, pages + static_cast<size_t>(first) * (2 * bytes),
                 pages + static_cast<size_t>(second) * (2 * bytes), bytes, false);
      if (++asked == min(segment + Cfg::CHUNKS, chunks)) {
        if (++phase == kPhases) {
          phase = 0, segment += Cfg::CHUNKS, now = next;
          next = Base::place(p, segment + Cfg::CHUNKS + lane / 2);
        }
        asked = segment;
      }
    }
#if __CUDA_ARCH__ < 900
    cp_async_commit();
#endif
  }
  __device__ __forceinline__ void start(const DecodeParams& p, int row, int coded, const Share& share,
                                        const int* early) {
    Base::take(p, row, coded, share);
    asked = phase = segment = 0;
    now = early ? Base::early_place(p, lane / 2, early[0]) : Base::place(p, lane / 2);
    int s = slot;
#pragma unroll
    for (int k = 0; k < Cfg::SLOTS; ++k) {
      fetch(p, s);
      s = s + 1 == Cfg::SLOTS ? 0 : s + 1;
    }
    next = Base::place(p, Cfg::CHUNKS + lane / 2);
  }
  __device__ __forceinline__ void release(const DecodeParams& p) {
    __syncwarp();
    fetch(p, slot);
    if (++slot == Cfg::SLOTS) slot = 0, parity ^= 1;
  }
};

}  // namespace pqlab
