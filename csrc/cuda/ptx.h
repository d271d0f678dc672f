// Instructions that CUDA C++ has no word for: inline PTX under nvcc, the simulator under g++. One meaning, two bodies.
//
// Named barriers take a compile-time number: with a run-time one ptxas reserves all sixteen.
#pragma once

#include "platform.h"

namespace fastdit::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- named barriers ---------------------------------------------------------------------------------------
template <int id>
__device__ __forceinline__ void named_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "r"(threads) : "memory");
}
template <int id>
__device__ __forceinline__ void named_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(id), "r"(threads) : "memory");
}

// ---- cp.async ---------------------------------------------------------------------------------------------
// `filled` bytes are copied, the rest of the 4, 8 or 16 is zero.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int filled = bytes) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(filled)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(filled),
                 "n"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- the matrix unit of a warp ----------------------------------------------------------------------------
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
#define FASTDIT_MMA(name, shape, type)                                                                  \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
FASTDIT_MMA(mma_bf16, "m16n8k16", "bf16")
FASTDIT_MMA(mma_f16, "m16n8k16", "f16")
FASTDIT_MMA(mma_tf32, "m16n8k8", "tf32")
#undef FASTDIT_MMA

// x, of which the compiler knows nothing: what is computed from it is not carried in registers through a loop around.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// 2^x to two units of the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- registers (sm_90) ------------------------------------------------------------------------------------
// A whole warpgroup: from here on each thread has this many, a multiple of 8. More: once others have given theirs away.
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- mbarrier (sm_90) -------------------------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the initialisations, before the barrier of the block: bulk copies see them.
__device__ __forceinline__ void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; the first phase has parity 0, so a fresh barrier passes parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- clusters (sm_90): blocks side by side ------------------------------------------------------------------
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of every block, whoever has not ended. After it peers know of initialised mbarriers, given their fence;
// before a block's end: what its peers signal or copy into its shared memory must have happened.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// What stands at the same place in block `rank`, for barrier_arrive_at().
__device__ __forceinline__ uint32_t peer_address(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
// Orders reads that have their values before what the peer's copies write. Writes to shared memory it does not hand
// over: its scope is the block, since a release to the cluster is a fence of all memory.
__device__ __forceinline__ void barrier_arrive_at(uint32_t peer) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer) : "memory");
}

// ---- bulk copies (sm_90) ----------------------------------------------------------------------------------
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// From shared memory; each is complete, and seen by its thread, after store_wait.
__device__ __forceinline__ void bulk_store(float* to, const float* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float* to, const float* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(groups) : "memory");
}
// What was stored may be overwritten; it need not have arrived.
template <int groups>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}
// Every thread that wrote shared memory, before the barrier after which wgmma or a bulk store reads it.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Between a wait for another block's bulk stores and those of this thread to the same place.
__device__ __forceinline__ void proxy_fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- turns of blocks --------------------------------------------------------------------------------------
// A counter in global memory. Who raises it releases what it knows of (its own bulk stores: after store_wait); who
// waits for a value acquires that.
__device__ __forceinline__ void counter_raise(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void counter_wait(const int* counter, int value) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now != value);
}

#else  // ---- the simulator ----------------------------------------------------------------------------------

inline auto async() { return simt::entered(simt::asynchronous()); }
inline uint32_t shared_address(const void* p) { return simt::entered(simt::memory())->shared_address(p); }

template <int id>
void named_barrier(int threads, FASTDIT_CALLED) {
  simt::entered(simt::machine())->named_barrier(id, threads, true, FASTDIT_SITE("bar.sync"));
}
template <int id>
void named_arrive(int threads, FASTDIT_CALLED) {
  simt::entered(simt::machine())->named_barrier(id, threads, false, FASTDIT_SITE("bar.arrive"));
}

template <int bytes>
void copy_async(void* to, const void* from, int filled = bytes) {
  async()->copy(to, from, bytes, filled);
}
inline void copy_commit() { async()->copy_commit(); }
template <int groups>
void copy_wait() {
  async()->copy_wait(groups);
}

template <bool transposed>
void load_matrices(uint32_t (&to)[4], const void* row, FASTDIT_CALLED) {
  simt::load_matrices(to, row, 4, transposed, FASTDIT_SITE("ldmatrix"));
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTDIT_CALLED) {
  simt::multiply(d, a, b, d, simt::MmaType::bf16, FASTDIT_SITE("mma.sync"));
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTDIT_CALLED) {
  simt::multiply(d, a, b, d, simt::MmaType::f16, FASTDIT_SITE("mma.sync"));
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTDIT_CALLED) {
  simt::multiply(d, a, b, d, simt::MmaType::tf32, FASTDIT_SITE("mma.sync"));
}

inline int opaque(int x) { return x; }
inline float exp2_fast(float x) { return x < -126 ? 0.0f : std::exp2(x); }

template <int count>
void more_registers() {}
template <int count>
void fewer_registers() {}

inline void barrier_init(uint64_t* barrier, int arrivals) { async()->barrier_init(barrier, arrivals); }
inline void barrier_fence_init() { async()->barrier_fence_init(); }
inline void barrier_arrive(uint64_t* barrier) { async()->barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) { async()->barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, int parity, FASTDIT_CALLED) {
  async()->barrier_wait(barrier, parity, FASTDIT_SITE("mbarrier.try_wait"));
}

inline int cluster_rank() { return simt::entered(simt::machine())->self().block; }
inline void cluster_barrier(FASTDIT_CALLED) {
  simt::entered(simt::machine())->cluster_barrier(FASTDIT_SITE("barrier.cluster"));
}
inline uint32_t peer_address(const void* p, int rank) { return simt::entered(simt::memory())->peer_address(p, rank); }
inline void barrier_arrive_at(uint32_t peer) { async()->barrier_arrive_at(peer); }

inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  async()->bulk_load(to, from, bytes, barrier);
}
inline void bulk_store(float* to, const float* from, uint32_t bytes) { async()->bulk_store(to, from, bytes, false); }
inline void bulk_add(float* to, const float* from, uint32_t bytes) { async()->bulk_store(to, from, bytes, true); }
inline void store_commit() { async()->store_commit(); }
template <int groups>
void store_wait() {
  async()->store_wait(groups, false);
}
template <int groups>
void store_wait_read() {
  async()->store_wait(groups, true);
}
inline void proxy_fence() { async()->proxy_fence(); }
inline void proxy_fence_global() { async()->proxy_fence_global(); }

inline void counter_raise(int* counter) { simt::entered(simt::counters())->raise(counter); }
inline void counter_wait(const int* counter, int value, FASTDIT_CALLED) {
  simt::entered(simt::counters())->wait(counter, value, FASTDIT_SITE("ld.acquire"));
}

#endif

}  // namespace fastdit::cuda
