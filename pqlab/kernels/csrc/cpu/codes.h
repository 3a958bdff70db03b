// Codes of a tile: 16 tokens of one subspace in 2 * nbits bytes, little-endian (paging/layout.py).
#pragma once
#include "vec.h"

namespace pq {

constexpr int TILE = 16;

// Eight codes, one to a byte, from the low 8 * nbits bits of `word`.
inline uint64_t spread(uint64_t word, int nbits) {
#ifdef __BMI2__
    return _pdep_u64(word, 0x0101010101010101ull * ((1u << nbits) - 1));
#else
    uint64_t codes = 0;
    for (int i = 0; i < 8; i++) codes |= (word >> (i * nbits) & ((1u << nbits) - 1)) << (8 * i);
    return codes;
#endif
}

inline uint64_t gather_bits(uint64_t codes, int nbits) {
#ifdef __BMI2__
    return _pext_u64(codes, 0x0101010101010101ull * ((1u << nbits) - 1));
#else
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) word |= (codes >> (8 * i) & ((1u << nbits) - 1)) << (i * nbits);
    return word;
#endif
}

// m subspaces of one tile to one code a byte, out [m][16].
inline void unpack_tile(uint8_t* out, const uint8_t* packed, int64_t m, int nbits) {
    int64_t i = 0;
#ifdef PQ_AVX2
    if (nbits == 4)
        for (; i + 2 <= 2 * m; i += 2) {
            const __m128i bytes = _mm_loadl_epi64((const __m128i*)(packed + i * 4)), low = _mm_set1_epi8(15);
            const __m128i codes = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
            _mm_storeu_si128((__m128i*)(out + i * 8), _mm_and_si128(codes, low));
        }
#endif
    for (; i < 2 * m; i++) {
        uint64_t word = 0;
        if ((i + 1) * nbits + 8 <= 2 * m * nbits)
            std::memcpy(&word, packed + i * nbits, 8);
        else
            std::memcpy(&word, packed + i * nbits, size_t(nbits));
        const uint64_t codes = spread(word, nbits);
        std::memcpy(out + i * 8, &codes, 8);
    }
}

// 16 codes of one subspace, one a byte, into 2 * nbits bytes.
inline void pack_codes(uint8_t* packed, const uint8_t* codes, int nbits) {
    for (int i = 0; i < 2; i++) {
        uint64_t eight;
        std::memcpy(&eight, codes + 8 * i, 8);
        const uint64_t word = gather_bits(eight, nbits);
        std::memcpy(packed + i * nbits, &word, size_t(nbits));
    }
}

}  // namespace pq
