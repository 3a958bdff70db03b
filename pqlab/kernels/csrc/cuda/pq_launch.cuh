// Host side: what the launchers share. Every function returns null, or a message that stays valid for the life of the
// process. No torch.
#pragma once
#include <cuda_runtime.h>

#ifdef _WIN32
#define PQ_API extern "C" __declspec(dllexport)
#else
#define PQ_API extern "C" __attribute__((visibility("default")))
#endif

namespace pqlab {

inline const char* cuda_message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename... P>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, int smem, void* stream, const P&... p) {
  kernel<<<grid, threads, smem, static_cast<cudaStream_t>(stream)>>>(p...);
  return cuda_message(cudaGetLastError());
}

// To be called before a launch with that much shared memory.
template <typename... P>
const char* allow_smem(void (*kernel)(P...), int bytes) {
  if (bytes <= 48 * 1024) return nullptr;
  return cuda_message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace pqlab
