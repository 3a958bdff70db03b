// The C interface that kernels/cpu.py calls: one struct of 8-byte fields per operation, in the order of its packing.
// Tensors are contiguous; shapes are those of kernels/ops.py, whose checks ran before.
#pragma once
#include <cstdint>

enum pq_dtype : int64_t { PQ_FLOAT32 = 0, PQ_BFLOAT16 = 1, PQ_FLOAT16 = 2, PQ_INT8 = 3 };

enum pq_result : int {
    PQ_OK = 0,
    PQ_BAD_PAGE = 1,     // a page id outside [0, max_pages) where a token lies
    PQ_BAD_LENGTHS = 2,  // lengths beyond what sinks, page table or window hold
    PQ_NO_MEMORY = 3,
    PQ_FLUSH = 4,  // stored, and some row's oldest tokens are to be encoded now; a step has not attended yet
};

enum pq_use : int64_t { PQ_KEYS = 0, PQ_VALUES = 1, PQ_SPAN_KEYS = 2 };  // of a codebook; 2: keys that have spans

struct pq_decode_args {
    const void* q;              // [B, Hq, S, d], or [num_spans, B, Hq, S, d]: with a span and no turns
    const int32_t* page_table;  // [B, table_width]
    const int32_t* lengths;     // [B, 3]: sinks, coded, window
    void* out;                  // [B, Hq, S, d]
    float* lse;                 // [B, Hq, S]
    // A step (S = 1) stores these first; null: there is nothing to store, or it has been stored.
    const void *k, *v;      // [B, H, 1, d]
    const int32_t* before;  // [B, 3]: the lengths until now; `lengths` are those with the new tokens
    int64_t batch, query_heads, steps, table_width, dtype;
    double scale;

    // From here on: the same at every step of a sequence.
    const uint8_t* k_pages;  // [max_pages, H, tiles, k_m, 2 * k_nbits]
    const uint8_t* v_pages;  // [max_pages, H, tiles, v_m, 2 * v_nbits]
    const void* k_books;     // [H, k_m, 2^k_nbits, d / k_m]
    const void* v_books;     // [H, v_m, 2^v_nbits, d / v_m]
    const void* sink_k;      // [B, H, num_sinks, d]
    const void* sink_v;
    const void* window_k;  // [B, H, window_slots, d], a ring
    const void* window_v;
    // Maps [H, d, d], null without: k @ k_forward and v @ v_forward are stored, q @ k_backward^T asks, and out is what
    // was attended to @ v_backward.
    const void *k_forward, *k_backward, *v_forward, *v_backward;
    // [B, H, d], null without: (k @ k_forward) * k_scale + k_shift is stored, (q @ k_backward^T) / k_scale asks.
    const float *k_scale, *k_shift;
    // [num_spans, 2, d / 2], cosines and sines, null without: k and q are turned back by them in front of the maps.
    const float* turns;
    const float* offsets;  // [num_spans, B, Hq, S], null without: added to the scores; with turns and k_shift made here
    const void* k_prepared;  // the books by `pq_prepare_book`; null where `pq_book_bytes` is 0
    const void* v_prepared;
    int64_t heads, head_dim, tiles, max_pages;
    int64_t k_m, k_nbits, v_m, v_nbits, num_sinks, window_slots;
    int64_t span, num_spans;  // code indexes that share a query; 0: all do
    int64_t k_book_dtype, v_book_dtype;  // float32 or float16
    int64_t k_forward_dtype, k_backward_dtype, v_forward_dtype, v_backward_dtype;  // the same, or int8 / 127
};

struct pq_encode_args {
    const void* x;          // [G, n, d]
    const void* books;      // [G, m, num_centroids, d / m]
    uint8_t* codes;         // [G, n, m], or the pages [max_pages, G, tiles, m, 2 * nbits] when page_ids is given
    const int64_t* page_ids;  // [num_pages] or null
    int64_t groups, n, head_dim, m, num_centroids, dtype, book_dtype;
    int64_t first_slot, tiles, nbits, max_pages;  // of the paged form
};

struct pq_append_args {
    uint8_t *sink_k, *sink_v;      // [B, H, num_sinks, vector_bytes]
    uint8_t *window_k, *window_v;  // [B, H, window_slots, vector_bytes], a ring
    const uint8_t *k, *v;          // [B, H, vector_bytes]: one token a row
    const int32_t *before, *after;  // [B, 3]: sinks, coded, window
    int64_t batch, heads, num_sinks, window_slots, vector_bytes;
};

struct pq_cell_sums_args {
    const void* x;         // [G, n, d]
    const float* weights;  // [G, n]
    const uint8_t* codes;  // [G, n, m]
    double *count, *total, *squares;  // [G, m, num_centroids], and twice that [.., d / m]
    int64_t groups, n, head_dim, m, num_centroids, dtype;
};

extern "C" {
int pq_append(const pq_append_args* args);
int pq_cell_sums(const pq_cell_sums_args* args);
int pq_decode(const pq_decode_args* args);
int pq_encode(const pq_encode_args* args);
const char* pq_isa();

// Bytes of one kv head's codebook as this library's decode reads it; 0: as it lies, there is nothing to prepare.
// `use`: a pq_use; `dtype`: what the codebook has that is given to decode.
int64_t pq_book_bytes(int64_t head_dim, int64_t nbits, int64_t use, int64_t dtype);
// book [heads][m][2^nbits][dm], in float32 whatever its dtype, to prepared [heads][pq_book_bytes], 64-byte aligned.
void pq_prepare_book(const float* book, void* prepared, int64_t heads, int64_t m, int64_t nbits, int64_t dm,
                     int64_t use, int64_t dtype);
}
