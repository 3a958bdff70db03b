// Keys by planes: tables of scores for the query rows, and their sums over the subspaces.
#pragma once
#include "ahead.h"
#include "planes.h"

#ifdef PQ_PERMUTE

namespace pq {

constexpr int64_t GROUP_TILES = GROUP / TILE;

// Scores of all centroids for up to four rows, as written by `make_key_tables`; kept for the next call.
struct KeyTables {
    Buffer<uint8_t> planes;    // [rows][m][PLANES][stored]
    float step[4], offset[4];  // of a row; offset: the score of all middles
};

// 16 coordinates from the middle, of column `dim` from entry `at` on.
template <bool HALF>
PQ_INLINE __m512 coordinates(const KeyBook& book, int64_t dim, int64_t stored, int64_t at) {
    const int64_t entry = dim * stored + at;
    if constexpr (!HALF) return _mm512_load_ps((const float*)book.columns + entry);
    const __m512 x = _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)(book.columns + entry * 2)));
    return _mm512_sub_ps(x, _mm512_set1_ps(book.middle[dim]));
}

// q [ROWS][d], scaled. `next`: what will be read after these, fetched meanwhile.
template <int ROWS, bool HALF>
PQ_NOINLINE void make_key_tables(const KeyBook& book, int64_t m, int64_t dm, int64_t stored, const float* q,
                                 KeyTables& tables, Ahead next) {
    constexpr float STEPS = float((1 << 24) - 64);  // from the least to the most entry, with room for rounding
    const int64_t d = m * dm, lines = next.share(m);
    tables.planes.resize(size_t(m * ROWS * PLANES * stored));
    float inverse[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float widest = 0.f;
        double offset = 0.;
        for (int64_t s = 0; s < d; s += dm) {
            float reach = 0.f;
            for (int64_t i = s; i < s + dm; i++) {
                reach += std::fabs(q[r * d + i]) * book.reach[i];
                offset += double(q[r * d + i]) * book.middle[i];
            }
            widest = std::max(widest, reach);
        }
        tables.step[r] = 2.f * widest / STEPS;
        tables.offset[r] = float(offset);
        inverse[r] = tables.step[r] > 1e-30f ? 1.f / tables.step[r] : 0.f;
    }
    for (int64_t s = 0; s < m; s++) {
        next.fetch(lines);
        const int64_t bytes = dm * stored * (HALF ? 2 : 4);
        const char* next_columns = book.columns + (s + 1) * bytes;
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next_columns + line, 0, 2);
        uint8_t* planes = tables.planes.data() + s * PLANES * stored;
        for (int64_t c = 0; c < stored; c += GROUP) {
            __m512 sum[ROWS][4];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
            for (int64_t i = 0; i < dm; i++) {
                __m512 x[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) x[j] = coordinates<HALF>(book, s * dm + i, stored, c + 16 * j);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const __m512 y = _mm512_set1_ps(q[r * d + s * dm + i] * inverse[r]);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_fmadd_ps(x[j], y, sum[r][j]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                __m512i entry[4], bytes[3];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    entry[j] = _mm512_add_epi32(_mm512_cvtps_epi32(sum[r][j]), _mm512_set1_epi32(1 << 23));
                split_bytes(entry, bytes);
#pragma GCC unroll 3
                for (int p = 0; p < PLANES; p++)
                    _mm512_store_si512(planes + (r * m * PLANES + p) * stored + c, bytes[p]);
            }
        }
    }
}

// Codes of `groups` groups for subspaces [first, last), as the loops want them: out [last - first][groups].
//   tiles [groups * 4]: 16 codes of subspace s at s * pitch.
inline void gather_codes(const uint8_t* const* tiles, int64_t pitch, int64_t groups, int64_t first, int64_t last,
                         __m512i* out) {
    const int64_t whole = pitch == TILE ? (last - first) / 4 * 4 : 0;
    for (int64_t g = 0; g < groups; g++, tiles += GROUP_TILES) {
        const uint8_t *t0 = tiles[0], *t1 = tiles[1], *t2 = tiles[2], *t3 = tiles[3];
        __m512i* to = out + g;
        int64_t s = first;
        for (; s < first + whole; s += 4, to += 4 * groups) {  // four subspaces lie side by side: a square of 16 bytes
            const __m512i a = _mm512_loadu_si512(t0 + s * TILE), b = _mm512_loadu_si512(t1 + s * TILE);
            const __m512i c = _mm512_loadu_si512(t2 + s * TILE), d = _mm512_loadu_si512(t3 + s * TILE);
            const __m512i ab = _mm512_shuffle_i64x2(a, b, 0x88), cd = _mm512_shuffle_i64x2(c, d, 0x88);  // s 0 2 0 2
            const __m512i AB = _mm512_shuffle_i64x2(a, b, 0xdd), CD = _mm512_shuffle_i64x2(c, d, 0xdd);  // s 1 3 1 3
            to[0] = _mm512_shuffle_i64x2(ab, cd, 0x88);
            to[groups] = _mm512_shuffle_i64x2(AB, CD, 0x88);
            to[2 * groups] = _mm512_shuffle_i64x2(ab, cd, 0xdd);
            to[3 * groups] = _mm512_shuffle_i64x2(AB, CD, 0xdd);
        }
        for (; s < last; s++, to += groups) {
            __m512i c = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(t0 + s * pitch)));
            c = _mm512_inserti32x4(c, _mm_loadu_si128((const __m128i*)(t1 + s * pitch)), 1);
            c = _mm512_inserti32x4(c, _mm_loadu_si128((const __m128i*)(t2 + s * pitch)), 2);
            *to = _mm512_inserti32x4(c, _mm_loadu_si128((const __m128i*)(t3 + s * pitch)), 3);
        }
    }
}

// As an intrinsic in a loop, GCC 12 copies every sum at its end.
PQ_INLINE void add_words(__m512i& sum, __m512i x) { asm("vpaddw %1, %0, %0" : "+v"(sum) : "v"(x)); }

// Sums of the bytes of each plane over `count` subspaces for a row and AT_ONCE groups, added to sums
// [AT_ONCE][PLANES][2]: all bytes as words (their overflow included), then the odd bytes. What is loaded of the tables
// serves all groups: of loads there are two a cycle, and they are what bounds this loop.
//   codes [count][pitch]; tables [count][PLANES][64 * PARTS].
template <int AT_ONCE, int PARTS>
PQ_INLINE void sum_groups(const __m512i* codes, int64_t pitch, int64_t count, const uint8_t* tables, bool begin,
                          __m512i* sums, Aheads& ahead) {
    __m512i sum[AT_ONCE][PLANES][2];
#pragma GCC unroll 2
    for (int g = 0; g < AT_ONCE; g++)
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) sum[g][p][i] = begin ? _mm512_setzero_si512() : sums[(g * PLANES + p) * 2 + i];
    for (int64_t s = 0; s < count; s++, codes += pitch, tables += PLANES * GROUP * PARTS) {
        ahead.fetch();
        Where w[AT_ONCE];
#pragma GCC unroll 2
        for (int g = 0; g < AT_ONCE; g++) w[g] = where<PARTS>(codes[g]);
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; p++) {
            const Plane<PARTS> plane(tables + p * GROUP * PARTS);
#pragma GCC unroll 2
            for (int g = 0; g < AT_ONCE; g++) {
                const __m512i x = plane.at(codes[g], w[g]);
                add_words(sum[g][p][0], x);
                add_words(sum[g][p][1], _mm512_srli_epi16(x, 8));
            }
        }
    }
#pragma GCC unroll 2
    for (int g = 0; g < AT_ONCE; g++)
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) sums[(g * PLANES + p) * 2 + i] = sum[g][p][i];
}

// The same for all groups: sums [groups][PLANES][2]. `next` is fetched on the way, in (groups + 1) / 2 * count turns.
template <int PARTS>
PQ_NOINLINE void sum_planes(const __m512i* codes, int64_t groups, int64_t count, const uint8_t* tables, bool begin,
                            __m512i* sums, Aheads& next) {
    Aheads ahead = next;
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2)
        sum_groups<2, PARTS>(codes + g, groups, count, tables, begin, sums + g * PLANES * 2, ahead);
    if (g < groups) sum_groups<1, PARTS>(codes + g, groups, count, tables, begin, sums + g * PLANES * 2, ahead);
    next = ahead;
}

// Scores of a row from such sums, 64 in the order of planes.h.
PQ_INLINE void scores_of(const __m512i* sums, int64_t m, float step, float offset, __m512 scores[4]) {
    const __m512i words = _mm512_set1_epi32(0xffff);
    __m512i total[4] = {};
    for (int p = PLANES - 1; p >= 0; p--) {
        const __m512i odd = sums[p * 2 + 1], even = _mm512_sub_epi16(sums[p * 2], _mm512_slli_epi16(odd, 8));
        const __m512i part[4] = {_mm512_and_si512(even, words), _mm512_and_si512(odd, words),
                                 _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odd, 16)};
        for (int j = 0; j < 4; j++) total[j] = _mm512_add_epi32(_mm512_slli_epi32(total[j], 8), part[j]);
    }
    const __m512i middle = _mm512_set1_epi32(int32_t(uint32_t(m) << 23));
    for (int j = 0; j < 4; j++)
        scores[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(total[j], middle)), _mm512_set1_ps(step),
                                    _mm512_set1_ps(offset));
}

}  // namespace pq
#endif
