// The value side of a decode step over codes in any byte order, for `bench layout`: 8-bit codes, two dimensions a
// subspace. A tile of 16 tokens is read subspace by subspace, as the kernels of this project do; where the codes of a
// subspace lie side by side, eight of them come with one load, elsewhere each is a load. `by_token` is the same sum with
// the loops the other way round, which suits row-major codes. Knows nothing of torch.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int TILE = 16, CHUNK = 16;  // tokens; subspaces whose tables (32 KiB) are walked at a time
constexpr int64_t BLOCK = 512;        // tokens that pass by a chunk
typedef float f8 __attribute__((vector_size(32)));
typedef double d4 __attribute__((vector_size(32)));
typedef double pair __attribute__((may_alias));  // two floats: an entry of a codebook

}  // namespace

struct orders_args {
    const uint8_t* pages;   // [max_pages][heads][page_size * m], in some order
    const int64_t* ids;     // [num_pages], the pages in token order
    const float* books;     // [heads][m][256][2]
    const float* weights;   // [num_pages * page_size]
    float* out;             // [parts][heads][m][2]: sums over the pages of a part
    int64_t num_pages, heads, m, page_size, parts;
    int64_t tile_stride, token_stride, subspace_stride;  // bytes between neighbours inside a page and head
    int64_t by_token;
};

namespace {

inline f8 four(const float* a, const float* b, const float* c, const float* d) {
    return (f8)(d4){*(const pair*)a, *(const pair*)b, *(const pair*)c, *(const pair*)d};
}

// 16 tokens of one subspace: their codes' entries times their weights, four tokens to a vector.
template <bool SIDE_BY_SIDE>
inline f8 tile_sum(const uint8_t* codes, int64_t stride, const float* table, const f8* weights) {
    unsigned c[TILE];
    if constexpr (SIDE_BY_SIDE) {
        uint64_t half[2];
        std::memcpy(half, codes, 16);
        for (int t = 0; t < TILE; t++) c[t] = half[t / 8] >> 8 * (t % 8) & 255;
    } else {
        for (int t = 0; t < TILE; t++) c[t] = codes[t * stride];
    }
    f8 sum[2] = {};
    for (int i = 0; i < 4; i++)
        sum[i % 2] += weights[i] * four(table + 2 * c[4 * i], table + 2 * c[4 * i + 1], table + 2 * c[4 * i + 2],
                                        table + 2 * c[4 * i + 3]);
    return sum[0] + sum[1];
}

template <bool SIDE_BY_SIDE>
void by_subspace(const orders_args& a, const uint8_t* codes, const float* books, const float* weights, int64_t first,
                 f8* sums) {
    for (int64_t tile = 0; tile < a.page_size / TILE; tile++) {
        f8 w[4];
        for (int i = 0; i < 4; i++) {
            const float* from = weights + tile * TILE + 4 * i;
            w[i] = f8{from[0], from[0], from[1], from[1], from[2], from[2], from[3], from[3]};
        }
        for (int64_t m = first; m < std::min(first + CHUNK, a.m); m++)
            sums[m] += tile_sum<SIDE_BY_SIDE>(codes + tile * a.tile_stride + m * a.subspace_stride, a.token_stride,
                                              books + m * 512, w);
    }
}

// Four subspaces to a vector; their codes lie side by side. `sums` are those of [first, first + CHUNK) / 4.
void by_token(const orders_args& a, const uint8_t* codes, const float* books, const float* weights, int64_t first,
              f8* sums) {
    f8 sum[CHUNK / 4];
    std::copy(sums + first / 4, sums + first / 4 + CHUNK / 4, sum);
    for (int64_t t = 0; t < a.page_size; t++) {
        const uint8_t* here = codes + t / TILE * a.tile_stride + t % TILE * a.token_stride + first;
        uint64_t half[2];
        std::memcpy(half, here, 16);
        const float* table = books + first * 512;
        const f8 w = f8{} + weights[t];
        for (int i = 0; i < CHUNK / 4; i++) {
            unsigned c[4];
            for (int j = 0; j < 4; j++) c[j] = half[i / 2] >> 8 * (4 * (i % 2) + j) & 255;
            sum[i] += w * four(table + 2 * c[0], table + 512 + 2 * c[1], table + 1024 + 2 * c[2], table + 1536 + 2 * c[3]);
            table += 4 * 512;
        }
    }
    std::copy(sum, sum + CHUNK / 4, sums + first / 4);
}

void sum_part(const orders_args& a, int64_t part, int64_t head) {
    const int64_t begin = a.num_pages * part / a.parts, end = a.num_pages * (part + 1) / a.parts;
    const int64_t together = std::max<int64_t>(1, BLOCK / a.page_size), head_bytes = a.page_size * a.m;
    const float* books = a.books + head * a.m * 512;
    std::vector<f8> sums(size_t(a.m), f8{});
    for (int64_t block = begin; block < end; block += together)
        for (int64_t first = 0; first < a.m; first += CHUNK)
            for (int64_t page = block; page < std::min(block + together, end); page++) {
                const uint8_t* codes = a.pages + (a.ids[page] * a.heads + head) * head_bytes;
                const float* weights = a.weights + page * a.page_size;
                if (a.by_token)
                    by_token(a, codes, books, weights, first, sums.data());
                else if (a.token_stride == 1)
                    by_subspace<true>(a, codes, books, weights, first, sums.data());
                else
                    by_subspace<false>(a, codes, books, weights, first, sums.data());
            }
    float* out = a.out + (part * a.heads + head) * a.m * 2;
    if (a.by_token) {
        std::memcpy(out, sums.data(), size_t(a.m) * 8);
        return;
    }
    for (int64_t m = 0; m < a.m; m++)
        for (int i = 0; i < 2; i++) {
            const f8 s = sums[size_t(m)];
            out[2 * m + i] = (s[i] + s[i + 2]) + (s[i + 4] + s[i + 6]);
        }
}

}  // namespace

extern "C" void pqlab_orders(const orders_args* a) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t part = 0; part < a->parts; part++)
        for (int64_t head = 0; head < a->heads; head++) sum_part(*a, part, head);
}

// Only reads: the sum of all bytes as 64-bit words, by as many threads.
extern "C" uint64_t pqlab_read(const uint64_t* p, int64_t words) {
    uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
    for (int64_t i = 0; i < words; i++) sum += p[i];
    return sum;
}
