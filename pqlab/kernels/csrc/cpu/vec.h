// Eight floats. GCC's and clang's vector types carry the arithmetic on any machine; intrinsics stand only where those
// types have no word for it, each beside a loop that does the same.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PQ_AVX2 1
#endif
// AMD. GCC before 12.3 knows those with AVX-512 as znver3.
#if defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
#define PQ_ZEN 1
#endif
#if defined(PQ_AVX2) || defined(__BMI2__)
#include <immintrin.h>
#endif

// Inner loops are functions of their own and what they call is always inlined: left to itself, GCC inlines the loop
// into its caller and then keeps the accumulators in memory, which takes twice the time.
#define PQ_INLINE inline __attribute__((always_inline))
#define PQ_NOINLINE __attribute__((noinline))

namespace pq {

constexpr int WIDTH = 8;
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float f8u __attribute__((vector_size(32), aligned(4), may_alias));

inline f8 load(const float* p) { return *(const f8u*)p; }
inline void store(float* p, f8 x) { *(f8u*)p = x; }
inline f8 splat(float x) { return f8{x, x, x, x, x, x, x, x}; }
inline f8 max(f8 a, f8 b) { return a > b ? a : b; }

inline float max_of(f8 x) {
    float top = x[0];
    for (int i = 1; i < WIDTH; i++) top = x[i] > top ? x[i] : top;
    return top;
}

inline float sum_of(f8 x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// e^x to 2 ulp for x <= 88; 0 below -87 (so e^-inf = 0). Cody and Waite's reduction, Cephes' polynomial.
inline f8 exp(f8 x) {
    const f8 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const f8 clamped = max(x, splat(-87.f));
    const f8 shifted = clamped * splat(1.44269504088896341f) + magic;
    const f8 n = shifted - magic;
    const f8 r = clamped - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    f8 y = splat(1.9875691500e-4f);
    y = y * r + splat(1.3981999507e-3f);
    y = y * r + splat(8.3334519073e-3f);
    y = y * r + splat(4.1665795894e-2f);
    y = y * r + splat(1.6666665459e-1f);
    y = y * r + splat(5.0000001201e-1f);
    y = y * (r * r) + r + splat(1.f);
    const i8 power = ((i8)shifted - (i8)magic + 127) << 23;
    return x < splat(-87.f) ? splat(0.f) : y * (f8)power;
}

// a0 b0 a1 b1 .. a7 b7 in two vectors -> a0 .. a7 and b0 .. b7
PQ_INLINE void split_pairs(f8& x, f8& y) {
#ifdef PQ_AVX2
    const __m256 a = _mm256_shuffle_ps((__m256)x, (__m256)y, 0x88), b = _mm256_shuffle_ps((__m256)x, (__m256)y, 0xdd);
    x = (f8)_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8);
    y = (f8)_mm256_permute4x64_pd(_mm256_castps_pd(b), 0xd8);
#else
    f8 a, b;
    for (int i = 0; i < 4; i++) a[i] = x[2 * i], a[i + 4] = y[2 * i], b[i] = x[2 * i + 1], b[i + 4] = y[2 * i + 1];
    x = a;
    y = b;
#endif
}

// Every lane TIMES times over, in 8 * TIMES floats.
template <int TIMES>
PQ_INLINE void store_repeated(float* out, f8 x) {
#ifdef PQ_AVX2
    if constexpr (TIMES == 2) {
        const __m256 low = _mm256_unpacklo_ps((__m256)x, (__m256)x), high = _mm256_unpackhi_ps((__m256)x, (__m256)x);
        store(out, (f8)_mm256_permute2f128_ps(low, high, 0x20));  // 0 0 1 1 2 2 3 3
        store(out + WIDTH, (f8)_mm256_permute2f128_ps(low, high, 0x31));
        return;
    }
#endif
    if constexpr (TIMES == 1) {
        store(out, x);
        return;
    }
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < TIMES; j++) out[i * TIMES + j] = x[i];
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

// rows[i][j] -> rows[j][i]
inline void transpose(f8 rows[8]) {
#ifdef PQ_AVX2
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
        b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        rows[i + 4] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            const float x = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = x;
        }
#endif
}

}  // namespace pq
