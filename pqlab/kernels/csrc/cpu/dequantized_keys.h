// Keys by planes, dequantized: scores of queries that change along the tokens (spans), without tables of any of them.
//
// Both bytes of a float16 coordinate are looked up for 64 tokens, put together, widened and multiplied with the query's:
// about 14 instructions a dimension and 4 a row, whatever the row asks. What is added up is float32, as by loads.
#pragma once
#include "permuted_keys.h"

#ifdef PQ_PERMUTE

namespace pq {

// A coordinate of 64 tokens from its planes, in the order that interleaving leaves (`in_order` undoes it).
template <int PARTS>
PQ_INLINE void dequantize(__m512i codes, const Where& w, const Plane<PARTS>& low, const Plane<PARTS>& high,
                          __m512 x[4]) {
    const __m512i l = low.at(codes, w), h = high.at(codes, w);
    const __m512i a = _mm512_unpacklo_epi8(l, h), b = _mm512_unpackhi_epi8(l, h);
    x[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(a));
    x[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1));
    x[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(b));
    x[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1));
}

// Tokens 0-7 16-23, 32-39 48-55, 8-15 24-31, 40-47 56-63 -> the order of planes.h.
PQ_INLINE void in_order(__m512 x[4]) {
    const __m512i first = _mm512_setr_epi32(0, 4, 16, 20, 8, 12, 24, 28, 1, 5, 17, 21, 9, 13, 25, 29);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    const __m512 a = _mm512_permutex2var_ps(x[0], first, x[2]), b = _mm512_permutex2var_ps(x[1], first, x[3]);
    const __m512 c = _mm512_permutex2var_ps(x[0], second, x[2]), d = _mm512_permutex2var_ps(x[1], second, x[3]);
    x[0] = _mm512_shuffle_f32x4(a, b, 0x44);
    x[1] = _mm512_shuffle_f32x4(a, b, 0xee);
    x[2] = _mm512_shuffle_f32x4(c, d, 0x44);
    x[3] = _mm512_shuffle_f32x4(c, d, 0xee);
}

// Scores over `count` subspaces of AT_ONCE groups, which share what is loaded of the planes, added to those there are.
//   codes [count][pitch]; planes [count][dm][BYTES][64 * PARTS]; q of each group [ROWS][row_floats];
//   scores [ROWS][row_scores], 64 of each group, in the order of `dequantize`.
template <int ROWS, int AT_ONCE, int PARTS>
PQ_NOINLINE void score_groups(const __m512i* codes, int64_t pitch, int64_t count, int64_t dm, const uint8_t* planes,
                              const float* const* q, int64_t row_floats, bool begin, __m512* scores,
                              int64_t row_scores, Aheads& next) {
    constexpr int64_t PLANE = GROUP * PARTS;
    __m512 sum[AT_ONCE][ROWS][4];
#pragma GCC unroll 4
    for (int g = 0; g < AT_ONCE; g++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[g][r][j] = begin ? _mm512_setzero_ps() : scores[r * row_scores + g * 4 + j];
    const float* at[AT_ONCE];
    for (int g = 0; g < AT_ONCE; g++) at[g] = q[g];
    Aheads ahead = next;
    for (int64_t s = 0; s < count; s++, codes += pitch) {
        ahead.fetch();
        Where w[AT_ONCE];
#pragma GCC unroll 4
        for (int g = 0; g < AT_ONCE; g++) w[g] = where<PARTS>(codes[g]);
        for (int64_t i = 0; i < dm; i++, planes += KeyPlanes::BYTES * PLANE) {
            const Plane<PARTS> low(planes), high(planes + PLANE);
#pragma GCC unroll 4
            for (int g = 0; g < AT_ONCE; g++) {
                __m512 x[4];
                dequantize(codes[g], w[g], low, high, x);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const __m512 y = _mm512_set1_ps(at[g][r * row_floats]);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sum[g][r][j] = _mm512_fmadd_ps(x[j], y, sum[g][r][j]);
                }
            }
#pragma GCC unroll 4
            for (int g = 0; g < AT_ONCE; g++) at[g]++;
        }
    }
    next = ahead;
#pragma GCC unroll 4
    for (int g = 0; g < AT_ONCE; g++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) scores[r * row_scores + g * 4 + j] = sum[g][r][j];
}

// The same for all groups of a block.
template <int ROWS, int AT_ONCE, int PARTS>
void score_planes(const __m512i* codes, int64_t groups, int64_t count, int64_t dm, const uint8_t* planes,
                  const float* const* q, int64_t row_floats, bool begin, __m512* scores, int64_t row_scores,
                  Aheads& next) {
    int64_t g = 0;
    for (; g + AT_ONCE <= groups; g += AT_ONCE)
        score_groups<ROWS, AT_ONCE, PARTS>(codes + g, groups, count, dm, planes, q + g, row_floats, begin,
                                           scores + g * 4, row_scores, next);
    for (; g < groups; g++)
        score_groups<ROWS, 1, PARTS>(codes + g, groups, count, dm, planes, q + g, row_floats, begin, scores + g * 4,
                                     row_scores, next);
}

}  // namespace pq
#endif
