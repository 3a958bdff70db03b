// Codebooks as the decode kernel keeps them in shared memory: fp16, bank-friendly, one image a kv head. No torch.
#pragma once
#include "pq_decode.cuh"

namespace pqlab {

// books float32 [H, M, C, D / M] of one side -> its entries of image [H][Cfg::book_bytes]; the rest of the image is the
// other side's, or padding that has to be zero.
template <typename Cfg, bool VALUE>
__global__ void pq_prepare_kernel(const float* __restrict__ books, uint8_t* __restrict__ image, int64_t entries) {
  using S = typename std::conditional<VALUE, typename Cfg::V, typename Cfg::K>::type;
  constexpr int dims = S::DM / S::CODES, M = Cfg::D / dims;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // (h, m, c)
  if (i >= entries) return;
  const int c = i % S::C, m = i / S::C % M;
  const int64_t h = i / S::C / M;
  const int at = (VALUE ? Cfg::value_image : 0) + S::entry_offset(m / S::CODES) + c * S::row_bytes;
  __half* to = reinterpret_cast<__half*>(image + h * Cfg::book_bytes + at) + m % S::CODES;
#pragma unroll
  for (int j = 0; j < dims; ++j) to[j] = __float2half_rn(books[i * dims + j]);
}

}  // namespace pqlab
