// Sums over the cells of a quantizer (the `cell_sums` of kernels/ops.py).
//
//   count = sum w,  total_i = sum w x_i,  squares_i = sum w x_i^2,  each over the tokens of a cell
//
// In float64, and a (group, subspace) is summed by one thread in the order of its tokens: the same bits for any number
// of threads. The tokens pass once, along as many subspaces as have their sums in L2: with fewer, whose sums would lie
// in L1, memory is read again and again, which costs more.
#include <algorithm>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "api.h"
#include "buffer.h"
#include "convert.h"

namespace pq {
namespace {

constexpr int64_t SUMS_BYTES = 352 << 10;  // of a thread's sums
constexpr int64_t LINE = 16;               // floats
constexpr int64_t MIN_CODES = 4096;        // per thread

// One token: x [count][dims] of weight w to its cells, sums [count][centroids][2 * dims + 1].
template <int DIMS>  // 0: any
PQ_INLINE void add(const float* x, double w, const uint8_t* codes, int64_t count, int64_t any, int64_t centroids,
                   double* sums) {
    const int64_t dims = DIMS ? DIMS : any, width = 2 * dims + 1;
    for (int64_t s = 0; s < count; s++) {
        double* cell = sums + (s * centroids + codes[s]) * width;
        for (int64_t i = 0; i < dims; i++) {
            const double xi = x[s * dims + i], weighted = w * xi;
            cell[i] += weighted;
            cell[dims + i] += weighted * xi;
        }
        cell[2 * dims] += w;
    }
}

// All tokens of a group, in `count` subspaces from `first`; row: room for as much of a token.
template <int DIMS>
PQ_NOINLINE void add_all(const pq_cell_sums_args& a, int64_t group, int64_t first, int64_t count, double* sums,
                         float* row) {
    const int64_t dims = a.head_dim / a.m;
    for (int64_t token = group * a.n; token < (group + 1) * a.n; token++) {
        const int64_t at = token * a.head_dim + first * dims;
        const float* x = (const float*)a.x + at;
        if (a.dtype != PQ_FLOAT32) to_float(row, a.x, at, count * dims, a.dtype), x = row;
        add<DIMS>(x, a.weights[token], a.codes + token * a.m + first, count, dims, a.num_centroids, sums);
    }
}

void add_all(const pq_cell_sums_args& a, int64_t group, int64_t first, int64_t count, double* sums, float* row) {
    switch (a.head_dim / a.m) {
        case 1: return add_all<1>(a, group, first, count, sums, row);
        case 2: return add_all<2>(a, group, first, count, sums, row);
        case 4: return add_all<4>(a, group, first, count, sums, row);
        case 8: return add_all<8>(a, group, first, count, sums, row);
        default: return add_all<0>(a, group, first, count, sums, row);
    }
}

// sums [count][centroids][2 * dims + 1] to the results, for subspaces of a group from `first`.
void store_sums(const pq_cell_sums_args& a, int64_t group, int64_t first, int64_t count, const double* sums) {
    const int64_t dims = a.head_dim / a.m, begin = (group * a.m + first) * a.num_centroids;
    for (int64_t to = begin; to < begin + count * a.num_centroids; to++, sums += 2 * dims + 1) {
        std::copy(sums, sums + dims, a.total + to * dims);
        std::copy(sums + dims, sums + 2 * dims, a.squares + to * dims);
        a.count[to] = sums[2 * dims];
    }
}

int cell_sums(const pq_cell_sums_args& a) {
    int threads = 1;
#ifdef _OPENMP
    if (!omp_in_parallel()) threads = omp_get_max_threads();
#endif
    threads = int(std::clamp<int64_t>(a.groups * a.n * a.m / MIN_CODES, 1, threads));
    const int64_t dims = a.head_dim / a.m, each = a.num_centroids * (2 * dims + 1);
    // Few groups are shared by their subspaces, but no thread reads less than a line of a token.
    const int64_t shared = threads > 1 ? a.groups * a.m / (4 * threads) : a.m;
    const int64_t wanted = std::min(SUMS_BYTES / int64_t(each * sizeof(double)), shared);
    const int64_t at_once = std::min(std::max(wanted, (LINE + dims - 1) / dims), a.m);
    const int64_t blocks = (a.m + at_once - 1) / at_once, jobs = a.groups * blocks;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        Buffer<double> sums;
        Buffer<float> row;
        try {
            sums.resize(size_t(at_once * each));
            row.resize(size_t(at_once * dims));
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs; job++) {
            if (failed) continue;
            const int64_t group = job / blocks, first = job % blocks * at_once;
            const int64_t count = std::min(at_once, a.m - first);
            std::fill(sums.begin(), sums.end(), 0.);
            add_all(a, group, first, count, sums.data(), row.data());
            store_sums(a, group, first, count, sums.data());
        }
    }
    return failed ? PQ_NO_MEMORY : PQ_OK;
}

}  // namespace
}  // namespace pq

extern "C" int pq_cell_sums(const pq_cell_sums_args* args) { return pq::cell_sums(*args); }
