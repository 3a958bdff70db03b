// Codes for few query rows by planes (planes.h), four rows at most at once: what few_rows.cpp does without AVX-512.
//
// A block of tokens is scored (sums of key-table entries, exact in integers), weighed (softmax within the block, three
// signed bytes a weight) and added up (products of weight bytes and value bytes, again exact). The products leave out
// the least: of the lowest byte of the weight all but the upper byte of the value, 2^-24 of the whole.
#include "convert.h"
#include "dequantized_keys.h"
#include "permuted_values.h"
#include "segment.h"

#ifdef PQ_PERMUTE

namespace pq {
namespace {

constexpr int64_t BLOCK_CODES = GROUPS * GROUP, STRIDE = BLOCK_CODES + 64;
// What stays in L1 (32 or 48 KiB) while keys are summed: codes and a row's tables of some subspaces, 16 and 12 KiB.
constexpr int64_t KEY_SUBSPACES = 16;

// A block's codes as the loops read them: 16 of subspace s at tiles[i] + s * pitch, tiles [groups * 4].
struct Codes {
    const uint8_t* const* tiles;
    int64_t pitch;
};

// Where 8-bit codes lie; other codes unpacked. The last tile stands for those that a whole group lacks.
Codes codes_for(std::vector<const uint8_t*>& tiles, int64_t m, int64_t nbits, Scratch& s) {
    while (tiles.size() % GROUP_TILES) tiles.push_back(tiles.back());
    if (nbits == 8) return {tiles.data(), TILE};
    unpack_tiles(s.codes.data(), STRIDE, tiles.data(), int64_t(tiles.size()), m, int(nbits));
    s.unpacked.clear();
    for (size_t i = 0; i < tiles.size(); i++) s.unpacked.push_back(s.codes.data() + i * TILE);
    return {s.unpacked.data(), STRIDE};
}

// What comes after a segment's codes, in pieces to be fetched during its last block: its exact tokens, and the books
// that the next segment of the thread begins with.
struct Coming {
    static constexpr int64_t PIECE = 4096;
    std::vector<const uint8_t*>& pieces;

    Coming(const Decode& job, const Segment& segment, const Segment* next, std::vector<const uint8_t*>& memory)
        : pieces(memory) {
        const pq_decode_args& a = job.a;
        pieces.clear();
        if (segment.exact && a.window_slots) {
            const int64_t vector = a.head_dim * int64_t(size_of(a.dtype)), ring = segment.pair * a.window_slots;
            const int32_t* length = a.lengths + segment.pair / a.heads * 3;
            const int64_t begin = length[1] % a.window_slots, end = begin + length[2];
            const int64_t first = end > a.window_slots ? 0 : begin, last = std::min(end, a.window_slots);
            for (const void* side : {a.window_k, a.window_v})
                add((const char*)side + (ring + first) * vector, (last - first) * vector);
        }
        if (!next || next->first_tile == next->last_tile) return;
        add(job.prepared_keys(next->pair), job.key_bytes());
        add(job.value_book(next->pair).step, ValueBook::bytes(a.head_dim, a.v_nbits));
    }
    void add(const void* from, int64_t bytes) {
        for (int64_t at = 0; at < bytes; at += PIECE) pieces.push_back((const uint8_t*)from + at);
    }
    // Half of the pieces: 0 or 1.
    Ahead half(int which, bool wanted) const {
        const int64_t n = int64_t(pieces.size()), middle = n / 2;
        return {pieces.data() + which * middle, !wanted ? 0 : which ? n - middle : middle, PIECE};
    }
};

// Scores of a block's keys by tables, which are made of the segment's one query.
template <int ROWS>
struct TableKeys {
    const pq_decode_args& a;
    const int64_t stored;
    Scratch& s;
    __m512i *gathered, *byte_sums;

    // `first`: codes that are read next, fetched meanwhile.
    TableKeys(const Decode& job, const Segment& segment, const float* q, Scratch& scratch, Ahead first)
        : a(job.a), stored(stored_of(job.a.k_nbits)), s(scratch) {
        s.byte_sums.resize(size_t(ROWS * GROUPS * PLANES * 2 * 64));
        s.gathered.resize(size_t(KEY_SUBSPACES * GROUPS * 64));
        byte_sums = (__m512i*)s.byte_sums.data(), gathered = (__m512i*)s.gathered.data();
        const KeyBook keys = job.key_book(segment.pair);
        const auto make_tables = keys.half ? make_key_tables<ROWS, true> : make_key_tables<ROWS, false>;
        make_tables(keys, a.k_m, a.head_dim / a.k_m, stored, q, s.keys, first);
    }
    // Calls of `Aheads::fetch` for a block.
    int64_t turns(int64_t groups) const { return ROWS * a.k_m * ((groups + 1) / 2); }
    // scores [ROWS][GROUPS][4]
    void score(const Codes& codes, int64_t, int64_t groups, __m512* scores, Aheads& next) const {
        const auto sum = parts_of(a.k_nbits) == 4 ? sum_planes<4> : sum_planes<1>;
        for (int64_t first = 0; first < a.k_m; first += KEY_SUBSPACES) {
            const int64_t n = std::min(KEY_SUBSPACES, a.k_m - first);
            gather_codes(codes.tiles, codes.pitch, groups, first, first + n, gathered);
            for (int r = 0; r < ROWS; r++)
                sum(gathered, groups, n, s.keys.planes.data() + (r * a.k_m + first) * PLANES * stored, first == 0,
                    byte_sums + r * GROUPS * PLANES * 2, next);
        }
        for (int r = 0; r < ROWS; r++)
            for (int64_t g = 0; g < groups; g++)
                scores_of(byte_sums + (r * GROUPS + g) * PLANES * 2, a.k_m, s.keys.step[r], s.keys.offset[r],
                          scores + (r * GROUPS + g) * 4);
    }
};

// The same where every span has a query of its own.
template <int ROWS>
struct SpanKeys {
    const Decode& job;
    const float *q, *moved;  // of the first row, in the segment's first span
    const uint8_t* planes;
    int64_t first_span;
    __m512i* gathered;

    SpanKeys(const Decode& decode, const Segment& segment, const float* first_q, Scratch& s, Ahead first)
        : job(decode), q(first_q), moved(s.offsets.data() + (first_q - s.q.data()) / decode.a.head_dim),
          planes(decode.prepared_keys(segment.pair)), first_span(decode.span_of_tile(segment.first_tile)) {
        s.gathered.resize(size_t(KEY_SUBSPACES * GROUPS * 64));
        gathered = (__m512i*)s.gathered.data();
        first.fetch(INT64_MAX);
    }
    static constexpr int64_t AT_ONCE = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // groups, as registers allow
    int64_t turns(int64_t groups) const { return job.a.k_m * ((groups + AT_ONCE - 1) / AT_ONCE); }
    void score(const Codes& codes, int64_t tile, int64_t groups, __m512* scores, Aheads& next) const {
        const pq_decode_args& a = job.a;
        const int64_t dm = a.head_dim / a.k_m, each = KeyPlanes::BYTES * stored_of(a.k_nbits) * dm;
        const float* queries[GROUPS];
        int64_t span[GROUPS];
        for (int64_t g = 0; g < groups; g++) span[g] = job.span_of_tile(tile + g * GROUP_TILES) - first_span;
        const auto score = parts_of(a.k_nbits) == 4 ? score_planes<ROWS, AT_ONCE, 4> : score_planes<ROWS, AT_ONCE, 1>;
        for (int64_t first = 0; first < a.k_m; first += KEY_SUBSPACES) {
            const int64_t n = std::min(KEY_SUBSPACES, a.k_m - first);
            gather_codes(codes.tiles, codes.pitch, groups, first, first + n, gathered);
            for (int64_t g = 0; g < groups; g++) queries[g] = q + span[g] * job.group_rows * a.head_dim + first * dm;
            score(gathered, groups, n, dm, planes + first * each, queries, a.head_dim, first == 0, scores, GROUPS * 4,
                  next);
        }
        for (int r = 0; r < ROWS; r++)
            for (int64_t g = 0; g < groups; g++) {
                __m512* x = scores + (r * GROUPS + g) * 4;
                in_order(x);
                if (!job.moves()) continue;
                const __m512 more = _mm512_set1_ps(moved[span[g] * job.group_rows + r]);
                for (int j = 0; j < 4; j++) x[j] = _mm512_add_ps(x[j], more);
            }
    }
};

template <int ROWS, template <int> class Keys>
void attend(const Decode& job, const Segment& segment, const Coming& coming, const float* q, Scratch& s,
            const Rows& rows) {
    const pq_decode_args& a = job.a;
    const int64_t d = a.head_dim, width = padded(d);
    constexpr int64_t BLOCK_TILES = GROUPS * GROUP_TILES;
    s.codes.resize(size_t(std::max(a.k_m, a.v_m) * STRIDE));
    s.scores.resize(size_t(ROWS * BLOCK_CODES));
    s.sums.assign(size_t(d * ROWS * 16), 0.f);
    s.weights.resize(ROWS * sizeof(Weights) / sizeof(float));
    __m512 *scores = (__m512*)s.scores.data(), *sums = (__m512*)s.sums.data();
    Weights* weights = (Weights*)s.weights.data();
    const ValueBook book = job.value_book(segment.pair);

    const auto find_keys = [&](int64_t tile) -> Ahead {
        job.find_k(segment.pair, tile, std::min(BLOCK_TILES, segment.last_tile - tile), s.k_tiles);
        return {s.k_tiles.data(), int64_t(s.k_tiles.size()), a.k_m * 2 * a.k_nbits};
    };
    const Keys<ROWS> keys(job, segment, q, s, find_keys(segment.first_tile));
    float m[ROWS], l[ROWS] = {};
    for (int r = 0; r < ROWS; r++) m[r] = -INFINITY;
    for (int64_t tile = segment.first_tile; tile < segment.last_tile; tile += BLOCK_TILES) {
        const int64_t tiles = int64_t(s.k_tiles.size()), groups = (tiles + GROUP_TILES - 1) / GROUP_TILES;
        const int64_t tokens = std::min(tiles * TILE, job.coded(segment.pair) - tile * TILE);
        const bool last_block = tile + tiles == segment.last_tile;
        job.find_v(segment.pair, tile, tiles, s.v_tiles);
        const Ahead values{s.v_tiles.data(), tiles, a.v_m * 2 * a.v_nbits};
        const Codes k_codes = codes_for(s.k_tiles, a.k_m, a.k_nbits, s);
        Aheads after_keys(values, coming.half(0, last_block), keys.turns(groups));
        keys.score(k_codes, tile, groups, scores, after_keys);
        float old[ROWS], now[ROWS];
        for (int r = 0; r < ROWS; r++) {
            __m512* p = scores + r * GROUPS * 4;
            for (int64_t t = tokens; t < groups * GROUP; t++)
                ((float*)p)[t / GROUP * GROUP + t % 4 * 16 + t % GROUP / 4] = -INFINITY;
            float top, sum;
            weigh(p, groups, weights[r], top, sum);
            const float next = std::max(m[r], top);
            old[r] = std::exp(m[r] - next);
            now[r] = std::exp(top - next);
            l[r] = l[r] * old[r] + sum * now[r];
            m[r] = next;
        }
        const Aheads after_values(find_keys(tile + tiles), coming.half(1, last_block), d * groups);
        const Codes v_codes = codes_for(s.v_tiles, a.v_m, a.v_nbits, s);
        const auto add = parts_of(a.v_nbits) == 4 ? add_values<ROWS, 4> : add_values<ROWS, 1>;
        add(v_codes.tiles, v_codes.pitch, groups, a.v_m, d / a.v_m, book, weights, old, now, sums, after_values);
    }
    for (int r = 0; r < ROWS; r++) {
        rows.m[r] = m[r];
        rows.l[r] = l[r];
        for (int64_t i = 0; i < d; i++)  // bytes count 2^16 at most for a weight and for a value
            rows.acc[r * width + i] =
                _mm512_reduce_add_ps(sums[i * ROWS + r]) * (4294967296.f / WEIGHT_ONE) * book.step[i] +
                book.middle[i] * l[r];
    }
}

}  // namespace

void Decode::run_planes(const Segment& segment, const Segment* next, Scratch& s, const Rows& rows) const {
    for (int64_t r = 0; r < rows.count; r += LOOKUP_ROWS) {
        const int64_t n = std::min(LOOKUP_ROWS, rows.count - r);
        const Coming coming(*this, segment, r + n == rows.count ? next : nullptr, s.coming);
        const Rows some{n, rows.dim, rows.m + r, rows.l + r, rows.acc + r * padded(rows.dim)};
        const auto call = [&](auto f) { f(*this, segment, coming, s.q.data() + r * a.head_dim, s, some); };
        switch (n) {
            case 1: call(a.span ? attend<1, SpanKeys> : attend<1, TableKeys>); break;
            case 2: call(a.span ? attend<2, SpanKeys> : attend<2, TableKeys>); break;
            case 3: call(a.span ? attend<3, SpanKeys> : attend<3, TableKeys>); break;
            default: call(a.span ? attend<4, SpanKeys> : attend<4, TableKeys>);
        }
    }
}

}  // namespace pq
#endif
