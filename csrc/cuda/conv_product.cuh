// The products of the convolution's GEMMs. bf16 and fp16 as they are; fp32 as three products of tf32, high and low
// parts, eight of K at a time, whose sums are added with their rounding errors kept: as good as fp32 itself.
#pragma once

#include "conv.cuh"
#include "mma.h"

namespace fastdit::cuda {

// MI x NI fragments of fp32 sums, and for fp32 what rounding took from them.
template <class T, int MI, int NI>
struct Accumulator {
  static constexpr bool wide = std::is_same_v<T, float>;
  float sum[MI][NI][4] = {};
  float rest[wide ? MI : 1][wide ? NI : 1][4] = {};

  __device__ __forceinline__ void add(uint32_t (&a)[MI][4], uint32_t (&b)[NI][2]) {
    if constexpr (wide)
      add_split(a, b);
    else
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NI; ++j) multiply_add<T>(sum[i][j], a[i], b[j][0], b[j][1]);
  }
  __device__ __forceinline__ float value(int i, int j, int k) const {
    if constexpr (wide) return fabsf(sum[i][j][k]) < INFINITY ? sum[i][j][k] + rest[i][j][k] : sum[i][j][k];
    return sum[i][j][k];
  }

 private:
  // The nearest of tf32 (ties away from zero); a NaN stays one.
  static __device__ __forceinline__ uint32_t high(uint32_t bits) {
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffe000u : (bits + 0x1000u) & 0xffffe000u;
  }
  static __device__ __forceinline__ uint32_t low(uint32_t bits) {
    return high(__float_as_uint(__uint_as_float(bits) - __uint_as_float(high(bits))));
  }
  __device__ __forceinline__ void add_split(uint32_t (&a)[MI][4], uint32_t (&b)[NI][2]) {
    uint32_t a_low[MI][4], b_low[NI][2];
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) a_low[i][k] = low(a[i][k]), a[i][k] = high(a[i][k]);
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) b_low[j][k] = low(b[j][k]), b[j][k] = high(b[j][k]);
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j) {
        float part[4] = {};
        mma_tf32(part, a_low[i], b[j]);
        mma_tf32(part, a[i], b_low[j]);
#pragma unroll
        for (int k = 0; k < 4; ++k) part[k] = fabsf(part[k]) < INFINITY ? part[k] : 0;  // the high parts say which
        mma_tf32(part, a[i], b[j]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float before = sum[i][j][k];
          sum[i][j][k] = before + part[k];
          rest[i][j][k] += part[k] - (sum[i][j][k] - before);
        }
      }
  }
};

}  // namespace fastdit::cuda
