// The part of CUDA C++ that our kernels are written in, for g++: a kernel is a function that the simulator calls once
// per thread. Included instead of cuda_runtime.h (../platform.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "convert.h"
#include "counters.h"
#include "memory.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
  float x, y;
} __attribute__((aligned(8)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
using dim3 = fastdit::simt::Dim3;

#define threadIdx ::fastdit::simt::thread_index()
#define blockIdx ::fastdit::simt::block_index()
#define blockDim ::fastdit::simt::block_size()
#define gridDim ::fastdit::simt::grid_size()

// A static variable in shared memory, and the dynamic part as bytes.
#define FASTDIT_SHARED_ALIGNED(type, name, align)              \
  static const char name##_key = 0;                            \
  auto& name = *reinterpret_cast<std::type_identity_t<type>*>( \
      ::fastdit::simt::entered(::fastdit::simt::memory())->shared_static(&name##_key, sizeof(type), align))
#define FASTDIT_SHARED(type, name) FASTDIT_SHARED_ALIGNED(type, name, alignof(type))
#define FASTDIT_SHARED_DYNAMIC(name, align) \
  char* const name = ::fastdit::simt::entered(::fastdit::simt::memory())->shared_dynamic(align)

// An operation that knows where it was called.
#define FASTDIT_CALLED const std::source_location where = std::source_location::current()
#define FASTDIT_SITE(operation) \
  ::fastdit::simt::Site { operation, where.file_name(), static_cast<int>(where.line()) }

inline void __syncthreads(FASTDIT_CALLED) {
  fastdit::simt::entered(fastdit::simt::machine())->block_barrier(FASTDIT_SITE("__syncthreads"));
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, FASTDIT_CALLED) {
  fastdit::simt::sync_warp(mask, FASTDIT_SITE("__syncwarp"));
}

#define FASTDIT_SHUFFLE(name, how, type)                                                                      \
  template <class T>                                                                                          \
  inline T name(uint32_t mask, T value, type argument, int width = 32, FASTDIT_CALLED) {                      \
    static_assert(sizeof(T) <= 8);                                                                            \
    uint64_t bits = 0;                                                                                        \
    __builtin_memcpy(&bits, &value, sizeof(T));                                                               \
    bits = fastdit::simt::shuffle(fastdit::simt::Shuffle::how, mask, bits, static_cast<int>(argument), width, \
                                  FASTDIT_SITE(#name));                                                       \
    __builtin_memcpy(&value, &bits, sizeof(T));                                                               \
    return value;                                                                                             \
  }
FASTDIT_SHUFFLE(__shfl_sync, index, int)
FASTDIT_SHUFFLE(__shfl_up_sync, up, unsigned)
FASTDIT_SHUFFLE(__shfl_down_sync, down, unsigned)
FASTDIT_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
#undef FASTDIT_SHUFFLE

inline uint32_t __ballot_sync(uint32_t mask, int predicate, FASTDIT_CALLED) {
  return fastdit::simt::ballot(mask, predicate, FASTDIT_SITE("__ballot_sync"));
}
inline int __any_sync(uint32_t mask, int predicate, FASTDIT_CALLED) {
  return fastdit::simt::ballot(mask, predicate, FASTDIT_SITE("__any_sync")) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, FASTDIT_CALLED) {
  return fastdit::simt::ballot(mask, !predicate, FASTDIT_SITE("__all_sync")) == 0;
}
inline unsigned __reduce_add_sync(uint32_t mask, unsigned value, FASTDIT_CALLED) {
  return fastdit::simt::reduce_add(mask, value, FASTDIT_SITE("__reduce_add_sync"));
}

// Blocks run one after the other, so an atomic is an access that races with no other atomic.
template <class T>
inline T atomicAdd(T* p, std::type_identity_t<T> value) {
  fastdit::simt::entered(fastdit::simt::memory())->access(p, sizeof(T), fastdit::simt::Access::atomic);
  T before;
  fastdit::simt::raw_copy(&before, p, sizeof(T));
  const T after = before + value;
  fastdit::simt::raw_copy(p, &after, sizeof(T));
  return before;
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> value) {
  fastdit::simt::entered(fastdit::simt::memory())->access(p, sizeof(T), fastdit::simt::Access::atomic);
  T before;
  fastdit::simt::raw_copy(&before, p, sizeof(T));
  const T after = before > value ? before : value;
  fastdit::simt::raw_copy(p, &after, sizeof(T));
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, const T& value) {
  *p = value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned u) { return fastdit::simt::float_of(u); }
inline int __clz(int x) { return __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float f) { return fastdit::simt::bits_of(f); }
using std::max;
using std::min;
