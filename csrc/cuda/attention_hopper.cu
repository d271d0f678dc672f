// Attention forward for sm_90a: tensor copies feed the warpgroups' matrix unit. Formulas: attention.cu; who sees whom:
// attention.cuh. Other architectures compile an empty kernel.
//
// A block owns 64 queries of one head for each of its consumer warpgroups (128 in all), whose sums o and scores s stay
// in registers. A fourth part, the producer warpgroup, gives its registers away: one warp keeps a ring of tiles of k
// full, another one of v. Tiles have 128 keys. A slot of a ring has two mbarriers: full (its copies have landed) and
// empty (every consumer warp is done).
//
// A consumer issues s = q k^T of the next tile and o += p v of this one together, then takes the softmax of the next
// while p v is running. Warpgroups take turns in issuing, so the softmax of one stands beside the products of the
// other.
//
// Values behind what is met are cleared; keys there are masked.
//
// Cost: 4 D FLOPs and an exponential a visible pair. A tile of keys (64 KiB at D = 128) serves 128 queries.
#include "attention_hopper.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kGroups = kAttentionQueries / 64, kKeys = kHopperKeys;
constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + 128;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // 2 x 128 and 128 of them, of 64 Ki
// Named barriers. kTurn + i: warpgroup i may issue. kRead + i: its queries' place may be overwritten.
constexpr int kTurn = 1, kRead = kTurn + kGroups, kDescribed = kRead + kGroups;

template <int D>
struct Shape {
  using Queries = Spans<D, kAttentionQueries>;
  using Keys = Spans<D, kKeys>;
  static constexpr int stages = D == 128 ? 2 : 3;
  static constexpr int bytes = Queries::bytes + 2 * stages * Keys::bytes;

  struct Shared {
    Ring<stages> k, v;
    uint64_t queries, landed;  // full, of the queries, and of a tile of v that has rows to be cleared
    Work work;
    int next;  // tile
    Query query[kAttentionQueries];
  };
};

// ---- a consumer warpgroup ---------------------------------------------------------------------------------------
template <class T, int D>
class Consumer {
  using Of = Shape<D>;
  using Keys = typename Of::Keys;
  const AttentionParams& p_;
  const Cut& cut_;
  typename Of::Shared& shared_;
  const Work& w_;
  const typename Of::Queries q_;
  char* const tiles_;              // of k, then of v
  const int group_, warp_, lane_;  // warp: of the warpgroup
  const Base base_;                // of the exponentials
  Place<Of::stages> k_, v_;
  int tile_ = 0;  // parity of the tiles so far

  float o_[D / 2], s_[kKeys / 2];
  uint32_t weights_[kKeys / 16][4];  // the scores' exponentials, as fragments
  float top_[2], sum_[2];            // maximum of the scores so far in base 2, and this lane's share of the sum

  // ---- who is where ---------------------------------------------------------------------------------------
  __device__ __forceinline__ void await(Ring<Of::stages>& ring, const Place<Of::stages>& place) const {
    barrier_wait(&ring.full[place.stage], place.phase);
  }
  __device__ __forceinline__ void release(Ring<Of::stages>& ring, Place<Of::stages>& place) const {
    if (lane_ == 0) barrier_arrive(&ring.empty[place.stage]);
    place.next();
  }
  // Groups behind the last query of the tile have nothing to do: the brick's token 64 * group is outside, and with it
  // all that follow.
  __device__ __forceinline__ bool active(int group) const { return shared_.query[64 * group].row >= 0; }

  __device__ __forceinline__ void await_turn() const {
    if (group_ == 0)
      named_barrier<kTurn>(256);
    else
      named_barrier<kTurn + 1>(256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if (group_ == 0)
      named_arrive<kTurn + 1>(256);
    else
      named_arrive<kTurn>(256);
  }

  // ---- products -------------------------------------------------------------------------------------------
  // Issues s = q k^T, k being there.
  __device__ __forceinline__ void multiply_keys() {
    const uint64_t q = q_.by_row(64 * group_), k = Keys{tiles_ + k_.stage * Keys::bytes}.by_row();
    product_fence();
#pragma unroll
    for (int d = 0; d < D; d += 16)
      product<T>(s_, q + Of::Queries::channels_step(d), k + Keys::channels_step(d), d > 0);
    product_commit();
  }
  // Issues o += p v.
  __device__ __forceinline__ void multiply_values() {
    await(shared_.v, v_);
    const uint64_t v = Keys{tiles_ + (Of::stages + v_.stage) * Keys::bytes}.by_k();
    product_fence();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) product<T, true>(o_, weights_[k / 16], v + Keys::rows_step(k));
    product_commit();
  }

  // ---- softmax --------------------------------------------------------------------------------------------
  __device__ __forceinline__ void mask(Point at) {
    with_visibility(p_, w_, at, cut_.met, [&](auto&& shows) {
      const int row = 64 * group_ + 16 * warp_ + lane_ / 4, first = opaque(lane_ % 4 * 2);
      const Query queries[2] = {shared_.query[row], shared_.query[row + 8]};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto seen = shows(8 * n + first + e);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (!seen(queries[half])) s_[4 * n + 2 * half + e] = -INFINITY;
        }
    });
  }

  // Scores become exponentials under the maximum so far; fade: what older sums are multiplied by.
  __device__ __forceinline__ void exponentials(Point at, float (&fade)[2]) {
    if (p_.scale < 0)
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s_[i] = -s_[i];
    if (!in_core(at, w_, cut_.met)) mask(at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(s_[2 * half], s_[2 * half + 1]);
#pragma unroll
      for (int n = 1; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s_[4 * n + 2 * half], s_[4 * n + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(top_[half], top * base_.factor);
      const float zero = top == -INFINITY ? 0.0f : top;  // rows that see no key yet
      fade[half] = exp2_fast(top_[half] - zero);
      top_[half] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s_[4 * n + 2 * half + e];
          x = exp2_fast(fmaf(x, base_.factor, -zero));
          sum += x;
        }
      sum_[half] = sum_[half] * fade[half] + sum;
    }
  }
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights_[i / 4][i % 4] = pair<T>(s_[2 * i], s_[2 * i + 1]);
  }

  // ---- the end --------------------------------------------------------------------------------------------
  // Divides and stores; a row without keys has sum 0 and gives 0 and -inf. A warp's rows pass through the place of its
  // queries, once nobody reads those any more.
  __device__ __forceinline__ void finish() {
    if (group_ == 0)
      named_barrier<kRead>(128);
    else
      named_barrier<kRead + 1>(128);
    const int64_t plane = w_.batch * p_.lse_stride[0] + w_.head * p_.lse_stride[1] + w_.q_row;
    const int first = 64 * group_ + 16 * warp_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = first + 8 * half + lane_ / 4, row = shared_.query[at].row;
      float sum = sum_[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float share = sum == 0 ? 0.0f : 1.0f / sum;
      if (row >= 0 && lane_ % 4 == 0) static_cast<float*>(p_.lse)[plane + row] = lse_of(top_[half], sum, base_);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(q_.at(at, n) + lane_ % 4 * 4) =
            pair<T>(o_[4 * n + 2 * half] * share, o_[4 * n + 2 * half + 1] * share);
    }
    store_rows<16>(Rows(p_.o, p_.o_stride, w_, w_.head, w_.q_row), q_, first, static_cast<int>(p_.head_dim),
                   [&](int r) { return shared_.query[r].row; });
    proxy_fence();  // the next tile's queries come by the copy engine
  }

  // Only hands the tiles on.
  __device__ __forceinline__ void skip() {
    for (int count = w_.count; count > 0; --count) {
      await(shared_.k, k_);
      release(shared_.k, k_);
      await(shared_.v, v_);
      release(shared_.v, v_);
    }
  }

 public:
  __device__ __forceinline__ Consumer(const AttentionParams& p, const Cut& cut, typename Of::Shared& shared,
                                      char* tiles, const Base& base)
      : p_(p),
        cut_(cut),
        shared_(shared),
        w_(shared.work),
        q_{tiles},
        tiles_(tiles + q_.bytes),
        group_(static_cast<int>(threadIdx.x) / 128),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32),
        base_(base) {}

  __device__ __forceinline__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kAttentionQueries) shared_.query[thread] = query_of(p_, cut_, w_, thread);
    named_barrier<kDescribed>(kConsumers);
    barrier_wait(&shared_.queries, tile_);
    tile_ ^= 1;
    if (!active(group_)) return skip();
    const bool turns = w_.count > 1 && active(kGroups - 1);
    top_[0] = top_[1] = -INFINITY, sum_[0] = sum_[1] = 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] = 0;
    if (w_.count) {
      if (turns && group_ == kGroups - 1) pass_turn();
      Point at = first_brick(w_);
      float fade[2];
      await(shared_.k, k_);
      multiply_keys();
      product_wait<0>();
      product_values(s_);
      release(shared_.k, k_);
      exponentials(at, fade);
      round_weights();
      for (int count = w_.count - 1; count > 0; --count) {
        at = next_brick(at, w_, cut_.met);
        await(shared_.k, k_);
        if (turns) await_turn();
        multiply_keys();
        multiply_values();
        if (turns && (count > 1 || group_ < kGroups - 1)) pass_turn();
        product_wait<1>();
        product_values(s_);
        release(shared_.k, k_);
        exponentials(at, fade);
        product_wait<0>();
        product_values(o_);
        release(shared_.v, v_);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o_[i] *= fade[i / 2 % 2];
        round_weights();
      }
      multiply_values();
      product_wait<0>();
      product_values(o_);
      release(shared_.v, v_);
    }
    finish();
  }
};

// ---- the kernel -------------------------------------------------------------------------------------------------
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                            const __grid_constant__ TensorMap v, const AttentionParams p, const Cut cut,
                            const Base base) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Of = Shape<D>;
  FASTDIT_SHARED_DYNAMIC(tiles, 1024);
  FASTDIT_SHARED(typename Of::Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i) {
      barrier_init(&s.k.full[i], 1), barrier_init(&s.k.empty[i], kConsumers / 32);
      barrier_init(&s.v.full[i], 1), barrier_init(&s.v.empty[i], kConsumers / 32);
    }
    barrier_init(&s.queries, 1), barrier_init(&s.landed, 1);
    s.next = first_tile(cut);
    barrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    more_registers<kConsumerRegisters>();
    Consumer<T, D> consumer(p, cut, s, tiles, base);
    const auto describe = [&](int plane, int tile) {
      if (threadIdx.x == 0) meet<false>(p, cut, plane, tile, s.work);
    };
    each_tile(p, cut, s.next, describe, [&] { consumer.run(); });
  } else {
    fewer_registers<kProducerRegisters>();
    const int warp = (static_cast<int>(threadIdx.x) - kConsumers) / 32;
    const typename Of::Queries queries{tiles};
    char* const first = tiles + queries.bytes;
    Feed<false, typename Of::Keys, Of::stages> keys(k, first, s.k, nullptr);
    Feed<true, typename Of::Keys, Of::stages> values(v, first + Of::stages * Of::Keys::bytes, s.v, &s.landed);
    each_tile(p, cut, s.next, nothing, [&] {
      const Work& w = s.work;
      const int behind = static_cast<int>(p.k_len);
      if (warp == 0) {
        load_brick(queries, q, w, w.head, w.q_row, static_cast<int>(p.q_len), w.corner, {w.T, w.H, w.W}, cut.own,
                   &s.queries);
        keys.run(w, cut.met, w.kv_head, 1, w.k_row, behind);
      } else if (warp == 1) {
        values.run(w, cut.met, w.kv_head, 1, w.k_row, behind);
      }
    });
  }
#endif
}

// ---- the host ---------------------------------------------------------------------------------------------------
template <class T, int D>
void run(const AttentionParams& p, const Cut& cut, Stream stream, const char* op) {
  using Of = Shape<D>;
  const TensorMap q = map_of<typename Of::Queries>(p, p.q, p.q_stride, p.q_len, p.heads, cut.own.w, op);
  const TensorMap k = map_of<typename Of::Keys>(p, p.k, p.k_stride, p.k_len, p.kv_heads, cut.met.w, op);
  const TensorMap v = map_of<typename Of::Keys>(p, p.v, p.v_stride, p.k_len, p.kv_heads, cut.met.w, op);
  launch(attention_hopper_kernel<T, D>, grid_of(p, cut, false, op), dim3(kThreads), Of::bytes, stream, op, sizes(p), q,
         k, v, p, cut, base_of(p));
}

}  // namespace

void attention_forward_hopper(const AttentionParams& p, const Cut& cut, Stream stream, const char* op) {
  check_attention(p, op);
  FASTDIT_HOPPER(p, run, p, cut, stream, op)
}

}  // namespace fastdit::cuda
