// Attention over a paged PQ cache (the `decode` of kernels/ops.py): work is split over (row, kv head, tokens).
//
// The tokens of all (row, kv head) pairs make one line, measured in tiles. The line is cut into shares that shrink
// towards its end, and every thread takes the next share when it has done one: a sequence with three kv heads keeps any
// number of threads busy, and a thread that another program holds up leaves the rest to the others. The part of a share
// that lies in one pair is a segment: it leaves (m, l, acc) for each query row, and a pair's segments are merged by the
// thread that does the last of them. There is one parallel region, so that the threads meet once.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "convert.h"
#include "segment.h"

namespace pq {
namespace {

constexpr int64_t CUT_TILES = 4;         // segments of a pair meet at multiples of these, whose tokens are of one span
constexpr int64_t MIN_LOOKUPS = 8192;    // per thread; below, waking another thread costs more than it saves
#ifdef PQ_PERMUTE
constexpr int64_t MIN_SHARE = 96;        // tiles; a segment begins with tables that cost as much as about 40
#else
constexpr int64_t MIN_SHARE = 16;
#endif

struct Plan {
    std::vector<Segment> segments;
    std::vector<int64_t> first_of_share, first_of_pair;  // segments, and one past the last
};

Plan make_plan(const Decode& job, int64_t pairs, int64_t threads, const std::vector<int64_t>& start) {
    const int64_t total = start.back();
    Plan plan;
    int64_t share_end = 0;
    for (int64_t p = 0; p < pairs; p++) {
        plan.first_of_pair.push_back(int64_t(plan.segments.size()));
        const int64_t pair_end = start[size_t(p) + 1], coded_start = pair_end - job.coded_tiles(p);
        for (int64_t at = start[size_t(p)]; at < pair_end;) {
            if (at >= share_end) {
                plan.first_of_share.push_back(int64_t(plan.segments.size()));
                // Half of an equal share of what is left; where that is little, all of it.
                const int64_t equal = (total - at + threads - 1) / threads;
                share_end = at + (equal < 3 * MIN_SHARE ? equal : equal / 2);
                // Rather whole pairs, while enough is left for the others to go on with: every segment reads codebooks.
                const auto after = std::lower_bound(start.begin() + 1, start.end() - 1, share_end);
                const int64_t pair_tiles = *after - after[-1];
                const int64_t near = total - share_end < threads * pair_tiles ? MIN_SHARE / 2 : (pair_tiles + 1) / 2;
                if (*after - share_end < near) share_end = *after;
                else if (after[-1] > at && share_end - after[-1] <= near) share_end = after[-1];
            }
            // Exact tokens are not split.
            const int64_t cut = std::max<int64_t>(share_end - coded_start, 0);
            const int64_t end = std::min(coded_start + (cut + CUT_TILES - 1) / CUT_TILES * CUT_TILES, pair_end);
            const bool exact = at == start[size_t(p)];
            plan.segments.push_back({p, std::max(at, coded_start) - coded_start, end - coded_start, exact});
            at = end;
        }
    }
    plan.first_of_pair.push_back(int64_t(plan.segments.size()));
    plan.first_of_share.push_back(int64_t(plan.segments.size()));
    return plan;
}

// Results of a pair from its segments: out = sum acc e^(m_i - m) / sum l e^(m_i - m).
void merge(const Decode& job, int64_t pair, const Rows* parts, int64_t num_parts, Scratch& s) {
    const pq_decode_args& a = job.a;
    const int64_t group_rows = job.group_rows, d = a.head_dim, width = padded(d);
    s.sums.assign(size_t(group_rows * d), 0.f);
    for (int64_t r = 0; r < group_rows; r++) {
        float* line = s.sums.data() + r * d;
        float m = -INFINITY, l = 0.f;
        for (int64_t i = 0; i < num_parts; i++) m = std::max(m, parts[i].m[r]);
        for (int64_t i = 0; i < num_parts; i++) {
            if (parts[i].l[r] == 0.f) continue;  // nothing stored
            const float factor = std::exp(parts[i].m[r] - m);
            const float* acc = parts[i].acc + r * width;
            l += parts[i].l[r] * factor;
            for (int64_t j = 0; j < d; j++) line[j] += acc[j] * factor;
        }
        const float norm = l == 0.f ? 0.f : 1.f / l;  // NaN stays
        for (int64_t j = 0; j < d; j++) line[j] *= norm;
        a.lse[pair * group_rows + r] = m + std::log(l);  // nothing stored: -inf
    }
    if (const Map map = job.v_backward(pair)) {
        s.mapped.resize(size_t(group_rows * d));
        multiply(s.sums.data(), group_rows, map, d, false, s.mapped.data());
        s.sums.swap(s.mapped);
    }
    from_float(a.out, pair * group_rows * d, s.sums.data(), group_rows * d, a.dtype);
}

// Stores the new tokens where that is all that can be done now; true: some row's oldest tokens are to be encoded first.
bool stored_for_flush(const Decode& job, Scratch& s) {
    const pq_decode_args& a = job.a;
    bool flush = false;
    for (int64_t row = 0; row < a.batch; row++) flush |= a.before[row * 3 + 1] != a.lengths[row * 3 + 1];
    if (flush)
        for (int64_t pair = 0; pair < a.batch * a.heads; pair++) job.store_token(pair, s);
    return flush;
}

Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

int decode(const pq_decode_args& args) {
    const Decode job(args);
    if (const int bad = job.check()) return bad;
    const int64_t pairs = args.batch * args.heads;
    if (args.k && stored_for_flush(job, own_scratch())) return PQ_FLUSH;

    // The line: every pair's exact tokens (as tiles, they cost about as much), then its coded tiles.
    std::vector<int64_t> start(size_t(pairs) + 1, 0);
    for (int64_t p = 0; p < pairs; p++)
        start[size_t(p) + 1] = start[size_t(p)] + 1 + job.exact_tokens(p) / TILE + job.coded_tiles(p);
    int64_t threads = 1;
#ifdef _OPENMP
    if (!omp_in_parallel()) {
        const int64_t lookups = start.back() * TILE * (args.k_m + args.v_m) / 2;
        const int64_t useful = lookups * std::max<int64_t>(1, job.group_rows / LOOKUP_ROWS) / MIN_LOOKUPS;
        threads = std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), useful));
    }
#endif
    const Plan plan = make_plan(job, pairs, threads, start);

    const int64_t row_floats = 2 + padded(args.head_dim);
    static thread_local Buffer<float> memory;
    memory.resize(plan.segments.size() * size_t(job.group_rows * row_floats));
    std::vector<Rows> parts;
    for (size_t i = 0; i < plan.segments.size(); i++) {
        float* base = memory.data() + i * size_t(job.group_rows * row_floats);
        parts.push_back({job.group_rows, args.head_dim, base, base + job.group_rows, base + 2 * job.group_rows});
    }
    // Segments of each pair that are to come; who does the last of them merges them all.
    std::vector<std::atomic<int64_t>> left(start.size());
    for (size_t p = 0; p < size_t(pairs); p++) left[p] = plan.first_of_pair[p + 1] - plan.first_of_pair[p];
    const int64_t shares = int64_t(plan.first_of_share.size()) - 1;
    int failed = 0;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1) schedule(dynamic, 1) reduction(| : failed)
    for (int64_t share = 0; share < shares; share++) {
        try {
            Scratch& scratch = own_scratch();
            const int64_t end = plan.first_of_share[size_t(share) + 1];
            for (int64_t i = plan.first_of_share[size_t(share)]; i < end; i++) {
                const Segment* segment = &plan.segments[size_t(i)];
                job.run(*segment, i + 1 < end ? segment + 1 : nullptr, scratch, parts[size_t(i)]);
                const size_t pair = size_t(segment->pair);
                const int64_t first = plan.first_of_pair[pair], count = plan.first_of_pair[pair + 1] - first;
                if (left[pair].fetch_sub(1, std::memory_order_acq_rel) == 1)
                    merge(job, segment->pair, parts.data() + first, count, scratch);
            }
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    }
    return failed ? PQ_NO_MEMORY : PQ_OK;
}

}  // namespace
}  // namespace pq

extern "C" int pq_decode(const pq_decode_args* args) {
    try {
        return pq::decode(*args);
    } catch (const std::bad_alloc&) {
        return PQ_NO_MEMORY;
    }
}

extern "C" const char* pq_isa() {
#if defined(PQ_PERMUTE)
    return "avx512 vbmi";
#elif defined(PQ_AVX2)
    return "avx2";
#else
    return "generic";
#endif
}
