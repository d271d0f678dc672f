// A row of C channels in the registers of a group of warps: thread i of the group holds packs i, i + threads, ... .
// Groups of one warp share a block (kRows of them); a wider group is a block of its own.
#pragma once

#include "packs.h"

namespace fastdit::cuda {

constexpr int kRows = 4, kMaxWarps = 16;

// W values in a pack, V packs in a thread, warps in a group.
struct Geometry {
  int W, V, warps;
  int groups() const { return warps == 1 ? kRows : 1; }  // of a block
  int threads() const { return 32 * warps * groups(); }
};

// The packs per thread that leave the fewest lanes idle; of equals the one with fewer warps. warps 0: C is too large.
inline Geometry geometry(int64_t C, int W, std::initializer_list<int> candidates) {
  Geometry best{W, 0, 0};
  int64_t least = 0;
  for (int V : candidates) {
    const int64_t step = 32 * W * V, warps = (C + step - 1) / step;
    if (warps > kMaxWarps) continue;
    if (!best.warps || warps * step <= least) best.V = V, best.warps = static_cast<int>(warps), least = warps * step;
  }
  return best;
}

// This thread's place in its group, and the group's among all groups of the launch.
struct Place {
  int group, lane, warps;
  __device__ explicit Place(int group_warps) : warps(group_warps) {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    group = warps == 1 ? block * kRows + thread / 32 : block;
    lane = warps == 1 ? thread % 32 : thread;
  }
  template <int W>
  __device__ int channel(int pack) const {
    return (pack * 32 * warps + lane) * W;
  }
};

// Sums over a group; the same order whatever the launch. Every thread of the group calls it the same number of times.
// Two buffers take turns: who writes one again has passed a barrier that all readers of its last use had reached.
struct Sums {
  float (*partial)[2][kMaxWarps];
  int warps, turn = 0;

  template <int count>
  __device__ __forceinline__ void operator()(float (&v)[count]) {
    static_assert(count <= 2);
#pragma unroll
    for (int k = 0; k < count; ++k)
#pragma unroll
      for (int step = 16; step > 0; step /= 2) v[k] += __shfl_xor_sync(0xffffffffu, v[k], step);
    if (warps == 1) return;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0)
      for (int k = 0; k < count; ++k) partial[turn][k][warp] = v[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += partial[turn][k][w];
      v[k] = sum;
    }
    turn ^= 1;
  }
  __device__ __forceinline__ float one(float v) {
    float a[1] = {v};
    (*this)(a);
    return a[0];
  }
};

}  // namespace fastdit::cuda
