// One deliberately broken kernel per class of fault, and a sound twin of each group: the simulator must name the first
// and stay silent about the second. tests/test_simt_faults.py says which words every report holds.
#include <map>
#include <memory>
#include <stdexcept>

#include "../launch.h"
#include "../ptx.h"
#include "../ring.h"
#include "../tensor_map.h"
#include "faults.h"

namespace fastdit::simt {
namespace {

constexpr int kThreads = 64;

// ---- bounds, alignment, initialisation ----------------------------------------------------------------------
__global__ void copy_rows(float* to, const float* from, int count) {
  const int i = threadIdx.x;
  if (i < count) to[i] = from[i];
}
__global__ void misaligned(float* to, const float* from) {
  if (threadIdx.x == 0) *reinterpret_cast<float2*>(to) = *reinterpret_cast<const float2*>(from + 1);
}
__global__ void write_input(const float* from) {
  if (threadIdx.x == 0) const_cast<float*>(from)[0] = 1;
}
template <int past>
__global__ void shared_static(float* to) {
  FASTDIT_SHARED(float[kThreads], values);
  values[threadIdx.x + past] = 1;
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}
template <int past>
__global__ void shared_dynamic(float* to) {
  FASTDIT_SHARED_DYNAMIC(bytes, 16);
  float* values = reinterpret_cast<float*>(bytes);
  values[threadIdx.x + past] = 1;
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}
__global__ void never_written(float* to) {
  FASTDIT_SHARED(float[kThreads], values);
  if (threadIdx.x) values[threadIdx.x] = 1;
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}
__global__ void output_read(float* to) { to[threadIdx.x] += 1; }
__global__ void others_local(float* to) {
  FASTDIT_SHARED(float*, pointer);
  float mine[4] = {1, 2, 3, 4};
  if (threadIdx.x == 0) pointer = mine;
  __syncthreads();
  to[threadIdx.x] = pointer[threadIdx.x % 4];
}

// ---- barriers and races ---------------------------------------------------------------------------------------
template <bool barrier>
__global__ void neighbour(float* to) {
  FASTDIT_SHARED(float[kThreads], values);
  values[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  to[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}
template <bool barrier>
__global__ void reused(float* to) {
  FASTDIT_SHARED(float[kThreads], values);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float other = values[(threadIdx.x + 33) % kThreads];
  if (barrier) __syncthreads();
  values[threadIdx.x] = other;
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}
__global__ void blocks_collide(float* to) { to[threadIdx.x] = blockIdx.x; }
__global__ void half_warp_syncs(float* to) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  to[threadIdx.x] = 0;
  __syncthreads();
}
__global__ void warps_at_two_barriers(float* to) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  to[threadIdx.x] = 0;
}
__global__ void nobody_else_comes(float* to) {
  if (threadIdx.x < 32) cuda::named_barrier<1>(kThreads);
  to[threadIdx.x] = 0;
}
template <bool complete>
__global__ void shuffled(float* to) {
  float v = threadIdx.x;
  if (complete || threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  to[threadIdx.x] = v;
}
template <bool sound>
__global__ void warp_exchange(float* to) {
  FASTDIT_SHARED(float[kThreads], values);
  values[threadIdx.x] = threadIdx.x;
  if (sound) __syncwarp();
  to[threadIdx.x] = values[threadIdx.x ^ 1];
}
template <bool atomic>
__global__ void counted(float* to) {
  if (atomic)
    atomicAdd(to, 1.0f);
  else
    to[0] = 1;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------
template <bool waits, bool barrier>
__global__ void copied(float* to, const float* from) {
  FASTDIT_SHARED_ALIGNED(float[kThreads * 4], values, 16);
  cuda::copy_async<16>(&values[threadIdx.x * 4], from + threadIdx.x * 4);
  cuda::copy_commit();
  if (waits) cuda::copy_wait<0>();
  if (barrier) __syncthreads();
  to[threadIdx.x] = values[(threadIdx.x * 4 + 4) % (kThreads * 4)];
  cuda::copy_wait<0>();
}

// A bulk copy of 256 bytes, announced on an mbarrier.
struct Bulk {
  bool init_known = true, fenced = true, waits = true, parity = true, bytes = true, arrives = true;
};
__global__ void bulk(float* to, const float* from, Bulk how) {
  FASTDIT_SHARED_ALIGNED(float[kThreads], values, 128);
  FASTDIT_SHARED(uint64_t, barrier);
  if (threadIdx.x == 0) {
    cuda::barrier_init(&barrier, 1);
    if (how.fenced) cuda::barrier_fence_init();
  }
  if (how.init_known) __syncthreads();
  if (threadIdx.x == 0) {
    if (how.arrives) cuda::barrier_arrive_expect(&barrier, how.bytes ? 256 : 128);
    cuda::bulk_load(values, from, 256, &barrier);
  }
  if (how.waits) cuda::barrier_wait(&barrier, how.parity ? 0 : 1);
  to[threadIdx.x] = values[threadIdx.x];
}

// ---- turns of blocks --------------------------------------------------------------------------------------------
// Blocks add 256 bytes to two places, in the order of their tickets.
struct Turns {
  bool waits = true, complete = true, fenced = true, fenced_global = true, read = true;
  int late = 0;  // turns that a block waits too long
};
__global__ void turns(float* to, int* counters, Turns how) {
  FASTDIT_SHARED_ALIGNED(float[kThreads], values, 128);
  FASTDIT_SHARED(int, ticket);
  if (threadIdx.x == 0) ticket = atomicAdd(counters, 1);
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    values[threadIdx.x] = ticket + i;
    if (how.fenced) cuda::proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      if (how.waits) cuda::counter_wait(counters + 1 + i, ticket + how.late);
      if (how.fenced_global) cuda::proxy_fence_global();
      if (ticket == 0)
        cuda::bulk_store(to + i * kThreads, values, sizeof values);
      else
        cuda::bulk_add(to + i * kThreads, values, sizeof values);
      cuda::store_commit();
      if (how.read) cuda::store_wait_read<0>();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (how.complete) cuda::store_wait<0>();
      cuda::counter_raise(counters + 1 + i);
    }
  }
  if (threadIdx.x == 0) cuda::store_wait<0>();
}

// ---- clusters ---------------------------------------------------------------------------------------------------
// Tiles that the two blocks of a cluster share: one thread of each asks for half of every tile, for both; one warp of
// each adds the tiles up.
struct Peers {
  bool known = true, fenced = true, all_bytes = true, own_half = true, both = true, waits = true, released = true,
       reads_first = true, stays = true;
};
constexpr int kSteps = 4, kPeerThreads = 128;
__global__ void shared_tiles(const __grid_constant__ TensorMap map, float* to, Peers how) {
  FASTDIT_SHARED_ALIGNED(float[2][64], tiles, 128);
  FASTDIT_SHARED(cuda::Ring<2>, ring);
  const int rank = cuda::cluster_rank(), lane = threadIdx.x;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s)
      cuda::barrier_init(&ring.full[s], 1), cuda::barrier_init(&ring.empty[s], how.released ? 2 : 1);
    if (how.fenced) cuda::barrier_fence_init();
  }
  __syncthreads();
  if (how.known) cuda::cluster_barrier();
  float sum = 0;
  cuda::RingPlace<2> at;
  if (threadIdx.x == kPeerThreads - 1)
    for (int step = 0; step < kSteps; ++step, at.next()) {
      cuda::barrier_wait(&ring.empty[at.stage], at.phase ^ 1);
      cuda::barrier_arrive_expect(&ring.full[at.stage], how.all_bytes ? 256 : 128);
      const int half = 32 * (how.own_half ? rank : 0), from[1] = {step * 64 + half};
      const uint16_t peers = how.both ? 3 : 1 << rank;
      cuda::tensor_load_peers(&tiles[at.stage][half], map, from, &ring.full[at.stage], peers);
    }
  if (threadIdx.x < 32)
    for (int step = 0; step < kSteps; ++step, at.next()) {
      const auto release = [&] {
        if (lane == rank || (lane == 1 - rank && how.released))
          cuda::barrier_arrive_at(cuda::peer_address(&ring.empty[at.stage], lane));
      };
      if (!how.waits && rank == 1 && step == kSteps - 1) break;
      cuda::barrier_wait(&ring.full[at.stage], at.phase);
      if (!how.reads_first) release();
      sum += tiles[at.stage][lane] + tiles[at.stage][lane + 32];
      __syncwarp();
      if (how.reads_first) release();
    }
  if (how.stays) cuda::cluster_barrier();
  if (threadIdx.x < 32) to[blockIdx.x * 32 + lane] = sum;
}

struct Buffers {
  alignas(16) float from[4 * kThreads], to[4 * kThreads], gap[4];
  int counters[4];
};
constexpr int kCounters = 4 * kThreads + 4;  // values after `to`
void take_turns(float* to, Turns how = {}) {
  cuda::launch(turns, dim3(3), dim3(kThreads), 0, {}, "fault", "", to, reinterpret_cast<int*>(to + kCounters), how);
}

template <class... P, class... A>
void start(void (*kernel)(P...), A... arguments) {
  cuda::launch(kernel, dim3(1), dim3(kThreads), kThreads * sizeof(float), {}, "fault", "", arguments...);
}

void start(float* to, const float* from, Peers how) {
  const TensorMap map =
      cuda::encode({from, DType::f32, 1, {4 * kThreads}, {1}, {32}, cuda::Swizzle::none}, "fault", "");
  cuda::launch_clusters(2, shared_tiles, dim3(4), dim3(kPeerThreads), 0, {}, "fault", "", map, to, how);
}

using Run = void (*)(float* to, const float* from);

#define FASTDIT_FAULT(name, ...)            \
  {name, [](float* to, const float* from) { \
     (void)to, (void)from;                  \
     __VA_ARGS__;                           \
   }}
const std::map<std::string, Run> kFaults = {
    FASTDIT_FAULT("sound/copy", start(copy_rows, to, from, 64)),
    FASTDIT_FAULT("sound/shared static", start(shared_static<0>, to)),
    FASTDIT_FAULT("sound/shared dynamic", start(shared_dynamic<0>, to)),
    FASTDIT_FAULT("sound/neighbour", start(neighbour<true>, to)),
    FASTDIT_FAULT("sound/reused", start(reused<true>, to)),
    FASTDIT_FAULT("sound/shuffled", start(shuffled<true>, to)),
    FASTDIT_FAULT("sound/warp exchange", start(warp_exchange<true>, to)),
    FASTDIT_FAULT("sound/counted", start(counted<true>, to + 4 * kThreads - 1)),
    FASTDIT_FAULT("sound/cp.async", start(copied<true, true>, to, from)),
    FASTDIT_FAULT("sound/bulk", start(bulk, to, from, Bulk{})),
    FASTDIT_FAULT("sound/turns", take_turns(to)),
    FASTDIT_FAULT("sound/cluster", start(to, from, Peers{})),
    FASTDIT_FAULT("turn not waited for", take_turns(to, {.waits = false})),
    FASTDIT_FAULT("turn given before the store is complete", take_turns(to, {.complete = false})),
    FASTDIT_FAULT("turn of a later block", take_turns(to, {.late = 1})),
    FASTDIT_FAULT("bulk store of values not fenced", take_turns(to, {.fenced = false})),
    FASTDIT_FAULT("bulk store after a turn not fenced", take_turns(to, {.fenced_global = false})),
    FASTDIT_FAULT("bulk store overwritten before it has read", take_turns(to, {.read = false})),
    FASTDIT_FAULT("global past the end", start(copy_rows, to + 4 * kThreads - 60, from, 64)),
    FASTDIT_FAULT("global before the beginning", start(copy_rows, to, from - 1, 64)),
    FASTDIT_FAULT("misaligned", start(misaligned, to, from)),
    FASTDIT_FAULT("input written", start(write_input, from)),
    FASTDIT_FAULT("output read", start(output_read, to)),
    FASTDIT_FAULT("shared static past the end", start(shared_static<1>, to)),
    FASTDIT_FAULT("shared dynamic past the end", start(shared_dynamic<1>, to)),
    FASTDIT_FAULT("shared never written", start(never_written, to)),
    FASTDIT_FAULT("another thread's local memory", start(others_local, to)),
    FASTDIT_FAULT("read without barrier", start(neighbour<false>, to)),
    FASTDIT_FAULT("overwritten without barrier", start(reused<false>, to)),
    FASTDIT_FAULT("two blocks write", cuda::launch(blocks_collide, dim3(2), dim3(kThreads), 0, {}, "fault", "", to)),
    FASTDIT_FAULT("half a warp at a barrier", start(half_warp_syncs, to)),
    FASTDIT_FAULT("two barriers", start(warps_at_two_barriers, to)),
    FASTDIT_FAULT("deadlock", start(nobody_else_comes, to)),
    FASTDIT_FAULT("half a warp shuffles", start(shuffled<false>, to)),
    FASTDIT_FAULT("warp exchange without __syncwarp", start(warp_exchange<false>, to)),
    FASTDIT_FAULT("counted without atomic", start(counted<false>, to)),
    FASTDIT_FAULT("cp.async without wait", start(copied<false, true>, to, from)),
    FASTDIT_FAULT("cp.async without barrier", start(copied<true, false>, to, from)),
    FASTDIT_FAULT("bulk without wait", start(bulk, to, from, Bulk{.waits = false})),
    FASTDIT_FAULT("bulk with the wrong parity", start(bulk, to, from, Bulk{.parity = false})),
    FASTDIT_FAULT("bulk with half the bytes", start(bulk, to, from, Bulk{.bytes = false})),
    FASTDIT_FAULT("bulk never announced", start(bulk, to, from, Bulk{.arrives = false})),
    FASTDIT_FAULT("mbarrier not known", start(bulk, to, from, Bulk{.init_known = false})),
    FASTDIT_FAULT("mbarrier not fenced", start(bulk, to, from, Bulk{.fenced = false})),
    FASTDIT_FAULT("peer's mbarrier not known", start(to, from, Peers{.known = false})),
    FASTDIT_FAULT("peer's mbarrier not fenced", start(to, from, Peers{.fenced = false})),
    FASTDIT_FAULT("peer's bytes not expected", start(to, from, Peers{.all_bytes = false})),
    FASTDIT_FAULT("the same half twice", start(to, from, Peers{.own_half = false})),
    FASTDIT_FAULT("copied for itself alone", start(to, from, Peers{.both = false})),
    FASTDIT_FAULT("not released at the peer", start(to, from, Peers{.released = false})),
    FASTDIT_FAULT("released at the peer too early", start(to, from, Peers{.reads_first = false})),
    FASTDIT_FAULT("ends before the peer signals", start(to, from, Peers{.stays = false})),
    FASTDIT_FAULT("ends before the peer's copy", start(to, from, Peers{.waits = false, .stays = false})),
    FASTDIT_FAULT("ends without its copy", start(to, from, Peers{.waits = false})),
};
#undef FASTDIT_FAULT

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, _] : kFaults) names.push_back(name);
  return names;
}

void run_fault(const std::string& name) {
  const auto found = kFaults.find(name);
  if (found == kFaults.end()) throw std::invalid_argument("run_fault: no kernel '" + name + "'");
  const auto owner = std::make_unique<Buffers>();
  Buffers& buffers = *owner;
  memory().forget();
  const std::vector<int64_t> sizes{4 * kThreads}, strides{1};
  memory().allow(reinterpret_cast<uintptr_t>(buffers.from), 4, sizes, strides, true, false);
  memory().allow(reinterpret_cast<uintptr_t>(buffers.to), 4, sizes, strides, name == "sound/counted", true);
  memory().allow(reinterpret_cast<uintptr_t>(buffers.counters), 4, {4}, strides, true, true);
  found->second(buffers.to, buffers.from);
}

}  // namespace fastdit::simt
