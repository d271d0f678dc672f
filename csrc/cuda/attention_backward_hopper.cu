// Gradients of attention for sm_90a: dk with dv, dq. Formulas and row statistics: attention_backward.cu; tiles, rings
// and masks: attention_hopper.cuh. Other architectures compile an empty kernel.
//
// As there, one kernel serves both passes and every row of a gradient has one owner: the same bits on every run, 14 D
// FLOPs a visible pair.
//
//            x   y    x'  y'     s = x x'^T    dp = y y'^T    dx += ds x'    dy += p y'
//   keys     k   v    q   do     transposed    transposed     dk             dv           for each head of the group
//   queries  q   do   k   v                                   dq
//
// A block owns 128 rows, 64 for each of its two consumer warpgroups; bricks of 64 pass by. x and y stand in shared
// memory. x' and y' come through one ring: a warp copies x', another one y', a third one says which brick it is and,
// with keys, brings the statistics of its queries. s and dp become p and ds in registers, from where they enter the
// next product as its left side; x' and y' are read along rows for the first products and along channels for the second
// ones.
//
// A consumer issues s and dp of the next brick with dx and dy of this one, and weighs the next while the sums run. With
// keys and D above 64 registers do not hold both: there, the other warpgroup's products run meanwhile.
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
  static constexpr int stages = D == 128 ? 3 : 4;
  static constexpr int bytes = 2 * Own::bytes + 2 * stages * Met::bytes;

  struct Shared {
    Ring<stages> ring;
    uint64_t own, landed[2];  // full, of what the block owns, and of an x' and a y' with rows to be cleared
    Work work;
    int next;   // tile
    int phase;  // of `own` for this tile
    Owned owned[kOwn];
    Point at[stages];              // of the brick in a slot
    float facts[stages][2][kMet];  // keys: lse and delta of its queries
  };
};

template <class T, int D, bool keys>
class Consumer {
  using Of = Shape<D>;
  using Met = typename Of::Met;
  static constexpr bool overlaps = !keys || D == 64;
  const AttentionGradParams& p_;
  const Cut& cut_;
  typename Of::Shared& shared_;
  const Work& w_;
  const float* const rows_;
  const typename Of::Own x_, y_;
  char* const tiles_;              // of x', then of y'
  const int group_, warp_, lane_;  // warp: of the warpgroup
  const float factor_;             // scale * log2(e)
  Place<Of::stages> place_;

  float dx_[D / 2], dy_[keys ? D / 2 : 1];
  float s_[kMet / 2], dp_[kMet / 2];  // later p and ds
  uint32_t p_fragments_[keys ? kMet / 16 : 1][4], ds_fragments_[kMet / 16][4];
  float lse_[2], delta_[2];  // queries: of this lane's rows

  __device__ __forceinline__ int row(int half) const { return 64 * group_ + 16 * warp_ + lane_ / 4 + 8 * half; }
  __device__ __forceinline__ Met x_met(int stage) const { return {tiles_ + stage * Met::bytes}; }
  __device__ __forceinline__ Met y_met(int stage) const { return {tiles_ + (Of::stages + stage) * Met::bytes}; }

  __device__ __forceinline__ void release(Place<Of::stages>& place) const {
    __syncwarp();  // every lane has read what stands beside the tiles
    if (lane_ == 0) barrier_arrive(&shared_.ring.empty[place.stage]);
    place.next();
  }

  // ---- products -------------------------------------------------------------------------------------------
  // Issues s = x x'^T and dp = y y'^T, once they are there.
  __device__ __forceinline__ void multiply_rows(const Place<Of::stages>& place) {
    barrier_wait(&shared_.ring.full[place.stage], place.phase);
    const uint64_t x = x_.by_row(64 * group_), x_met = this->x_met(place.stage).by_row();
    const uint64_t y = y_.by_row(64 * group_), y_met = this->y_met(place.stage).by_row();
    product_fence();
#pragma unroll
    for (int d = 0; d < D; d += 16) product<T>(s_, x + Of::Own::channels_step(d), x_met + Met::channels_step(d), d > 0);
#pragma unroll
    for (int d = 0; d < D; d += 16)
      product<T>(dp_, y + Of::Own::channels_step(d), y_met + Met::channels_step(d), d > 0);
    product_commit();
  }
  // Issues dy += p y' and dx += ds x'.
  __device__ __forceinline__ void multiply_sums(const Place<Of::stages>& place) {
    const uint64_t x_met = this->x_met(place.stage).by_k(), y_met = this->y_met(place.stage).by_k();
    product_fence();
    if constexpr (keys)
#pragma unroll
      for (int k = 0; k < kMet; k += 16) product<T, true>(dy_, p_fragments_[k / 16], y_met + Met::rows_step(k));
#pragma unroll
    for (int k = 0; k < kMet; k += 16) product<T, true>(dx_, ds_fragments_[k / 16], x_met + Met::rows_step(k));
    product_commit();
  }
  __device__ __forceinline__ void rows_are_there() {
    product_values(s_);
    product_values(dp_);
  }
  __device__ __forceinline__ void sums_are_there() {
    product_values(dx_);
    if constexpr (keys) product_values(dy_);
  }

  // ---- a brick --------------------------------------------------------------------------------------------
  // s and dp become p and ds; 0 where the masks hide one from the other.
  __device__ __forceinline__ void weigh(int stage) {
    with_sight(
        p_, w_, shared_.at[stage], cut_.met, [&](int half) -> const Owned& { return shared_.owned[row(half)]; },
        [&](auto&& sees) {
          const int first = opaque(lane_ % 4 * 2);
          const float (&facts)[2][kMet] = shared_.facts[stage];
#pragma unroll
          for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = 8 * n + first + e;
              float lse = 0, delta = 0;
              if constexpr (keys) lse = facts[0][column], delta = facts[1][column];
              const auto seen = sees(column);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int i = 4 * n + 2 * half + e;
                float p = exp2_fast(s_[i] * factor_ - (keys ? lse : lse_[half]));
                if (!seen(half)) p = 0;
                s_[i] = p, dp_[i] = p * (dp_[i] - (keys ? delta : delta_[half]));
              }
            }
        });
  }
  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < kMet / 4; ++i) {
      if constexpr (keys) p_fragments_[i / 4][i % 4] = pair<T>(s_[2 * i], s_[2 * i + 1]);
      ds_fragments_[i / 4][i % 4] = pair<T>(dp_[2 * i], dp_[2 * i + 1]);
    }
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
  __device__ __forceinline__ void finish() {
    if (group_ == 0)
      named_barrier<kRead>(128);
    else
      named_barrier<kRead + 1>(128);
    const float scale = static_cast<float>(p_.scale);
    if constexpr (keys) {
      if (p_.dk) finish(dx_, scale, x_, {p_.dk, p_.dk_stride, w_, w_.kv_head, w_.k_row});
      if (p_.dv) finish(dy_, 1, y_, {p_.dv, p_.dv_stride, w_, w_.kv_head, w_.k_row});
    } else {
      finish(dx_, scale, x_, {p_.dq, p_.dq_stride, w_, w_.head, w_.q_row});
    }
    proxy_fence();  // the next tile's rows come by the copy engine
  }

 public:
  __device__ __forceinline__ Consumer(const AttentionGradParams& p, const Cut& cut, typename Of::Shared& shared,
                                      const float* rows, char* tiles, float factor)
      : p_(p),
        cut_(cut),
        shared_(shared),
        w_(shared.work),
        rows_(rows),
        x_{tiles},
        y_{tiles + x_.bytes},
        tiles_(tiles + 2 * x_.bytes),
        group_(static_cast<int>(threadIdx.x) / 128),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32),
        factor_(factor) {}

  __device__ __forceinline__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kOwn) shared_.owned[thread] = owned_of<keys>(p_, cut_, w_, thread);
    named_barrier<kDescribed>(kConsumers);
    int left = w_.count;
    if (keys) left *= static_cast<int>(p_.heads / p_.kv_heads);
    if (left) barrier_wait(&shared_.own, shared_.phase);
    if (shared_.owned[64 * group_].row < 0) {  // and with it the whole group: it only hands the bricks on
      for (; left > 0; --left) {
        barrier_wait(&shared_.ring.full[place_.stage], place_.phase);
        release(place_);
      }
      return;
    }
    if constexpr (!keys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = shared_.owned[row(half)].row;
        lse_[half] = at >= 0 ? facts_of(p_, cut_, rows_, w_, w_.head, 0)[at] : 0.0f;
        delta_[half] = at >= 0 ? facts_of(p_, cut_, rows_, w_, w_.head, 1)[at] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      dx_[i] = 0;
      if constexpr (keys) dy_[i] = 0;
    }
    if (left) {
      if constexpr (overlaps) {
        Place<Of::stages> ahead = place_;
        multiply_rows(ahead);
        product_wait<0>();
        rows_are_there();
        weigh(ahead.stage);
        round();
        for (--left; left > 0; --left) {
          ahead.next();
          multiply_rows(ahead);
          multiply_sums(place_);
          product_wait<1>();
          rows_are_there();
          weigh(ahead.stage);
          product_wait<0>();
          sums_are_there();
          release(place_);
          round();
        }
        multiply_sums(place_);
        product_wait<0>();
        sums_are_there();
        release(place_);
      } else {
        for (; left > 0; --left) {
          multiply_rows(place_);
          product_wait<0>();
          rows_are_there();
          weigh(place_.stage);
          round();
          multiply_sums(place_);
          product_wait<0>();
          sums_are_there();
          release(place_);
        }
      }
    }
    finish();
  }
};

// ---- the kernel -------------------------------------------------------------------------------------------------
struct Maps {  // of k, v, q, do, or of q, do, k, v
  TensorMap x, y, x_met, y_met;
};

template <class T, int D, bool keys>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_hopper_kernel(const __grid_constant__ Maps maps, const AttentionGradParams p, const Cut cut,
                                     const float* rows, float factor) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Of = Shape<D>;
  FASTDIT_SHARED_DYNAMIC(tiles, 1024);
  FASTDIT_SHARED(typename Of::Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i)
      barrier_init(&s.ring.full[i], 3), barrier_init(&s.ring.empty[i], kConsumers / 32);
    barrier_init(&s.own, 2), barrier_init(&s.landed[0], 1), barrier_init(&s.landed[1], 1);
    s.phase = 1;
    s.next = first_tile(cut);
    barrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    more_registers<kConsumerRegisters>();
    Consumer<T, D, keys> consumer(p, cut, s, rows, tiles, factor);
    const auto describe = [&](int plane, int tile) {
      if (threadIdx.x) return;
      meet<keys>(p, cut, plane, tile, s.work);
      if (s.work.count) s.phase ^= 1;
    };
    each_tile(p, cut, s.next, describe, [&] { consumer.run(); });
  } else {
    fewer_registers<kProducerRegisters>();
    const int warp = (static_cast<int>(threadIdx.x) - kConsumers) / 32;  // 0: x, x'; 1: y, y'; 2: statistics
    const TensorMap &own_map = warp ? maps.y : maps.x, &met_map = warp ? maps.y_met : maps.x_met;
    const typename Of::Own own{tiles + warp * Of::Own::bytes};
    char* const met = tiles + 2 * Of::Own::bytes + warp * Of::stages * Of::Met::bytes;
    Feed<true, typename Of::Met, Of::stages> feed(met_map, met, s.ring, &s.landed[warp]);
    Place<Of::stages> place;
    each_tile(p, cut, s.next, nothing, [&] {
      const Work& w = s.work;
      const int heads = keys ? static_cast<int>(p.heads / p.kv_heads) : 1, queries = static_cast<int>(p.q_len),
                all_keys = static_cast<int>(p.k_len);
      if (warp < 2 && w.count) {
        load_brick(own, own_map, w, keys ? w.kv_head : w.head, keys ? w.k_row : w.q_row, keys ? all_keys : queries,
                   w.corner, {w.T, w.H, w.W}, cut.own, &s.own);
        feed.run(w, cut.met, keys ? w.head : w.kv_head, heads, keys ? w.q_row : w.k_row, keys ? queries : all_keys);
      } else if (warp == 2) {
        feed_facts<keys>(p, cut, rows, heads, s, place);
      }
    });
  }
#endif
}

// ---- the host ---------------------------------------------------------------------------------------------------
template <bool keys>
struct Launch {
  template <class T, int D>
  static void run(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream, const char* op) {
    using Of = Shape<D>;
    const auto map = [&](auto tile, bool of_keys, const void* t, const int64_t (&stride)[3], int side) {
      return map_of<decltype(tile)>(p, t, stride, of_keys ? p.k_len : p.q_len, of_keys ? p.kv_heads : p.heads, side,
                                    op);
    };
    const auto own = [&](bool of_keys, const void* t, const int64_t (&stride)[3]) {
      return map(typename Of::Own{}, of_keys, t, stride, cut.own.w);
    };
    const auto met = [&](bool of_keys, const void* t, const int64_t (&stride)[3]) {
      return map(typename Of::Met{}, of_keys, t, stride, cut.met.w);
    };
    const Maps maps = keys ? Maps{own(true, p.k, p.k_stride), own(true, p.v, p.v_stride), met(false, p.q, p.q_stride),
                                  met(false, p.d_o, p.d_o_stride)}
                           : Maps{own(false, p.q, p.q_stride), own(false, p.d_o, p.d_o_stride),
                                  met(true, p.k, p.k_stride), met(true, p.v, p.v_stride)};
    launch(attention_backward_hopper_kernel<T, D, keys>, grid_of(p, cut, keys, op), dim3(kThreads), Of::bytes, stream,
           op, sizes(p), maps, p, cut, rows, static_cast<float>(p.scale) * kLog2e);
  }
};

}  // namespace

void attention_backward_keys_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                    const char* op) {
  FASTDIT_HOPPER(p, Launch<true>::run, p, rows, cut, stream, op)
}

void attention_backward_queries_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                       const char* op) {
  FASTDIT_HOPPER(p, Launch<false>::run, p, rows, cut, stream, op)
}

}  // namespace fastdit::cuda
