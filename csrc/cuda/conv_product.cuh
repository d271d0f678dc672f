// The products of the convolution's GEMMs: bf16 and fp16 as they are, fp32 as three products of tf32, high and low
// parts: errors of 2^-22 a product.
#pragma once

#include "conv.cuh"
#include "mma.h"

namespace fastdit::cuda {

__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) { return (bits + 0x1000u) & 0xffffe000u; }
// What tf32 leaves of x; nothing of an infinity, the NaN of a NaN.
__device__ __forceinline__ uint32_t rest_of(uint32_t bits) {
  const float x = __uint_as_float(bits);
  const bool infinite = (bits & 0x7fffffffu) == 0x7f800000u;
  return infinite ? 0u : to_tf32(__float_as_uint(x - __uint_as_float(to_tf32(bits))));
}

template <class T, int MI, int NI>
__device__ __forceinline__ void multiply(float (&sum)[MI][NI][4], uint32_t (&a)[MI][4], uint32_t (&b)[NI][2]) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t a_rest[MI][4], b_rest[NI][2];
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) a_rest[i][k] = rest_of(a[i][k]), a[i][k] = to_tf32(a[i][k]);
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) b_rest[j][k] = rest_of(b[j][k]), b[j][k] = to_tf32(b[j][k]);
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j) mma_tf32(sum[i][j], a_rest[i], b[j]), mma_tf32(sum[i][j], a[i], b_rest[j]);
  }
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j) {
      if constexpr (std::is_same_v<T, float>)
        mma_tf32(sum[i][j], a[i], b[j]);
      else
        multiply_add<T>(sum[i][j], a[i], b[j][0], b[j][1]);
    }
}

// total += part, which starts anew. One running sum over thousands of fp32 products would lose more than they do.
template <int MI, int NI>
__device__ __forceinline__ void settle(float (&total)[MI][NI][4], float (&part)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) total[i][j][k] += part[i][j][k], part[i][j][k] = 0;
}

}  // namespace fastdit::cuda
