// Launchers of pq_encode and pq_append for one configuration, given by macros (pqlab/kernels/cuda.py sets them):
//   PQ_DM dimensions a subspace | PQ_NBITS bits a code (8 or 4) | PQ_T element type of the vectors
// Every function returns null, or a message that stays valid for the life of the process.
#include "pq_encode.cuh"

#ifdef _WIN32
#define PQ_API extern "C" __declspec(dllexport)
#else
#define PQ_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int kSmem = pqlab::kEncodeWarps * (1 << PQ_NBITS) * (PQ_DM + 1) * 4;
constexpr int kFew = (1 << PQ_NBITS) >= 64 ? 8 : 2;  // threads a tile where there are few tokens

template <typename P>
const char* launch(void (*kernel)(P), dim3 grid, const P& p, void* stream) {
  if (kSmem > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
    if (e != cudaSuccess) return cudaGetErrorString(e);
  }
  kernel<<<grid, pqlab::kEncodeWarps * 32, kSmem, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

unsigned ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

PQ_API const char* pqlab_encode(const pqlab::EncodeParams* params, void* stream) {
  const pqlab::EncodeParams& p = *params;
  if (p.n == 0 || p.G == 0) return nullptr;
  if (p.page_ids && reinterpret_cast<uintptr_t>(p.codes) & 15) return "pages must be aligned to 16 bytes";
  const int tiles = ceil_div(p.first_slot % 16 + p.n, 16);
  const bool few = p.n <= 2048;
  const dim3 grid(ceil_div(tiles, few ? 32 / kFew : 32), ceil_div(p.M, pqlab::kEncodeWarps), p.G);
  return few ? launch(pqlab::pq_encode_kernel<PQ_T, PQ_DM, PQ_NBITS, kFew>, grid, p, stream)
             : launch(pqlab::pq_encode_kernel<PQ_T, PQ_DM, PQ_NBITS, 1>, grid, p, stream);
}

PQ_API const char* pqlab_append(const pqlab::AppendParams* params, void* stream) {
  const pqlab::AppendParams& p = *params;
  if (p.B == 0) return nullptr;
  const dim3 grid(ceil_div(p.tiles_per_page + 1, 32 / kFew), ceil_div(p.M, pqlab::kEncodeWarps), p.sides * p.B * p.H);
  return launch(pqlab::pq_append_kernel<PQ_T, PQ_DM, PQ_NBITS, kFew>, grid, p, stream);
}
