// Codebooks as the decode kernels of this library read them, made once for each codebook (`pq_prepare_book`).
#include <algorithm>
#include <cmath>

#include "api.h"
#include "convert.h"
#include "planes.h"

#ifdef PQ_PERMUTE

namespace pq {
namespace {

constexpr float STEPS = float((1 << 24) - 4);  // from the least to the most entry, with room for rounding

// One dimension of a subspace's centroids: x[c * stride], c < count.
struct Column {
    const float* x;
    int64_t count, stride;
    float middle, reach;

    Column(const float* book, int64_t count, int64_t stride) : x(book), count(count), stride(stride) {
        float least = x[0], most = x[0];
        for (int64_t c = 0; c < count; c++) {
            const float y = x[c * stride];
            least = std::min(least, y);
            most = std::max(most, y);
        }
        middle = 0.5f * least + 0.5f * most;
        reach = std::max(most - middle, middle - least);
    }
    float at(int64_t c) const { return x[c * stride] - middle; }
};

void prepare_key(const Column& from, int64_t dim, int64_t stored, const KeyBook& to) {
    to.middle[dim] = from.middle;
    to.reach[dim] = from.reach;
    for (int64_t c = 0; c < from.count; c++) {
        const int64_t place = dim * stored + c / GROUP * GROUP + c % 4 * 16 + c % GROUP / 4;
        if (to.half) ((uint16_t*)to.columns)[place] = float_to_half(from.x[c * from.stride]);
        else ((float*)to.columns)[place] = from.at(c);
    }
}

void prepare_key_planes(const Column& from, int64_t dim, int64_t stored, uint8_t* planes) {
    uint8_t* to = planes + dim * KeyPlanes::BYTES * stored;
    for (int64_t c = 0; c < from.count; c++) {
        const uint16_t x = float_to_half(from.x[c * from.stride]);
        to[c] = uint8_t(x), to[stored + c] = uint8_t(x >> 8);
    }
}

void prepare_value(const Column& from, int64_t dim, int64_t stored, const ValueBook& to) {
    const float step = 2.f * from.reach / STEPS;
    to.step[dim] = step;
    to.middle[dim] = from.middle;
    const double inverse = step > 0.f ? 1. / step : 0.;
    for (int64_t c = 0; c < from.count; c++) {
        const int32_t entry = int32_t(std::lrint(double(from.at(c)) * inverse)) + (1 << 23);
        for (int p = 0; p < PLANES; p++) to.planes[(dim * PLANES + p) * stored + c] = uint8_t(entry >> (8 * p));
    }
}

}  // namespace
}  // namespace pq

extern "C" int64_t pq_book_bytes(int64_t head_dim, int64_t nbits, int64_t use, int64_t dtype) {
    switch (use) {
        case PQ_KEYS: return pq::KeyBook::bytes(head_dim, nbits, dtype == PQ_FLOAT16);
        case PQ_SPAN_KEYS: return dtype == PQ_FLOAT16 ? pq::KeyPlanes::bytes(head_dim, nbits) : 0;
        default: return pq::ValueBook::bytes(head_dim, nbits);
    }
}

extern "C" void pq_prepare_book(const float* book, void* prepared, int64_t heads, int64_t m, int64_t nbits, int64_t dm,
                                int64_t use, int64_t dtype) {
    const int64_t d = m * dm, count = int64_t(1) << nbits, stored = pq::stored_of(nbits);
    const int64_t bytes = pq_book_bytes(d, nbits, use, dtype);
    std::fill_n((char*)prepared, heads * bytes, char(0));
    for (int64_t head = 0; head < heads; head++) {
        char* memory = (char*)prepared + head * bytes;
        for (int64_t dim = 0; dim < d; dim++) {
            const float* first = book + ((head * m + dim / dm) * count) * dm + dim % dm;
            const pq::Column column(first, count, dm);
            switch (use) {
                case PQ_KEYS: pq::prepare_key(column, dim, stored, pq::KeyBook(memory, d, dtype == PQ_FLOAT16)); break;
                case PQ_SPAN_KEYS: pq::prepare_key_planes(column, dim, stored, (uint8_t*)memory); break;
                default: pq::prepare_value(column, dim, stored, pq::ValueBook(memory, d));
            }
        }
    }
}

#else

extern "C" int64_t pq_book_bytes(int64_t, int64_t, int64_t, int64_t) { return 0; }
extern "C" void pq_prepare_book(const float*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) {}

#endif
