// Codes for 1 to 4 query rows: entries are looked up, a block of tokens at a time (lookup.h).
#include "lookup.h"
#include "segment.h"

namespace pq {
namespace {

template <int ROWS>
void score(const uint8_t* codes, int64_t tiles, const Book& book, const float* const* q, float* scores, Ahead next) {
    const auto call = [&](auto f) {
        f(codes, tiles, book.entries(), book.place, book.centroids, book.table, q, scores, next);
    };
    if (book.small) return call(score_codes<1, ROWS, true>);
    switch (book.width) {
        case 1: return call(score_codes<1, ROWS, false>);
        case 2: return call(score_codes<2, ROWS, false>);
        case 4: return call(score_codes<4, ROWS, false>);
        default: return call(score_codes<8, ROWS, false>);
    }
}

template <int ROWS>
void add(const uint8_t* codes, int64_t tiles, const Book& book, const float* weights, float* sums, Ahead next) {
    const auto call = [&](auto f) {
        f(codes, tiles, book.entries(), book.place, book.centroids, book.table, weights, sums, next);
    };
    if (book.small) return call(add_values<1, ROWS, true>);
    switch (book.width) {
        case 1: return call(add_values<1, ROWS, false>);
        case 2: return call(add_values<2, ROWS, false>);
        case 4: return call(add_values<4, ROWS, false>);
        default: return call(add_values<8, ROWS, false>);
    }
}

// Scores to weights, each as often as `add_values` wants it.
float weigh(float* scores, int n, float& m, float& l, float* weights, int64_t repeats) {
    switch (repeats) {
        case 2: return softmax_row<2>(scores, n, m, l, weights);
        case 4: return softmax_row<4>(scores, n, m, l, weights);
        default: return softmax_row<1>(scores, n, m, l, weights);
    }
}

template <int ROWS>
void attend_codes(const Decode& job, const Segment& segment, const Book& k, const Book& v, Scratch& s,
                  const Rows& rows) {
    const pq_decode_args& a = job.a;
    const int64_t repeats = v.width == 8 ? 1 : v.width, d = a.head_dim, width = padded(d);
    s.scores.resize(size_t(ROWS * BLOCK_TOKENS));
    s.weights.resize(size_t(ROWS * BLOCK_TOKENS * repeats));
    s.sums.assign(size_t(ROWS * v.entries() * WIDTH), 0.f);
    s.codes.resize(size_t(std::max(a.k_m, a.v_m) * CODE_STRIDE));
    const int64_t first_span = job.span_of_tile(segment.first_tile);
    const int64_t spans = job.span_of_tile(segment.last_tile - 1) + 1 - first_span, q_floats = k.entries() * k.width;
    const float* by_entry = s.q.data();  // [spans][ROWS][entries][width], zero in a book's padding
    if (k.padded()) {
        s.by_entry.assign(size_t(spans * ROWS * q_floats), 0.f);
        by_entry = s.by_entry.data();
        for (int64_t r = 0; r < spans * ROWS; r++)
            for (int64_t e = 0; e < k.entries(); e++)
                for (int64_t i = 0; i < k.width; i++)
                    if (k.dim(e, i) >= 0)
                        s.by_entry[size_t(r * q_floats + e * k.width + i)] = s.q[size_t(r * d + k.dim(e, i))];
    }

    float m[ROWS], l[ROWS];
    for (int r = 0; r < ROWS; r++) m[r] = -INFINITY, l[r] = 0.f;
    int64_t n = std::min(BLOCK_TILES, segment.last_tile - segment.first_tile);
    job.find_k(segment.pair, segment.first_tile, n, s.k_tiles);
    for (int64_t tile = segment.first_tile; tile < segment.last_tile; tile += n) {
        n = int64_t(s.k_tiles.size());
        const int64_t tokens = std::min(n * TILE, job.coded(segment.pair) - tile * TILE);
        job.find_v(segment.pair, tile, n, s.v_tiles);
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.k_tiles.data(), n, a.k_m, int(a.k_nbits));
        const Ahead values{s.v_tiles.data(), n, a.v_m * 2 * a.v_nbits};
        const float* queries[BLOCK_TILES];
        for (int64_t i = 0; i < n; i++)
            queries[i] = by_entry + (job.span_of_tile(tile + i) - first_span) * ROWS * q_floats;
        score<ROWS>(s.codes.data(), n, k, queries, s.scores.data(), values);
        for (int64_t i = 0; job.moves() && i < n; i++)
            for (int r = 0; r < ROWS; r++) {
                const float moved = s.offsets[size_t((job.span_of_tile(tile + i) - first_span) * ROWS + r)];
                float* p = s.scores.data() + r * BLOCK_TOKENS + i * TILE;
                for (int64_t t = 0; t < TILE; t++) p[t] += moved;
            }
        for (int r = 0; r < ROWS; r++) {
            float* p = s.scores.data() + r * BLOCK_TOKENS;
            for (int64_t t = tokens; t < n * TILE; t++) p[t] = -INFINITY;
            float* weights = s.weights.data() + r * BLOCK_TOKENS * repeats;
            const float factor = weigh(p, int(n * TILE), m[r], l[r], weights, repeats);
            if (factor != 1.f)
                for (int64_t e = 0; e < v.entries(); e++) {
                    float* sum = s.sums.data() + (e * ROWS + r) * WIDTH;
                    store(sum, load(sum) * splat(factor));
                }
        }
        job.find_k(segment.pair, tile + n, std::min(BLOCK_TILES, segment.last_tile - tile - n), s.k_tiles);
        const Ahead next{s.k_tiles.data(), int64_t(s.k_tiles.size()), a.k_m * 2 * a.k_nbits};
        unpack_tiles(s.codes.data(), CODE_STRIDE, s.v_tiles.data(), n, a.v_m, int(a.v_nbits));
        add<ROWS>(s.codes.data(), n, v, s.weights.data(), s.sums.data(), next);
    }
    for (int r = 0; r < ROWS; r++) {
        rows.m[r] = m[r];
        rows.l[r] = l[r];
        float* acc = rows.acc + r * width;
        for (int64_t e = 0; e < v.entries(); e++)
            for (int64_t lane = 0; lane < WIDTH; lane++)
                if (const int64_t dim = v.dim(e, lane % v.width); dim >= 0)
                    acc[dim] += s.sums[size_t((e * ROWS + r) * WIDTH + lane)];
    }
}

}  // namespace

void Decode::run_entries(const Segment& segment, Scratch& s, const Rows& rows) const {
    const Book k = k_book(segment.pair, s);
    const Book v = v_book(segment.pair, s);
    switch (rows.count) {
        case 1: return attend_codes<1>(*this, segment, k, v, s, rows);
        case 2: return attend_codes<2>(*this, segment, k, v, s, rows);
        case 3: return attend_codes<3>(*this, segment, k, v, s, rows);
        default: return attend_codes<4>(*this, segment, k, v, s, rows);
    }
}

}  // namespace pq
