// What the two backwards of sm_90a share: tiles of 128 rows and bricks of 64, and the statistics of the queries.
#pragma once

#include "attention_hopper.cuh"

namespace fastdit::cuda {

constexpr int kGradGroups = kHopperGradOwn / 64, kGradConsumers = kGradGroups * 128,
              kGradThreads = kGradConsumers + 128;

// The row statistics of a segment's queries (attention.h), lse or delta.
__device__ __forceinline__ const float* facts_of(const AttentionParams& p, const Cut& cut, const float* rows,
                                                 const Work& w, int head, int which) {
  const int planes = static_cast<int>(cut.plan ? 1 : p.batch) * static_cast<int>(p.heads);
  const int plane = which * planes + w.batch * static_cast<int>(p.heads) + head;
  return rows + plane * p.q_len + w.q_row;
}

// One warp: which brick stands in a slot and, with keys, the statistics of its queries.
template <bool keys, class Shared, int stages>
__device__ __forceinline__ void feed_facts(const AttentionParams& p, const Cut& cut, const float* rows, int heads,
                                           Shared& s, Place<stages>& place) {
  constexpr int kMet = kHopperGradMet;
  const Work& w = s.work;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    Point at = first_brick(w);
#pragma unroll 1
    for (int count = w.count; count > 0; --count, at = next_brick(at, w, cut.met), place.next()) {
      barrier_wait(&s.ring.empty[place.stage], place.phase ^ 1);
      __syncwarp();
      if (lane == 0) s.at[place.stage] = at;
      if constexpr (keys)
#pragma unroll 1
        for (int i = lane; i < 2 * kMet; i += 32) {
          const int row = token_row(w, at, {w.t.hi, w.h.hi, w.w.hi}, cut.met, i % kMet, p.grids != nullptr);
          // where x' and y' are 0, any will do
          s.facts[place.stage][i / kMet][i % kMet] =
              row >= 0 ? facts_of(p, cut, rows, w, w.head + head, i / kMet)[row] : 0.0f;
        }
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.ring.full[place.stage]);
    }
  }
}

}  // namespace fastdit::cuda
