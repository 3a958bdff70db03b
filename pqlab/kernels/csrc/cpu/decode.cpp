// Attention over a paged PQ cache (the `decode` of kernels/ops.py): work is split over (row, kv head, tokens).
//
// The tokens of all (row, kv head) pairs make one line, measured in tiles. The line is cut into shares that shrink
// towards its end, and every thread takes the next share when it has done one: a sequence with three kv heads keeps any
// number of threads busy, and a thread that another program holds up leaves the rest to the others. The part of a share
// that lies in one pair is a segment: it leaves (m, l, acc) for each query row, and a pair's segments are merged at the
// end. There is one parallel region, so that the threads meet once.
#include <algorithm>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "convert.h"
#include "segment.h"

namespace pq {
namespace {

constexpr int64_t MIN_LOOKUPS = 8192;    // per thread; below, waking another thread costs more than it saves
#ifdef PQ_PERMUTE
constexpr int64_t MIN_SHARE = 96;        // tiles; a segment begins with tables that cost as much as about 40
#else
constexpr int64_t MIN_SHARE = 16;
#endif
constexpr int64_t MANY_FLOATS = 65536;   // results above this are merged by all threads

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
                const auto after = std::lower_bound(start.begin() + 1, start.end() - 1, share_end);
                if (*after - share_end < MIN_SHARE / 2) share_end = *after;  // rather whole pairs
                else if (after[-1] > at && share_end - after[-1] < MIN_SHARE / 2) share_end = after[-1];
            }
            const int64_t end = std::max(std::min(share_end, pair_end), coded_start);  // exact tokens are not split
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
void merge(const Decode& job, int64_t pair, const Rows* parts, int64_t num_parts) {
    const pq_decode_args& a = job.a;
    const int64_t group_rows = job.group_rows;
    static thread_local Buffer<float> line;
    const int64_t d = a.head_dim, width = padded(d);
    line.resize(size_t(width));
    for (int64_t r = 0; r < group_rows; r++) {
        float m = -INFINITY, l = 0.f;
        for (int64_t i = 0; i < num_parts; i++) m = std::max(m, parts[i].m[r]);
        std::fill(line.begin(), line.end(), 0.f);
        for (int64_t i = 0; i < num_parts; i++) {
            if (parts[i].l[r] == 0.f) continue;  // nothing stored
            const float factor = std::exp(parts[i].m[r] - m);
            const float* acc = parts[i].acc + r * width;
            l += parts[i].l[r] * factor;
            for (int64_t j = 0; j < width; j++) line[size_t(j)] += acc[j] * factor;
        }
        const float norm = l == 0.f ? 0.f : 1.f / l;  // NaN stays
        for (float& x : line) x *= norm;
        from_float(a.out, (pair * group_rows + r) * d, line.data(), d, a.dtype);
        a.lse[pair * group_rows + r] = m + std::log(l);  // nothing stored: -inf
    }
}

int decode(const pq_decode_args& args) {
    const Decode job(args);
    if (const int bad = job.check()) return bad;
    const int64_t pairs = args.batch * args.heads;

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
    const int64_t shares = int64_t(plan.first_of_share.size()) - 1;
    int failed = 0;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1) schedule(dynamic, 1) reduction(| : failed)
    for (int64_t share = 0; share < shares; share++) {
        static thread_local Scratch scratch;
        try {
            const int64_t end = plan.first_of_share[size_t(share) + 1];
            for (int64_t i = plan.first_of_share[size_t(share)]; i < end; i++) {
                const Segment* segment = &plan.segments[size_t(i)];
                job.run(*segment, i + 1 < end ? segment + 1 : nullptr, scratch, parts[size_t(i)]);
            }
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    }
    if (failed) return PQ_NO_MEMORY;
    const bool many = threads > 1 && int64_t(parts.size()) * job.group_rows * row_floats > MANY_FLOATS;
#pragma omp parallel for num_threads(int(threads)) if (many) schedule(static)
    for (int64_t p = 0; p < pairs; p++) {
        const int64_t first = plan.first_of_pair[size_t(p)];
        merge(job, p, parts.data() + first, plan.first_of_pair[size_t(p) + 1] - first);
    }
    return PQ_OK;
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
