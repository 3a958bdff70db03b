// Nearest centroid of every subvector (the `encode` and `encode_pages_` of kernels/ops.py).
//
//   code = argmin_c sum_i (x_i - c_i)^2, the lowest c on a tie
//
// 32 tokens at a time: four vectors of eight tokens pass along all centroids, each of which is broadcast once. The
// distance is computed as it stands and not as |c|^2 - 2xc, which is quicker by a third but loses small distances to
// rounding: a vector that is a centroid has to find itself.
#include <algorithm>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "api.h"
#include "buffer.h"
#include "codes.h"
#include "convert.h"

namespace pq {
namespace {

constexpr int STRIP = 32;  // tokens
constexpr int VECTORS = STRIP / WIDTH;
constexpr int64_t MIN_CODES = 512;  // per thread

// The best so far of 32 tokens.
struct Best {
    f8 distance[VECTORS];
    i8 index[VECTORS];
};

// Centroids c .. c + AT_ONCE - 1 against 32 tokens, xt [dims][32]; book [centroids][dims].
template <int DIMS, int AT_ONCE>  // DIMS 0: any
PQ_INLINE void compare(const float* xt, const float* book, int64_t c, int64_t dims, Best& best) {
    f8 distance[AT_ONCE][VECTORS] = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < (DIMS ? DIMS : dims); i++) {
        f8 ci[AT_ONCE];
#pragma GCC unroll 2
        for (int a = 0; a < AT_ONCE; a++) ci[a] = splat(book[(c + a) * dims + i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const f8 x = load(xt + i * STRIP + v * WIDTH);
#pragma GCC unroll 2
            for (int a = 0; a < AT_ONCE; a++) distance[a][v] += (x - ci[a]) * (x - ci[a]);
        }
    }
#pragma GCC unroll 2
    for (int a = 0; a < AT_ONCE; a++) {
        const i8 number = i8{} + int32_t(c + a);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const i8 closer = distance[a][v] < best.distance[v];
#ifdef PQ_AVX2
            best.distance[v] = (f8)_mm256_min_ps((__m256)distance[a][v], (__m256)best.distance[v]);
            best.index[v] = (i8)_mm256_blendv_epi8((__m256i)best.index[v], (__m256i)number, (__m256i)closer);
#else
            best.distance[v] = closer ? distance[a][v] : best.distance[v];
            best.index[v] = closer ? number : best.index[v];
#endif
        }
    }
}

// codes[token] for 32 tokens. Wide subvectors take two centroids at a time, which share the loads of x.
template <int DIMS>
PQ_NOINLINE void nearest(const float* xt, const float* book, int64_t centroids, int64_t dims, uint8_t* codes) {
    constexpr int AT_ONCE = DIMS == 0 || DIMS > 4 ? 2 : 1;
    Best best;
    for (int v = 0; v < VECTORS; v++) best.distance[v] = splat(INFINITY), best.index[v] = i8{};
    int64_t c = 0;
    for (; c + AT_ONCE <= centroids; c += AT_ONCE) compare<DIMS, AT_ONCE>(xt, book, c, dims, best);
    if (c < centroids) compare<DIMS, 1>(xt, book, c, dims, best);
    for (int t = 0; t < STRIP; t++) codes[t] = uint8_t(best.index[t / WIDTH][t % WIDTH]);
}

#ifdef PQ_AVX2
// Fused for certain: a distance that is computed again has to have the same bits.
PQ_INLINE f8 add_square(f8 sum, f8 x) { return (f8)_mm256_fmadd_ps((__m256)x, (__m256)x, (__m256)sum); }

// One token, x [DIMS][32], against the 8 centroids of a block.
template <int DIMS>
PQ_INLINE f8 distances(const float* block, const float* x) {
    f8 c[2] = {load(block), load(block + (DIMS - 1) * WIDTH)}, sum = {};
    if constexpr (DIMS == 2) split_pairs(c[0], c[1]);
    for (int i = 0; i < DIMS; i++) sum = add_square(sum, splat(x[i * STRIP]) - c[i]);
    return sum;
}

// The same for one or two dimensions, of which noting the nearest so far takes half of the time: only its block of 8
// centroids is noted, and each token looks there for its distance in the end.
template <int DIMS>
PQ_NOINLINE void nearest_narrow(const float* xt, const float* book, int64_t centroids, uint8_t* codes) {
    alignas(32) float best[STRIP];
    alignas(32) int32_t block[STRIP] = {};
    std::fill(best, best + STRIP, INFINITY);
    for (int64_t first = 0; first < centroids; first += WIDTH) {
        f8 least[VECTORS];
        for (int v = 0; v < VECTORS; v++) least[v] = splat(INFINITY);
        for (int64_t c = first; c < first + WIDTH; c++) {
            f8 distance[VECTORS] = {};
#pragma GCC unroll 2
            for (int i = 0; i < DIMS; i++) {
                const f8 ci = splat(book[c * DIMS + i]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    distance[v] = add_square(distance[v], load(xt + i * STRIP + v * WIDTH) - ci);
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) least[v] = (f8)_mm256_min_ps((__m256)distance[v], (__m256)least[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const f8 before = load(best + v * WIDTH);
            const __m256i closer = (__m256i)(least[v] < before), number = _mm256_set1_epi32(int(first));
            __m256i* at = (__m256i*)block + v;
            _mm256_store_si256(at, _mm256_blendv_epi8(_mm256_load_si256(at), number, closer));
            store(best + v * WIDTH, (f8)_mm256_min_ps((__m256)least[v], (__m256)before));
        }
    }
    for (int t = 0; t < STRIP; t++) {
        const f8 all = distances<DIMS>(book + block[t] * DIMS, xt + t);
        const int found = _mm256_movemask_ps((__m256)(all == splat(best[t])));  // 0: x is not a number
        codes[t] = uint8_t(block[t] + (found ? __builtin_ctz(unsigned(found)) : 0));
    }
}
#endif

void nearest(const float* xt, const float* book, int64_t centroids, int64_t dims, uint8_t* codes) {
#ifdef PQ_AVX2
    const bool narrow = centroids >= 128 && centroids % WIDTH == 0;  // fewer do not pay for the look into the block
    if (narrow && dims == 1) return nearest_narrow<1>(xt, book, centroids, codes);
    if (narrow && dims == 2) return nearest_narrow<2>(xt, book, centroids, codes);
#endif
    switch (dims) {
        case 1: return nearest<1>(xt, book, centroids, 1, codes);
        case 2: return nearest<2>(xt, book, centroids, 2, codes);
        case 4: return nearest<4>(xt, book, centroids, 4, codes);
        case 8: return nearest<8>(xt, book, centroids, 8, codes);
        default: return nearest<0>(xt, book, centroids, dims, codes);
    }
}

// Rows x[first .. first + n) of a group, transposed: xt [d][32], zero from column n on.
void load_strip(const pq_encode_args& a, int64_t group, int64_t first, int n, float* row, float* xt) {
    const int64_t d = a.head_dim;
    std::fill(xt, xt + d * STRIP, 0.f);
    for (int t = 0; t < n; t++) {
        to_float(row, a.x, (group * a.n + first + t) * d, d, a.dtype);
        for (int64_t i = 0; i < d; i++) xt[i * STRIP + t] = row[i];
    }
}

// Tokens [first, first + n) of a group into codes [n][m] of the token-major result.
void store_rows(const pq_encode_args& a, int64_t group, int64_t first, int n, int64_t subspace, const uint8_t* codes) {
    uint8_t* out = a.codes + (group * a.n + first) * a.m + subspace;
    for (int t = 0; t < n; t++) out[t * a.m] = codes[t];
}

// Tokens [first, first + n) of a kv head into their pages; codes of other tokens in the same tile stay.
void store_pages(const pq_encode_args& a, int64_t head, int64_t first, int n, int64_t subspace, const uint8_t* codes) {
    for (int t = 0; t < n;) {
        const int64_t slot = a.first_slot + first + t, tile = slot / TILE;
        const int lane = int(slot % TILE), count = std::min(n - t, TILE - lane);
        const int64_t id = a.page_ids[tile / a.tiles];
        const int64_t index = ((id * a.groups + head) * a.tiles + tile % a.tiles) * a.m + subspace;
        uint8_t* packed = a.codes + index * 2 * a.nbits;
        uint8_t merged[TILE];
        if (count < TILE) unpack_codes(merged, packed, int(a.nbits));
        std::memcpy(merged + lane, codes + t, size_t(count));
        if (a.nbits == 8) std::memcpy(packed, merged, TILE);
        else pack_codes(packed, merged, int(a.nbits));
        t += count;
    }
}

int encode(const pq_encode_args& a) {
    const int64_t dims = a.head_dim / a.m;
    // Strips of pages begin at multiples of 32 slots, so that two threads never write to one tile.
    const int64_t shift = a.page_ids ? a.first_slot % STRIP : 0;
    const int64_t strips = a.n ? (shift + a.n + STRIP - 1) / STRIP : 0, jobs = a.groups * strips;
    if (a.page_ids)
        for (int64_t i = 0; i < (a.first_slot + a.n + a.tiles * TILE - 1) / (a.tiles * TILE); i++)
            if (a.page_ids[i] < 0 || a.page_ids[i] >= a.max_pages) return PQ_BAD_PAGE;
    int threads = 1;
#ifdef _OPENMP
    if (!omp_in_parallel()) threads = omp_get_max_threads();
#endif
    const int64_t useful = std::min(jobs, a.groups * a.n * a.m / MIN_CODES);
    threads = int(std::clamp<int64_t>(useful, 1, threads));
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        static thread_local Buffer<float> memory, wide;
        int64_t wide_group = -1;
        const float* books = nullptr;
        try {
            memory.resize(size_t(a.head_dim * (STRIP + 1)));
            if (a.book_dtype != PQ_FLOAT32) wide.reserve(size_t(a.num_centroids * a.head_dim));  // may throw here
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
        float *xt = memory.data(), *row = xt + a.head_dim * STRIP;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs; job++) {
            if (failed) continue;
            const int64_t group = job / strips, strip = job % strips;
            const int64_t first = std::max<int64_t>(0, strip * STRIP - shift);
            const int n = int(std::min(a.n, (strip + 1) * STRIP - shift) - first);
            load_strip(a, group, first, n, row, xt);
            if (group != wide_group) {
                const int64_t size = a.num_centroids * a.head_dim;
                books = wide_book(a.books, group * size, size, a.book_dtype, wide);
                wide_group = group;
            }
            for (int64_t s = 0; s < a.m; s++) {
                uint8_t codes[STRIP];
                nearest(xt + s * dims * STRIP, books + s * a.num_centroids * dims, a.num_centroids, dims, codes);
                if (a.page_ids) store_pages(a, group, first, n, s, codes);
                else store_rows(a, group, first, n, s, codes);
            }
        }
    }
    return failed ? PQ_NO_MEMORY : PQ_OK;
}

}  // namespace
}  // namespace pq

extern "C" int pq_encode(const pq_encode_args* args) {
    try {
        return pq::encode(*args);
    } catch (const std::bad_alloc&) {
        return PQ_NO_MEMORY;
    }
}
