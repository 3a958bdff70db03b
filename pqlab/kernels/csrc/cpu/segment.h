// What one thread does for a segment: part of the tokens of one (row, kv head), for all query rows that share them.
#pragma once
#include <algorithm>
#include <vector>

#include "api.h"
#include "book.h"
#include "buffer.h"
#include "convert.h"
#include "dense.h"
#include "lookup.h"

namespace pq {

constexpr int64_t LOOKUP_ROWS = 4;  // more query rows than this: dequantize blocks instead

struct Segment {
    int64_t pair, first_tile, last_tile;  // coded tiles [first, last)
    bool exact;                           // sinks and window too
};

// Memory of one thread; grows, is kept for the next call.
struct Scratch {
    Buffer<float> q, scores, weights, sums, k, kt, v, k_book, v_book;
    Buffer<uint8_t> codes;
    std::vector<const uint8_t*> k_tiles, v_tiles;
};

// The arguments of one call, and how a segment of it is computed.
struct Decode {
    const pq_decode_args& a;
    int64_t group_rows, page_tokens;

    explicit Decode(const pq_decode_args& args)
        : a(args), group_rows(args.query_heads / args.heads * args.steps), page_tokens(args.tiles * TILE) {}

    int64_t coded(int64_t pair) const { return a.lengths[pair / a.heads * 3 + 1]; }
    int64_t coded_tiles(int64_t pair) const { return (coded(pair) + TILE - 1) / TILE; }
    int64_t exact_tokens(int64_t pair) const {
        const int32_t* row = a.lengths + pair / a.heads * 3;
        return row[0] + row[2];
    }

    int check() const {
        for (int64_t b = 0; b < a.batch; b++) {
            const int32_t* row = a.lengths + b * 3;
            if (row[0] < 0 || row[0] > a.num_sinks || row[1] < 0 || row[1] > a.table_width * page_tokens || row[2] < 0 ||
                row[2] > a.window_slots)
                return PQ_BAD_LENGTHS;
            for (int64_t page = 0; page * page_tokens < row[1]; page++) {
                const int32_t id = a.page_table[b * a.table_width + page];
                if (id < 0 || id >= a.max_pages) return PQ_BAD_PAGE;
            }
        }
        return PQ_OK;
    }

    // Addresses of tiles [first, first + n) of a pair.
    void find(const uint8_t* pages, int64_t tile_bytes, int64_t pair, int64_t first, int64_t n,
              std::vector<const uint8_t*>& out) const {
        out.resize(size_t(n));
        const int32_t* table = a.page_table + pair / a.heads * a.table_width;
        for (int64_t i = 0; i < n; i++) {
            const int64_t page = table[(first + i) / a.tiles] * a.heads + pair % a.heads;
            out[size_t(i)] = pages + (page * a.tiles + (first + i) % a.tiles) * tile_bytes;
        }
    }
    void find_k(int64_t pair, int64_t first, int64_t n, std::vector<const uint8_t*>& out) const {
        find(a.k_pages, a.k_m * 2 * a.k_nbits, pair, first, n, out);
    }
    void find_v(int64_t pair, int64_t first, int64_t n, std::vector<const uint8_t*>& out) const {
        find(a.v_pages, a.v_m * 2 * a.v_nbits, pair, first, n, out);
    }

    void run(const Segment& segment, Scratch& s, const Rows& rows) const;
    void run_exact(int64_t pair, Scratch& s, const Rows& rows) const;
    Block exact_block(const void* k, const void* v, int64_t at, int n, Scratch& s) const;
    void run_dense(const Segment& segment, const Book& k, const Book& v, Scratch& s, const Rows& rows) const;
    template <int ROWS>
    void run_lookup(const Segment& segment, const Book& k, const Book& v, Scratch& s, const Rows& rows,
                    int64_t first_row) const;
};

// -- codes, few rows -------------------------------------------------------------------------------------------------

template <int ROWS>
void score(const uint8_t* codes, int64_t tiles, const Book& book, const float* q, float* scores, Ahead next) {
    const auto call = [&](auto f) {
        f(codes, tiles, book.entries(), book.parts, book.centroids, book.table, q, scores, next);
    };
    switch (book.width) {
        case 1: return call(score_codes<1, ROWS>);
        case 2: return call(score_codes<2, ROWS>);
        case 4: return call(score_codes<4, ROWS>);
        default: return call(score_codes<8, ROWS>);
    }
}

template <int ROWS>
void add(const uint8_t* codes, int64_t tiles, const Book& book, const float* weights, float* sums, Ahead next) {
    const auto call = [&](auto f) {
        f(codes, tiles, book.entries(), book.parts, book.centroids, book.table, weights, sums, next);
    };
    switch (book.width) {
        case 1: return call(add_values<1, ROWS>);
        case 2: return call(add_values<2, ROWS>);
        case 4: return call(add_values<4, ROWS>);
        default: return call(add_values<8, ROWS>);
    }
}

// Scores to weights, each as often as `add_values` wants it.
inline float weigh(float* scores, int n, float& m, float& l, float* weights, int64_t repeats) {
    switch (repeats) {
        case 2: return softmax_row<2>(scores, n, m, l, weights);
        case 4: return softmax_row<4>(scores, n, m, l, weights);
        default: return softmax_row<1>(scores, n, m, l, weights);
    }
}

template <int ROWS>
inline void Decode::run_lookup(const Segment& segment, const Book& k, const Book& v, Scratch& s, const Rows& rows,
                        int64_t first_row) const {
    const int64_t repeats = v.width == 8 ? 1 : v.width, d = a.head_dim, width = padded(d);
    s.scores.resize(size_t(ROWS * BLOCK_TOKENS));
    s.weights.resize(size_t(ROWS * BLOCK_TOKENS * repeats));
    s.sums.assign(size_t(ROWS * v.entries() * WIDTH), 0.f);
    s.codes.resize(size_t(std::max(a.k_m, a.v_m) * CODE_STRIDE));
    Buffer<float>& q = s.k;  // [ROWS][entries][width], zero where the book is padded
    q.assign(size_t(ROWS * k.entries() * k.width), 0.f);
    for (int64_t e = 0; e < k.entries(); e++)
        for (int64_t i = 0; i < k.width; i++)
            if (k.dim(e, i) >= 0)
                for (int r = 0; r < ROWS; r++)
                    q[size_t((r * k.entries() + e) * k.width + i)] = s.q[size_t((first_row + r) * d + k.dim(e, i))];

    float m[ROWS], l[ROWS];
    for (int r = 0; r < ROWS; r++) m[r] = -INFINITY, l[r] = 0.f;
    int64_t n = std::min(BLOCK_TILES, segment.last_tile - segment.first_tile);
    find_k(segment.pair, segment.first_tile, n, s.k_tiles);
    for (int64_t tile = segment.first_tile; tile < segment.last_tile; tile += n) {
        n = int64_t(s.k_tiles.size());
        const int64_t tokens = std::min(n * TILE, coded(segment.pair) - tile * TILE);
        find_v(segment.pair, tile, n, s.v_tiles);
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.k_tiles.data(), n, a.k_m, int(a.k_nbits));
        const Ahead values{s.v_tiles.data(), n, a.v_m * 2 * a.v_nbits};
        score<ROWS>(s.codes.data(), n, k, q.data(), s.scores.data(), values);
        for (int r = 0; r < ROWS; r++) {
            float* p = s.scores.data() + r * BLOCK_TOKENS;
            for (int64_t t = tokens; t < n * TILE; t++) p[t] = -INFINITY;
            const float factor = weigh(p, int(n * TILE), m[r], l[r], s.weights.data() + r * BLOCK_TOKENS * repeats, repeats);
            if (factor != 1.f)
                for (int64_t e = 0; e < v.entries(); e++) {
                    float* sum = s.sums.data() + (e * ROWS + r) * WIDTH;
                    store(sum, load(sum) * splat(factor));
                }
        }
        find_k(segment.pair, tile + n, std::min(BLOCK_TILES, segment.last_tile - tile - n), s.k_tiles);
        const Ahead next{s.k_tiles.data(), int64_t(s.k_tiles.size()), a.k_m * 2 * a.k_nbits};
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.v_tiles.data(), n, a.v_m, int(a.v_nbits));
        add<ROWS>(s.codes.data(), n, v, s.weights.data(), s.sums.data(), next);
    }
    for (int r = 0; r < ROWS; r++) {
        const int64_t row = first_row + r;
        rows.m[row] = m[r];
        rows.l[row] = l[r];
        float* acc = rows.acc + row * width;
        for (int64_t e = 0; e < v.entries(); e++)
            for (int64_t lane = 0; lane < WIDTH; lane++)
                if (const int64_t dim = v.dim(e, lane % v.width); dim >= 0)
                    acc[dim] += s.sums[size_t((e * ROWS + r) * WIDTH + lane)];
    }
}

// -- codes, many rows ------------------------------------------------------------------------------------------------

// Entries of padded books into out[dim * dim_stride + token * token_stride].
inline void dequantize_padded(const Book& book, const uint8_t* codes, int64_t n, float* out, int64_t dim_stride,
                       int64_t token_stride) {
    for (int64_t e = 0; e < book.entries(); e++)
        for (int64_t i = 0; i < book.width && book.dim(e, i) >= 0; i++)
            for (int64_t t = 0; t < n; t++)
                out[book.dim(e, i) * dim_stride + t * token_stride] =
                    book.table[(e * book.centroids + codes[e / book.parts * CODE_STRIDE + t]) * book.width + i];
}

// Keys as columns kt [d][BLOCK], values as rows v [BLOCK][width].
inline void dequantize_keys(const Book& book, const uint8_t* codes, int64_t n, float* kt) {
    if (book.padded()) return dequantize_padded(book, codes, n, kt, BLOCK, 1);
    const auto call = [&](auto f) { f(codes, n, book.entries(), book.parts, book.centroids, book.table, kt, BLOCK); };
    switch (book.width) {
        case 1: return call(dequantize_columns<1>);
        case 2: return call(dequantize_columns<2>);
        case 4: return call(dequantize_columns<4>);
        default: return call(dequantize_columns<8>);
    }
}

inline void dequantize_values(const Book& book, const uint8_t* codes, int64_t n, float* v, int64_t width) {
    if (book.padded()) return dequantize_padded(book, codes, n, v, 1, width);
    const auto call = [&](auto f) { f(codes, n, book.entries(), book.parts, book.centroids, book.table, v, width); };
    switch (book.width) {
        case 1: return call(dequantize_rows<1>);
        case 2: return call(dequantize_rows<2>);
        case 4: return call(dequantize_rows<4>);
        default: return call(dequantize_rows<8>);
    }
}

inline void Decode::run_dense(const Segment& segment, const Book& k, const Book& v, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim, width = padded(d);
    s.kt.resize(size_t(d * BLOCK));
    s.v.assign(size_t(BLOCK * width), 0.f);
    s.codes.resize(size_t(std::max(a.k_m, a.v_m) * CODE_STRIDE));
    constexpr int64_t TILES = BLOCK / TILE;
    for (int64_t tile = segment.first_tile; tile < segment.last_tile; tile += TILES) {
        const int64_t n = std::min(TILES, segment.last_tile - tile);
        find_k(segment.pair, tile, n, s.k_tiles);
        find_v(segment.pair, tile, n, s.v_tiles);
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.k_tiles.data(), n, a.k_m, int(a.k_nbits));
        dequantize_keys(k, s.codes.data(), n * TILE, s.kt.data());
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.v_tiles.data(), n, a.v_m, int(a.v_nbits));
        dequantize_values(v, s.codes.data(), n * TILE, s.v.data(), width);
        const int64_t tokens = std::min(n * TILE, coded(segment.pair) - tile * TILE);
        const int64_t coming = std::min(TILES, segment.last_tile - tile - n);
        find_k(segment.pair, tile + n, coming, s.k_tiles);
        find_v(segment.pair, tile + n, coming, s.v_tiles);
        Ahead{s.k_tiles.data(), coming, a.k_m * 2 * a.k_nbits}.fetch(INT64_MAX);
        Ahead{s.v_tiles.data(), coming, a.v_m * 2 * a.v_nbits}.fetch(INT64_MAX);
        attend_block(s.q.data(), rows, Block{int(tokens), s.kt.data(), nullptr, s.v.data(), 0, width});
    }
}

// -- exact tokens ----------------------------------------------------------------------------------------------------

inline void Decode::run_exact(int64_t pair, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim;
    const int32_t* length = a.lengths + pair / a.heads * 3;
    const auto range = [&](const void* k, const void* v, int64_t slots, int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += BLOCK)
            attend_block(s.q.data(), rows, exact_block(k, v, (pair * slots + first) * d, int(std::min<int64_t>(BLOCK, end - first)), s));
    };
    range(a.sink_k, a.sink_v, a.num_sinks, 0, length[0]);
    if (length[2]) {  // the ring: one or two runs of slots
        const int64_t begin = length[1] % a.window_slots, end = begin + length[2];
        range(a.window_k, a.window_v, a.window_slots, begin, std::min(end, a.window_slots));
        if (end > a.window_slots) range(a.window_k, a.window_v, a.window_slots, 0, end - a.window_slots);
    }
}

// n consecutive keys and values from element `at` on; read in place where they can be.
inline Block Decode::exact_block(const void* k, const void* v, int64_t at, int n, Scratch& s) const {
    const int64_t d = a.head_dim, width = padded(d);
    Block block{n, nullptr, nullptr, nullptr, d, d};
    if (a.dtype == PQ_FLOAT32 && width == d) {
        block.v = (const float*)v + at;
    } else {
        s.v.resize(size_t(BLOCK * width));
        block.v = s.v.data();
        block.v_stride = width;
        for (int t = 0; t < n; t++) {
            to_float(s.v.data() + t * width, v, at + t * d, d, a.dtype);
            std::fill(s.v.data() + t * width + d, s.v.data() + (t + 1) * width, 0.f);
        }
    }
    const bool few = group_rows <= LOOKUP_ROWS && d % WIDTH == 0;
    if (few && a.dtype == PQ_FLOAT32) {
        block.k = (const float*)k + at;
        return block;
    }
    s.k.resize(size_t((BLOCK + 1) * width));
    to_float(s.k.data(), k, at, n * d, a.dtype);
    block.k = s.k.data();
    if (few) return block;
    s.kt.resize(size_t(padded(d) * BLOCK));
    for (int t = 0; t < n; t += WIDTH)
        for (int64_t dim = 0; dim < d; dim += WIDTH) {  // reads past a row's or the block's end stay in the scratch
            f8 square[WIDTH];
            for (int i = 0; i < WIDTH; i++) square[i] = load(s.k.data() + (t + i) * d + dim);
            transpose(square);
            for (int i = 0; i < WIDTH; i++) store(s.kt.data() + (dim + i) * BLOCK + t, square[i]);
        }
    block.kt = s.kt.data();
    return block;
}

// -- segments, and their merging -------------------------------------------------------------------------------------

inline void Decode::run(const Segment& segment, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim, head = segment.pair % a.heads;
    rows.clear();
    s.q.resize(size_t(group_rows * d));
    to_float(s.q.data(), a.q, segment.pair * group_rows * d, group_rows * d, a.dtype, float(a.scale));
    if (segment.first_tile < segment.last_tile) {
        const int64_t k_dm = d / a.k_m, v_dm = d / a.v_m;
        const Book k = make_book(a.k_books + head * d * (int64_t(1) << a.k_nbits), a.k_m, a.k_nbits, k_dm, s.k_book);
        const Book v = make_book(a.v_books + head * d * (int64_t(1) << a.v_nbits), a.v_m, a.v_nbits, v_dm, s.v_book);
        if (group_rows > LOOKUP_ROWS) run_dense(segment, k, v, s, rows);
        else if (group_rows == 1) run_lookup<1>(segment, k, v, s, rows, 0);
        else if (group_rows == 2) run_lookup<2>(segment, k, v, s, rows, 0);
        else if (group_rows == 3) run_lookup<3>(segment, k, v, s, rows, 0);
        else run_lookup<4>(segment, k, v, s, rows, 0);
    }
    if (segment.exact) run_exact(segment.pair, s, rows);
}

}  // namespace pq
