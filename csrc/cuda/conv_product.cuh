// The products of the convolution's GEMMs. bf16 and fp16 as they are. fp32 is the sum of three bf16, all its 24 bits:
// six products of bf16, what they leave out is below 2^-25; sums over 16 of K are added with their rounding errors
// kept.
#pragma once

#include "conv.cuh"
#include "mma.h"

namespace fastdit::cuda {

// MI x NI fragments of fp32 sums, and for fp32 what rounding took from them.
template <class T, int MI, int NI>
struct Accumulator {
  static constexpr bool wide = std::is_same_v<T, float>;
  static constexpr int LOADS = wide ? 2 : 1;  // fragments of 32 bytes along K that make 16 values
  float sum[MI][NI][4] = {};
  float rest[wide ? MI : 1][wide ? NI : 1][4] = {};

  // As ldmatrix gives them: 16-bit values as mma.h says; of fp32 a lane has column lane % 4 + 4 (i / 2) of 8.
  __device__ __forceinline__ void add(const uint32_t (&a)[LOADS][MI][4], const uint32_t (&b)[LOADS][NI][2]) {
    if constexpr (wide)
      add_split(a, b);
    else
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NI; ++j) multiply_add<T>(sum[i][j], a[0][i], b[0][j][0], b[0][j][1]);
  }
  __device__ __forceinline__ float value(int i, int j, int k) const {
    if constexpr (wide) return fabsf(sum[i][j][k]) < INFINITY ? sum[i][j][k] + rest[i][j][k] : sum[i][j][k];
    return sum[i][j][k];
  }

 private:
  // Two fp32 as three pairs of bf16, high ones first.
  static __device__ __forceinline__ void split(uint32_t low, uint32_t high, uint32_t& first, uint32_t& second,
                                               uint32_t& third) {
    float x = __uint_as_float(low), y = __uint_as_float(high);
    first = pair<bf16>(x, y);
    x -= __uint_as_float(first << 16), y -= __uint_as_float(first & 0xffff0000u);
    second = pair<bf16>(x, y);
    x -= __uint_as_float(second << 16), y -= __uint_as_float(second & 0xffff0000u);
    third = pair<bf16>(x, y);
  }
  // The order of K is free as long as both operands have the same: columns q and q + 4 of 8 make a pair.
  __device__ __forceinline__ void add_split(const uint32_t (&a)[LOADS][MI][4], const uint32_t (&b)[LOADS][NI][2]) {
    uint32_t x[3][MI][4];
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) split(a[k / 2][i][k % 2], a[k / 2][i][k % 2 + 2], x[0][i][k], x[1][i][k], x[2][i][k]);
#pragma unroll
    for (int j = 0; j < NI; ++j) {
      uint32_t y[3][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) split(b[k][j][0], b[k][j][1], y[0][k], y[1][k], y[2][k]);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        float part[4] = {};
        mma_bf16(part, x[0][i], y[2]);
        mma_bf16(part, x[2][i], y[0]);
        mma_bf16(part, x[1][i], y[1]);
        mma_bf16(part, x[0][i], y[1]);
        mma_bf16(part, x[1][i], y[0]);
#pragma unroll
        for (int k = 0; k < 4; ++k) part[k] = fabsf(part[k]) < INFINITY ? part[k] : 0;  // the high parts say which
        mma_bf16(part, x[0][i], y[0]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float before = sum[i][j][k];
          sum[i][j][k] = before + part[k];
          rest[i][j][k] += part[k] - (sum[i][j][k] - before);
        }
      }
    }
  }
};

}  // namespace fastdit::cuda
