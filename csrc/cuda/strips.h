// Sums of rows in a fixed order: a block of (kStrip, lanes) threads takes a strip of columns, a line of memory wide.
#pragma once

#include "platform.h"

namespace fastdit::cuda {

constexpr int kStrip = 32;

// The sum of value(first) .. value(last), this thread's column of those rows. Lane i takes every lanes-th row from
// first + i on, then the first lane adds what they found: its result is the sum. Every thread of the block calls it.
template <int lanes, class Value>
__device__ __forceinline__ float strip_sum(int first, int last, float (&partial)[lanes][kStrip], Value&& value) {
  const int lane = static_cast<int>(threadIdx.y), column = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int k = first + lane; k <= last; k += lanes) sum += value(k);
  partial[lane][column] = sum;
  __syncthreads();
  if (lane) return 0;
  sum = 0;
  for (int k = 0; k < lanes; ++k) sum += partial[k][column];
  return sum;
}

}  // namespace fastdit::cuda
