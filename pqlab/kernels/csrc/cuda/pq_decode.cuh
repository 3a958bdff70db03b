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
#include "pq_merge.cuh"
#include "pq_stream.cuh"

namespace pqlab {

// One lane arrives for its warp, after __syncwarp. compute-sanitizer's racecheck does not see through that: for it all
// lanes arrive, one after the other.
#ifdef PQ_RACECHECK
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif

// Reads N words of shared memory at byte OFFSET + `at` of the dynamic part. On sm_90 the compiler would add the start
// of the dynamic part to every address (it depends on the place in a cluster); outside clusters it is a constant, the
// memory that CUDA reserves, and fits into the instruction. The launcher checks it.
template <int N, int OFFSET>
__device__ __forceinline__ void lookup(uint32_t (&x)[N], const uint8_t* smem, uint32_t at) {
#if __CUDA_ARCH__ >= 900
  if constexpr (N == 1)
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(x[0]) : "r"(at), "n"(OFFSET + kReservedSmem));
  else if constexpr (N == 2)
    asm("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(x[0]), "=r"(x[1]) : "r"(at), "n"(OFFSET + kReservedSmem));
  else
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "r"(at), "n"(OFFSET + kReservedSmem));
#else
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = *reinterpret_cast<const uint32_t*>(smem + OFFSET + at + 4 * i);
#endif
}

template <int I>
struct Int {
  static constexpr int value = I;
};
// f(Int<0>()), f(Int<1>()), ... f(Int<N - 1>()): a loop whose index is a constant.
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (I < N) {
    f(Int<I>());
    unrolled<N, I + 1>(f);
  }
}

// Address of the entry of byte `byte` of `codes`, less the block's offset; see Side. `low` is a plain number, or for
// pairs of blocks a register whose byte `at` is the low byte and whose top byte is zero.
template <typename S>
__device__ __forceinline__ uint32_t entry_address(uint32_t codes, int byte, uint32_t low, int at) {
  if constexpr (S::PAIRS)
    return prmt(codes, low, 0x7704u + at + (byte << 4));
  else
    return __dp4a(codes, 128u << (8 * byte), low);
}

// Asks for one side's codebook; the barrier completes when it is there. Called by all threads, thread `one` of them
// works for all where there is a copy engine. Blocks of the same head start at different places, or they would all ask
// the same slices of L2 at a time.
template <typename S, int THREADS>
__device__ __forceinline__ void fetch_books(const uint8_t* books, uint32_t to, uint32_t barrier, int one) {
#if __CUDA_ARCH__ >= 900
  constexpr int pieces = S::book_bytes >= 32768 ? 8 : 1, bytes = S::book_bytes / pieces;
  if (threadIdx.x == one) {
    mbarrier_expect(barrier, S::book_bytes);
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
      const int at = (i + blockIdx.x) % pieces * bytes;
      bulk_copy(to + at, books + at, bytes, barrier);
    }
  }
#else
  for (int i = threadIdx.x * 16; i < S::book_bytes; i += THREADS * 16) cp_async_16(to + i, books + i);
  cp_async_arrive(barrier);
#endif
}

template <typename Cfg>
__global__ void __launch_bounds__(Cfg::NW * 32, 1) pq_decode_kernel(const __grid_constant__ DecodeParams p) {
  using T = typename Cfg::T;
  using K = typename Cfg::K;
  using V = typename Cfg::V;
  constexpr int HG = Cfg::HG, HS = Cfg::HS, NW = Cfg::NW, NP = Cfg::NP, NT = NW * 32, D = Cfg::D, DP = Cfg::DP;
  constexpr int VR = V::MP >= 32 ? V::MP / 32 : 1;  // subspaces a value lane owns
  constexpr int U = VR * V::EW;                     // words (pairs of dimensions) of them
  extern __shared__ __align__(1024) uint8_t smem[];

  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(~0u, tid >> 5, 0);  // says that it is uniform: addresses then take uniform registers
  const bool keys = warp < NP;
  const int pair = keys ? warp : warp - NP;
  const int col = lane >> 2, quad = lane & 3;   // mma row / column of this lane, position in its quad
  const bool diagonal = quad == col >> 1;       // of an 8x8 result: this lane holds element (col, col)
  const bool odd = col & 1;
  const int h = blockIdx.y, group = blockIdx.z;
  const int vectors = p.G * p.S, first_vector = group * HG;

  float* const scores = reinterpret_cast<float*>(smem + Cfg::pair_offset + pair * Cfg::pair_bytes);  // [2][32][HS]
  __half* const weights = reinterpret_cast<__half*>(reinterpret_cast<uint8_t*>(scores) + Cfg::pair_weights);  // [HG][32]
  const uint32_t barriers = smem_address(smem + Cfg::barrier_offset);
  const uint32_t key_books = barriers, value_books = barriers + 8;
  uint32_t full = barriers + 8 * (Cfg::pair_barriers + 4 * pair);  // two, then two that say a buffer is free
  keep(full);
  const uint32_t free = full + 16;

  // -- what everything waits for: lengths, then the page table, then codes ---------------------------------------------
  if (warp == NW - 1 && lane < (p.B * 3 + 31) / 32) prefetch_l2(p.lengths + lane * 32);
  if (warp == NW - 1 && p.B == 1) {  // the part of the table that is this block's if the row fills it
    const int entry = static_cast<int>(blockIdx.x) * p.table_stride / p.splits + lane * 32;
    if (entry < p.table_stride) prefetch_l2(p.page_table + entry);
  }

  // -- codebooks: on their way first ----------------------------------------------------------------------------------
  if (lane == 0) {  // dealt to the warps: making one takes 40 cycles
    if (warp == 0) mbarrier_init(key_books, kBulk ? 1 : NT);
    if (warp == NP) mbarrier_init(value_books, kBulk ? 1 : NT);
    for (int i = 0; i < 2; ++i) mbarrier_init((keys ? full : free) + 8 * i, kArrivals);
    for (int i = 0; i < Cfg::SLOTS; ++i) mbarrier_init(barriers + 8 * (Cfg::ring_barriers + warp * Cfg::SLOTS + i), 1);
    fence_barrier_init();
  }
  __syncthreads();
  const uint8_t* books = p.books + static_cast<size_t>(h) * Cfg::book_bytes;
  fetch_books<K, NT>(books, smem_address(smem), key_books, 0);
  if constexpr (!kBulk) fetch_books<V, NT>(books + K::book_bytes, smem_address(smem) + K::book_bytes, value_books, 0);

  // -- what to do -----------------------------------------------------------------------------------------------------
  auto query = [&](int row, int g) -> const T* {
    const int v = first_vector + g < vectors ? first_vector + g : 0, head = p.S == 1 ? v : v / p.S;
    return static_cast<const T*>(p.q) + row * p.q_stride[0] + static_cast<int64_t>(h * p.G + head) * p.q_stride[1] +
           (v - head * p.S) * p.q_stride[2];
  };
  Part part = {};
  part.find<NP>(p, lane);
  CodeStream<NP, Cfg::SLOTS> stream;
  stream.pages = keys ? p.k_pages : p.v_pages;
  stream.tile_bytes = keys ? K::tile_bytes : V::tile_bytes;
  stream.ring = smem_address(smem) + Cfg::book_bytes + warp * Cfg::ring_bytes;
  stream.slot_bytes = Cfg::slot_bytes;
  stream.barriers = barriers + 8 * (Cfg::ring_barriers + warp * Cfg::SLOTS);
  stream.lane = lane, stream.pair = pair, stream.head = h;
  keep(stream.ring), keep(stream.barriers);
  int buffer = 0;      // of scores, next in turn
  uint32_t round = 0;  // parity of its barriers
  bool have_books = false;

  while (part.begin < part.end && part.before < part.end) {
    const int b = part.row;
    const Row row(p, b);
    if (row.units == 0) {
      ++part.row;
      continue;
    }
    const int u0 = max(part.begin - part.before, 0), u1 = min(part.end - part.before, row.units);


    if (keys) {
      // -- keys: codes -> scores --------------------------------------------------------------------------------------
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
        const T* q = query(b, g);
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
      mbarrier_wait(key_books, 0);

#pragma unroll 1
      for (int k = 0; k < stream.chunks; ++k) {
        uint32_t codes = stream.wait();
        if constexpr (K::C == 16) {  // spread nibbles to bytes: a row per subspace, as ldmatrix needs
          const uint32_t wide = smem_address(scores) + Cfg::pair_spread;
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
                  z[t][i.value >> 1], smem, entry_address<K>(y[t][l >> 2], l & 3, low[r / kPack], r % kPack));
            });
            unrolled<per * K::EW / 2>([&](auto n) {
              constexpr int w = 2 * n.value, m = step.value * (per * K::EW / 2) + n.value;
              constexpr int l0 = w / K::EW, e0 = w % K::EW, l1 = (w + 1) / K::EW, e1 = (w + 1) % K::EW;
#pragma unroll
              for (int g = 0; g < HG; ++g)
                mma_16816(d[g], z[0][l0][e0], z[1][l0][e0], z[0][l1][e1], z[1][l1][e1], bq[g][m][0], bq[g][m][1]);
            });
          });
          if (j == 0) mbarrier_wait(free + 8 * buffer, round ^ 1);
          if (diagonal) {  // rows of 16 bytes (HG = 4) of the eight lanes side by side: no bank conflicts
            float first[HG], second[HG];
#pragma unroll
            for (int g = 0; g < HG; ++g) {
              first[g] = odd ? d[g][1] : d[g][0];
              second[g] = odd ? d[g][3] : d[g][2];
            }
            float* to = scores + (buffer * kChunk + j * kTile + col) * HS;
            store(to, first);
            store(to + 8 * HS, second);
          }
        }
        __syncwarp();
        if (lane < kArrivals) mbarrier_arrive(full + 8 * buffer);
        buffer ^= 1;
        if (buffer == 0) round ^= 1;
      }
    } else {
      // -- values: scores -> weights, codes -> sums ---------------------------------------------------------------------
      stream.start(p, b, row.coded, share(row.chunks, u0, row.units), share(row.chunks, u1, row.units));
      if (kBulk && !have_books)  // only now: before, they would stand in the way of the page table and the query
        fetch_books<V, NT>(books + K::book_bytes, smem_address(smem) + K::book_bytes, value_books, NP * 32);
      // Two ways to fill the tensor cores. One query vector: a word (two dimensions of a token) is two columns of A, the
      // two rows of B are diagonal; A's lower rows are the lane's second word. More: the words of two tokens are
      // shuffled to pairs of tokens, rows are one dimension and the other, and columns of B are two vectors.
      constexpr bool kWords = HG == 1 && U % 2 == 0;
      constexpr int NHP = (HG + 1) / 2;
      float acc[kWords ? U / 2 : U][NHP][4] = {};
      float top[HG], sum[HG];  // running maximum (log2 units, the same in all lanes), the lane's part of the sum
#pragma unroll
      for (int g = 0; g < HG; ++g) top[g] = -1e30f, sum[g] = 0.f;
      auto at = [&](int word, int dim, int g) -> float& {
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
        for (int g = 0; g < HG; ++g) read(query(b, g), qx[g]);
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
            for (int w = 0; w < U; ++w) at(w, 0, g) *= shrink, at(w, 1, g) *= shrink;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
              const float weight = exp2_approx(s[j] - best);
              if (lane == 0) sum[g] += weight;
#pragma unroll
              for (int w = 0; w < U; ++w) at(w, 0, g) += weight * vx[j][w].x, at(w, 1, g) += weight * vx[j][w].y;
            }
          }
        }
      }
      mbarrier_wait(value_books, 0);

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
        mbarrier_wait(full + 8 * buffer, round);
        float w[HG], s[HG], most = 0.f;
        load(scores + (buffer * kChunk + own) * HS, s);
        __syncwarp();
        if (lane < kArrivals) mbarrier_arrive(free + 8 * buffer);
        buffer ^= 1;
        if (buffer == 0) round ^= 1;

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
            for (int word = 0; word < U; ++word) at(word, 0, g) *= shrink, at(word, 1, g) *= shrink;
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
                  entry, smem, entry_address<V>(t < 4 ? c.x : t < 8 ? c.y : t < 12 ? c.z : c.w, t & 3, low, 0));
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
      float* const mine = reinterpret_cast<float*>(smem + Cfg::book_bytes + warp * Cfg::ring_bytes);  // [HG][DP]
      float2* const totals = reinterpret_cast<float2*>(smem + Cfg::total_offset);                     // [NP][HG]
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        float x = sum[g];
#pragma unroll
        for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
        if (lane == 0) totals[pair * HG + g] = make_float2(top[g], x);
        if (owner)
#pragma unroll
          for (int w = 0; w < U; ++w)
            *reinterpret_cast<float2*>(mine + g * DP + dim_of(w)) = make_float2(at(w, 0, g), at(w, 1, g));
      }
    }
    have_books = true;
    finish_row<Cfg>(p, smem, part, row, b);
    part.before += row.units;
    ++part.row;
  }
  if (!have_books) mbarrier_wait(key_books, 0);  // the copy must not outlive the block
  if constexpr (!kBulk) cp_async_wait<0>();

  // Rows that store nothing: out 0, lse -inf.
  for (int e = blockIdx.x; e < p.B; e += p.splits)
    if (Row(p, e).units == 0)
      for (int i = tid; i < HG * D; i += NT) {
        const int g = i / D, dim = i % D;
        if (first_vector + g >= vectors) continue;
        const size_t vector = (static_cast<size_t>(e) * p.H + h) * vectors + first_vector + g;
        static_cast<T*>(p.out)[vector * D + dim] = from_float<T>(0.f);
        if (dim == 0) p.lse[vector] = -INFINITY;
      }
}

}  // namespace pqlab
