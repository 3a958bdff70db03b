// The two inner loops over codes, for 1 to 4 query rows of one kv head.
//
// A codebook is a table of entries of D floats, D = 1, 2, 4 or 8 (books of other widths are padded or cut into such
// entries first, book.h); eight floats therefore hold the entries of 8 / D tokens. An entry is fetched by a scalar or
// 64-bit load and inserted: on Zen 3 that is twice as fast as the gather instruction. Fetched once, it serves all rows.
// Subspaces are walked in chunks whose part of the codebook stays in L1 while all tokens of the block pass by.
#pragma once
#include "codes.h"

namespace pq {

constexpr int64_t CHUNK_FLOATS = 4096;  // of a codebook kept in L1 at a time: 16 KiB

// Entries of 8 / D consecutive tokens, side by side.
template <int D>
inline f8 entries(const float* table, const uint8_t* codes);

template <>
inline f8 entries<8>(const float* table, const uint8_t* codes) {
    return load(table + codes[0] * 8);
}

#ifdef PQ_AVX2
template <>
inline f8 entries<4>(const float* table, const uint8_t* codes) {
    return (f8)_mm256_loadu2_m128(table + codes[1] * 4, table + codes[0] * 4);
}

template <>
inline f8 entries<2>(const float* table, const uint8_t* codes) {
    uint32_t c;  // one load for four codes: the load ports are what binds
    std::memcpy(&c, codes, 4);
    const double* t = (const double*)table;
    const __m128d low = _mm_loadh_pd(_mm_load_sd(t + (c & 255)), t + (c >> 8 & 255));
    const __m128d high = _mm_loadh_pd(_mm_load_sd(t + (c >> 16 & 255)), t + (c >> 24));
    return (f8)_mm256_castpd_ps(_mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1));
}

template <>
inline f8 entries<1>(const float* t, const uint8_t* codes) {
    uint64_t c;
    std::memcpy(&c, codes, 8);
    const __m128 a = _mm_setr_ps(t[c & 255], t[c >> 8 & 255], t[c >> 16 & 255], t[c >> 24 & 255]);
    const __m128 b = _mm_setr_ps(t[c >> 32 & 255], t[c >> 40 & 255], t[c >> 48 & 255], t[c >> 56]);
    return (f8)_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
}
#else
template <int D>
inline f8 entries(const float* table, const uint8_t* codes) {
    f8 x;
    for (int t = 0; t < WIDTH / D; t++)
        for (int i = 0; i < D; i++) x[t * D + i] = table[codes[t] * D + i];
    return x;
}
#endif

// D floats repeated over the eight lanes.
template <int D>
inline f8 repeat(const float* p) {
    if constexpr (D == 1) return splat(p[0]);
    if constexpr (D == 2) return f8{p[0], p[1], p[0], p[1], p[0], p[1], p[0], p[1]};
    if constexpr (D == 4) return f8{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]};
    return load(p);
}

// Adds the sums over groups of D lanes to out[0 .. 8/D).
template <int D>
inline void add_groups(float* out, f8 x) {
#ifdef PQ_AVX2
    if constexpr (D == 1) {
        store(out, load(out) + x);
        return;
    }
    const __m128 low = _mm256_castps256_ps128((__m256)x), high = _mm256_extractf128_ps((__m256)x, 1);
    const __m128 pairs = _mm_hadd_ps(low, high);  // 01 23 45 67
    if constexpr (D == 2) {
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), pairs));
        return;
    }
    const __m128 fours = _mm_hadd_ps(pairs, pairs);  // 0123 4567
    if constexpr (D == 4) {
        out[0] += _mm_cvtss_f32(fours);
        out[1] += _mm_cvtss_f32(_mm_movehdup_ps(fours));
    } else {
        out[0] += _mm_cvtss_f32(_mm_hadd_ps(fours, fours));
    }
#else
    for (int t = 0; t < WIDTH / D; t++)
        for (int i = 0; i < D; i++) out[t] += x[t * D + i];
#endif
}

// scores[row * stride + token] = q[row] . k[token] over `tiles` tiles of byte codes.
//   tile_codes[tile]: [subspaces][16]; book [subspaces * parts][C][D]; q [ROWS][subspaces * parts][D], scaled.
//   `parts` consecutive entries share a subspace's code (d_m > 8).
template <int D, int ROWS>
void score_codes(const uint8_t* const* tile_codes, int64_t tiles, int64_t num_entries, int64_t parts, int64_t centroids,
                 const float* book, const float* q, float* scores, int64_t stride) {
    constexpr int PER_TILE = 2 * D;               // vectors of entries in a tile
    constexpr int AT_ONCE = ROWS > 3 ? 2 : (PER_TILE < 4 ? PER_TILE : 4);  // they share the loads of q
    constexpr int TOKENS = WIDTH / D;
    for (int row = 0; row < ROWS; row++) std::memset(scores + row * stride, 0, size_t(tiles) * TILE * 4);
    const int64_t table = centroids * D, chunk = std::max<int64_t>(1, CHUNK_FLOATS / table);
    for (int64_t first = 0; first < num_entries; first += chunk) {
        const int64_t last = std::min(first + chunk, num_entries);
        for (int64_t tile = 0; tile < tiles; tile++) {
            for (int group = 0; group < PER_TILE; group += AT_ONCE) {
                const uint8_t* codes = tile_codes[tile] + group * TOKENS;
                f8 sum[AT_ONCE][ROWS] = {};
                for (int64_t e = first; e < last; e++) {
                    const uint8_t* c = codes + (parts == 1 ? e : e / parts) * TILE;
                    f8 x[AT_ONCE];
#pragma GCC unroll 4
                    for (int i = 0; i < AT_ONCE; i++) x[i] = entries<D>(book + e * table, c + i * TOKENS);
#pragma GCC unroll 4
                    for (int row = 0; row < ROWS; row++) {
                        const f8 y = repeat<D>(q + (row * num_entries + e) * D);
#pragma GCC unroll 4
                        for (int i = 0; i < AT_ONCE; i++) sum[i][row] += x[i] * y;
                    }
                }
                for (int row = 0; row < ROWS; row++)
                    for (int i = 0; i < AT_ONCE; i++)
                        add_groups<D>(scores + row * stride + tile * TILE + (group + i) * TOKENS, sum[i][row]);
            }
        }
    }
}

// sums[entry][row][8] += weight[token] * entry: the lanes of a vector are still apart (see `fold_values`).
//   spread [ROWS][stride]: the weight of each token D times over (D <= 4), or once (D = 8).
template <int D, int ROWS>
void add_values(const uint8_t* const* tile_codes, int64_t tiles, int64_t num_entries, int64_t parts, int64_t centroids,
                const float* book, const float* spread, int64_t stride, float* sums) {
    constexpr int PER_TILE = 2 * D, TOKENS = WIDTH / D;
    const int64_t table = centroids * D;
    for (int64_t e = 0; e < num_entries; e++) {
        f8 sum[ROWS];
        for (int row = 0; row < ROWS; row++) sum[row] = load(sums + (e * ROWS + row) * WIDTH);
        const int64_t offset = (parts == 1 ? e : e / parts) * TILE;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const uint8_t* c = tile_codes[tile] + offset;
#pragma GCC unroll 4
            for (int i = 0; i < PER_TILE; i++) {
                const f8 x = entries<D>(book + e * table, c + i * TOKENS);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row++) {
                    const float* w = spread + row * stride;
                    sum[row] += x * (D == 8 ? splat(w[tile * TILE + i]) : load(w + (tile * PER_TILE + i) * WIDTH));
                }
            }
        }
        for (int row = 0; row < ROWS; row++) store(sums + (e * ROWS + row) * WIDTH, sum[row]);
    }
}

}  // namespace pq
