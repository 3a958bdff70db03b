// A segment with many query rows, its exact tokens, and the choice between the ways.
#include "segment.h"

#include "convert.h"
#include "lookup.h"

namespace pq {
namespace {

// Entries of padded books into out[dim * dim_stride + token * token_stride].
void dequantize_padded(const Book& book, const uint8_t* codes, int64_t n, float* out, int64_t dim_stride,
                       int64_t token_stride) {
    for (int64_t e = 0; e < book.entries(); e++)
        for (int64_t i = 0; i < book.width && book.dim(e, i) >= 0; i++)
            for (int64_t t = 0; t < n; t++)
                out[book.dim(e, i) * dim_stride + t * token_stride] =
                    book.table[(e * book.centroids + codes[book.place[e] * CODE_STRIDE + t]) * book.width + i];
}

// Keys as columns kt [d][BLOCK], values as rows v [BLOCK][width].
void dequantize_keys(const Book& book, const uint8_t* codes, int64_t n, float* kt) {
    if (book.padded()) return dequantize_padded(book, codes, n, kt, BLOCK, 1);
    const auto call = [&](auto f) { f(codes, n, book.entries(), book.place, book.centroids, book.table, kt, BLOCK); };
    if (book.small) return call(dequantize_columns<1, true>);
    switch (book.width) {
        case 1: return call(dequantize_columns<1, false>);
        case 2: return call(dequantize_columns<2, false>);
        case 4: return call(dequantize_columns<4, false>);
        default: return call(dequantize_columns<8, false>);
    }
}

void dequantize_values(const Book& book, const uint8_t* codes, int64_t n, float* v, int64_t width) {
    if (book.padded()) return dequantize_padded(book, codes, n, v, 1, width);
    const auto call = [&](auto f) { f(codes, n, book.entries(), book.place, book.centroids, book.table, v, width); };
    switch (book.width) {
        case 1: return call(dequantize_rows<1>);
        case 2: return call(dequantize_rows<2>);
        case 4: return call(dequantize_rows<4>);
        default: return call(dequantize_rows<8>);
    }
}

}  // namespace

// Codes for many query rows: a block is dequantized once, then it is a small matrix product (dense.h).
void Decode::run_dense(const Segment& segment, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim, width = padded(d);
    const Book k = k_book(segment.pair, s);
    const Book v = v_book(segment.pair, s);
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

void Decode::run_exact(int64_t pair, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim;
    const int32_t* length = a.lengths + pair / a.heads * 3;
    const auto range = [&](const void* k, const void* v, int64_t slots, int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += BLOCK) {
            const int n = int(std::min<int64_t>(BLOCK, end - first));
            attend_block(s.q.data(), rows, exact_block(k, v, (pair * slots + first) * d, n, s));
        }
    };
    range(a.sink_k, a.sink_v, a.num_sinks, 0, length[0]);
    if (length[2]) {  // the ring: one or two runs of slots
        const int64_t begin = length[1] % a.window_slots, end = begin + length[2];
        range(a.window_k, a.window_v, a.window_slots, begin, std::min(end, a.window_slots));
        if (end > a.window_slots) range(a.window_k, a.window_v, a.window_slots, 0, end - a.window_slots);
    }
}

// n consecutive keys and values from element `at` on; read in place where they can be.
Block Decode::exact_block(const void* k, const void* v, int64_t at, int n, Scratch& s) const {
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

void Decode::store_token(int64_t pair, Scratch& s) const {
    const int64_t d = a.head_dim, row = pair / a.heads;
    const int32_t *old = a.before + row * 3, *now = a.lengths + row * 3;
    const int64_t token = int64_t(old[0]) + old[1] + old[2];
    if (int64_t(now[0]) + now[1] + now[2] == token) return;  // a pad: nothing to store
    const bool sink = token < a.num_sinks;
    const int64_t slots = sink ? a.num_sinks : a.window_slots;
    const int64_t place = sink ? token : (token - a.num_sinks) % a.window_slots;
    const auto put = [&](const void* from, const void* to, const Map& map, const float* scale, const float* shift) {
        s.mapped.resize(size_t(2 * d));
        float *x = s.mapped.data(), *y = x + d;
        to_float(x, from, pair * d, d, a.dtype);
        if (map) multiply(x, 1, map, d, false, y);
        if (scale)
            for (int64_t i = 0; i < d; i++) y[i] = y[i] * scale[i] + shift[i];
        from_float(const_cast<void*>(to), (pair * slots + place) * d, map ? y : x, d, a.dtype);
    };
    put(a.k, sink ? a.sink_k : a.window_k, k_forward(pair), of_pair(a.k_scale, pair), of_pair(a.k_shift, pair));
    put(a.v, sink ? a.sink_v : a.window_v, v_forward(pair), nullptr, nullptr);
}

void Decode::run(const Segment& segment, const Segment* next, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim;
    rows.clear();
    s.q.resize(size_t(group_rows * d));
    to_float(s.q.data(), a.q, segment.pair * group_rows * d, group_rows * d, a.dtype, float(a.scale));
    if (const Map map = k_backward(segment.pair)) {
        s.mapped.resize(size_t(group_rows * d));
        multiply(s.q.data(), group_rows, map, d, true, s.mapped.data());
        s.q.swap(s.mapped);
        if (const float* scale = of_pair(a.k_scale, segment.pair))
            for (int64_t at = 0; at < group_rows * d; at += d)
                for (int64_t i = 0; i < d; i++) s.q[size_t(at + i)] /= scale[i];
    }
    if (segment.first_tile < segment.last_tile) {
        if (few_rows()) run_lookup(segment, next, s, rows);
        else run_dense(segment, s, rows);
    }
    if (!segment.exact) return;
    if (a.k) store_token(segment.pair, s);
    run_exact(segment.pair, s, rows);
}

}  // namespace pq
