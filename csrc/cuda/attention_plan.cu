// Packed segments as tiles, on the device: from cu_seqlens alone, the costly ones first, so that nobody waits for a
// count on the host and the longest work starts first. Layout: attention.h.
//
// Warp s ranks segment s among all by counting those that go before it: no sort, no atomics. Cost: S + 1 warps, each
// reads cu_seqlens once (8 bytes a segment, from the caches).
#include "attention.cuh"

namespace fastdit::cuda {
namespace {

struct Demand {
  int tiles, cost;  // cost: partners of one row; the tail has none
};

__device__ __forceinline__ Demand demand(const PlanParams& p, int s) {
  const bool real = s < p.segments;
  const int begin = p.cu[s], length = (real ? p.cu[s + 1] : static_cast<int>(p.rows)) - begin;
  if (!real) return {pieces(length, p.own.w), -1};
  if (!p.grids) return {pieces(length, p.own.w), p.cu_other[s + 1] - p.cu_other[s]};
  const int t = p.grids[3 * s], h = p.grids[3 * s + 1], w = p.grids[3 * s + 2];
  const auto met = [&](int n, int axis) { return min(n, static_cast<int>(p.window[axis])); };
  return {bricks(t, h, w, p.own), met(t, 0) * met(h, 1) * met(w, 2)};
}

__global__ void __launch_bounds__(32) attention_plan_kernel(const PlanParams p) {
  const int s = static_cast<int>(blockIdx.x), segments = static_cast<int>(p.segments);
  const Demand own = demand(p, s);
  unsigned rank = 0, first = 0;
  for (int c = static_cast<int>(threadIdx.x); c <= segments; c += 32) {
    const Demand other = demand(p, c);
    if (other.cost > own.cost || (other.cost == own.cost && c < s)) ++rank, first += other.tiles;
  }
  rank = __reduce_add_sync(0xffffffffu, rank), first = __reduce_add_sync(0xffffffffu, first);
  if (threadIdx.x) return;
  p.plan[rank] = static_cast<int>(first);
  p.plan[segments + 2 + rank] = s;
  if (s == segments) {  // the tail ends the list
    p.plan[segments + 1] = static_cast<int>(first) + own.tiles;
    p.plan[2 * segments + 3] = 0;
  }
}

}  // namespace

void attention_plan(const PlanParams& p, Stream stream, const char* op) {
  launch(attention_plan_kernel, dim3(static_cast<unsigned>(p.segments + 1)), dim3(32), 0, stream, op,
         "segments=" + std::to_string(p.segments), p);
}

}  // namespace fastdit::cuda
