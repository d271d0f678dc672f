// One kernel source, two compilers: nvcc for the card, g++ for the block simulator (simt/).
//
//   FASTDIT_SHARED(float[2][32], sums);                a static variable in shared memory
//   FASTDIT_SHARED_ALIGNED(float[64], tile, 128);      likewise
//   FASTDIT_SHARED_DYNAMIC(bytes, 1024);               char* to the dynamic part, aligned as said and no better
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTDIT_SHARED(type, name) __shared__ std::type_identity_t<type> name
#define FASTDIT_SHARED_ALIGNED(type, name, align) __shared__ __align__(align) std::type_identity_t<type> name
#define FASTDIT_SHARED_DYNAMIC(name, align) \
  extern __shared__ __align__(align)        \
  char name[]
#else
#include "simt/cuda.h"
#endif
