// bfloat16 and float16 to float32 and back.
#pragma once
#include <cstddef>

#include "api.h"
#include "buffer.h"
#include "vec.h"

namespace pq {

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
#ifdef PQ_AVX2
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000)));  // * 2^112
#endif
}

inline uint16_t float_to_half(float x) {
#ifdef PQ_AVX2
    return _cvtss_sh(x, 0);
#else
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(bits_to_float(rest) * 16777216.f)));
    return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - 0x1c000);
#endif
}

inline float bfloat_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

inline size_t size_of(int64_t dtype) { return dtype == PQ_FLOAT32 ? 4 : 2; }

// n values from `first` of a tensor of `dtype`, times `scale`.
inline void to_float(float* out, const void* tensor, int64_t first, int64_t n, int64_t dtype, float scale = 1.f) {
    if (dtype == PQ_FLOAT32) {
        const float* x = (const float*)tensor + first;
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale;
        return;
    }
    const uint16_t* x = (const uint16_t*)tensor + first;
    if (dtype == PQ_BFLOAT16) {
        for (int64_t i = 0; i < n; i++) out[i] = bfloat_to_float(x[i]) * scale;
        return;
    }
    int64_t i = 0;
#ifdef PQ_AVX2
    for (; i + 8 <= n; i += 8) {
        const __m128i eight = _mm_loadu_si128((const __m128i*)(x + i));
        store(out + i, (f8)_mm256_cvtph_ps(eight) * splat(scale));
    }
#endif
    for (; i < n; i++) out[i] = half_to_float(x[i]) * scale;
}

// n centroids from `first` as float32: where they lie, or, of fp16 ones, in `room`.
inline const float* wide_book(const void* books, int64_t first, int64_t n, int64_t dtype, Buffer<float>& room) {
    if (dtype == PQ_FLOAT32) return (const float*)books + first;
    room.resize(size_t(n));
    to_float(room.data(), books, first, n, dtype);
    return room.data();
}

inline void from_float(void* tensor, int64_t first, const float* x, int64_t n, int64_t dtype) {
    if (dtype == PQ_FLOAT32) {
        std::memcpy((float*)tensor + first, x, size_t(n) * 4);
        return;
    }
    uint16_t* out = (uint16_t*)tensor + first;
    for (int64_t i = 0; i < n; i++) out[i] = dtype == PQ_BFLOAT16 ? float_to_bfloat(x[i]) : float_to_half(x[i]);
}

}  // namespace pq
