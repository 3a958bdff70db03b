// Products of a few vectors with a head's map [d][d], which is float32, float16 or int8 in units of 1/127.
#pragma once
#include <type_traits>

#include "buffer.h"
#include "convert.h"

namespace pq {

struct Map {
    const void* entries;
    int64_t dtype;

    explicit operator bool() const { return entries != nullptr; }
    // Of a head.
    Map of(int64_t head, int64_t d) const {
        const int64_t bytes = dtype == PQ_FLOAT32 ? 4 : dtype == PQ_INT8 ? 1 : 2;
        return {entries ? (const char*)entries + head * d * d * bytes : nullptr, dtype};
    }
    float unit() const { return dtype == PQ_INT8 ? 1.f / 127.f : 1.f; }
};

// Entries at .. at + 7, or one entry, without the unit.
template <int DTYPE>
PQ_INLINE float entry_at(const void* entries, int64_t at) {
    if constexpr (DTYPE == PQ_FLOAT32) return ((const float*)entries)[at];
    if constexpr (DTYPE == PQ_INT8) return float(((const int8_t*)entries)[at]);
    return half_to_float(((const uint16_t*)entries)[at]);
}

template <int DTYPE>
PQ_INLINE f8 entries_at(const void* entries, int64_t at) {
    if constexpr (DTYPE == PQ_FLOAT32) return load((const float*)entries + at);
#ifdef PQ_AVX2
    if constexpr (DTYPE == PQ_INT8) {
        const __m128i eight = _mm_loadl_epi64((const __m128i*)((const int8_t*)entries + at));
        return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    } else {
        return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)entries + at)));
    }
#else
    f8 x;
    for (int i = 0; i < WIDTH; i++) x[i] = entry_at<DTYPE>(entries, at + i);
    return x;
#endif
}

// out[row] = x[row] @ map, VECTORS vectors of eight columns at a time.
template <int DTYPE, int ROWS, int VECTORS>
PQ_INLINE void multiply_columns(const float* x, const void* map, int64_t d, int64_t column, float unit, float* out) {
    f8 sum[ROWS][VECTORS] = {};
    for (int64_t i = 0; i < d; i++) {
        f8 y[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) y[j] = entries_at<DTYPE>(map, i * d + column + j * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sum[r][j] += splat(x[r * d + i]) * y[j];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store(out + r * d + column + j * WIDTH, sum[r][j] * splat(unit));
}

template <int DTYPE, int ROWS>
PQ_NOINLINE void multiply_rows(const float* x, const void* map, int64_t d, float unit, float* out) {
    constexpr int VECTORS = ROWS > 2 ? 2 : 4;
    int64_t column = 0;
    for (; column + VECTORS * WIDTH <= d; column += VECTORS * WIDTH)
        multiply_columns<DTYPE, ROWS, VECTORS>(x, map, d, column, unit, out);
    for (; column + WIDTH <= d; column += WIDTH) multiply_columns<DTYPE, ROWS, 1>(x, map, d, column, unit, out);
    for (; column < d; column++)
        for (int r = 0; r < ROWS; r++) {
            float sum = 0.f;
            for (int64_t i = 0; i < d; i++) sum += x[r * d + i] * entry_at<DTYPE>(map, i * d + column);
            out[r * d + column] = sum * unit;
        }
}

// out[row] = x[row] @ map^T: products with the rows of the map, four of them at a time.
template <int DTYPE, int ROWS>
PQ_NOINLINE void multiply_rows_transposed(const float* x, const void* map, int64_t d, float unit, float* out) {
    constexpr int AT_ONCE = 4;
    const int64_t whole = d / WIDTH * WIDTH;
    for (int64_t first = 0; first < d; first += AT_ONCE) {
        const int64_t count = first + AT_ONCE <= d ? AT_ONCE : d - first;
        f8 sum[ROWS][AT_ONCE] = {};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            f8 y[AT_ONCE];
#pragma GCC unroll 4
            for (int j = 0; j < AT_ONCE; j++)
                y[j] = entries_at<DTYPE>(map, (first + (j < count ? j : count - 1)) * d + i);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < AT_ONCE; j++) sum[r][j] += load(x + r * d + i) * y[j];
        }
        for (int r = 0; r < ROWS; r++) {
            float sums[AT_ONCE] = {};
            add_groups<WIDTH, AT_ONCE>(sums, sum[r]);
            for (int64_t j = 0; j < count; j++) {
                for (int64_t i = whole; i < d; i++) sums[j] += x[r * d + i] * entry_at<DTYPE>(map, (first + j) * d + i);
                out[r * d + first + j] = sums[j] * unit;
            }
        }
    }
}

// As many floats as a register has.
#ifdef __AVX512F__
constexpr int LANES = 16, ROWS_AT_ONCE = 6, VECTORS_AT_ONCE = 4;
#else
constexpr int LANES = 8, ROWS_AT_ONCE = 6, VECTORS_AT_ONCE = 2;
#endif
typedef float wide __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// map^T in float32, `to` [d][d], with its unit; d is a multiple of 8.
template <int DTYPE>
PQ_NOINLINE void write_transposed(const void* map, int64_t d, float unit, float* to) {
    for (int64_t first = 0; first < d; first += WIDTH)
        for (int64_t i = 0; i < d; i += WIDTH) {
            f8 square[WIDTH];
            for (int r = 0; r < WIDTH; r++) square[r] = entries_at<DTYPE>(map, (first + r) * d + i) * splat(unit);
            transpose(square);
            for (int r = 0; r < WIDTH; r++) store(to + (i + r) * d + first, square[r]);
        }
}

// out[row] = x[row] @ map for columns [column, column + LANES * VECTORS_AT_ONCE), float32.
template <int ROWS>
PQ_NOINLINE void multiply_wide(const float* x, const float* map, int64_t d, int64_t column, float* out) {
    wide sum[ROWS][VECTORS_AT_ONCE] = {};
    for (int64_t i = 0; i < d; i++) {
        wide y[VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS_AT_ONCE; j++) y[j] = *(const wide*)(map + i * d + column + j * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS_AT_ONCE; j++) sum[r][j] += x[r * d + i] * y[j];
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS_AT_ONCE; j++) *(wide*)(out + r * d + column + j * LANES) = sum[r][j];
}

// x [count][d] @ map^T for many vectors: the map is widened and turned once, in `memory`.
inline void multiply_many(const float* x, int64_t count, const Map& map, int64_t d, Buffer<float>& memory, float* out) {
    memory.resize(size_t(d * d));
    const auto write = map.dtype == PQ_FLOAT32 ? write_transposed<PQ_FLOAT32>
                       : map.dtype == PQ_INT8  ? write_transposed<PQ_INT8>
                                               : write_transposed<PQ_FLOAT16>;
    write(map.entries, d, map.unit(), memory.data());
    for (int64_t column = 0; column < d; column += LANES * VECTORS_AT_ONCE) {
        int64_t at = 0;
        const auto rows = [&](auto f, int64_t n) { f(x + at * d, memory.data(), d, column, out + at * d), at += n; };
        while (at + ROWS_AT_ONCE <= count) rows(multiply_wide<ROWS_AT_ONCE>, ROWS_AT_ONCE);
        while (at + 2 <= count) rows(multiply_wide<2>, 2);
        if (at < count) rows(multiply_wide<1>, 1);
    }
}
// Fewer vectors than this are done before the map is written out.
constexpr int64_t MANY = 16;
inline bool are_many(int64_t count, int64_t d) { return count >= MANY && d % (LANES * VECTORS_AT_ONCE) == 0; }

// x [count][d] @ map, or @ map^T, to out [count][d], another place.
inline void multiply(const float* x, int64_t count, const Map& map, int64_t d, bool transposed, float* out) {
    const auto call = [&](auto rows, int64_t at) {
        constexpr int ROWS = decltype(rows)::value;
        const auto with = [&](auto f) { f(x + at * d, map.entries, d, map.unit(), out + at * d); };
        switch (map.dtype * 2 + transposed) {
            case PQ_FLOAT32 * 2: return with(multiply_rows<PQ_FLOAT32, ROWS>);
            case PQ_FLOAT32 * 2 + 1: return with(multiply_rows_transposed<PQ_FLOAT32, ROWS>);
            case PQ_INT8 * 2: return with(multiply_rows<PQ_INT8, ROWS>);
            case PQ_INT8 * 2 + 1: return with(multiply_rows_transposed<PQ_INT8, ROWS>);
            case PQ_FLOAT16 * 2: return with(multiply_rows<PQ_FLOAT16, ROWS>);
            default: return with(multiply_rows_transposed<PQ_FLOAT16, ROWS>);
        }
    };
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) call(std::integral_constant<int, 4>{}, at);
    switch (count - at) {
        case 3: return call(std::integral_constant<int, 3>{}, at);
        case 2: return call(std::integral_constant<int, 2>{}, at);
        case 1: return call(std::integral_constant<int, 1>{}, at);
    }
}

}  // namespace pq
