// A codebook in the shape the lookup loops want: entries of D = 1, 2, 4 or 8 floats.
//
//   d_m = 1, 2, 4, 8     used as it lies, one entry per subspace
//   d_m = 3, 5, 6, 7     padded with zeros to 4 or 8
//   d_m > 8              cut into ceil(d_m / 8) entries of 8 that share the subspace's code, the last one padded
//   d_m = 1, nbits <= 4  16 floats to a table, which then is two registers and needs no memory
#pragma once
#include "buffer.h"

#include "vec.h"

namespace pq {

struct Book {
    int64_t m, dm, centroids;  // as given: [m, centroids, dm]
    int64_t width, parts;      // D and entries per subspace
    const float* table;        // [m * parts, centroids, width]
    const int64_t* place;      // [m * parts]: the subspace of an entry
    bool small;                // 16 floats a table, padded with zeros

    bool padded() const { return width * parts != dm; }
    int64_t entries() const { return m * parts; }
    int64_t dim(int64_t entry, int64_t i) const {  // the dimension that lane i of an entry stands for, or -1: padding
        const int64_t within = entry % parts * width + i;
        return within < dm ? entry / parts * dm + within : -1;
    }
};

// Owns what a book had to have laid out anew.
struct BookMemory {
    Buffer<float> table;
    std::vector<int64_t> place;
};

inline Book make_book(const float* book, int64_t m, int64_t nbits, int64_t dm, BookMemory& memory) {
    const int64_t given = int64_t(1) << nbits;
    Book b{m, dm, given, dm, 1, book, nullptr, nbits <= 4 && dm == 1};
    const bool as_it_lies = !b.small && (dm == 1 || dm == 2 || dm == 4 || dm == 8);
    if (b.small) {
        b.centroids = 16;
    } else if (!as_it_lies) {
        b.width = dm == 3 ? 4 : 8;
        b.parts = (dm + 7) / 8;
    }
    memory.place.resize(size_t(b.entries()));
    for (int64_t e = 0; e < b.entries(); e++) memory.place[size_t(e)] = e / b.parts;
    b.place = memory.place.data();
    if (as_it_lies) return b;
    memory.table.assign(size_t(b.entries() * b.centroids * b.width), 0.f);
    for (int64_t e = 0; e < b.entries(); e++)
        for (int64_t i = 0; i < b.width && b.dim(e, i) >= 0; i++) {
            const float* from = book + b.place[e] * given * dm + b.dim(e, i) % dm;
            for (int64_t c = 0; c < given; c++)
                memory.table[size_t((e * b.centroids + c) * b.width + i)] = from[c * dm];
        }
    b.table = memory.table.data();
    return b;
}

}  // namespace pq
