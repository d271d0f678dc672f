// qk_norm_rope backward: one pass over the tokens, then sums in a fixed order for weight and bias.
//
//   n = (x - mean) * root,  a = n * w + b,  y = R a
//   g = R^T dy,  dw += g * n,  db += g,  dx = root * (g w - mean(g w) - n * mean(g w * n))      (rms: without mean(g w))
//
// A thread owns the same channels in every round, so it sums their dw and db in registers; a block leaves one row of
// each (of D, or of all heads under scope "hidden") in fp32, and strips of those rows are added in the order of the
// blocks. No atomics: the bits do not depend on who ran when.
#include "rotary.cuh"
#include "rotary.h"
#include "strips.h"

namespace fastdit::cuda {
namespace {

// Rows of the sums for q and for k, one per block; null: nobody wants them.
struct Partial {
  float *weight[2], *bias[2];
};

template <class T, Pairs mode>
struct Backward {
  using L = Lane<T, mode>;
  static constexpr int S = L::S;
  const QkNormRopeParams& p;
  const RotaryOperand& o;
  const RotaryGrad& d;
  const RotaryPlace place;
  const L own;
  HeadSums sums;
  TableRow<T, mode, sizeof(T) == 2> row;
  float *const weight_row, *const bias_row;
  const int heads, tokens, slots;
  float wa[kPairs] = {}, wb[kPairs] = {}, ba[kPairs] = {}, bb[kPairs] = {};  // dw and db

  __device__ Backward(const QkNormRopeParams& params, const RotaryOperand& operand, const RotaryGrad& grad,
                      const RotaryGrid& g, const RotaryPlace& where, const Partial& rows,
                      float (*partial)[2][kMaxWarps])
      : p(params),
        o(operand),
        d(grad),
        place(where),
        own(params, g, where.lane),
        sums{{partial, g.warps}, g.lanes, params.all_heads},
        row(params, operand, g, where.side),
        weight_row(rows.weight[where.side]),
        bias_row(rows.bias[where.side]),
        heads(static_cast<int>(operand.heads)),
        tokens(static_cast<int>(operand.tokens)),
        slots(32 / g.lanes) {}

  // g: of y's unrotated channels; becomes that of x.
  __device__ __forceinline__ void through_norm(float (&ga)[kPairs], float (&gb)[kPairs], float (&na)[kPairs],
                                               float (&nb)[kPairs], int head) {
    const bool here = head < heads;
    const int64_t at = p.all_heads ? static_cast<int64_t>(head) * p.head_dim : 0;
    const float inverse = 1.0f / static_cast<float>(p.all_heads ? o.heads * p.head_dim : p.head_dim);
    float mean, root, both[2] = {0, 0};
    own.statistics(na, nb, here, inverse, sums, mean, root);
    if (here)
      own.pieces([&](int j) {
        float v[S], w[S];
        if (o.weight) own.piece(o.weight, o.weight_dtype, at, j, v, w);
#pragma unroll
        for (int k = 0; k < S; ++k) {
          const int i = j * S + k;
          na[i] = (na[i] - mean) * root, nb[i] = own.whole(j) ? (nb[i] - mean) * root : 0;
          wa[i] += ga[i] * na[i], wb[i] += gb[i] * nb[i];
          ba[i] += ga[i], bb[i] += gb[i];
          if (o.weight) ga[i] *= v[k], gb[i] *= w[k];
          both[0] += ga[i] + gb[i], both[1] += ga[i] * na[i] + gb[i] * nb[i];
        }
      });
    sums(both);
    const float level = p.norm == RotaryNorm::layer ? both[0] * inverse : 0, slope = both[1] * inverse;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      ga[i] = (ga[i] - level - na[i] * slope) * root;
      gb[i] = (gb[i] - level - nb[i] * slope) * root;
    }
  }

  __device__ __forceinline__ void token_gradient(int i, int rounds, int warps) {
    const int b = i / tokens, n = i - b * tokens;
    const bool turns = row.turns(n), per_head = row.per_head();
    if (turns && !per_head) row.load(own, b, n, 0);
    const T* x = static_cast<const T*>(o.x) + b * o.x_stride[0] + n * o.x_stride[1];
    const T* g = static_cast<const T*>(d.grad) + b * d.grad_stride[0] + n * d.grad_stride[1];
    T* out = static_cast<T*>(o.out) + b * o.out_stride[0] + n * o.out_stride[1];
    for (int r = place.warp; r < rounds; r += warps) {
      const int head = r * slots + place.slot;
      const bool here = head < heads, normed = p.norm != RotaryNorm::none;
      typename L::Raw grad, value;
      if (here) own.fetch(g + head * d.grad_stride[2], grad);
      if (here && normed) own.fetch(x + head * o.x_stride[2], value);
      if (turns && per_head && here) row.load(own, b, n, head);
      float ga[kPairs], gb[kPairs], na[kPairs], nb[kPairs];
      own.widen_pairs(grad, here, ga, gb);
      if (turns)
        own.each([&](int k, int j) {
          if (own.pair(j) >= row.turning || !here) return;
          const float first = ga[k] * row.cos[k] + gb[k] * row.sin[k];
          gb[k] = gb[k] * row.cos[k] - ga[k] * row.sin[k], ga[k] = first;
        });
      if (normed) {
        own.widen_pairs(value, here, na, nb);
        through_norm(ga, gb, na, nb, head);
      }
      if (o.out && here) own.store(out + head * o.out_stride[2], ga, gb);
    }
  }

  // The row of the block: of all heads under scope "hidden", else the sum over the slots and warps that share D channels.
  __device__ __forceinline__ void keep(float* rows, float (&a)[kPairs], float (&b)[kPairs],
                                       float (*shared)[2 * kPairs][32]) {
    if (!rows) return;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    if (p.all_heads) {
      const int head = place.warp * slots + place.slot;
      if (head < heads) own.store(rows + (static_cast<int64_t>(place.block) * heads + head) * p.head_dim, a, b);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        if (step >= own.g.lanes) {
          a[i] += __shfl_xor_sync(0xffffffffu, a[i], step);
          b[i] += __shfl_xor_sync(0xffffffffu, b[i], step);
        }
      shared[thread / 32][2 * i][lane] = a[i], shared[thread / 32][2 * i + 1][lane] = b[i];
    }
    __syncthreads();
    if (thread < own.g.lanes) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        a[i] = b[i] = 0;
        for (int w = 0; w < kRows; ++w) a[i] += shared[w][2 * i][lane], b[i] += shared[w][2 * i + 1][lane];
      }
      own.store(rows + static_cast<int64_t>(place.block) * p.head_dim, a, b);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run(int begin, int end, int warps, float (*shared)[2 * kPairs][32]) {
    const int rounds = p.all_heads ? place.warp + 1 : (heads + slots - 1) / slots;
    for (int i = begin; i < end; ++i) token_gradient(i, rounds, warps);
    keep(weight_row, wa, wb, shared);
    keep(bias_row, ba, bb, shared);
  }
};

template <class T, Pairs mode>
__global__ void __launch_bounds__(32 * kMaxWarps)
    qk_norm_rope_backward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RotarySides sides,
                                 const __grid_constant__ RotaryGrid g, const __grid_constant__ Partial rows) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], partial);
  FASTDIT_SHARED(float[kRows][2 * kPairs][32], shared);
  const RotaryPlace place(g);
  const RotaryOperand& o = sides.operand[place.side];
  const int all = static_cast<int>(p.batch * o.tokens), per = g.per[place.side], begin = place.group * per;
  Backward<T, mode> backward(p, o, sides.grad[place.side], g, place, rows, partial);
  backward.run(min(begin, all), min(begin + per, all), g.warps, shared);
}

// ---- second stage -----------------------------------------------------------------------------------------
// Rows of fp32 that become one row of a gradient.
struct Columns {
  const float* from;
  void* to;
  int dtype, rows, width;
};
struct AllColumns {
  Columns of[4];
};
constexpr int kLanes = 32;

__global__ void __launch_bounds__(kStrip* kLanes) rotary_sums_kernel(const __grid_constant__ AllColumns all) {
  FASTDIT_SHARED(float[kLanes][kStrip], partial);
  const Columns& columns = all.of[blockIdx.y];
  const int c = static_cast<int>(blockIdx.x * kStrip + threadIdx.x), width = columns.width;
  if (static_cast<int>(blockIdx.x) * kStrip >= width) return;
  const float total[1] = {strip_sum(0, columns.rows - 1, partial, [&](int k) {
    return c < width ? columns.from[static_cast<int64_t>(k) * width + c] : 0.0f;
  })};
  if (threadIdx.y == 0 && c < width) store_as<1>(columns.to, columns.dtype, c, total);
}

// ---- the host's part --------------------------------------------------------------------------------------
template <class T, Pairs mode>
void start(const QkNormRopeGradParams& q, const RotaryPlan& plan, const Partial& rows, Stream stream, const char* op) {
  launch(qk_norm_rope_backward_kernel<T, mode>, dim3(plan.grid()), dim3(plan.threads()), 0, stream, op,
         sizes(q.forward), q.forward, RotarySides{{q.forward.q, q.forward.k}, {q.q, q.k}}, plan.g, rows);
}

template <class T>
void run(const QkNormRopeGradParams& q, const RotaryPlan& plan, const Partial& rows, Stream stream, const char* op) {
  if (plan.mode == Pairs::neighbours) return start<T, Pairs::neighbours>(q, plan, rows, stream, op);
  if (plan.mode == Pairs::halves) return start<T, Pairs::halves>(q, plan, rows, stream, op);
  return start<T, Pairs::single>(q, plan, rows, stream, op);
}

bool wants(const RotaryOperand& o, const RotaryGrad& d) { return d.grad && (o.out || d.weight || d.bias); }

RotaryPlan plan_of(const QkNormRopeGradParams& q, int device, const char* op) {
  const QkNormRopeParams& p = q.forward;
  RotaryPlan plan = rotary_plan(p, device, 1024, wants(p.q, q.q), wants(p.k, q.k), op);
  const int W = static_cast<int>(16 / itemsize(static_cast<DType>(p.dtype)));
  const bool aligned = (!wants(p.q, q.q) || fits(p, p.q, q.q.grad, q.q.grad_stride, W)) &&
                       (!wants(p.k, q.k) || fits(p, p.k, q.k.grad, q.k.grad_stride, W));
  if (!aligned) plan.mode = Pairs::single;
  return plan;
}

// Sums in the order q's weight, q's bias, k's weight, k's bias.
AllColumns columns_of(const QkNormRopeGradParams& q, const RotaryPlan& plan) {
  const QkNormRopeParams& p = q.forward;
  const auto columns = [&](void* to, int dtype, int side, const RotaryOperand& o) {
    return Columns{nullptr, to, dtype, plan.g.blocks[side],
                   to && plan.g.blocks[side] ? static_cast<int>(p.all_heads ? o.heads * p.head_dim : p.head_dim) : 0};
  };
  return {{columns(q.q.weight, p.q.weight_dtype, 0, p.q), columns(q.q.bias, p.q.bias_dtype, 0, p.q),
           columns(q.k.weight, p.k.weight_dtype, 1, p.k), columns(q.k.bias, p.k.bias_dtype, 1, p.k)}};
}

// Rows begin on 16 bytes.
int64_t room(const Columns& c) { return (int64_t{c.rows} * c.width + 3) / 4 * 4; }

}  // namespace

int64_t qk_norm_rope_partials(const QkNormRopeGradParams& q, int device) {
  int64_t count = 0;
  for (const Columns& c : columns_of(q, plan_of(q, device, "qk_norm_rope_backward")).of) count += room(c);
  return count;
}

void qk_norm_rope_backward(const QkNormRopeGradParams& q, float* partial, Stream stream, const char* op) {
  const QkNormRopeParams& p = q.forward;
  const RotaryPlan plan = plan_of(q, stream.device, op);
  if (!plan.grid()) return;
  AllColumns all = columns_of(q, plan);
  Partial rows{};
  int strips = 0;
  for (int i = 0; i < 4; ++i) {
    Columns& c = all.of[i];
    if (!c.width) continue;
    c.from = (i % 2 ? rows.bias : rows.weight)[i / 2] = partial;
    partial += room(c);
    strips = std::max(strips, (c.width + kStrip - 1) / kStrip);
  }
  const auto first = [&] { FASTDIT_ROTARY_DTYPES(p, run, q, plan, rows, stream, op) };
  first();
  if (strips) launch(rotary_sums_kernel, dim3(strips, 4), dim3(kStrip, kLanes), 0, stream, op, sizes(p), all);
}

}  // namespace fastdit::cuda
