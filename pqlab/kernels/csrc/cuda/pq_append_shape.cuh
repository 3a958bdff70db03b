// What the launchers of pq_append are given. No torch.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

namespace pqlab {

struct AppendSide {
  void* sink;           // [B, H, num_sinks, D] of T, dense
  void* window;         // [B, H, W, D] of T, dense
  const void* x;        // [B, H, 1, D] of T, last dimension dense
  int64_t x_stride[2];
  const float* books;   // [H, M, C, DM]
  uint8_t* pages;       // [max_pages][H][T][M][2 * NBITS]
  const void* map;      // [H, D, D] of fp16, or of int8 in units of 1/127: what is stored is x map[h]; null: x
  int eight;            // whether it is int8
};

struct AppendParams {
  AppendSide side[2];
  const int* page_table;  // [B][table_stride]
  const int* before;      // [B][3]: sinks, coded, window
  const int* after;
  int table_stride;
  int sides, B, H, D, M, num_sinks, slots, tiles_per_page;
  int num_tickets;
  int* tickets;  // set to zero for the pq_decode that follows, if any
  const void* q;         // [B, H * G, S, D] of T, last dimension dense
  int64_t q_stride[3];
  const __half* q_map;   // [H, D, D]: queries are asked as q q_map[h]^T; null: as they are
  void* mapped_q;        // [B, H * G, S, D] of T, dense; with turns [spans, B, H * G, S, D]
  const float* k_scale;  // [B, H, D], or null: mapped keys are stored * k_scale + k_shift, mapped queries / k_scale
  const float* k_shift;
  const float* turns;    // [spans][2][D / 2], or null: cosines and sines by which keys of a span and queries for it are
                         // turned back ahead of their map
  float* offsets;        // with turns and a shift [asked_parts(D), spans, B, H * G, S]: what is to be added to scores,
                         // ahead of the softmax scale: the shift adds another number to those of every span
  int G, S;
  int spans, span_shift;  // the token with code index u is in span u >> span_shift
  int maps;              // whether this launch is the one that maps
  // Filled in by the launcher:
  int query_blocks, map_blocks;  // the first blocks map queries, those up to map_blocks tokens
  int shares;                    // blocks that share the flush of a side, row and head
  float slices_inverse, heads_inverse, rows_inverse, shares_inverse, slots_inverse, each_inverse, steps_inverse;
  float span_inverse;  // of query vectors of a head for a span

  // The cosines of a code index; half a vector further on its sines. There is no span behind the last.
  __device__ __forceinline__ const float* turn_of(int index) const {
    return turns + static_cast<int64_t>(min(index >> span_shift, spans - 1)) * D;
  }
};

}  // namespace pqlab
