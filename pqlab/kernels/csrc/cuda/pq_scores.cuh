// Scores of a tile of keys: products of looked-up centroids with the query, on the tensor cores. No torch.
//
// The lane of token pair `col` and quad position `quad` looks up, at step l, entry quad of group l ^ rot of the
// block, rot being col as far as there are groups: so the 32 lanes of a lookup touch 32 different banks.
#pragma once
#include "pq_lookup.cuh"

namespace pqlab {

// The query vectors of a row, dealt to the lanes of a key warp: asked for early, needed late. Those of anchored keys
// are read when a warp comes to their span.
template <typename Cfg>
struct Query {
  static constexpr int words = Cfg::HG * Cfg::DP / 2, N = words / 32;
  static_assert(words * 4 <= 2 * Cfg::score_bytes, "goes through the buffers of scores");
  Raw<typename Cfg::T> x[N];

  __device__ __forceinline__ void load(const DecodeParams& p, const Place<Cfg>& at, int row) {
#pragma unroll
    for (int i = 0; i < (Cfg::ANCHORED ? 0 : N); ++i) {
      const int word = i * 32 + at.lane, dim = word % (Cfg::DP / 2) * 2;
      x[i] = {};
      if (Cfg::D == Cfg::DP || dim < Cfg::D) x[i] = load_raw(at.query(p, row, word / (Cfg::DP / 2)) + dim);
    }
  }
  // All of them to the warp's buffers of scores, fp16: [HG][DP / 2].
  __device__ __forceinline__ const uint32_t* spread(const Place<Cfg>& at) const {
    uint32_t* const to = reinterpret_cast<uint32_t*>(at.scores);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i * 32 + at.lane] = to_half2(x[i]);
    __syncwarp();
    return to;
  }
};

template <typename ADD>
__device__ __forceinline__ void put(float* to, float x, ADD add) { *to = add ? *to + x : x; }
template <typename ADD>
__device__ __forceinline__ void put(float* to, float2 x, ADD add) {
  float2& at = *reinterpret_cast<float2*>(to);
  at = add ? make_float2(at.x + x.x, at.y + x.y) : x;
}

// A of a product holds what the lanes looked up: rows are tokens, and the columns of row r have its permutation. B holds
// the query.
//  * One vector: column n of B has the permutation n, so the scores are the diagonal of the result.
//  * More: the lowest bit of the permutation is left to a sparse A, whose row takes one of two neighbours in B. A column
//    is then (upper bits of the permutation, vector): half the products. Two vectors of a row fall to one lane.
template <typename Cfg>
struct Scores {
  using K = typename Cfg::K;
  static constexpr int HG = Cfg::HG, HS = Cfg::HS, DP = K::DP, EW = K::EW;
  static constexpr int kRot = K::rotations, kPack = K::PAIRS ? 3 : 1;
  static constexpr bool kSparse = HG > 1;
  static constexpr int classes = kSparse ? kRot / 2 : kRot, together = 8 / classes;  // vectors a product
  static constexpr int products = kSparse ? (HG + together - 1) / together : 1;

  const Place<Cfg>& at;
  uint32_t low[(kRot + kPack - 1) / kPack] = {};  // low parts of addresses, three to a register or each in its own
  uint32_t b[products][DP / 16][kSparse ? 4 : 2];
  uint32_t which;   // of two neighbours
  uint32_t couple;  // the first of the two vectors that the lane will hold; HG: none
  uint32_t place;   // where its scores go, less those of the tile
  uint32_t halves;  // of two lookups of an entry: in even groups the first is by the first code, in odd ones it is not
  float more[2] = {};  // of anchored keys: what is added to the scores of the lane's vectors

  // buffer: where the codebook lies, in 64 KiB (pairs of blocks only).
  __device__ __forceinline__ explicit Scores(const Place<Cfg>& at_, uint32_t buffer = 0) : at(at_) {
    const int col = at.col, quad = at.quad;
#pragma unroll
    for (int j = 0; j < kRot; ++j)
      low[j / kPack] |= (((j ^ (col & (kRot - 1))) * 4 + quad) * EW * 4) << (8 * (j % kPack));
    for (uint32_t& x : low) x |= buffer << 24, keep(x);
    which = at.odd ? 0xEEEEEEEEu : 0x44444444u;
    // Product t has its permutations turned by 2t, so that other lanes hold its results.
    const int turn = 2 * quad / together ^ (col >> 1 & (classes - 1));
    couple = turn & 1 ? HG : turn / 2 * together + 2 * quad % together;
    place = col * HS + (kSparse ? couple : 0);
    keep(which), keep(couple), keep(place);
    halves = at.odd ? 0x3254u : 0x7610u;  // of an even step
    if constexpr (K::CODES == 2) keep(halves);
  }

  // Takes query vectors: word(g, i) is dimensions 2i and 2i + 1 of vector g.
  template <typename F>
  __device__ __forceinline__ void ask(F&& word) {
    int col = at.col, quad = at.quad;
    if constexpr (Cfg::ANCHORED) asm volatile("" : "+r"(col), "+r"(quad));  // or all places would be in registers
#pragma unroll
    for (int t = 0; t < products; ++t) {
      const int g = kSparse ? t * together + col % together : 0;
      const int permutation = kSparse ? 2 * (col / together ^ 2 * t) & (kRot - 1) : col & (kRot - 1);
#pragma unroll
      for (int m = 0; m < DP / 16; ++m)
#pragma unroll
        for (int j = 0; j < (kSparse ? 4 : 2); ++j) {  // the word of lookup w / EW that meets rows 8j + 2 quad of B
          const int four = 2 * j + (quad >> 1), w = 2 * m + (kSparse ? four >> 2 : j), l = w / EW;
          const int group = (l & ~(kRot - 1)) + ((l & (kRot - 1)) ^ permutation ^ (kSparse ? quad & 1 : 0));
          const int entry = group * 4 + (kSparse ? four & 3 : quad);
          b[t][m][j] = g < HG ? word(g, entry * EW + w % EW) : 0u;
        }
    }
  }
  // Those in shared memory, `stride` words apart.
  __device__ __forceinline__ void ask(const uint32_t* words, int stride) {
    ask([&](int g, int i) { return words[g * stride + i]; });
  }

  // Adds offset(g) to the scores of vector g from here on.
  template <typename F>
  __device__ __forceinline__ void move(F&& offset) {
    const int first = kSparse ? couple : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) more[i] = first + i < HG ? offset(first + i) : 0.f;
  }
  __device__ __forceinline__ float moved(float x) const { return Cfg::ANCHORED ? x + more[0] : x; }
  __device__ __forceinline__ float2 moved(float2 x) const {
    return Cfg::ANCHORED ? make_float2(x.x + more[0], x.y + more[1]) : x;
  }

  // `codes` of two tokens (2 col, 2 col + 1 of the tile), in the order of the lookups -> `to` [tokens][HS]: rows col are
  // the even tokens, rows 8 + col the odd ones. `wait`: until there is room. `add`: to what is there.
  template <int NY, typename WAIT, typename ADD = std::false_type>
  __device__ __forceinline__ void tile(const uint32_t (&codes)[K::CODES][2][NY], float* to, WAIT&& wait,
                                       ADD add = {}) const {
    float d[products][4] = {};
    unrolled<DP / 8 / (EW > 2 ? EW : 2)>([&](auto step) {
      constexpr int per = EW > 2 ? 1 : 2 / EW;  // lookups a step, for each token
      uint32_t z[2][per][EW];
      unrolled<2 * per>([&](auto i) {
        constexpr int t = i.value & 1, l = step.value * per + (i.value >> 1), r = l % kRot;
        auto find = [&](const uint32_t (&of)[2][NY], uint32_t (&entry)[EW]) {
          lookup<EW, K::block_offset(l / kRot)>(
              entry, at.smem, entry_address<K>(of[t][l >> 2], l & 3, low[r / kPack], r % kPack));
        };
        uint32_t (&entry)[EW] = z[t][i.value >> 1];
        find(codes[0], entry);
        if constexpr (K::CODES == 2) {
          uint32_t other[1];
          find(codes[1], other);
          entry[0] = l & 1 ? prmt(other[0], entry[0], halves) : prmt(entry[0], other[0], halves);
        }
      });
      unrolled<per * EW / 2>([&](auto n) {  // words 2m, 2m + 1 of both tokens are the A of the m-th product
        constexpr int w = 2 * n.value, m = step.value * (per * EW / 2) + n.value;
        constexpr int l0 = w / EW, e0 = w % EW, l1 = (w + 1) / EW, e1 = (w + 1) % EW;
#pragma unroll
        for (int t = 0; t < products; ++t)
          if constexpr (kSparse)
            mma_sparse_16832(d[t], z[0][l0][e0], z[1][l0][e0], z[0][l1][e1], z[1][l1][e1], b[t][m], which);
          else
            mma_16816(d[t], z[0][l0][e0], z[1][l0][e0], z[0][l1][e1], z[1][l1][e1], b[t][m][0], b[t][m][1]);
      });
    });
    wait();
    to += place;
    if constexpr (!kSparse) {
      if (at.diagonal)
        put(to, moved(at.odd ? d[0][1] : d[0][0]), add), put(to + 8 * HS, moved(at.odd ? d[0][3] : d[0][2]), add);
    } else if (couple < HG) {  // with three vectors the fourth place is nobody's
      constexpr int last = products - 1;
      const bool second = last && couple >= static_cast<uint32_t>(together);
      put(to, moved(second ? make_float2(d[last][0], d[last][1]) : make_float2(d[0][0], d[0][1])), add);
      put(to + 8 * HS, moved(second ? make_float2(d[last][2], d[last][3]) : make_float2(d[0][2], d[0][3])), add);
    }
  }
};

}  // namespace pqlab
