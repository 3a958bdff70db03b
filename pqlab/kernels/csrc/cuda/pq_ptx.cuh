// The few PTX instructions the kernels are built from, as functions. No torch, sm_80 and newer.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pqlab {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulk = true;  // codes and codebooks go through the bulk copy engine
#else
constexpr bool kBulk = false;  // cp.async
#endif

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Keeps a value in its register: the compiler can no longer see how to compute it again in every round of a loop.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Byte permute: byte n of the result is byte `selector nibble n` of the eight bytes {b, a}.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d[16x8] += a[16x16] b[16x8], fp16 in, fp32 out. Lane l = 4 p + i holds of a the rows p (a0, a2) and p + 8 (a1, a3),
// columns 2i, 2i+1 (a0, a1) and 2i+8, 2i+9 (a2, a3); of b column p, rows 2i, 2i+1 (b0) and 2i+8, 2i+9 (b1); of d
// row p, columns 2i, 2i+1 (d0, d1) and row p + 8 (d2, d3).
__device__ __forceinline__ void mma_16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with a sparse A of 32 columns: of every four, which meet four rows of B, two are there. `pairs` says which:
// in all of a lane's rows the first two (0x44444444) or the last two (0xEEEEEEEE). b[j]: rows 8j + 2i, 8j + 2i + 1.
__device__ __forceinline__ void mma_sparse_16832(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 const uint32_t (&b)[4], uint32_t pairs) {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define PQ_SPARSE "mma.sp::ordered_metadata"
#else
#define PQ_SPARSE "mma.sp"
#endif
  asm(PQ_SPARSE ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(pairs));
#undef PQ_SPARSE
}

// Four (two) 8x8 matrices of 16-bit elements, transposed: lane 8m + r gives the address of row r of matrix m; lane
// l = 4 p + i receives of every matrix column p of the rows 2i (low half) and 2i + 1 (high half).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address)
               : "memory");
}

// -- copies from global to shared memory ----------------------------------------------------------------------------

__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// -- barriers in shared memory ----------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(bar) : "memory");
}
// The same; whether this arrival completes the barrier's phase. By one lane of a warp: those of an instruction get the
// same count, so that none would be last.
__device__ __forceinline__ bool mbarrier_arrive_last(uint32_t bar) {
  uint32_t pending;
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%1];\nmbarrier.pending_count.b64 %0, state;\n}"
      : "=r"(pending)
      : "r"(bar)
      : "memory");
  return pending == 1;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define PQ_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define PQ_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
  asm volatile("{\n.reg .pred done;\nagain:\n" PQ_TEST " done, [%0], %1;\n@!done bra again;\n}" ::"r"(bar), "r"(parity)
               : "memory");
#undef PQ_TEST
}
// Arrives once the thread's copies so far are done (cp.async).
__device__ __forceinline__ void cp_async_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// The copy engine copies `bytes` (a multiple of 16), which count on the barrier. Called by one thread.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}
// The same, called by a whole warp with equal arguments; arrives with `expect` bytes first, if any.
__device__ __forceinline__ void bulk_copy_one(uint32_t to, const void* from, uint32_t bytes, uint32_t bar,
                                              uint32_t expect) {
  if (expect)
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, -1;\n"
                 "@one mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n}" ::"r"(bar), "r"(expect)
                 : "memory");
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, -1;\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}
#endif
// Orders earlier ordinary accesses of shared memory before later ones of the copy engine.
__device__ __forceinline__ void fence_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A load that stays where it is written.
__device__ __forceinline__ int load_now(const int* p) {
  int x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Adds one; what threads wrote before a barrier (or __syncwarp) that this one came through after them is visible to
// whoever sees the new value, and the reverse.
__device__ __forceinline__ int draw_ticket(int* ticket) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
  return before;
}

// -- element types ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ uint32_t pack_half2(float lo, float hi) {
  __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&h);
}

// Two neighbouring elements, aligned to their size.
__device__ __forceinline__ float2 load_float2(const float* x) { return *reinterpret_cast<const float2*>(x); }
__device__ __forceinline__ float2 load_float2(const __half* x) {
  return __half22float2(*reinterpret_cast<const __half2*>(x));
}
__device__ __forceinline__ float2 load_float2(const __nv_bfloat16* x) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}
// The same in two steps: a load, and what has to wait for it.
template <typename T>
struct Raw {
  uint32_t x;
};
template <>
struct Raw<float> {
  float2 x;
};
template <typename T>
__device__ __forceinline__ Raw<T> load_raw(const T* x) { return *reinterpret_cast<const Raw<T>*>(x); }
template <typename T>
__device__ __forceinline__ float2 to_float2(const Raw<T>& x) { return load_float2(reinterpret_cast<const T*>(&x)); }

__device__ __forceinline__ uint32_t to_half2(const Raw<__half>& x) { return x.x; }
template <typename T>
__device__ __forceinline__ uint32_t to_half2(const Raw<T>& x) {
  const float2 two = to_float2(x);
  return pack_half2(two.x, two.y);
}

// N <= 4 floats as one access; 3 take the place of 4.
template <int N>
__device__ __forceinline__ void store(float* to, const float (&x)[N]) {
  if constexpr (N == 1) *to = x[0];
  if constexpr (N == 2) *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  if constexpr (N >= 3) *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], N == 4 ? x[N - 1] : 0.f);
}
template <int N>
__device__ __forceinline__ void load(const float* from, float (&x)[N]) {
  if constexpr (N == 1) x[0] = *from;
  if constexpr (N == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    x[0] = v.x, x[1] = v.y;
  }
  if constexpr (N >= 3) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z;
    if constexpr (N == 4) x[3] = v.w;
  }
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t from) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t from) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// 8 codes of 4 bits, low nibble first, to bytes.
__device__ __forceinline__ uint2 spread_nibbles(uint32_t c) {
  const uint32_t x0 = c & 0x0F0F0F0Fu, x1 = c >> 4 & 0x0F0F0F0Fu;
  return make_uint2(prmt(x0, x1, 0x5140), prmt(x0, x1, 0x7362));
}
// 16 of them.
__device__ __forceinline__ uint4 spread_nibbles(uint2 c) {
  const uint2 a = spread_nibbles(c.x), b = spread_nibbles(c.y);
  return make_uint4(a.x, a.y, b.x, b.y);
}

}  // namespace pqlab
