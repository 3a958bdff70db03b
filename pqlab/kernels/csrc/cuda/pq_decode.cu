// Launcher of pq_decode for one configuration, given by macros (pqlab/kernels/cuda_config.py sets them):
//   PQ_D head size | PQ_KM, PQ_VM subspaces | PQ_KBITS, PQ_VBITS bits a code (8 or 4) | PQ_T element type of queries
//   and exact tokens | PQ_HG query vectors a block | PQ_NW warps a block | PQ_SLOTS chunks on their way to a warp
//   | PQ_ANCHORED 1: keys have anchors | for heads in halves: PQ_BUFFERS books in shared memory at a time | PQ_CHUNKS
//   chunks of a warp in a segment
#include "pq_books.cuh"
#include "pq_decode.cuh"
#include "pq_halves.cuh"
#include "pq_launch.cuh"

namespace {

using pqlab::cuda_message;
#ifdef PQ_BUFFERS
using Cfg = pqlab::HalvesConfig<PQ_T, PQ_D, PQ_KM, PQ_KBITS, PQ_VM, PQ_VBITS, PQ_HG, PQ_NW, PQ_SLOTS, PQ_BUFFERS,
                                PQ_CHUNKS, PQ_ANCHORED>;
constexpr auto kOneRow = pqlab::pq_halves_kernel<Cfg, true>, kRows = pqlab::pq_halves_kernel<Cfg, false>;
constexpr bool kMapsOneRow = false;
#else
using Cfg = pqlab::DecodeConfig<PQ_T, PQ_D, PQ_KM, PQ_KBITS, PQ_VM, PQ_VBITS, PQ_HG, PQ_NW, PQ_SLOTS, PQ_ANCHORED>;
constexpr auto kOneRow = pqlab::pq_decode_kernel<Cfg, true>, kRows = pqlab::pq_decode_kernel<Cfg, false>;
constexpr bool kMapsOneRow = true;
#endif

// What has to be true of the device before the first launch; checked once a device.
const char* check_device() {
  static bool good[64] = {};
  int device = 0, optin = 0, reserved = 0, major = 0;
  if (const char* m = cuda_message(cudaGetDevice(&device))) return m;
  if (device < 64 && good[device]) return nullptr;
  cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (optin < Cfg::smem_bytes) return "the codebooks and buffers do not fit into this device's shared memory";
  if (major >= 9 && reserved != pqlab::kReservedSmem) return "shared memory does not start where the kernel expects it";
  if (const char* m = pqlab::allow_smem(kOneRow, Cfg::smem_bytes)) return m;
  if (const char* m = pqlab::allow_smem(kRows, Cfg::smem_bytes)) return m;
  if (device < 64) good[device] = true;
  return nullptr;
}

}  // namespace

// {query vectors a block, warps a block, shared memory bytes, bytes of prepared books a kv head, floats of what a block
// leaves of a row, tickets of a row and group of query vectors}
PQ_API void pqlab_decode_info(int* info) {
  using Of = pqlab::Slices<Cfg>;
  info[0] = Cfg::HG, info[1] = Cfg::NW, info[2] = Cfg::smem_bytes, info[3] = Cfg::book_bytes;
  info[4] = Of::jobs * Of::floats, info[5] = Of::jobs;
}

// k_books [H, KM, C, d / KM], v_books likewise, float32 dense -> image [H][book_bytes], 16-byte aligned.
PQ_API const char* pqlab_prepare_books(const float* k_books, const float* v_books, void* image, int H, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  uint8_t* const to = static_cast<uint8_t*>(image);
  if (const char* m = cuda_message(cudaMemsetAsync(image, 0, static_cast<size_t>(H) * Cfg::book_bytes, s))) return m;
  const int64_t nk = static_cast<int64_t>(H) * PQ_KM * Cfg::K::C, nv = static_cast<int64_t>(H) * PQ_VM * Cfg::V::C;
  pqlab::pq_prepare_kernel<Cfg, false><<<(nk + 255) / 256, 256, 0, s>>>(k_books, to, nk);
  pqlab::pq_prepare_kernel<Cfg, true><<<(nv + 255) / 256, 256, 0, s>>>(v_books, to, nv);
  return cuda_message(cudaGetLastError());
}

// Whether a graph is being made of the stream (or that cannot be asked now).
PQ_API int pqlab_is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return 1;
}

PQ_API const char* pqlab_decode(const pqlab::DecodeParams* params, void* stream) {
  pqlab::DecodeParams p = *params;
  if (const char* m = check_device()) return m;
  if (!(p.scale_log2 > 0.f)) return "the scale of the scores must be positive";
  if ((reinterpret_cast<uintptr_t>(p.k_pages) | reinterpret_cast<uintptr_t>(p.v_pages) |
       reinterpret_cast<uintptr_t>(p.books) | reinterpret_cast<uintptr_t>(p.map)) & 15)
    return "pages, books and maps must be aligned to 16 bytes";
  if (p.B == 0 || p.G * p.S == 0) return nullptr;
  if (p.G * p.S > 64) return "too many query vectors a kv head";
  p.turn_magic = static_cast<uint32_t>((1ull << 32) / (p.splits * Cfg::NP)) + 1;
  p.step_magic = (1 << 16) / p.S + 1;
  const dim3 grid(p.splits, p.H, (p.G * p.S + Cfg::HG - 1) / Cfg::HG);
  void* const out = p.out;
  const bool map_later = p.map != nullptr && (p.B > 1 || !kMapsOneRow);
  if (map_later) p.out = p.unmapped;
  const char* const m = pqlab::launch(p.B == 1 ? kOneRow : kRows, grid, Cfg::NW * 32, Cfg::smem_bytes, stream, p);
  if (m != nullptr || !map_later) return m;
  p.out = out;
  const dim3 blocks(p.H * (Cfg::D / pqlab::kMapSlice), pqlab::map_chunks(p.B * p.G * p.S));
  return pqlab::launch(pqlab::pq_home_kernel<Cfg>, blocks, pqlab::kMapThreads, 0, stream, p);
}
