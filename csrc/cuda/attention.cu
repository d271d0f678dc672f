// Softmax attention forward, one pass over the keys with a running maximum (arXiv 2205.14135, 2307.08691).
//
//   s[i, j] = scale * q[i] . k[j]        lse[i] = log sum_j exp(s[i, j])        o[i] = sum_j exp(s[i, j] - lse[i]) v[j]
//
// A block owns 128 queries of one head, a warp 32 of them: its sums o and its scores stay in registers, and the scores,
// rounded, are the A operand of the second product. Tiles of 64 keys pass by: those of v arrive while q k^T is made,
// those of the next k during softmax and p v. Exponentials are powers of 2 with the scale folded in. Bricks that every
// query sees whole take no mask; what no query of the tile sees is never loaded. A row of one head stands alone in
// memory, so bricks of a window cost no more traffic than lines.
//
// Cost: 4 D FLOPs a visible pair; each tile of queries reads its keys and values once, from L2 while the tiles of a
// head run side by side.
#include "attention.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kRows = kAttentionQueries / kWarps, kM = kRows / 16;
constexpr int kN = kAttentionKeys / 8;

template <class T, int D>
class Forward {
  const AttentionParams& p_;
  const Cut& cut_;
  const Work& w_;
  Query* const queries_;
  const Tile<D> q_, k_, v_;
  const int thread_, warp_, lane_;
  const Base base_;  // of the exponentials

  float o_[kM][D / 8][4], s_[kM][kN][4];
  uint32_t weights_[kM][kN][2];    // the scores' exponentials, as fragments
  float top_[kM][2], sum_[kM][2];  // maximum of the scores so far, and this lane's share of the sum

  __device__ __forceinline__ bool windowed() const { return p_.grids != nullptr; }

  // ---- memory ---------------------------------------------------------------------------------------------
  __device__ __forceinline__ void stage_keys(Tile<D> to, const void* t, const int64_t (&stride)[3], Point at) const {
    stage_brick<kAttentionKeys, kThreads>(to, Rows(t, stride, w_, w_.kv_head, w_.k_row), w_, at, cut_.met, windowed(),
                                          static_cast<int>(p_.head_dim));
  }
  __device__ __forceinline__ void stage_queries() const {
    const Rows from(p_.q, p_.q_stride, w_, w_.head, w_.q_row);
    stage<kAttentionQueries, kThreads>(q_, opaque(thread_), static_cast<int>(p_.head_dim), p_.q, [&](int r) {
      const int row = queries_[r].row;
      return Source{from(row), row >= 0};
    });
  }

  // ---- a tile of keys -------------------------------------------------------------------------------------
  __device__ __forceinline__ void scores() {
    product<T>(s_, q_, warp_ * kRows, k_);
    if (p_.scale < 0)
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s_[m][n][i] = -s_[m][n][i];
  }

  __device__ __forceinline__ const Query& query(int m, int half) const {
    return queries_[warp_ * kRows + 16 * m + 8 * half + lane_ / 4];
  }

  // Scores of unseen keys become -inf. shows(query, key): key counts in the brick.
  template <class Shows>
  __device__ __forceinline__ void hide(Shows&& shows) {
    Query queries[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) queries[m][0] = query(m, 0), queries[m][1] = query(m, 1);
    const int first = opaque(lane_ % 4 * 2);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto seen = shows(8 * n + first + e);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (!seen(queries[m][half])) s_[m][n][2 * half + e] = -INFINITY;
      }
  }
  __device__ __forceinline__ void mask(Point at) {
    with_visibility(p_, w_, at, cut_.met, [&](auto&& shows) { hide(shows); });
  }

  // Scores become probabilities under the maximum so far; the sums follow it.
  __device__ __forceinline__ void softmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = fmaxf(s_[m][0][2 * half], s_[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kN; ++n) top = fmaxf(top, fmaxf(s_[m][n][2 * half], s_[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(top_[m][half], top * base_.factor);
        const float zero = top == -INFINITY ? 0.0f : top;  // rows that see no key yet
        const float fade = exp2_fast(top_[m][half] - zero);
        top_[m][half] = top;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s_[m][n][2 * half + e];
            x = exp2_fast(fmaf(x, base_.factor, -zero));
            sum += x;
          }
#pragma unroll
        for (int n = 0; n < kN; ++n) weights_[m][n][half] = pair<T>(s_[m][n][2 * half], s_[m][n][2 * half + 1]);
        sum_[m][half] = sum_[m][half] * fade + sum;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) o_[m][n][2 * half] *= fade, o_[m][n][2 * half + 1] *= fade;
      }
  }

  // ---- the end --------------------------------------------------------------------------------------------
  // Divides and stores; a row without keys has sum 0 and gives 0 and -inf. A warp's rows pass through its own part of
  // the tile of queries.
  __device__ __forceinline__ void finish() {
    const int lane = opaque(lane_);
    const int64_t plane = w_.batch * p_.lse_stride[0] + w_.head * p_.lse_stride[1] + w_.q_row;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float share = sum == 0 ? 0.0f : 1.0f / sum;
        const int row = queries_[warp_ * kRows + 16 * m + 8 * half + lane / 4].row;
        if (row >= 0 && lane % 4 == 0) static_cast<float*>(p_.lse)[plane + row] = lse_of(top_[m][half], sum, base_);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          char* to = q_.at(warp_ * kRows + 16 * m + 8 * half + lane / 4, n) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(to) = pair<T>(o_[m][n][2 * half] * share, o_[m][n][2 * half + 1] * share);
        }
      }
    store_rows<kRows>(Rows(p_.o, p_.o_stride, w_, w_.head, w_.q_row), q_, warp_ * kRows, static_cast<int>(p_.head_dim),
                      [&](int r) { return queries_[r].row; });
  }

 public:
  __device__ __forceinline__ Forward(const AttentionParams& p, const Cut& cut, const Work& w, Query* queries,
                                     char* tiles, const Base& base)
      : p_(p),
        cut_(cut),
        w_(w),
        queries_(queries),
        q_{tiles},
        k_{tiles + q_.bytes(kAttentionQueries)},
        v_{k_.data + q_.bytes(kAttentionKeys)},
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        base_(base) {}

  static constexpr int bytes = Tile<D>::bytes(kAttentionQueries + 2 * kAttentionKeys);

  __device__ __forceinline__ void run() {
    Point at = first_brick(w_);
    stage_queries();
    if (w_.count) stage_keys(k_, p_.k, p_.k_stride, at);
    copy_commit();
    const bool active = __any_sync(0xffffffffu, queries_[thread_].row >= 0);  // a warp without queries only copies
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      top_[m][0] = top_[m][1] = -INFINITY, sum_[m][0] = sum_[m][1] = 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[m][n][i] = 0;
    }
    for (int count = w_.count; count > 0; --count) {
      copy_wait<0>();
      __syncthreads();  // k is there, and nobody reads the v before it any more
      stage_keys(v_, p_.v, p_.v_stride, at);
      copy_commit();
      if (active) {
        scores();
        if (!in_core(at, w_, cut_.met)) mask(at);
        softmax();
      }
      at = next_brick(at, w_, cut_.met);
      copy_wait<0>();
      __syncthreads();  // v is there, and nobody reads k any more
      if (count > 1) stage_keys(k_, p_.k, p_.k_stride, at);
      copy_commit();
      if (active) add_product<T>(o_, weights_, v_);
    }
    copy_wait<0>();
    __syncthreads();  // the queries have arrived where there were no keys
    if (active) finish();
  }
};

// Block b: tiles b % programs, + programs, ... of head b / programs.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward_kernel(const AttentionParams p, const Cut cut, const Base base) {
  FASTDIT_SHARED_DYNAMIC(tiles, 128);
  FASTDIT_SHARED(Query[kAttentionQueries], queries);
  FASTDIT_SHARED(Work, work);
  const int programs = static_cast<int>(cut.programs), plane = static_cast<int>(blockIdx.x) / programs;
  Forward<T, D> forward(p, cut, work, queries, tiles, base);
  const int all = tiles_of(p, cut);
  for (int tile = static_cast<int>(blockIdx.x) % programs; tile < all; tile += programs) {
    if (threadIdx.x == 0) meet<false>(p, cut, plane, tile, work);
    __syncthreads();
    queries[threadIdx.x] = query_of(p, cut, work, static_cast<int>(threadIdx.x));
    __syncthreads();
    forward.run();
    __syncthreads();  // before the next tile is described
  }
}

template <class T, int D>
void run(const AttentionParams& p, const Cut& cut, Stream stream, const char* op) {
  launch(attention_forward_kernel<T, D>, grid_of(p, cut, false, op), dim3(kThreads), Forward<T, D>::bytes, stream, op,
         sizes(p), p, cut, base_of(p));
}

}  // namespace

void attention_forward(const AttentionParams& p, const Cut& cut, Stream stream, const char* op) {
  check_attention(p, op);
  FASTDIT_ATTENTION(p, run, p, cut, stream, op)
}

}  // namespace fastdit::cuda
