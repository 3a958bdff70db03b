// Scratch memory that begins on a cache line: a std::vector's floats may straddle lines, and every other 32-byte load
// then costs two.
#pragma once
#include <new>
#include <vector>

namespace pq {

template <class T>
struct Aligned {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    friend bool operator==(const Aligned&, const Aligned&) { return true; }
    friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

}  // namespace pq
