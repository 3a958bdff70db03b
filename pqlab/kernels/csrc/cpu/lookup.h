// The two inner loops over codes, for 1 to 4 query rows of one kv head.
//
// A codebook is a table of entries of D floats, D = 1, 2, 4 or 8 (books of other widths are padded or cut into such
// entries first, book.h); eight floats therefore hold the entries of 8 / D tokens. An entry is fetched by a scalar or
// 64-bit load and inserted: on Zen 3 that is twice as fast as the gather instruction. Fetched once, it serves all rows.
// Subspaces are walked in chunks whose part of the codebook stays in L1 while all tokens of the block pass by.
#pragma once
#include "codes.h"

namespace pq {

// Of a codebook walked at a time: 32 KiB for narrow entries, which come one to a load. Wide ones are worth a trip to L2
// each; there it costs more to add up the lanes of every vector once per chunk.
template <int D>
constexpr int64_t CHUNK_FLOATS = D <= 2 ? 8192 : D == 4 ? 16384 : 65536;

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

// Adds the sums over groups of D lanes of N vectors to out[0 .. N * 8/D).
template <int D, int N>
PQ_INLINE void add_groups(float* out, const f8* x) {
#ifdef PQ_AVX2
    if constexpr (D == 1) {
        for (int i = 0; i < N; i++) store(out + i * WIDTH, load(out + i * WIDTH) + x[i]);
        return;
    }
    if constexpr (D > 1 && N % 2 == 0) {
        __m256 pairs[N / 2];  // lanes of two vectors: a01 a23 b01 b23 | a45 a67 b45 b67
        for (int i = 0; i < N / 2; i++) pairs[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
        if constexpr (D == 2) {
            for (int i = 0; i < N / 2; i++) {
                const __m256d sums = _mm256_permute4x64_pd(_mm256_castps_pd(pairs[i]), 0xd8);
                store(out + i * WIDTH, load(out + i * WIDTH) + (f8)_mm256_castpd_ps(sums));
            }
            return;
        }
        const __m256 fours = _mm256_hadd_ps(pairs[0], pairs[N / 2 - 1]);  // a0123 b0123 c0123 d0123 | a4567 ..
        const __m128 low = _mm256_castps256_ps128(fours), high = _mm256_extractf128_ps(fours, 1);
        if constexpr (D == 4) {
            _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), _mm_unpacklo_ps(low, high)));
            if constexpr (N == 4)
                _mm_storeu_ps(out + 4, _mm_add_ps(_mm_loadu_ps(out + 4), _mm_unpackhi_ps(low, high)));
            return;
        }
        const __m128 sums = _mm_add_ps(low, high);
        if constexpr (N == 4)
            _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
        else
            _mm_storel_pi((__m64*)out, _mm_add_ps(_mm_loadl_pi(_mm_setzero_ps(), (const __m64*)out), sums));
        return;
    }
#endif
    for (int i = 0; i < N; i++)
        for (int t = 0; t < WIDTH / D; t++)
            for (int lane = 0; lane < D; lane++) out[i * WIDTH / D + t] += x[i][t * D + lane];
}

// scores[row * stride + token] = q[row] . k[token] over `tiles` tiles of byte codes.
//   tile_codes[tile]: [subspaces][16]; book [subspaces * parts][C][D]; q [ROWS][subspaces * parts][D], scaled.
//   `parts` consecutive entries share a subspace's code (d_m > 8, so D = 8).
template <int D, int ROWS>
PQ_NOINLINE void score_codes(const uint8_t* const* tile_codes, int64_t tiles, int64_t num_entries, int64_t parts, int64_t centroids,
                 const float* book, const float* q, float* scores, int64_t stride) {
    constexpr int PER_TILE = 2 * D;               // vectors of entries in a tile
    constexpr int AT_ONCE = ROWS > 2 ? 2 : (PER_TILE < 4 ? PER_TILE : 4);  // they share the loads of q
    constexpr int TOKENS = WIDTH / D;
    for (int row = 0; row < ROWS; row++) std::memset(scores + row * stride, 0, size_t(tiles) * TILE * 4);
    const int64_t table = centroids * D, chunk = std::max<int64_t>(1, CHUNK_FLOATS<D> / table);
    for (int64_t first = 0; first < num_entries; first += chunk) {
        const int64_t last = std::min(first + chunk, num_entries);
        for (int64_t tile = 0; tile < tiles; tile++) {
            for (int group = 0; group < PER_TILE; group += AT_ONCE) {
                const uint8_t* codes = tile_codes[tile] + group * TOKENS;
                f8 sum[ROWS][AT_ONCE] = {};
                for (int64_t e = first; e < last; e++) {
                    const uint8_t* c = codes + (D == 8 ? e / parts : e) * TILE;
                    f8 x[AT_ONCE];
#pragma GCC unroll 4
                    for (int i = 0; i < AT_ONCE; i++) x[i] = entries<D>(book + e * table, c + i * TOKENS);
#pragma GCC unroll 4
                    for (int row = 0; row < ROWS; row++) {
                        const f8 y = repeat<D>(q + (row * num_entries + e) * D);
#pragma GCC unroll 4
                        for (int i = 0; i < AT_ONCE; i++) sum[row][i] += x[i] * y;
                    }
                }
                for (int row = 0; row < ROWS; row++)
                    add_groups<D, AT_ONCE>(scores + row * stride + tile * TILE + group * TOKENS, sum[row]);
            }
        }
    }
}

// sums[entry][row][8] += weight[token] * entry: the lanes of a vector are still apart (see `fold_values`).
//   spread [ROWS][stride]: the weight of each token D times over (D <= 4), or once (D = 8).
template <int D, int ROWS>
PQ_NOINLINE void add_values(const uint8_t* const* tile_codes, int64_t tiles, int64_t num_entries, int64_t parts, int64_t centroids,
                const float* book, const float* spread, int64_t stride, float* sums) {
    constexpr int PER_TILE = 2 * D, TOKENS = WIDTH / D;
    // Independent sums: a fused multiply-add takes four cycles, the vectors of a tile come faster than that.
    constexpr int CHAINS = D == 1 ? 1 : D == 8 && ROWS <= 2 ? 4 : 2;
    const int64_t table = centroids * D;
    for (int64_t e = 0; e < num_entries; e++) {
        f8 sum[ROWS][CHAINS] = {};
        for (int row = 0; row < ROWS; row++) sum[row][0] = load(sums + (e * ROWS + row) * WIDTH);
        const int64_t offset = (D == 8 ? e / parts : e) * TILE;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const uint8_t* c = tile_codes[tile] + offset;
#pragma GCC unroll 4
            for (int i = 0; i < PER_TILE; i += CHAINS) {
#pragma GCC unroll 4
                for (int chain = 0; chain < CHAINS; chain++) {
                    const f8 x = entries<D>(book + e * table, c + (i + chain) * TOKENS);
                    const int64_t at = D == 8 ? tile * TILE + i + chain : (tile * PER_TILE + i + chain) * WIDTH;
#pragma GCC unroll 4
                    for (int row = 0; row < ROWS; row++) {
                        const float* w = spread + row * stride + at;
                        sum[row][chain] += x * (D == 8 ? splat(*w) : load(w));
                    }
                }
            }
        }
        for (int row = 0; row < ROWS; row++) {
            f8 total = sum[row][0];
            for (int chain = 1; chain < CHAINS; chain++) total += sum[row][chain];
            store(sums + (e * ROWS + row) * WIDTH, total);
        }
    }
}

}  // namespace pq
