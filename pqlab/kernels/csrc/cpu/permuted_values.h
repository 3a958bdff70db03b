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

// sum += products of four unsigned and signed bytes, by lane. As an intrinsic in a loop, GCC 12 copies every sum twice
// a turn and keeps the planes in memory for it.
PQ_INLINE void multiply_add(__m512i& sum, __m512i bytes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(digits));
}

// sums[row] = sums * old[row] + now[row] * sum of weight * entry over the tokens of a block, by lane, for a dimension.
// Its planes stay in registers. A product takes four cycles, so few rows have a sum for each of the six and many share
// three or four, as registers allow. `next` is fetched on the way.
//   codes [groups]; planes [PLANES][64 * PARTS].
template <int ROWS, int PARTS>
PQ_NOINLINE void add_dimension(const __m512i* codes, int64_t groups, const uint8_t* planes, const Weights* weights,
                               const float* old, const float* now, __m512* sums, Aheads& next) {
    constexpr int64_t PLANE = GROUP * PARTS;
    constexpr int SUMS = ROWS < 3 ? 6 : ROWS == 3 ? 4 : 3;
    // Sums of the products high * digit 2, 1, 0, middle * digit 2, 1 and low * digit 2.
    constexpr int H2 = 0, H1 = 1, H0 = 2;
    constexpr int M2 = SUMS == 6 ? 3 : H1, M1 = SUMS == 6 ? 4 : H0, L2 = SUMS == 3 ? H0 : SUMS - 1;
    const Plane<PARTS> low(planes), middle(planes + PLANE), high(planes + 2 * PLANE);
    Aheads ahead = next;
    __m512i sum[ROWS][SUMS] = {};
    for (int64_t g = 0; g < groups; g++) {
        ahead.fetch();
        __builtin_prefetch(planes + PLANES * PLANE + g * 64, 0, 3);
        const __m512i c = codes[g];
        const Where w = where<PARTS>(c);
        const __m512i h = high.at(c, w), m = middle.at(c, w), l = low.at(c, w);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            __m512i d2 = weights[r].digits[2][g], d1 = weights[r].digits[1][g];
            asm("" : "+v"(d2), "+v"(d1));  // or they are loaded for every product, and loads are what bounds this loop
            multiply_add(sum[r][H2], h, d2);
            multiply_add(sum[r][M2], m, d2);
            multiply_add(sum[r][L2], l, d2);
            multiply_add(sum[r][H1], h, d1);
            multiply_add(sum[r][M1], m, d1);
            multiply_add(sum[r][H0], h, weights[r].digits[0][g]);
        }
    }
    next = ahead;
    const __m512 byte = _mm512_set1_ps(1.f / 256.f);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const __m512i* centre = weights[r].centre;
        __m512i units = _mm512_add_epi32(sum[r][H0], centre[0]), bytes = _mm512_add_epi32(sum[r][H1], centre[1]);
        if constexpr (SUMS > 3) units = _mm512_add_epi32(units, sum[r][L2]);
        if constexpr (SUMS > 4) {
            units = _mm512_add_epi32(units, sum[r][M1]);
            bytes = _mm512_add_epi32(bytes, sum[r][M2]);
        }
        __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(units), byte, _mm512_cvtepi32_ps(bytes));
        x = _mm512_fmadd_ps(x, byte, _mm512_cvtepi32_ps(_mm512_add_epi32(sum[r][H2], centre[2])));
        sums[r] = _mm512_fmadd_ps(x, _mm512_set1_ps(now[r]), _mm512_mul_ps(sums[r], _mm512_set1_ps(old[r])));
    }
}

// All dimensions of a block: sums [d][ROWS].
//   tiles [groups * 4]: codes of subspace s of 16 tokens at s * pitch. `next` is fetched on the way.
template <int ROWS, int PARTS>
void add_values(const uint8_t* const* tiles, int64_t pitch, int64_t groups, int64_t m, int64_t dm,
                const ValueBook& book, const Weights* weights, const float* old, const float* now, __m512* sums,
                Aheads next) {
    constexpr int64_t SUBSPACE = PLANES * GROUP * PARTS, AT_ONCE = 4;
    __m512i codes[AT_ONCE * GROUPS];
    for (int64_t s = 0; s < m; s++) {
        const uint8_t* planes = book.planes + s * dm * SUBSPACE;
        for (int64_t line = 0; line < dm * SUBSPACE; line += 64)
            __builtin_prefetch(planes + dm * SUBSPACE + line, 0, 2);
        if (s % AT_ONCE == 0) gather_codes(tiles, pitch, groups, s, std::min(s + AT_ONCE, m), codes);
        const __m512i* here = codes + s % AT_ONCE * groups;
        for (int64_t i = s * dm; i < (s + 1) * dm; i++, planes += SUBSPACE)
            add_dimension<ROWS, PARTS>(here, groups, planes, weights, old, now, sums + i * ROWS, next);
    }
}

}  // namespace pq
#endif
