// What one thread does for a segment: part of the tokens of one (row, kv head), for all query rows that share them.
#pragma once
#include <algorithm>
#include <vector>

#include "api.h"
#include "book.h"
#include "buffer.h"
#include "codes.h"
#include "convert.h"
#include "dense.h"
#include "maps.h"
#include "permuted_keys.h"

namespace pq {

constexpr int64_t LOOKUP_ROWS = 4;  // that share a look-up
#ifdef PQ_PERMUTE
constexpr int64_t PLANE_ROWS = 12;  // more query rows than this: dequantize blocks instead
#else
constexpr int64_t PLANE_ROWS = 0;
#endif

struct Segment {
    int64_t pair, first_tile, last_tile;  // coded tiles [first, last)
    bool exact;                           // sinks and window too
};

// Memory of one thread; grows, is kept for the next call.
struct Scratch {
    Buffer<float> q, offsets, mapped, map, by_entry, scores, weights, sums, k, kt, v, k_wide, v_wide;
    BookMemory k_book, v_book;
    Buffer<uint8_t> codes;
    std::vector<const uint8_t*> k_tiles, v_tiles;
#ifdef PQ_PERMUTE
    KeyTables keys;
    Buffer<uint8_t> byte_sums, gathered;
    std::vector<const uint8_t*> unpacked, coming;
#endif
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

    Map k_forward(int64_t pair) const { return Map{a.k_forward, a.k_forward_dtype}.of(pair % a.heads, a.head_dim); }
    Map k_backward(int64_t pair) const { return Map{a.k_backward, a.k_backward_dtype}.of(pair % a.heads, a.head_dim); }
    Map v_forward(int64_t pair) const { return Map{a.v_forward, a.v_forward_dtype}.of(pair % a.heads, a.head_dim); }
    Map v_backward(int64_t pair) const { return Map{a.v_backward, a.v_backward_dtype}.of(pair % a.heads, a.head_dim); }

    // Spans: code index u is asked by the queries of span u / span, sinks by those of span 0.
    int64_t span_of(int64_t index) const { return a.span ? std::min(index / a.span, a.num_spans - 1) : 0; }
    int64_t span_tiles() const { return a.span ? a.span / TILE : INT64_MAX; }
    // One past the last tile of the span of a tile.
    int64_t span_end(int64_t tile) const { return a.span ? (tile / span_tiles() + 1) * span_tiles() : INT64_MAX; }
    int64_t span_of_tile(int64_t tile) const { return span_of(tile * TILE); }

    bool moves() const { return a.offsets || (a.turns && a.k_shift); }
    // Attention of span number `span` of those in s.q. Scores that are all moved by as much are scores beside a maximum
    // that is moved back.
    void attend_span(int64_t span, const Block& block, Scratch& s, const Rows& rows) const {
        const float* moved = s.offsets.data() + span * group_rows;
        if (moves())
            for (int64_t r = 0; r < group_rows; r++) rows.m[r] -= moved[r];
        attend_block(s.q.data() + span * group_rows * a.head_dim, rows, block);
        if (moves())
            for (int64_t r = 0; r < group_rows; r++) rows.m[r] += moved[r];
    }

    // What the keys of a pair are fitted by, [d], or null.
    const float* of_pair(const float* fit, int64_t pair) const { return fit ? fit + pair * a.head_dim : nullptr; }

    int check() const {
        for (int64_t b = 0; b < a.batch; b++) {
            const int32_t* row = a.lengths + b * 3;
            const int64_t limits[3] = {a.num_sinks, a.table_width * page_tokens, a.window_slots};
            for (int i = 0; i < 3; i++)
                if (row[i] < 0 || row[i] > limits[i]) return PQ_BAD_LENGTHS;
            for (int64_t page = 0; page * page_tokens < row[1]; page++) {
                const int32_t id = a.page_table[b * a.table_width + page];
                if (id < 0 || id >= a.max_pages) return PQ_BAD_PAGE;
            }
            if (!a.k) continue;
            const int32_t* old = a.before + b * 3;
            const int64_t token = int64_t(old[0]) + old[1] + old[2];
            if (token < 0 || (token >= a.num_sinks && a.window_slots == 0)) return PQ_BAD_LENGTHS;
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

    // s.q becomes the queries [last + 1 - first][group_rows][d] of spans [first, last], as they ask: turned, mapped, scaled;
    // s.offsets what is added to their scores, [last + 1 - first][group_rows].
    void ask(int64_t pair, int64_t first, int64_t last, Scratch& s) const;
    // The new token of a pair, mapped, to its sink or to its slot of the ring.
    void store_token(int64_t pair, Scratch& s) const;
    // `next`: what the same thread does after this, or null. The segment with the exact tokens stores the new one.
    void run(const Segment& segment, const Segment* next, Scratch& s, const Rows& rows) const;
    void run_exact(int64_t pair, Scratch& s, const Rows& rows) const;
    Block exact_block(const void* k, const void* v, int64_t at, int n, Scratch& s) const;
    // The codes of a segment.
    bool planes() const {
        const bool prepared = !a.span || a.k_book_dtype == PQ_FLOAT16;  // of spans: KeyPlanes, else there are tables
        return PLANE_ROWS && prepared && group_rows <= PLANE_ROWS && a.k_m <= MAX_SUBSPACES;
    }
    bool entries() const { return group_rows <= LOOKUP_ROWS && a.k_m <= MAX_SUBSPACES; }
    void run_planes(const Segment& segment, const Segment* next, Scratch& s, const Rows& rows) const;  // few rows
    void run_entries(const Segment& segment, Scratch& s, const Rows& rows) const;                      // few rows
    void run_dense(const Segment& segment, Scratch& s, const Rows& rows) const;

    Book k_book(int64_t pair, Scratch& s) const {
        const int64_t size = a.head_dim << a.k_nbits;
        const float* wide = wide_book(a.k_books, pair % a.heads * size, size, a.k_book_dtype, s.k_wide);
        return make_book(wide, a.k_m, a.k_nbits, a.head_dim / a.k_m, s.k_book);
    }
    Book v_book(int64_t pair, Scratch& s) const {
        const int64_t size = a.head_dim << a.v_nbits;
        const float* wide = wide_book(a.v_books, pair % a.heads * size, size, a.v_book_dtype, s.v_wide);
        return make_book(wide, a.v_m, a.v_nbits, a.head_dim / a.v_m, s.v_book);
    }
#ifdef PQ_PERMUTE
    bool half_keys() const { return a.k_book_dtype == PQ_FLOAT16; }
    int64_t key_bytes() const {
        return a.span ? KeyPlanes::bytes(a.head_dim, a.k_nbits) : KeyBook::bytes(a.head_dim, a.k_nbits, half_keys());
    }
    uint8_t* prepared_keys(int64_t pair) const { return (uint8_t*)a.k_prepared + pair % a.heads * key_bytes(); }
    KeyBook key_book(int64_t pair) const { return {prepared_keys(pair), a.head_dim, half_keys()}; }
    ValueBook value_book(int64_t pair) const {
        return {(char*)a.v_prepared + pair % a.heads * ValueBook::bytes(a.head_dim, a.v_nbits), a.head_dim};
    }
#endif
};

}  // namespace pq
