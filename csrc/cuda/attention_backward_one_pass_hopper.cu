// Every gradient of attention in one pass over the keys, for sm_90a and lines: 10 D FLOPs a visible pair instead of 14.
// Formulas and row statistics: attention_backward.cu; tiles, rings and masks: attention_hopper.cuh. Other architectures
// compile an empty kernel.
//
// A block owns 128 keys, 64 for each of two consumer warpgroups, and walks the queries in bricks of 64, for each head
// of the group:
//
//   s = k q^T      dp = v do^T                              from shared memory, both transposed
//   dv += p do     dk += ds q                               p and ds in registers
//   part = ds^T k                                           ds through shared memory, 128 keys x 64 queries
//
// The two warpgroups take the parts of bricks in turn; each part leaves through a staging tile, from where one thread
// adds it to fp32 sums in global memory by bulk reduction. When all are done a second kernel scales and rounds them.
//
// Order. The sums of a brick are taken over the key tiles in ascending order, so the bits are the same on every run: a
// counter per head and brick says how many tiles were added. A block waits until it equals its tile's number, adds,
// waits until the sums have arrived, and raises it. Tile 0 stores instead, so the sums need no zeros. The tiles that
// meet a brick are 0 .. n: with frames a later tile is met by later queries only. (Bricks begin at multiples of 64.)
//
// No deadlock: a block draws its tile as a ticket when it starts, and tiles of a head are handed out in ascending
// order. So it waits only for blocks that have drawn lower tickets, which are resident and never yield; the one with
// the lowest ticket waits for nobody. In which order hardware starts blocks does not matter.
#include "attention_backward_hopper.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kOwn = kHopperGradOwn, kMet = kHopperGradMet, kGroups = kGradGroups;
constexpr int kConsumers = kGradConsumers, kThreads = kGradThreads;
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;  // 2 x 128 and 128 of them, of 64 Ki
// Named barriers. kRead + i: the rows that warpgroup i owns may be overwritten.
constexpr int kRead = 1, kDescribed = kRead + kGroups;

template <int D>
struct Shape {
  using Own = Spans<D, kOwn>;
  using Met = Spans<D, kMet>;
  using Ds = Spans<kMet, kOwn>;
  static constexpr int stages = D == 128 ? 3 : 4, part = kMet * D;  // values of dq's part
  static constexpr int bytes = 2 * Own::bytes + 2 * stages * Met::bytes + Ds::bytes + part * 4;

  struct Shared {
    Ring<stages> ring;
    uint64_t own, landed[2];  // full, of what the block owns; of an x' or a y' with rows to be cleared
    uint64_t own_landed;      // likewise, of k
    // of a brick: ds is there, its part has been made of it; the part is staged, the staging tile has been read
    uint64_t ds_full, ds_free, staged, drained;
    Work work;
    int tile;
    Owned owned[kOwn];
    Point at[stages];              // of the brick in a slot
    float facts[stages][2][kMet];  // lse and delta of its queries
  };
};

// Where the sums of a brick stand, and their counter.
struct Sums {
  int64_t slot;
  __device__ __forceinline__ Sums(const AttentionParams& p, const Cut& cut, const OnePass& one, const Work& w, int head,
                                  Point at) {
    const int64_t plane = static_cast<int64_t>(w.batch) * p.heads + head;
    const int64_t first = cut.plan ? w.q_row / kMet + w.segment : 0;  // no two segments share one: see segment_of
    slot = plane * one.slots + first + at.w / kMet;
  }
};

template <class T, int D>
class Consumer {
  using Of = Shape<D>;
  using Met = typename Of::Met;
  static constexpr int kSteps = kMet / 16;
  // Registers hold the products of a brick side by side: dv runs while ds is made, the part beside dk. At D = 128 the
  // other warpgroup's products run meanwhile.
  static constexpr bool early = D < 128;
  const AttentionGradParams& p_;
  const Cut& cut_;
  typename Of::Shared& shared_;
  const Work& w_;
  const typename Of::Own k_, v_;
  char* const tiles_;  // of q, then of do
  const typename Of::Ds ds_tile_;
  float4* const staging_;
  const int group_, warp_, lane_;  // warp: of the warpgroup
  const float factor_;             // scale * log2(e)
  int place_ = 0;                  // in the ring: slot, and parity in bit 2: registers are few

  float dk_[D / 2], dv_[D / 2];
  float s_[kMet / 2], dp_[kMet / 2];  // later p and ds
  uint32_t p_fragments_[kSteps][4], ds_fragments_[kSteps][4];

  __device__ __forceinline__ int row(int half) const { return 64 * group_ + 16 * warp_ + lane_ / 4 + 8 * half; }
  __device__ __forceinline__ int slot() const { return place_ & 3; }
  __device__ __forceinline__ Met q_met(int stage) const { return {tiles_ + stage * Met::bytes}; }
  __device__ __forceinline__ Met do_met(int stage) const { return {tiles_ + (Of::stages + stage) * Met::bytes}; }

  // A warp says so for all of its lanes.
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(barrier);
  }
  __device__ __forceinline__ void release() {
    arrive(&shared_.ring.empty[slot()]);
    place_ = slot() == Of::stages - 1 ? (place_ ^ 4) & 4 : place_ + 1;
  }

  // ---- products -------------------------------------------------------------------------------------------
  // Issues s = k q^T and then dp = v do^T, once they are there.
  __device__ __forceinline__ void multiply_rows() {
    barrier_wait(&shared_.ring.full[slot()], place_ >> 2);
    const uint64_t k = k_.by_row(64 * group_), q = q_met(slot()).by_row();
    const uint64_t v = v_.by_row(64 * group_), d_o = do_met(slot()).by_row();
    product_fence();
#pragma unroll
    for (int d = 0; d < D; d += 16) product<T>(s_, k + Of::Own::channels_step(d), q + Met::channels_step(d), d > 0);
    product_commit();
#pragma unroll
    for (int d = 0; d < D; d += 16) product<T>(dp_, v + Of::Own::channels_step(d), d_o + Met::channels_step(d), d > 0);
    product_commit();
  }
  // Issues dv += p do, dk += ds q.
  __device__ __forceinline__ void multiply_values() {
    const uint64_t d_o = do_met(slot()).by_k();
    product_fence();
#pragma unroll
    for (int k = 0; k < kMet; k += 16) product<T, true>(dv_, p_fragments_[k / 16], d_o + Met::rows_step(k));
  }
  __device__ __forceinline__ void multiply_keys() {
    const uint64_t q = q_met(slot()).by_k();
    product_fence();
#pragma unroll
    for (int k = 0; k < kMet; k += 16) product<T, true>(dk_, ds_fragments_[k / 16], q + Met::rows_step(k));
  }
  __device__ __forceinline__ void sums_are_there() {
    product_values(dk_);
    product_values(dv_);
  }
  // Issues part = ds^T k.
  __device__ __forceinline__ void multiply_part(float (&part)[D / 2]) {
    const uint64_t ds = ds_tile_.by_k(), k = k_.by_k();
    product_fence();
#pragma unroll
    for (int j = 0; j < kOwn; j += 16)
      product<T, true, true>(part, ds + Of::Ds::rows_step(j), k + Of::Own::rows_step(j), j > 0);
    product_commit();
  }

  // ---- a brick --------------------------------------------------------------------------------------------
  // s becomes p: 0 where the masks hide one from the other.
  __device__ __forceinline__ void weigh(int stage) {
    with_sight(
        p_, w_, shared_.at[stage], cut_.met, [&](int half) -> const Owned& { return shared_.owned[row(half)]; },
        [&](auto&& sees) {
          const int first = opaque(lane_ % 4 * 2);
          const float (&lse)[kMet] = shared_.facts[stage][0];
#pragma unroll
          for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = 8 * n + first + e;
              const auto seen = sees(column);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int i = 4 * n + 2 * half + e;
                const float p = exp2_fast(s_[i] * factor_ - lse[column]);
                s_[i] = seen(half) ? p : 0;
              }
            }
        });
  }
  // dp becomes ds.
  __device__ __forceinline__ void differ(int stage) {
    const int first = opaque(lane_ % 4 * 2);
    const float (&delta)[kMet] = shared_.facts[stage][1];
#pragma unroll
    for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * n + 2 * half + e;
          dp_[i] = s_[i] * (dp_[i] - delta[8 * n + first + e]);
        }
  }
  static __device__ __forceinline__ void round(uint32_t (&to)[kSteps][4], const float (&from)[kMet / 2]) {
#pragma unroll
    for (int i = 0; i < kMet / 4; ++i) to[i / 4][i % 4] = pair<T>(from[2 * i], from[2 * i + 1]);
  }
  // ds to shared memory, once the brick before has been used; 0 for keys that nobody sees: theirs may be anything.
  __device__ __forceinline__ void publish(int parity) {
    barrier_wait(&shared_.ds_free, parity ^ 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool usable = shared_.owned[row(half)].usable;
#pragma unroll
      for (int n = 0; n < kMet / 8; ++n)
        *reinterpret_cast<uint32_t*>(ds_tile_.at(row(half), n) + lane_ % 4 * 4) =
            usable ? ds_fragments_[n / 2][n % 2 * 2 + half] : 0;
    }
    proxy_fence();
    arrive(&shared_.ds_full);
  }
  // The part to its staging tile, as the registers have it.
  __device__ __forceinline__ void stage(const float (&part)[D / 2], int parity) {
    barrier_wait(&shared_.drained, parity ^ 1);
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      staging_[i * 128 + 32 * warp_ + lane_] = {part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]};
    proxy_fence();
    arrive(&shared_.staged);
  }

  // ---- the end --------------------------------------------------------------------------------------------
  // Through this warp's rows of a tile that nobody else reads; scaled, 0 where a row may not be used.
  __device__ __forceinline__ void finish(const float (&sum)[D / 2], float scale, typename Of::Own tile,
                                         const Rows& to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool usable = shared_.owned[row(half)].usable;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(tile.at(row(half), n) + lane_ % 4 * 4) =
            usable ? pair<T>(sum[4 * n + 2 * half] * scale, sum[4 * n + 2 * half + 1] * scale) : 0;
    }
    store_rows<16>(to, tile, 64 * group_ + 16 * warp_, static_cast<int>(p_.head_dim),
                   [&](int r) { return shared_.owned[r].row; });
  }

 public:
  __device__ __forceinline__ Consumer(const AttentionGradParams& p, const Cut& cut, typename Of::Shared& shared,
                                      char* tiles, float factor)
      : p_(p),
        cut_(cut),
        shared_(shared),
        w_(shared.work),
        k_{tiles},
        v_{tiles + k_.bytes},
        tiles_(tiles + 2 * k_.bytes),
        ds_tile_{tiles_ + 2 * Of::stages * Met::bytes},
        staging_(reinterpret_cast<float4*>(ds_tile_.data + ds_tile_.bytes)),
        group_(static_cast<int>(threadIdx.x) / 128),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32),
        factor_(factor) {}

  __device__ __forceinline__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kOwn) shared_.owned[thread] = owned_of<true>(p_, cut_, w_, thread);
    named_barrier<kDescribed>(kConsumers);
    // twice the bricks to come, and the parity of those behind
    int left = 2 * w_.count * static_cast<int>(p_.heads / p_.kv_heads);
    const bool with_queries = p_.dq != nullptr;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk_[i] = dv_[i] = 0;
    if (left) barrier_wait(&shared_.own, 0);
    // a warpgroup without keys, too: the other one's queries need its zeros
    for (; left > 1; left = (left - 2) ^ 1) {
      multiply_rows();
      product_wait<1>();
      product_values(s_);
      weigh(slot());
      if constexpr (early) {
        round(p_fragments_, s_);
        multiply_values();
        product_commit();
        product_wait<1>();
      } else {
        product_wait<0>();
      }
      product_values(dp_);
      differ(slot());
      if constexpr (!early) round(p_fragments_, s_);
      round(ds_fragments_, dp_);
      if (with_queries) publish(left & 1);
      if constexpr (!early) multiply_values();
      multiply_keys();
      product_commit();
      if (!with_queries || (left & 1) != group_) {
        product_wait<0>();
        sums_are_there();
        release();
        continue;
      }
      float part[D / 2];
      if constexpr (!early) {
        product_wait<0>();
        sums_are_there();
        release();
      }
      barrier_wait(&shared_.ds_full, left & 1);
      multiply_part(part);
      if constexpr (early) {
        product_wait<1>();
        sums_are_there();
        release();
      }
      product_wait<0>();
      product_values(part);
      arrive(&shared_.ds_free);
      stage(part, left & 1);
    }
    if (group_ == 0)
      named_barrier<kRead>(128);
    else
      named_barrier<kRead + 1>(128);
    if (with_queries) barrier_wait(&shared_.ds_free, left ^ 1);  // the last part has read k
    const float scale = static_cast<float>(p_.scale);
    if (p_.dk) finish(dk_, scale, k_, {p_.dk, p_.dk_stride, w_, w_.kv_head, w_.k_row});
    if (p_.dv) finish(dv_, 1, v_, {p_.dv, p_.dv_stride, w_, w_.kv_head, w_.k_row});
  }
};

// One thread: adds the parts of the block to the sums, each when it is the block's turn.
template <int D>
__device__ __forceinline__ void add_parts(const AttentionGradParams& p, const Cut& cut, const OnePass& one, int heads,
                                          typename Shape<D>::Shared& s, const float* staging) {
  constexpr int kPart = Shape<D>::part;
  const Work& w = s.work;
  const int turn = w.corner.w / kOwn;
  int phase = 0;
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    Point at = first_brick(w);
#pragma unroll 1
    for (int count = w.count; count > 0; --count, at = next_brick(at, w, cut.met), phase ^= 1) {
      const Sums to(p, cut, one, w, w.head + head, at);
      int* const counter = one.counters + 1 + to.slot;
      barrier_wait(&s.staged, phase);
      counter_wait(counter, turn);
      proxy_fence_global();  // the sums so far came by another block's copy engine
      if (turn)
        bulk_add(one.sums + to.slot * kPart, staging, kPart * sizeof(float));
      else
        bulk_store(one.sums + to.slot * kPart, staging, kPart * sizeof(float));
      store_commit();
      store_wait_read<0>();
      barrier_arrive(&s.drained);
      store_wait<0>();  // and with it the sums are seen by this thread, which hands them on
      counter_raise(counter);
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------
struct Maps {
  TensorMap k, v, q, d_o;
};

// What a block works at: tiles of `together` heads go round, ascending in each.
__device__ __forceinline__ void draw(const AttentionParams& p, const Cut& cut, const OnePass& one, int& tile, Work& w) {
  const unsigned ticket = static_cast<unsigned>(atomicAdd(one.counters, 1));
  const unsigned programs = static_cast<unsigned>(cut.programs), planes = gridDim.x / programs;
  const unsigned together = static_cast<unsigned>(one.together), first = ticket / (together * programs) * together;
  const unsigned here = min(together, planes - first), number = ticket - first * programs;
  tile = static_cast<int>(number / here);
  if (tile >= tiles_of(p, cut)) return;
  meet<true>(p, cut, static_cast<int>(first + number % here), tile, w);
  w.w.lo = w.w.lo / kMet * kMet;
  count_bricks(cut, w);
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_one_pass_hopper_kernel(const __grid_constant__ Maps maps, const AttentionGradParams p,
                                              const Cut cut, const OnePass one, const float* rows, float factor) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Of = Shape<D>;
  FASTDIT_SHARED_DYNAMIC(tiles, 1024);
  FASTDIT_SHARED(typename Of::Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i)
      barrier_init(&s.ring.full[i], 3), barrier_init(&s.ring.empty[i], kConsumers / 32);
    barrier_init(&s.own, 2), barrier_init(&s.own_landed, 1);
    barrier_init(&s.landed[0], 1), barrier_init(&s.landed[1], 1);
    barrier_init(&s.ds_full, kConsumers / 32), barrier_init(&s.ds_free, 4);
    barrier_init(&s.staged, 4), barrier_init(&s.drained, 1);
    barrier_fence_init();
    draw(p, cut, one, s.tile, s.work);
  }
  __syncthreads();
  if (s.tile >= tiles_of(p, cut)) return;
  if (threadIdx.x < kConsumers) {
    more_registers<kConsumerRegisters>();
    Consumer<T, D>(p, cut, s, tiles, factor).run();
    return;
  }
  fewer_registers<kProducerRegisters>();
  const Work& w = s.work;
  if (w.count == 0) return;
  const int warp = (static_cast<int>(threadIdx.x) - kConsumers) / 32;  // 0: k, q; 1: v, do; 2: statistics; 3: dq
  const int heads = static_cast<int>(p.heads / p.kv_heads), queries = static_cast<int>(p.q_len);
  if (warp < 2) {
    const typename Of::Own own{tiles + warp * Of::Own::bytes};
    const int end = warp ? kOwn : w.line.keys - w.corner.w;  // what lies behind must not be read as keys of dq
    load_brick(own, warp ? maps.v : maps.k, w, w.kv_head, w.k_row, static_cast<int>(p.k_len), w.corner, {w.T, w.H, w.W},
               cut.own, end < kOwn ? &s.own_landed : &s.own);
    if (end < kOwn) {
      barrier_wait(&s.own_landed, 0);
      clear_behind(own, kOwn, end);
      if (threadIdx.x % 32 == 0) barrier_arrive(&s.own);
    }
    char* const met = tiles + 2 * Of::Own::bytes + warp * Of::stages * Of::Met::bytes;
    Feed<true, typename Of::Met, Of::stages> feed(warp ? maps.d_o : maps.q, met, s.ring, &s.landed[warp]);
    feed.run(w, cut.met, w.head, heads, w.q_row, queries);
  } else if (warp == 2) {
    Place<Of::stages> place;
    feed_facts<true>(p, cut, rows, heads, s, place);
  } else if (p.dq && threadIdx.x % 32 == 0) {
    const char* const staging = tiles + Of::bytes - Of::part * sizeof(float);
    add_parts<D>(p, cut, one, heads, s, reinterpret_cast<const float*>(staging));
  }
#endif
}

// ---- dq from its sums -------------------------------------------------------------------------------------------
constexpr int kSumThreads = 256;

// The segment whose first slot (cu / 64 + its number: a segment's slots end before the next one's begin) is the last
// one at or before `slot`; `segments`: the rows behind the last one.
__device__ __forceinline__ int segment_of(const int32_t* cu, int segments, int slot) {
  int low = 0, high = segments + 1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu[middle] / kMet + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A block: a brick of queries. Bytes: 4 read, 2 written a value. A brick that no key tile met has no sums: 0.
template <class T, int D>
__global__ void __launch_bounds__(kSumThreads) attention_dq_kernel(const AttentionGradParams p, const OnePass one) {
  const int slots = static_cast<int>(one.slots), slot = static_cast<int>(blockIdx.x) % slots,
            plane = static_cast<int>(blockIdx.x) / slots, heads = static_cast<int>(p.heads);
  int first = slot * kMet, end = static_cast<int>(p.q_len);
  if (p.cu_q) {
    const int segments = static_cast<int>(p.batch), s = segment_of(p.cu_q, segments, slot), begin = p.cu_q[s];
    first = begin + (slot - begin / kMet - s) * kMet;
    if (s < segments) end = p.cu_q[s + 1];
  }
  if (first >= end) return;
  const bool there = one.counters[1 + blockIdx.x] != 0;
  const float4* const from = reinterpret_cast<const float4*>(one.sums + static_cast<int64_t>(blockIdx.x) * kMet * D);
  char* const to = static_cast<char*>(p.dq) + (plane / heads * p.dq_stride[0] + plane % heads * p.dq_stride[2] +
                                               static_cast<int64_t>(first) * p.dq_stride[1]) *
                                                  2;
  const float scale = static_cast<float>(p.scale);
  // eight channels of rows r and r + 8: registers 4 chunk .. 4 chunk + 3 of four lanes
  for (int i = static_cast<int>(threadIdx.x); i < kMet / 2 * (D / 8); i += kSumThreads) {
    const int chunk = i % (D / 8), lanes = i / (D / 8), r = lanes / 8 * 16 + lanes % 8;
    if (chunk * 8 >= p.head_dim || first + r >= end) continue;
    uint32_t values[2][4] = {};
    if (there)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float4 v = from[chunk * 128 + lanes * 4 + q];
        values[0][q] = pair<T>(v.x * scale, v.y * scale), values[1][q] = pair<T>(v.z * scale, v.w * scale);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (first + r + 8 * half < end)
        __stcs(reinterpret_cast<uint4*>(to + (r + 8 * half) * p.dq_stride[1] * 2 + chunk * 16),
               uint4{values[half][0], values[half][1], values[half][2], values[half][3]});
  }
}

// ---- the host ---------------------------------------------------------------------------------------------------
struct Launch {
  template <class T, int D>
  static void run(const AttentionGradParams& p, const float* rows, const Cut& cut, const OnePass& one, Stream stream,
                  const char* op) {
    using Of = Shape<D>;
    const auto map = [&](auto tile, bool of_keys, const void* t, const int64_t (&stride)[3]) {
      return map_of<decltype(tile)>(p, t, stride, of_keys ? p.k_len : p.q_len, of_keys ? p.kv_heads : p.heads,
                                    tile.tokens, op);
    };
    const Maps maps{map(typename Of::Own{}, true, p.k, p.k_stride), map(typename Of::Own{}, true, p.v, p.v_stride),
                    map(typename Of::Met{}, false, p.q, p.q_stride),
                    map(typename Of::Met{}, false, p.d_o, p.d_o_stride)};
    launch(attention_backward_one_pass_hopper_kernel<T, D>, grid_of(p, cut, true, op), dim3(kThreads), Of::bytes,
           stream, op, sizes(p), maps, p, cut, one, rows, static_cast<float>(p.scale) * kLog2e);
    if (!p.dq) return;
    const int64_t bricks = (cut.plan ? 1 : p.batch) * p.heads * one.slots;
    if (bricks > 0x7fffffff)
      throw std::invalid_argument(std::string(op) + ": more bricks than a launch has blocks; got " + sizes(p));
    launch(attention_dq_kernel<T, D>, dim3(static_cast<unsigned>(bricks)), dim3(kSumThreads), 0, stream, op, sizes(p),
           p, one);
  }
};

}  // namespace

void attention_backward_one_pass_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut,
                                        const OnePass& one, Stream stream, const char* op) {
  FASTDIT_HOPPER(p, Launch::run, p, rows, cut, one, stream, op)
}

}  // namespace fastdit::cuda
