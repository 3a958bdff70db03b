// The two inner loops over codes, for 1 to 4 query rows of one kv head.
//
// A codebook is a table of entries of D floats, D = 1, 2, 4 or 8 (books of other widths are padded or cut into such
// entries first, book.h); eight floats therefore hold the entries of 8 / D tokens. An entry is fetched by a scalar or
// 64-bit load and inserted: on Zen 3 that is twice as fast as the gather instruction. Fetched once, it serves all rows.
// Subspaces are walked in chunks whose part of the codebook stays in L1 while all tokens of the block pass by.
#pragma once
#include "ahead.h"
#include "codes.h"

namespace pq {

// Of a codebook walked at a time: 32 KiB for narrow entries, which come one to a load. Wide ones are worth a trip to L2
// each; there it costs more to add up the lanes of every vector once per chunk.
template <int D>
constexpr int64_t CHUNK_FLOATS = D <= 2 ? 8192 : D == 4 ? 16384 : 65536;

// Tokens that are scored, weighed and added up in one go. Their codes are put side by side first, [m][CODE_STRIDE]
// (`unpack_tiles`): in a page the codes of a subspace lie M * 16 bytes apart from tile to tile, mostly a power of two;
// walked like that, a block's cache lines fall into few sets and push each other out, which costs more than the copy.
constexpr int64_t BLOCK_TILES = 32, BLOCK_TOKENS = BLOCK_TILES * TILE;
constexpr int64_t CODE_STRIDE = BLOCK_TOKENS + 64;

// Entries of 8 / D consecutive tokens, side by side.
template <int D>
PQ_INLINE f8 entries(const float* table, const uint8_t* codes);

template <>
PQ_INLINE f8 entries<8>(const float* table, const uint8_t* codes) {
    return load(table + codes[0] * 8);
}

#ifdef PQ_AVX2
template <>
PQ_INLINE f8 entries<4>(const float* table, const uint8_t* codes) {
    return (f8)_mm256_loadu2_m128(table + codes[1] * 4, table + codes[0] * 4);
}

template <>
PQ_INLINE f8 entries<2>(const float* table, const uint8_t* codes) {
    uint32_t c;  // one load for four codes: the load ports are what binds
    std::memcpy(&c, codes, 4);
    const double* t = (const double*)table;
    const __m128d low = _mm_loadh_pd(_mm_load_sd(t + (c & 255)), t + (c >> 8 & 255));
    const __m128d high = _mm_loadh_pd(_mm_load_sd(t + (c >> 16 & 255)), t + (c >> 24));
    return (f8)_mm256_castpd_ps(_mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1));
}

template <>
PQ_INLINE f8 entries<1>(const float* t, const uint8_t* codes) {
    uint64_t c;
    std::memcpy(&c, codes, 8);
    const __m128 a = _mm_setr_ps(t[c & 255], t[c >> 8 & 255], t[c >> 16 & 255], t[c >> 24 & 255]);
    const __m128 b = _mm_setr_ps(t[c >> 32 & 255], t[c >> 40 & 255], t[c >> 48 & 255], t[c >> 56]);
    return (f8)_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
}
#else
template <int D>
PQ_INLINE f8 entries(const float* table, const uint8_t* codes) {
    f8 x;
    for (int t = 0; t < WIDTH / D; t++)
        for (int i = 0; i < D; i++) x[t * D + i] = table[codes[t] * D + i];
    return x;
}
#endif

// The same from a table of 16 single floats: two permutes by the low three bits of the code, a blend by the fourth.
// (Two such tables for d_m = 2 are slower than one look-up of a pair on Zen 3, whose permutes take two cycles each.)
PQ_INLINE f8 entries_of_16(const float* table, const uint8_t* codes) {
#ifdef PQ_AVX2
    const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
    const __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), c);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), c);
    return (f8)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
#else
    return entries<1>(table, codes);
#endif
}

template <int D, bool SMALL>
PQ_INLINE f8 fetch(const float* table, const uint8_t* codes) {
    if constexpr (SMALL) return entries_of_16(table, codes);
    return entries<D>(table, codes);
}

// D floats repeated over the eight lanes.
template <int D>
PQ_INLINE f8 repeat(const float* p) {
    if constexpr (D == 1) return splat(p[0]);
    if constexpr (D == 8) return load(p);
#ifdef PQ_AVX2  // one broadcasting load each; from the initializer below, compilers make shuffles
    if constexpr (D == 2) return (f8)_mm256_castpd_ps(_mm256_broadcast_sd((const double*)p));
    if constexpr (D == 4) return (f8)_mm256_broadcast_ps((const __m128*)p);
#else
    f8 x;
    for (int i = 0; i < WIDTH; i++) x[i] = p[i % D];
    return x;
#endif
}

// scores[row][token] = q[tile][row] . k[token] over `tiles` tiles: all of them pass by a part of the book while it is in
// L1, whoever asks them.
//   codes [subspaces][CODE_STRIDE]; book [entries][C][D]; q of each tile [ROWS][entries][D], scaled;
//   scores [ROWS][BLOCK_TOKENS]; place[entry]: its subspace (read where they may differ: D = 8).
//   SMALL: D = 1 and C = 16. `next`: what will be read after these, fetched meanwhile.
template <int D, int ROWS, bool SMALL>
PQ_NOINLINE void score_codes(const uint8_t* codes, int64_t tiles, int64_t num_entries, const int64_t* place,
                             int64_t centroids, const float* book, const float* const* queries, float* scores, Ahead next) {
    constexpr int PER_TILE = 2 * D;                                        // vectors of entries in a tile
    constexpr int AT_ONCE = ROWS > 2 ? 2 : (PER_TILE < 4 ? PER_TILE : 4);  // they share the loads of q
    constexpr int TOKENS = WIDTH / D;
    for (int row = 0; row < ROWS; row++) std::memset(scores + row * BLOCK_TOKENS, 0, size_t(tiles) * TILE * 4);
    const int64_t table = centroids * D, chunk = std::max<int64_t>(1, CHUNK_FLOATS<D> / table);
    const int64_t lines = next.share((num_entries + chunk - 1) / chunk * tiles);
    for (int64_t first = 0; first < num_entries; first += chunk) {
        const int64_t last = std::min(first + chunk, num_entries);
        for (int64_t tile = 0; tile < tiles; tile++) {
            next.fetch(lines);
            const float* q = queries[tile];
            for (int group = 0; group < PER_TILE; group += AT_ONCE) {
                const uint8_t* here = codes + tile * TILE + group * TOKENS;
                f8 sum[ROWS][AT_ONCE] = {};
                for (int64_t e = first; e < last; e++) {
                    const uint8_t* c = here + (D == 8 ? place[e] : e) * CODE_STRIDE;
                    f8 x[AT_ONCE];
#pragma GCC unroll 4
                    for (int i = 0; i < AT_ONCE; i++) x[i] = fetch<D, SMALL>(book + e * table, c + i * TOKENS);
#pragma GCC unroll 4
                    for (int row = 0; row < ROWS; row++) {
                        const f8 y = repeat<D>(q + (row * num_entries + e) * D);
#pragma GCC unroll 4
                        for (int i = 0; i < AT_ONCE; i++) sum[row][i] += x[i] * y;
                    }
                }
                for (int row = 0; row < ROWS; row++)
                    add_groups<D, AT_ONCE>(scores + row * BLOCK_TOKENS + tile * TILE + group * TOKENS, sum[row]);
            }
        }
    }
}

// Entries [first, first + AT_ONCE) of `add_values`; they share the loads of the weights.
template <int D, int ROWS, bool SMALL, int AT_ONCE>
PQ_NOINLINE void add_entries(const uint8_t* codes, int64_t tiles, int64_t first, const int64_t* place,
                             int64_t centroids, const float* book, const float* weights, float* sums) {
    constexpr int PER_TILE = 2 * D, TOKENS = WIDTH / D, REPEATS = D == 8 ? 1 : D;
    // Independent sums: a fused multiply-add takes four cycles, the vectors of a tile come faster than that.
    constexpr int CHAINS = D >= 4 && ROWS * AT_ONCE <= 4 ? 2 : 1;
    const int64_t table = centroids * D;
    const uint8_t* c[AT_ONCE];
    f8 sum[AT_ONCE][ROWS][CHAINS] = {};
    for (int i = 0; i < AT_ONCE; i++) {
        c[i] = codes + (D == 8 ? place[first + i] : first + i) * CODE_STRIDE;
        for (int row = 0; row < ROWS; row++) sum[i][row][0] = load(sums + ((first + i) * ROWS + row) * WIDTH);
    }
    for (int64_t t = 0; t < tiles * TILE; t += 4 * TOKENS > TILE ? TILE : 4 * TOKENS) {
#pragma GCC unroll 4
        for (int v = 0; v < (4 < PER_TILE ? 4 : PER_TILE); v++) {
            f8 x[AT_ONCE];
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) x[i] = fetch<D, SMALL>(book + (first + i) * table, c[i] + t + v * TOKENS);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                const float* w = weights + (row * BLOCK_TOKENS + t + v * TOKENS) * REPEATS;
                const f8 y = D == 8 ? splat(*w) : load(w);
#pragma GCC unroll 4
                for (int i = 0; i < AT_ONCE; i++) sum[i][row][v % CHAINS] += x[i] * y;
            }
        }
    }
    for (int i = 0; i < AT_ONCE; i++)
        for (int row = 0; row < ROWS; row++)
            store(sums + ((first + i) * ROWS + row) * WIDTH,
                  CHAINS == 1 ? sum[i][row][0] : sum[i][row][0] + sum[i][row][CHAINS - 1]);
}

// sums[entry][row][8] += weight[row][token] * entry: the lanes of a vector are still apart, each holds one dimension of
// one token in 8/D.
//   codes [subspaces][CODE_STRIDE]; weights [ROWS][BLOCK_TOKENS]: of each token D times over (D <= 4), or once (D = 8).
template <int D, int ROWS, bool SMALL>
void add_values(const uint8_t* codes, int64_t tiles, int64_t num_entries, const int64_t* place, int64_t centroids,
                const float* book, const float* weights, float* sums, Ahead next) {
    const int64_t lines = next.share(std::max<int64_t>(1, num_entries / 2));
    int64_t e = 0;
    for (; e + 2 <= num_entries; e += 2) {
        next.fetch(lines);
        add_entries<D, ROWS, SMALL, 2>(codes, tiles, e, place, centroids, book, weights, sums);
    }
    if (e < num_entries) add_entries<D, ROWS, SMALL, 1>(codes, tiles, e, place, centroids, book, weights, sums);
}

// Keys of n tokens (a multiple of 16) as columns: out[entry * D + i][token], `stride` floats a row; no padded entries.
template <int D, bool SMALL>
void dequantize_columns(const uint8_t* codes, int64_t n, int64_t num_entries, const int64_t* place, int64_t centroids,
                        const float* book, float* out, int64_t stride) {
    for (int64_t e = 0; e < num_entries; e++) {
        const float* table = book + e * centroids * D;
        const uint8_t* c = codes + (D == 8 ? place[e] : e) * CODE_STRIDE;
        float* rows = out + e * D * stride;
        for (int64_t t = 0; t < n; t += WIDTH) {
            f8 x[8] = {};
            if constexpr (D == 1) {
                x[0] = fetch<1, SMALL>(table, c + t);
            } else if constexpr (D == 2) {
                x[0] = entries<2>(table, c + t);
                x[1] = entries<2>(table, c + t + 4);
                split_pairs(x[0], x[1]);
            } else {
                for (int i = 0; i < WIDTH; i++) std::memcpy(&x[i], table + c[t + i] * D, D * 4);
                transpose(x);
            }
            for (int i = 0; i < D; i++) store(rows + i * stride + t, x[i]);
        }
    }
}

// Values of n tokens as rows: out[token][entry * D + i], `stride` floats a row; no padded entries.
template <int D>
void dequantize_rows(const uint8_t* codes, int64_t n, int64_t num_entries, const int64_t* place, int64_t centroids,
                     const float* book, float* out, int64_t stride) {
    for (int64_t e = 0; e < num_entries; e++) {
        const float* table = book + e * centroids * D;
        const uint8_t* c = codes + place[e] * CODE_STRIDE;
        for (int64_t t = 0; t < n; t++) std::memcpy(out + t * stride + e * D, table + c[t] * D, D * 4);
    }
}

}  // namespace pq
