// The value side of a decode step over codes in any byte order, for `bench layout`: 8-bit codes, two dimensions a
// subspace, M = 64. As in pq_decode, a warp takes tiles of 16 tokens and a lane the subspaces `lane` and `lane + 32`,
// whose entries only it looks up: the codebook lies in shared memory as [centroid][subspace], and no two lanes meet in a
// bank. Where the 16 codes of a subspace lie side by side they come with one load of 16 bytes, elsewhere with 16 loads.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef _WIN32
#define PQ_API extern "C" __declspec(dllexport)
#else
#define PQ_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int M = 64, TILE = 16, WARPS = 16, AT_ONCE = 2;  // tiles on their way to a warp
constexpr int BOOK_BYTES = 256 * M * 4;

struct OrdersParams {
  const uint8_t* pages;    // [max_pages][heads][page_size * M], in some order
  const int32_t* ids;      // [num_pages], the pages in token order
  const __half2* books;    // [heads][256][M]
  const __half2* weights;  // [num_pages * page_size], each twice
  float2* out;             // [blocks of a head][heads][M]
  int32_t num_pages, heads, page_size;
  int32_t tile_stride, token_stride, subspace_stride;  // bytes between neighbours inside a page and head
};

template <bool SIDE_BY_SIDE>
__device__ __forceinline__ uint4 load_codes(const uint8_t* p, int stride) {
  if constexpr (SIDE_BY_SIDE) {
    return __ldg(reinterpret_cast<const uint4*>(p));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i] |= static_cast<uint32_t>(__ldg(p + (4 * i + j) * stride)) << (8 * j);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Entries of 16 codes of a subspace times the tokens' weights: 16 terms in fp16, then float.
__device__ __forceinline__ void add_tile(const char* book, uint4 codes, const uint4* weights, float2& sum) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  __half2 part = __float2half2_rn(0.f);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 w = weights[i];
    const uint32_t four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t code = __byte_perm(words[i], 0, 0x4440 | j);
      const __half2 entry = *reinterpret_cast<const __half2*>(book + code * (M * 4));
      part = __hfma2(entry, *reinterpret_cast<const __half2*>(&four[j]), part);
    }
  }
  const float2 add = __half22float2(part);
  sum.x += add.x, sum.y += add.y;
}

template <bool SIDE_BY_SIDE>
__global__ void __launch_bounds__(WARPS * 32, 2) orders_kernel(const OrdersParams p) {
  extern __shared__ char book[];
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint4* from = reinterpret_cast<const uint4*>(p.books + static_cast<int64_t>(head) * 256 * M);
  for (int i = threadIdx.x; i < BOOK_BYTES / 16; i += blockDim.x) reinterpret_cast<uint4*>(book)[i] = from[i];
  __syncthreads();

  const int tiles = p.page_size / TILE, all = p.num_pages * tiles, step = gridDim.x * WARPS;
  const int64_t head_bytes = static_cast<int64_t>(p.page_size) * M;
  float2 sum[2] = {};
  for (int tile = blockIdx.x * WARPS + warp; tile < all; tile += step * AT_ONCE) {
    uint4 codes[AT_ONCE][2];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int here = min(tile + k * step, all - 1), page = here / tiles;
      const uint8_t* c = p.pages + (static_cast<int64_t>(__ldg(p.ids + page)) * p.heads + head) * head_bytes +
                         (here - page * tiles) * p.tile_stride;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        codes[k][i] = load_codes<SIDE_BY_SIDE>(c + (lane + 32 * i) * p.subspace_stride, p.token_stride);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (tile + k * step >= all) break;
      const uint4* from_weights = reinterpret_cast<const uint4*>(p.weights + (tile + k * step) * TILE);
      uint4 weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i] = __ldg(from_weights + i);
#pragma unroll
      for (int i = 0; i < 2; ++i) add_tile(book + (lane + 32 * i) * 4, codes[k][i], weights, sum[i]);
    }
  }
  __shared__ float2 parts[WARPS][M];
  for (int i = 0; i < 2; ++i) parts[warp][lane + 32 * i] = sum[i];
  __syncthreads();
  if (threadIdx.x < M) {
    float2 total = make_float2(0.f, 0.f);
    for (int w = 0; w < WARPS; ++w) total.x += parts[w][threadIdx.x].x, total.y += parts[w][threadIdx.x].y;
    p.out[(static_cast<int64_t>(blockIdx.x) * p.heads + head) * M + threadIdx.x] = total;
  }
}

template <bool SIDE_BY_SIDE>
cudaError_t launch(const OrdersParams& p, int blocks, cudaStream_t stream) {
  const auto kernel = orders_kernel<SIDE_BY_SIDE>;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BOOK_BYTES);
  if (e != cudaSuccess) return e;
  kernel<<<dim3(blocks, p.heads), WARPS * 32, BOOK_BYTES, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// `blocks` of every head share its tiles. Returns nullptr, or what went wrong.
PQ_API const char* pqlab_orders(const void* params, int blocks, void* stream) {
  const OrdersParams& p = *static_cast<const OrdersParams*>(params);
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t e = p.token_stride == 1 ? launch<true>(p, blocks, s) : launch<false>(p, blocks, s);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
