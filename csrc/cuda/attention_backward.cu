// Gradients of attention: the row statistics, dk with dv, dq. No atomics anywhere.
//
//   p = exp(scale * q . k - lse);   delta = sum(do * o) - dlse;   dp = do . v;   ds = p * (dp - delta)
//   dv = p^T do;                    dk = scale * ds^T q;          dq = scale * ds k
//
// Every row of a gradient has one owner that sums in one order: bitwise the same on every run. The price is that scores
// and dp are made twice: 14 D FLOPs a visible pair where a fused loop with atomics needs 10.
//
// One kernel serves both: a block owns 64 rows, a warp 16 of them, in two tiles x and y; rows x' and y' pass by in
// bricks of 64.
//
//            x   y    x'  y'     s = x x'^T    dp = y y'^T    dx += ds x'    dy += p y'
//   keys     k   v    q   do     transposed    transposed     dk             dv           for each head of the group
//   queries  q   do   k   v                                   dq
//
// Either way p and ds leave the tensor cores in the registers from which they enter the next product as its left side.
// The next y' arrives during dx and the next x' during dp.
#include "attention.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 128, kTile = kAttentionGradTile, kRows = kTile / (kThreads / 32), kN = kTile / 8;

// Where the block is: the query head of the group, and a brick.
struct Turn {
  int head, number;
  Point at;
};

template <class T, int D, bool keys>
class Backward {
  const AttentionGradParams& p_;
  const Cut& cut_;
  const Work& w_;
  Owned* const owned_;
  float (*const facts_)[kTile];  // keys: lse and delta of the queries that pass by
  const float* const rows_;
  const Tile<D> x_, y_, x_met_, y_met_;
  const int thread_, warp_, lane_;
  const float factor_;  // scale * log2(e)

  float dx_[1][D / 8][4], dy_[1][keys ? D / 8 : 1][4];
  float s_[1][kN][4], dp_[1][kN][4];
  uint32_t p_fragments_[1][kN][2], ds_fragments_[1][kN][2];
  float lse_[2], delta_[2];  // queries: of this lane's rows

  __device__ __forceinline__ bool windowed() const { return p_.grids != nullptr; }
  __device__ __forceinline__ int present() const { return static_cast<int>(p_.head_dim); }
  __device__ __forceinline__ const Owned& owned(int half) const { return owned_[warp_ * kRows + 8 * half + lane_ / 4]; }

  // ---- memory ---------------------------------------------------------------------------------------------
  __device__ __forceinline__ Rows of_queries(const void* t, const int64_t (&stride)[3], int head) const {
    return {t, stride, w_, head, w_.q_row};
  }
  __device__ __forceinline__ Rows of_keys(const void* t, const int64_t (&stride)[3]) const {
    return {t, stride, w_, w_.kv_head, w_.k_row};
  }
  // The row statistics of the segment's queries; those of delta are that many floats behind.
  __device__ __forceinline__ const float* facts_of(int head) const {
    return rows_ + (w_.batch * p_.heads + head) * p_.q_len + w_.q_row;
  }
  __device__ __forceinline__ int64_t behind() const { return (cut_.plan ? 1 : p_.batch) * p_.heads * p_.q_len; }

  __device__ __forceinline__ void stage_own(Tile<D> to, const Rows& from) const {
    stage<kTile, kThreads>(to, opaque(thread_), present(), from.at, [&](int r) {
      const Owned& i = owned_[r];
      return Source{from(i.row), i.usable != 0};
    });
  }
  __device__ __forceinline__ void stage_met(Tile<D> to, const Rows& from, const Turn& turn) const {
    stage_brick<kTile, kThreads>(to, from, w_, turn.at, cut_.met, windowed(), present());
  }
  __device__ __forceinline__ void stage_x(const Turn& turn) const {
    if constexpr (keys) {
      stage_met(x_met_, of_queries(p_.q, p_.q_stride, w_.head + turn.head), turn);
      const int n = opaque(thread_) % kTile, which = thread_ / kTile;
      const int row = token_row(w_, turn.at, {w_.t.hi, w_.h.hi, w_.w.hi}, cut_.met, n, windowed());
      const float* from = facts_of(w_.head + turn.head) + which * behind();
      copy_async<4>(&facts_[which][n], row >= 0 ? from + row : rows_, row >= 0 ? 4 : 0);
    } else {
      stage_met(x_met_, of_keys(p_.k, p_.k_stride), turn);
    }
  }
  __device__ __forceinline__ void stage_y(const Turn& turn) const {
    stage_met(y_met_, keys ? of_queries(p_.d_o, p_.d_o_stride, w_.head + turn.head) : of_keys(p_.v, p_.v_stride), turn);
  }

  __device__ __forceinline__ void next(Turn& turn) const {
    turn.at = next_brick(turn.at, w_, cut_.met);
    if (++turn.number % w_.count == 0) ++turn.head, turn.at = first_brick(w_);
  }

  // ---- a brick --------------------------------------------------------------------------------------------
  // p and ds as fragments; 0 where the masks hide one from the other.
  template <class Sees>
  __device__ __forceinline__ void weigh(Sees&& sees) {
    const int first = opaque(lane_ % 4 * 2);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float p[4], ds[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + first + e;
        float lse = 0, delta = 0;
        if constexpr (keys) lse = facts_[0][column], delta = facts_[1][column];
        const auto seen = sees(column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + e;
          p[i] = exp2_fast(s_[0][n][i] * factor_ - (keys ? lse : lse_[half]));
          if (!seen(half)) p[i] = 0;
          ds[i] = p[i] * (dp_[0][n][i] - (keys ? delta : delta_[half]));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        p_fragments_[0][n][half] = pair<T>(p[2 * half], p[2 * half + 1]);
        ds_fragments_[0][n][half] = pair<T>(ds[2 * half], ds[2 * half + 1]);
      }
    }
  }
  __device__ __forceinline__ void weigh(Point at) {
    with_sight(
        p_, w_, at, cut_.met, [&](int half) -> const Owned& { return owned(half); }, [&](auto&& sees) { weigh(sees); });
  }

  // ---- the end --------------------------------------------------------------------------------------------
  // Through this warp's part of a tile that nobody else reads; scaled, 0 where a row may not be used.
  __device__ __forceinline__ void finish(const float (&sum)[D / 8][4], float scale, Tile<D> tile,
                                         const Rows& to) const {
    const int lane = opaque(lane_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_ * kRows + 8 * half + lane / 4;
      const bool usable = owned_[r].usable;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(tile.at(r, n) + lane % 4 * 4) =
            usable ? pair<T>(sum[n][2 * half] * scale, sum[n][2 * half + 1] * scale) : 0;
    }
    store_rows<kRows>(to, tile, warp_ * kRows, present(), [&](int r) { return owned_[r].row; });
  }

 public:
  static constexpr int bytes = Tile<D>::bytes(4 * kTile);

  __device__ __forceinline__ Backward(const AttentionGradParams& p, const Cut& cut, const Work& w, Owned* owned,
                                      float (*facts)[kTile], const float* rows, char* tiles, float factor)
      : p_(p),
        cut_(cut),
        w_(w),
        owned_(owned),
        facts_(facts),
        rows_(rows),
        x_{tiles},
        y_{tiles + x_.bytes(kTile)},
        x_met_{tiles + x_.bytes(2 * kTile)},
        y_met_{tiles + x_.bytes(3 * kTile)},
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        factor_(factor) {}

  __device__ __forceinline__ void run() {
    int left = w_.count;
    if (keys) left *= static_cast<int>(p_.heads / p_.kv_heads);
    Turn turn{0, 0, first_brick(w_)}, later = turn;
    if (left) {
      stage_own(x_, keys ? of_keys(p_.k, p_.k_stride) : of_queries(p_.q, p_.q_stride, w_.head));
      stage_own(y_, keys ? of_keys(p_.v, p_.v_stride) : of_queries(p_.d_o, p_.d_o_stride, w_.head));
      stage_y(turn);
      copy_commit();
      stage_x(turn);
    }
    copy_commit();
    const bool active = __any_sync(0xffffffffu, owned_[warp_ * kRows + lane_ % kRows].usable);  // or it only copies
    if constexpr (!keys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = owned(half).row;
        const float* from = facts_of(w_.head) + row;
        lse_[half] = row >= 0 ? from[0] : 0.0f, delta_[half] = row >= 0 ? from[behind()] : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dx_[0][n][i] = 0;
        if constexpr (keys) dy_[0][n][i] = 0;
      }
    for (; left > 0; --left) {
      copy_wait<1>();
      __syncthreads();  // y' is there
      if (active) product<T>(dp_, y_, warp_ * kRows, y_met_);
      copy_wait<0>();
      __syncthreads();  // x' is there
      if (active) {
        product<T>(s_, x_, warp_ * kRows, x_met_);
        weigh(turn.at);
        if constexpr (keys)
          if (p_.dv) add_product<T>(dy_, p_fragments_, y_met_);
      }
      next(later);
      __syncthreads();  // nobody reads y' any more
      if (left > 1) stage_y(later);
      copy_commit();
      if (active && (!keys || p_.dk)) add_product<T>(dx_, ds_fragments_, x_met_);
      __syncthreads();  // nobody reads x' any more
      if (left > 1) stage_x(later);
      copy_commit();
      turn = later;
    }
    if constexpr (keys) {
      if (p_.dk) finish(dx_[0], static_cast<float>(p_.scale), x_, of_keys(p_.dk, p_.dk_stride));
      if (p_.dv) finish(dy_[0], 1, y_, of_keys(p_.dv, p_.dv_stride));
    } else {
      finish(dx_[0], static_cast<float>(p_.scale), x_, of_queries(p_.dq, p_.dq_stride, w_.head));
    }
  }
};

// Block b: tiles b % programs, + programs, ... of head b / programs.
template <class T, int D, bool keys>
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_kernel(const AttentionGradParams p, const Cut cut, const float* rows, float factor) {
  FASTDIT_SHARED_DYNAMIC(tiles, 128);
  FASTDIT_SHARED(Owned[kTile], owned);
  FASTDIT_SHARED(float[2][kTile], facts);
  FASTDIT_SHARED(Work, work);
  const int programs = static_cast<int>(cut.programs), plane = static_cast<int>(blockIdx.x) / programs;
  Backward<T, D, keys> backward(p, cut, work, owned, facts, rows, tiles, factor);
  const int all = tiles_of(p, cut);
  for (int tile = static_cast<int>(blockIdx.x) % programs; tile < all; tile += programs) {
    if (threadIdx.x == 0) meet<keys>(p, cut, plane, tile, work);
    __syncthreads();
    if (threadIdx.x < kTile) owned[threadIdx.x] = owned_of<keys>(p, cut, work, static_cast<int>(threadIdx.x));
    __syncthreads();
    backward.run();
    __syncthreads();  // before the next tile is described
  }
}

// ---- row statistics ---------------------------------------------------------------------------------------
// Sixteen lanes a row, eight channels a lane. Bytes: 4 D + 12 a row.
constexpr int kRowThreads = 256, kLanes = 16;

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_rows_kernel(const AttentionGradParams p, float* rows, int tiles) {
  const int thread = static_cast<int>(threadIdx.x), channel = thread % kLanes * 8;
  const int tile = static_cast<int>(blockIdx.x) % tiles, plane = static_cast<int>(blockIdx.x) / tiles;
  const int64_t i = tile * (kRowThreads / kLanes) + thread / kLanes;
  const int64_t heads = p.heads, b = plane / heads, h = plane % heads, N = p.q_len;
  const bool there = i < N;
  float delta = 0;
  if (there && channel < p.head_dim) {
    float o[8], d_o[8];
    widen(
        load_once<8>(static_cast<const T*>(p.o) + b * p.o_stride[0] + i * p.o_stride[1] + h * p.o_stride[2] + channel),
        o);
    widen(load_again<8>(static_cast<const T*>(p.d_o) + b * p.d_o_stride[0] + i * p.d_o_stride[1] + h * p.d_o_stride[2] +
                        channel),
          d_o);
#pragma unroll
    for (int k = 0; k < 8; ++k) delta += o[k] * d_o[k];
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (!there || channel) return;
  const int64_t row = plane * N + i;
  const float lse = static_cast<const float*>(p.lse)[row];
  if (p.d_lse)
    delta -= static_cast<const float*>(p.d_lse)[b * p.d_lse_stride[0] + h * p.d_lse_stride[1] + i * p.d_lse_stride[2]];
  const bool blind = lse == -INFINITY;
  const int64_t planes = static_cast<int64_t>(gridDim.x) / tiles;
  rows[row] = blind ? INFINITY : lse * kLog2e;
  rows[planes * N + row] = blind ? 0.0f : delta;
}

template <bool keys>
struct Launch {
  template <class T, int D>
  static void run(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream, const char* op) {
    launch(attention_backward_kernel<T, D, keys>, grid_of(p, cut, keys, op), dim3(kThreads),
           Backward<T, D, keys>::bytes, stream, op, sizes(p), p, cut, rows, static_cast<float>(p.scale) * kLog2e);
  }
};

}  // namespace

void attention_backward_rows(const AttentionGradParams& p, float* rows, Stream stream, const char* op) {
  check_attention(p, op);
  const int64_t planes = (p.cu_q ? 1 : p.batch) * p.heads, per = kRowThreads / kLanes,
                tiles = (p.q_len + per - 1) / per;
  const auto kernel =
      static_cast<DType>(p.dtype) == DType::bf16 ? attention_rows_kernel<bf16> : attention_rows_kernel<f16>;
  launch(kernel, dim3(static_cast<unsigned>(tiles * planes)), dim3(kRowThreads), 0, stream, op, sizes(p), p, rows,
         static_cast<int>(tiles));
}

void attention_backward_keys(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                             const char* op) {
  FASTDIT_ATTENTION(p, Launch<true>::run, p, rows, cut, stream, op)
}

void attention_backward_queries(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                const char* op) {
  FASTDIT_ATTENTION(p, Launch<false>::run, p, rows, cut, stream, op)
}

}  // namespace fastdit::cuda
