// Rings of slots in shared memory, which some warps fill and others empty.
#pragma once

#include "platform.h"

namespace fastdit::cuda {

// What the slots announce.
template <int stages>
struct Ring {
  uint64_t full[stages], empty[stages];
};

// The slot that a warp has come to, and the parity of its round: of `full` as it is, of `empty` the other one. stages:
// 0 where only the call knows.
template <int stages = 0>
struct RingPlace {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next(int count = stages) {
    if (++stage == count) stage = 0, phase ^= 1;
  }
};

}  // namespace fastdit::cuda
