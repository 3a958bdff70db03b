// Reads bytes and does nothing with them: the time against which the benchmarks hold a kernel that has to read as many.
#include <cuda_runtime.h>

#include <cstdint>

#ifdef _WIN32
#define PQ_API extern "C" __declspec(dllexport)
#else
#define PQ_API extern "C" __attribute__((visibility("default")))
#endif

__global__ void __launch_bounds__(1024) read_kernel(const uint4* p, int64_t n, uint4* never) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint4 all = make_uint4(0, 0, 0, 0);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += 8 * stride) {
    uint4 v[8];  // all on their way before the first is used
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint4* from = p + (i + k * stride < n ? i + k * stride : i);
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w)
                   : "l"(from));
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) all.x ^= v[k].x, all.y ^= v[k].y, all.z ^= v[k].z, all.w ^= v[k].w;
  }
  if ((all.x ^ all.y ^ all.z ^ all.w) == 0x12345678u) *never = all;
}

// Reads `bytes` (a multiple of 16) from p; `never` is 16 bytes that are written on one value of their sum in 2^32.
PQ_API const char* pqlab_read(const void* p, int64_t bytes, void* never, int blocks, void* stream) {
  read_kernel<<<blocks, 1024, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(p), bytes / 16,
                                                                      static_cast<uint4*>(never));
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
