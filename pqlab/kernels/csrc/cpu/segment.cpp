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

// x [d] turned back by the angles of turn: cosines [d / 2], sines [d / 2] of the pairs (i, i + d / 2).
void turn_back(float* x, const float* turn, int64_t d) {
    const int64_t half = d / 2;
    const auto turned = [&](auto low, auto high, auto cos, auto sin, const auto& put, int64_t i) {
        put(x + i, low * cos + high * sin);
        put(x + i + half, high * cos - low * sin);
    };
    int64_t i = 0;
    for (; i + WIDTH <= half; i += WIDTH)
        turned(load(x + i), load(x + i + half), load(turn + i), load(turn + half + i), store, i);
    for (; i < half; i++)
        turned(x[i], x[i + half], turn[i], turn[half + i], [](float* to, float y) { *to = y; }, i);
}

void divide(float* x, const float* by, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(x + i, load(x + i) / load(by + i));
    for (; i < n; i++) x[i] /= by[i];
}

// In eight sums: one alone is a chain of additions, each of which waits for the one before.
float dot(const float* x, const float* y, int64_t n) {
    f8 sums = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) sums += load(x + i) * load(y + i);
    float sum = sum_of(sums);
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
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
    const int64_t first_span = span_of_tile(segment.first_tile);
    for (int64_t tile = segment.first_tile, n; tile < segment.last_tile; tile += n) {
        n = std::min({TILES, segment.last_tile - tile, span_end(tile) - tile});
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
        const Block block{int(tokens), s.kt.data(), nullptr, s.v.data(), 0, width};
        attend_span(span_of_tile(tile) - first_span, block, s, rows);
    }
}

void Decode::run_exact(int64_t pair, Scratch& s, const Rows& rows) const {
    const int64_t d = a.head_dim;
    const int32_t* length = a.lengths + pair / a.heads * 3;
    const auto range = [&](const void* k, const void* v, int64_t slots, int64_t begin, int64_t end, int64_t span) {
        for (int64_t first = begin; first < end; first += BLOCK) {
            const int n = int(std::min<int64_t>(BLOCK, end - first));
            attend_span(span, exact_block(k, v, (pair * slots + first) * d, n, s), s, rows);
        }
    };
    if (a.span) ask(pair, 0, 0, s);
    range(a.sink_k, a.sink_v, a.num_sinks, 0, length[0], 0);
    if (!length[2]) return;
    const int64_t first = length[1], end = first + length[2], first_span = span_of(first);
    if (a.span) ask(pair, first_span, span_of(end - 1), s);
    for (int64_t u = first, n; u < end; u += n) {  // runs of slots of one span: the ring is one or two of them
        const int64_t slot = u % a.window_slots;
        n = std::min(end - u, a.window_slots - slot);
        if (a.span) n = std::min(n, a.span - u % a.span);
        range(a.window_k, a.window_v, a.window_slots, slot, slot + n, span_of(u) - first_span);
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
    const auto put = [&](const void* from, const void* to, const Map& map, const float* scale, const float* shift,
                         const float* turn) {
        s.mapped.resize(size_t(2 * d));
        float *x = s.mapped.data(), *y = x + d;
        to_float(x, from, pair * d, d, a.dtype);
        if (turn) turn_back(x, turn, d);
        if (map) multiply(x, 1, map, d, false, y);
        if (scale)
            for (int64_t i = 0; i < d; i++) y[i] = y[i] * scale[i] + shift[i];
        from_float(const_cast<void*>(to), (pair * slots + place) * d, map ? y : x, d, a.dtype);
    };
    const float* turn = a.turns && !sink ? a.turns + span_of(token - a.num_sinks) * d : nullptr;
    put(a.k, sink ? a.sink_k : a.window_k, k_forward(pair), of_pair(a.k_scale, pair), of_pair(a.k_shift, pair), turn);
    put(a.v, sink ? a.sink_v : a.window_v, v_forward(pair), nullptr, nullptr, nullptr);
}

void Decode::ask(int64_t pair, int64_t first, int64_t last, Scratch& s) const {
    const int64_t d = a.head_dim, floats = group_rows * d, all = (last + 1 - first) * floats;
    s.q.resize(size_t(all));
    for (int64_t r = first; r <= last; r++) {
        const int64_t given = a.turns ? pair : r * a.batch * a.heads + pair;
        float* q = s.q.data() + (r - first) * floats;
        to_float(q, a.q, given * floats, floats, a.dtype, float(a.scale));
        if (a.turns && r)
            for (int64_t at = 0; at < floats; at += d) turn_back(q + at, a.turns + r * d, d);
    }
    if (a.offsets) {
        s.offsets.resize(size_t(all / d));
        for (int64_t r = first; r <= last; r++)
            std::copy_n(a.offsets + (r * a.batch * a.heads + pair) * group_rows, group_rows,
                        s.offsets.data() + (r - first) * group_rows);
    }
    const Map map = k_backward(pair);
    if (!map) return;
    s.mapped.resize(size_t(all));
    if (are_many(all / d, d)) multiply_many(s.q.data(), all / d, map, d, s.map, s.mapped.data());
    else multiply(s.q.data(), all / d, map, d, true, s.mapped.data());
    s.q.swap(s.mapped);
    if (const float* scale = of_pair(a.k_scale, pair))
        for (int64_t at = 0; at < all; at += d) divide(s.q.data() + at, scale, d);
    if (!a.turns || !a.k_shift) return;
    s.offsets.resize(size_t(all / d));
    const float* shift = of_pair(a.k_shift, pair);
    for (int64_t at = 0; at < all; at += d) s.offsets[size_t(at / d)] = -dot(s.q.data() + at, shift, d);
}

void Decode::run(const Segment& segment, const Segment* next, Scratch& s, const Rows& rows) const {
    rows.clear();
    const bool codes = segment.first_tile < segment.last_tile;
    if (codes) ask(segment.pair, span_of_tile(segment.first_tile), span_of_tile(segment.last_tile - 1), s);
    else if (!a.span) ask(segment.pair, 0, 0, s);
    if (codes && planes()) {
        if constexpr (PLANE_ROWS > 0) run_planes(segment, next, s, rows);
    } else if (codes && entries()) {
        run_entries(segment, s, rows);
    } else if (codes) {
        run_dense(segment, s, rows);
    }
    if (!segment.exact) return;
    if (a.k) store_token(segment.pair, s);
    run_exact(segment.pair, s, rows);
}

}  // namespace pq
