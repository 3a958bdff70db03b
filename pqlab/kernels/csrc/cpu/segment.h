// What one thread does for a segment: part of the tokens of one (row, kv head), for all query rows that share them.
#pragma once
#include <algorithm>
#include <vector>

#include "api.h"
#include "book.h"
#include "buffer.h"
#include "codes.h"
#include "dense.h"

namespace pq {

constexpr int64_t LOOKUP_ROWS = 4;  // more query rows than this: dequantize blocks instead

struct Segment {
    int64_t pair, first_tile, last_tile;  // coded tiles [first, last)
    bool exact;                           // sinks and window too
};

// Memory of one thread; grows, is kept for the next call.
struct Scratch {
    Buffer<float> q, scores, weights, sums, k, kt, v, k_wide, v_wide;
    BookMemory k_book, v_book;
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
            const int64_t limits[3] = {a.num_sinks, a.table_width * page_tokens, a.window_slots};
            for (int i = 0; i < 3; i++)
                if (row[i] < 0 || row[i] > limits[i]) return PQ_BAD_LENGTHS;
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
    void run_lookup(const Segment& segment, const Book& k, const Book& v, Scratch& s, const Rows& rows) const;
};

}  // namespace pq
