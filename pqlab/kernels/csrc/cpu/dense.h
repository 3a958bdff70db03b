// Online softmax attention over blocks of up to 64 float32 keys: for the exact tokens, and for codes when many query
// rows share them (then a block is dequantized once and this is a small matrix product).
//
//   s = q k^T;  m' = max(m, max s);  l = l e^(m - m') + sum e^(s - m');  acc = acc e^(m - m') + e^(s - m') v
#pragma once
#include "vec.h"

namespace pq {

constexpr int BLOCK = 64;

inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// What a row of queries has gathered so far.
struct Rows {
    int64_t count, dim;  // acc has padded(dim) floats a row
    float* m;            // [count], -inf at first
    float* l;            // [count], 0 at first
    float* acc;          // [count, padded(dim)], 0 at first

    void clear() const {
        for (int64_t r = 0; r < count; r++) m[r] = -INFINITY, l[r] = 0.f;
        std::memset(acc, 0, size_t(count * padded(dim)) * 4);
    }
};

// A block of n keys and values in float32. Keys lie transposed, kt [d][BLOCK], or as rows k [n][k_stride] when kt is
// null (then d is a multiple of 8); v [n][v_stride] with padded(d) readable floats a row.
struct Block {
    int n;
    const float *kt, *k, *v;
    int64_t k_stride, v_stride;
};

// s[row][token] = q[row] . k[token], four sums of eight lanes at a time.
template <int ROWS>
void score_rows(const float* q, int64_t d, const Block& block, float (*s)[BLOCK]) {
    constexpr int TOKENS = ROWS > 3 ? 2 : 4;
    for (int t = 0; t < block.n; t += TOKENS) {
        f8 sum[ROWS][TOKENS] = {};
        const float* k[TOKENS];
        for (int i = 0; i < TOKENS; i++) k[i] = block.k + std::min(t + i, block.n - 1) * block.k_stride;
        for (int64_t i = 0; i < d; i += WIDTH) {
            f8 x[TOKENS];
#pragma GCC unroll 4
            for (int j = 0; j < TOKENS; j++) x[j] = load(k[j] + i);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const f8 y = load(q + r * d + i);
#pragma GCC unroll 4
                for (int j = 0; j < TOKENS; j++) sum[r][j] += x[j] * y;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float sums[4] = {};
            add_groups<WIDTH, TOKENS>(sums, sum[r]);
            std::memcpy(s[r] + t, sums, TOKENS * 4);
        }
    }
}

// The same from transposed keys.
template <int ROWS>
void score_columns(const float* q, int64_t d, const Block& block, float (*s)[BLOCK]) {
    for (int col = 0; col < block.n; col += 16) {
        f8 sum[ROWS][2] = {};
        for (int64_t i = 0; i < d; i++) {
            const f8 k0 = load(block.kt + i * BLOCK + col), k1 = load(block.kt + i * BLOCK + col + 8);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const f8 x = splat(q[r * d + i]);
                sum[r][0] += x * k0;
                sum[r][1] += x * k1;
            }
        }
        for (int r = 0; r < ROWS; r++) store(s[r] + col, sum[r][0]), store(s[r] + col + 8, sum[r][1]);
    }
}

// s[row] becomes e^(s - m'), each REPEATS times over in `out`; the factor for what came before is returned.
template <int REPEATS = 1>
inline float softmax_row(float* s, int n, float& m, float& l, float* out) {
    const int whole = (n + WIDTH - 1) / WIDTH * WIDTH;
    for (int i = n; i < whole; i++) s[i] = -INFINITY;
    f8 top = load(s);
    for (int i = WIDTH; i < whole; i += WIDTH) top = max(top, load(s + i));
    const float next = std::max(m, max_of(top));
    f8 sum = {};
    for (int i = 0; i < whole; i += WIDTH) {
        const f8 p = exp(load(s + i) - splat(next));
        store_repeated<REPEATS>(out + i * REPEATS, p);
        sum += p;
    }
    const float factor = m == next ? 1.f : std::exp(m - next);  // m = -inf at first: 0
    l = l * factor + sum_of(sum);
    m = next;
    return factor;
}

template <int ROWS>
PQ_NOINLINE void attend_rows(const float* q, const Rows& rows, int64_t first, const Block& block) {
    const int64_t d = rows.dim, width = padded(d);
    alignas(64) float s[ROWS][BLOCK];
    if (block.kt)
        score_columns<ROWS>(q + first * d, d, block, s);
    else
        score_rows<ROWS>(q + first * d, d, block, s);
    float factor[ROWS];
    for (int r = 0; r < ROWS; r++) factor[r] = softmax_row(s[r], block.n, rows.m[first + r], rows.l[first + r], s[r]);
    for (int64_t col = 0; col < width; col += 16) {
        f8 sum[ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const float* acc = rows.acc + (first + r) * width + col;
            sum[r][0] = load(acc) * splat(factor[r]);
            sum[r][1] = load(acc + 8) * splat(factor[r]);
        }
        for (int t = 0; t < block.n; t++) {
            const f8 v0 = load(block.v + t * block.v_stride + col), v1 = load(block.v + t * block.v_stride + col + 8);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const f8 p = splat(s[r][t]);
                sum[r][0] += p * v0;
                sum[r][1] += p * v1;
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            float* acc = rows.acc + (first + r) * width + col;
            store(acc, sum[r][0]);
            store(acc + 8, sum[r][1]);
        }
    }
}

// All rows of q [count, d] (scaled) over one block.
inline void attend_block(const float* q, const Rows& rows, const Block& block) {
    int64_t r = 0;
    for (; r + 6 <= rows.count; r += 6) attend_rows<6>(q, rows, r, block);
    switch (rows.count - r) {
        case 5: attend_rows<5>(q, rows, r, block); break;
        case 4: attend_rows<4>(q, rows, r, block); break;
        case 3: attend_rows<3>(q, rows, r, block); break;
        case 2: attend_rows<2>(q, rows, r, block); break;
        case 1: attend_rows<1>(q, rows, r, block); break;
    }
}

}  // namespace pq
