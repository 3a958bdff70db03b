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

// 16 codes of one subspace from 2 * nbits bytes to one code a byte; reads 8 bytes a half where `whole` allows it.
PQ_INLINE void unpack_codes(uint8_t* codes, const uint8_t* packed, int nbits, bool whole = false) {
    for (int half = 0; half < 2; half++) {
        uint64_t word = 0;
        if (whole)
            std::memcpy(&word, packed + half * nbits, 8);
        else
            std::memcpy(&word, packed + half * nbits, size_t(nbits));
        word = spread(word, nbits);
        std::memcpy(codes + 8 * half, &word, 8);
    }
}

// 4-bit codes of two tiles to one code a byte, 32 bytes.
PQ_INLINE void unpack_nibbles(uint8_t* codes, const uint8_t* first, const uint8_t* second) {
#ifdef PQ_AVX2
    const __m128i low = _mm_loadl_epi64((const __m128i*)first), high = _mm_loadl_epi64((const __m128i*)second);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(low, high));  // 00 ba -> 0b 0a
    const __m256i spread = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    _mm256_storeu_si256((__m256i*)codes, _mm256_and_si256(spread, _mm256_set1_epi8(15)));
#else
    unpack_codes(codes, first, 4);
    unpack_codes(codes + TILE, second, 4);
#endif
}

// m subspaces of `n` tiles to one code a byte: out [m][stride], the tiles of a subspace side by side.
inline void unpack_tiles(uint8_t* out, int64_t stride, const uint8_t* const* tiles, int64_t n, int64_t m, int nbits) {
    const int64_t bytes = 2 * nbits;
    for (int64_t first = 0; first < n; first += 4) {  // four tiles fill a cache line of the result
        const int64_t last = first + 4 < n ? first + 4 : n;
        if (nbits == 8) {
            for (int64_t s = 0; s < m; s++)
                for (int64_t t = first; t < last; t++)
                    std::memcpy(out + s * stride + t * TILE, tiles[t] + s * TILE, TILE);
        } else if (nbits == 4 && last - first == 4) {
            for (int64_t s = 0; s < m; s++)
                for (int64_t t = first; t < last; t += 2)
                    unpack_nibbles(out + s * stride + t * TILE, tiles[t] + s * bytes, tiles[t + 1] + s * bytes);
        } else {
            for (int64_t s = 0; s < m; s++) {
                const bool whole = (s + 1) * bytes + 8 <= m * bytes;
                for (int64_t t = first; t < last; t++)
                    unpack_codes(out + s * stride + t * TILE, tiles[t] + s * bytes, nbits, whole);
            }
        }
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
