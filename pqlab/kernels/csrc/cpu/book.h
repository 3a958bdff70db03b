// A codebook in the shape the lookup loops want: entries of D = 1, 2, 4 or 8 floats.
//
//   d_m = 1, 2, 4, 8     used as it lies, one entry per subspace
//   d_m = 3, 5, 6, 7     padded with zeros to 4 or 8
//   d_m > 8              cut into ceil(d_m / 8) entries of 8 that share the subspace's code, the last one padded
#pragma once
#include "buffer.h"

#include "vec.h"

namespace pq {

struct Book {
    int64_t m, dm, centroids;  // as given: [m, centroids, dm]
    int64_t width, parts;      // D and entries per subspace
    const float* table;        // [m * parts, centroids, width]

    bool padded() const { return width * parts != dm; }
    int64_t entries() const { return m * parts; }
    int64_t dim(int64_t entry, int64_t i) const {  // the dimension that lane i of an entry stands for, or -1: padding
        const int64_t within = entry % parts * width + i;
        return within < dm ? entry / parts * dm + within : -1;
    }
};

// `copy` owns the table where the book has to be laid out anew.
inline Book make_book(const float* book, int64_t m, int64_t nbits, int64_t dm, Buffer<float>& copy) {
    Book b{m, dm, int64_t(1) << nbits, dm, 1, book};
    if (dm == 1 || dm == 2 || dm == 4 || dm == 8) return b;
    b.width = dm == 3 ? 4 : 8;
    b.parts = (dm + 7) / 8;
    copy.assign(size_t(b.entries() * b.centroids * b.width), 0.f);
    for (int64_t e = 0; e < b.entries(); e++)
        for (int64_t i = 0; i < b.width; i++) {
            const int64_t dim = b.dim(e, i) - e / b.parts * dm;
            if (b.dim(e, i) < 0) continue;
            for (int64_t c = 0; c < b.centroids; c++)
                copy[size_t((e * b.centroids + c) * b.width + i)] = book[(e / b.parts * b.centroids + c) * dm + dim];
        }
    b.table = copy.data();
    return b;
}

}  // namespace pq
