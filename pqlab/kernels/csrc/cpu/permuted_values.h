// Values by planes: weights of a block in bytes, and their products with the codes' entries.
#pragma once
#include "permuted_keys.h"

#ifdef PQ_PERMUTE

namespace pq {

constexpr int64_t GROUPS = 16;           // of a block
constexpr float WEIGHT_ONE = 8355711.f;  // 0x7f7f7f: the most that three signed bytes hold
constexpr int DIGITS = 3;

// e^x for x <= 0; below -80: about e^-80.
PQ_INLINE __m512 exp16(__m512 x) {
    const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-80.f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(y, n);
}

// The weights of a block for one row.
struct Weights {
    __m512i digits[DIGITS][GROUPS];  // signed bytes of 64 tokens, least first
    __m512i centre[DIGITS];          // what makes the upper bytes of the values signed: -128 * sum of digits, by lane
};

// Scores [groups][4] to weights e^(s - max); their maximum and sum.
inline void weigh(const __m512* scores, int64_t groups, Weights& weights, float& m, float& l) {
    __m512 top = scores[0];
    for (int64_t i = 1; i < groups * 4; i++) top = _mm512_max_ps(top, scores[i]);
    m = _mm512_reduce_max_ps(top);
    const __m512i signs = _mm512_set1_epi32(int32_t(0x80808080)), half = _mm512_set1_epi8(int8_t(128));
    __m512i total[DIGITS] = {};  // 128 * sum of digits
    for (int64_t g = 0; g < groups; g++) {
        __m512i w[4];
        for (int j = 0; j < 4; j++) {
            const __m512 e = exp16(_mm512_sub_ps(scores[g * 4 + j], _mm512_set1_ps(m)));
            w[j] = _mm512_cvtps_epi32(_mm512_mul_ps(e, _mm512_set1_ps(WEIGHT_ONE)));
            w[j] = _mm512_add_epi32(w[j], _mm512_set1_epi32(0x00808080));  // digits of -128 .. 127, plus 128 each
        }
        __m512i digits[DIGITS];
        split_bytes(w, digits);
        for (int k = 0; k < DIGITS; k++) {
            weights.digits[k][g] = _mm512_xor_si512(digits[k], signs);
            total[k] = _mm512_dpbusd_epi32(total[k], half, weights.digits[k][g]);
        }
    }
    __m512 sum = _mm512_setzero_ps();
    for (int k = DIGITS - 1; k >= 0; k--) {
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(total[k]));
        weights.centre[k] = _mm512_sub_epi32(_mm512_setzero_si512(), total[k]);
    }
    // The lower bytes of the value are left out where they meet the lowest digit: half of an upper one on average.
    weights.centre[0] = _mm512_add_epi32(weights.centre[0], _mm512_srai_epi32(total[0], 8));
    l = _mm512_reduce_add_ps(sum) * (1.f / 128.f / WEIGHT_ONE);
}

// sums[dim][row] = sums * old[row] + now[row] * sum of weight * entry over the tokens of the block, by lane, for DIMS
// dimensions of one subspace. `next` is fetched on the way.
//   tiles [groups * 4]: codes of 16 tokens at `at`; planes [DIMS][PLANES][64 * PARTS].
template <int ROWS, int DIMS, int PARTS>
PQ_NOINLINE void add_dimensions(const uint8_t* const* tiles, int64_t at, int64_t groups, const uint8_t* planes,
                                const Weights* weights, const float* old, const float* now, __m512* sums,
                                Aheads& next) {
    constexpr int64_t PLANE = GROUP * PARTS;
    Aheads ahead = next;
    __m512i sum[DIMS][ROWS][DIGITS];
#pragma GCC unroll 2
    for (int i = 0; i < DIMS; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
            for (int k = 0; k < DIGITS; k++) sum[i][r][k] = weights[r].centre[k];
    for (int64_t g = 0; g < groups; g++) {
        ahead.fetch();
        const __m512i c = codes_of(tiles + g * GROUP_TILES, at);
        const Where w = where<PARTS>(c);
#pragma GCC unroll 2
        for (int i = 0; i < DIMS; i++) {
            const uint8_t* plane = planes + i * PLANES * PLANE;
            const __m512i low = look_up<PARTS>(plane, c, w), middle = look_up<PARTS>(plane + PLANE, c, w);
            const __m512i high = look_up<PARTS>(plane + 2 * PLANE, c, w);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const __m512i d0 = weights[r].digits[0][g], d1 = weights[r].digits[1][g], d2 = weights[r].digits[2][g];
                sum[i][r][2] = _mm512_dpbusd_epi32(sum[i][r][2], high, d2);
                sum[i][r][1] = _mm512_dpbusd_epi32(sum[i][r][1], high, d1);
                sum[i][r][0] = _mm512_dpbusd_epi32(sum[i][r][0], high, d0);
                sum[i][r][1] = _mm512_dpbusd_epi32(sum[i][r][1], middle, d2);
                sum[i][r][0] = _mm512_dpbusd_epi32(sum[i][r][0], middle, d1);
                sum[i][r][0] = _mm512_dpbusd_epi32(sum[i][r][0], low, d2);
            }
        }
    }
    next = ahead;
    const __m512 byte = _mm512_set1_ps(1.f / 256.f);
#pragma GCC unroll 2
    for (int i = 0; i < DIMS; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            __m512 x = _mm512_cvtepi32_ps(sum[i][r][0]);
            x = _mm512_fmadd_ps(x, byte, _mm512_cvtepi32_ps(sum[i][r][1]));
            x = _mm512_fmadd_ps(x, byte, _mm512_cvtepi32_ps(sum[i][r][2]));
            __m512& to = sums[i * ROWS + r];
            to = _mm512_fmadd_ps(x, _mm512_set1_ps(now[r]), _mm512_mul_ps(to, _mm512_set1_ps(old[r])));
        }
}

// All dimensions of a block, tiles as in `sum_planes`: sums [d][ROWS].
template <int ROWS, int PARTS>
void add_values(const uint8_t* const* tiles, int64_t pitch, int64_t groups, int64_t m, int64_t dm,
                const ValueBook& book, const Weights* weights, const float* old, const float* now, __m512* sums,
                Aheads next) {
    constexpr int64_t PLANE = GROUP * PARTS;
    for (int64_t s = 0; s < m; s++) {
        const uint8_t* planes = book.planes + s * dm * PLANES * PLANE;
        for (int64_t line = 0; line < dm * PLANES * PLANE; line += 64)
            __builtin_prefetch(planes + dm * PLANES * PLANE + line, 0, 2);
        int64_t i = 0;
        for (; i + 2 <= dm; i += 2)
            add_dimensions<ROWS, 2, PARTS>(tiles, s * pitch, groups, planes + i * PLANES * PLANE, weights, old, now,
                                           sums + (s * dm + i) * ROWS, next);
        if (i < dm)
            add_dimensions<ROWS, 1, PARTS>(tiles, s * pitch, groups, planes + i * PLANES * PLANE, weights, old, now,
                                           sums + (s * dm + i) * ROWS, next);
    }
}

}  // namespace pq
#endif
