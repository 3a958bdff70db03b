// Tables of up to 256 numbers in vector registers (AVX-512 with VBMI and VNNI).
//
// A number is kept as an integer of three bytes, a table as three planes of bytes: 64 of a plane fit into a register,
// and `vpermb` looks 64 codes up in it at once. 256 entries are four look-ups that overwrite each other where the upper
// two bits of the code say so. So a byte of 64 look-ups costs four instructions; by loads it would cost sixty-four.
//
//   key tables    score of centroid c for a query row = step * (entry - 2^23) + middle, one step a row, so that integer
//                 sums over the subspaces are exact. Made for every call, from `KeyBook`.
//   value planes  coordinate of centroid c = step * (entry - 2^23) + middle, one step a dimension. They do not depend
//                 on the query and are made once, `ValueBook`.
//   key planes    coordinates of float16 codebooks as they are, in two planes, `KeyPlanes`: for queries that change on
//                 the way (spans), whose tables would cost more than they save.
//
// All loops agree on one order of the 64 tokens of a group that no shuffle is needed for: number i of vector j is token
// 4 i + j, since the four bytes of a 32-bit lane are four consecutive tokens.
#pragma once
#include "vec.h"

namespace pq {

constexpr int64_t MAX_SUBSPACES = 256;  // so that sums of bytes fit into 16 bits

}  // namespace pq

#if defined(PQ_AVX2) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define PQ_PERMUTE 1
// On AMD (so far all that have AVX-512) `vpermi2b` takes as long as `vpermb` and looks up twice as many entries; on
// Intel it takes two cycles and an instruction more.
#ifdef PQ_ZEN
#define PQ_PAIRS 1
#endif

#include "buffer.h"
#include "codes.h"

namespace pq {

constexpr int GROUP = 64;  // tokens of a look-up
constexpr int64_t PLANES = 3;

// Registers a plane takes: 4 for 7 and 8 bits, else 1.
inline int parts_of(int64_t nbits) { return nbits > 6 ? 4 : 1; }

// Where the upper bits of 64 codes send them.
struct Where {
    __mmask64 b6, b7, both;
};

template <int PARTS>
PQ_INLINE Where where(__m512i codes) {
    Where w{};
    if constexpr (PARTS == 4) {
        w.b7 = _mm512_movepi8_mask(codes);
#ifndef PQ_PAIRS
        w.b6 = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
        w.both = _kand_mask64(w.b6, w.b7);
#endif
    }
    return w;
}

#ifdef PQ_PAIRS
// Bytes of two registers at the lower seven bits of 64 codes. With the intrinsic GCC 12 overwrites the tables instead of
// the codes, and copies and stores every table for it.
PQ_INLINE __m512i of_pair(__m512i codes, __m512i low, __m512i high) {
    asm("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(low), "v"(high));
    return codes;
}
#endif

// A plane in registers.
template <int PARTS>
struct Plane {
    __m512i part[PARTS];

    PQ_INLINE explicit Plane(const uint8_t* plane) {
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; i++) {
            __m512i x = _mm512_load_si512(plane + i * 64);
            asm("" : "+v"(x));  // or GCC loads it for every use, and of loads there are two a cycle at most
            part[i] = x;
        }
    }
    // Its bytes at 64 codes.
    PQ_INLINE __m512i at(__m512i codes, const Where& w) const {
        if constexpr (PARTS == 1) {
            return _mm512_permutexvar_epi8(codes, part[0]);
        } else {
#ifdef PQ_PAIRS
            return _mm512_mask_mov_epi8(of_pair(codes, part[0], part[1]), w.b7, of_pair(codes, part[2], part[3]));
#else
            __m512i x = _mm512_permutexvar_epi8(codes, part[0]);
            x = _mm512_mask_permutexvar_epi8(x, w.b6, codes, part[1]);
            x = _mm512_mask_permutexvar_epi8(x, w.b7, codes, part[2]);
            return _mm512_mask_permutexvar_epi8(x, w.both, codes, part[3]);
#endif
        }
    }
};

// Bytes 0, 1 and 2 of four vectors to three: byte j of a lane comes from vector j.
PQ_INLINE void split_bytes(const __m512i x[4], __m512i bytes[3]) {
    constexpr int CHOOSE = 0xca;  // a ? b : c, bit by bit
    const __m512i even = _mm512_set1_epi32(0x00ff00ff), low = _mm512_set1_epi32(0xffff);
    __m512i pair[2][2];  // bytes 0 0 2 2 and 1 1 3 3 of vectors 0, 1 and of 2, 3
    for (int i = 0; i < 2; i++) {
        const __m512i a = x[2 * i], b = x[2 * i + 1];
        pair[0][i] = _mm512_ternarylogic_epi32(even, a, _mm512_slli_epi32(b, 8), CHOOSE);
        pair[1][i] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(a, 8), b, CHOOSE);
    }
    bytes[0] = _mm512_ternarylogic_epi32(low, pair[0][0], _mm512_slli_epi32(pair[0][1], 16), CHOOSE);
    bytes[1] = _mm512_ternarylogic_epi32(low, pair[1][0], _mm512_slli_epi32(pair[1][1], 16), CHOOSE);
    bytes[2] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(pair[0][0], 16), pair[0][1], CHOOSE);
}

// Codebooks of one kv head, prepared (prepare.cpp); `stored` entries a table: 64 for each register of a plane.
inline int64_t stored_of(int64_t nbits) { return GROUP * parts_of(nbits); }

struct KeyBook {
    float* middle;  // [d]: between the least and the most coordinate
    float* reach;   // [d]: from there to either
    // [d][stored]: float32 coordinates less the middle, or, of a float16 codebook (`half`), those that it has, in half
    // the memory: a kernel call on a short sequence reads little else. Of 64 centroids, number 16 j + i is 4 i + j.
    char* columns;
    bool half;

    static int64_t bytes(int64_t d, int64_t nbits, bool half) {
        return aligned(d) * 2 + d * stored_of(nbits) * (half ? 2 : 4);
    }
    KeyBook(void* memory, int64_t d, bool half)
        : middle((float*)memory), reach((float*)((char*)memory + aligned(d))), columns((char*)memory + 2 * aligned(d)),
          half(half) {}
    static int64_t aligned(int64_t d) { return (d * 4 + 63) / 64 * 64; }
};

struct KeyPlanes {
    static constexpr int64_t BYTES = 2;  // of a float16
    uint8_t* planes;                     // [d][BYTES][stored], low plane first

    static int64_t bytes(int64_t d, int64_t nbits) { return d * BYTES * stored_of(nbits); }
};

struct ValueBook {
    float *step, *middle;  // [d]
    uint8_t* planes;       // [d][PLANES][stored], low plane first

    static int64_t bytes(int64_t d, int64_t nbits) { return KeyBook::aligned(d) * 2 + d * PLANES * stored_of(nbits); }
    ValueBook(void* memory, int64_t d)
        : step((float*)memory), middle((float*)((char*)memory + KeyBook::aligned(d))),
          planes((uint8_t*)memory + 2 * KeyBook::aligned(d)) {}
};

}  // namespace pq
#endif
