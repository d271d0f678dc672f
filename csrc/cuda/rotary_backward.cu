// qk_norm_rope backward: one pass over the tokens, then sums in a fixed order for weight and bias.
//
//   n = (x - mean) * root,  a = n * w + b,  y = R a
//   g = R^T dy,  dw += g * n,  db += g,  dx = root * (g w - mean(g w) - n * mean(g w * n))      (rms: without mean(g
//   w))
//
// A thread owns the same channels in every round, so it sums their dw in registers; a block leaves one row (of D, or of
// all heads under scope "hidden") in fp32, and strips of those rows are added in the order of the blocks. No atomics:
// the bits do not depend on who ran when. db is a pass of its own over dy alone, for registers: few models have a bias.
#include "rotary.cuh"
#include "rotary.h"
#include "strips.h"

namespace fastdit::cuda {
namespace {

// Rows of sums for q and for k, one per block; null: nobody wants them.
struct Partial {
  float* rows[2];
  bool bias;  // sums of g alone: nothing else is made
};

template <class T, Pairs mode>
struct Backward : RotaryWorker<T, mode> {
  FASTDIT_ROTARY_WORKER(T, mode);
  using L = Lane<T, mode>;
  static constexpr int S = L::S;
  static constexpr bool ahead = mode != Pairs::single;  // single values take too many registers
  const RotaryGrad& d;
  TableRow<T, sizeof(T) == 2> row;
  const Partial& partial;
  float sa[kPairs] = {}, sb[kPairs] = {};  // dw, or db

  __device__ Backward(const QkNormRopeParams& params, const RotarySide& side, const RotaryGrid& g,
                      const RotaryPlace& where, const Partial& sums_of, float (*buffer)[2][kMaxWarps], char* shared)
      : Base(params, g, where, side.operand, buffer),
        d(side.grad),
        row(params, side.operand, g, shared),
        partial(sums_of) {}

  // g: of y's unrotated channels; becomes that of x.
  __device__ __forceinline__ void through_norm(float (&ga)[kPairs], float (&gb)[kPairs], float (&na)[kPairs],
                                               float (&nb)[kPairs], int head) {
    const bool here = head < heads;
    const int64_t at = this->affine_at(head);
    float mean, root, both[2] = {0, 0};
    own.statistics(na, nb, here, inverse, sums, mean, root);
    if (here)
      own.pieces([&](int j) {
#pragma unroll
        for (int k = 0; k < S; ++k) {
          const int i = j * S + k;
          na[i] = (na[i] - mean) * root, nb[i] = own.whole(j) ? (nb[i] - mean) * root : 0;
          sa[i] += ga[i] * na[i], sb[i] += gb[i] * nb[i];
        }
        if (o.weight) own.apply(o.weight, o.weight_dtype, at, j, ga, gb, [](float x, float w) { return x * w; });
#pragma unroll
        for (int i = j * S; i < j * S + S; ++i) both[0] += ga[i] + gb[i], both[1] += ga[i] * na[i] + gb[i] * nb[i];
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
    const bool turns = row.turns(n);
    if (turns && !row.per_head) row.load(b, n);
    const T* x = static_cast<const T*>(o.x) + b * o.x_stride[0] + n * o.x_stride[1];
    const T* g = static_cast<const T*>(d.grad) + b * d.grad_stride[0] + n * d.grad_stride[1];
    T* out = static_cast<T*>(o.out) + b * o.out_stride[0] + n * o.out_stride[1];
    for (int r = place.warp; r < rounds; r += warps) {
      const int head = r * slots + place.slot;
      const bool here = head < heads, normed = p.norm != RotaryNorm::none && !partial.bias;
      typename L::Raw grad, value;
      if (here) own.fetch(g + head * d.grad_stride[2], grad);
      if (here && normed && ahead) own.fetch(x + head * o.x_stride[2], value);
      if (turns && row.per_head) row.load(b, n, head, here, place);
      float ga[kPairs], gb[kPairs], na[kPairs], nb[kPairs];
      own.widen_pairs(grad, here, ga, gb);
      if (turns)
        own.pieces([&](int j) {
          if (own.pair(j) >= own.g.turning || !here) return;
          float cos[S], sin[S];
          row.read(own.pair(j), place, cos, sin);
#pragma unroll
          for (int k = 0; k < S; ++k) {
            float &u = ga[j * S + k], &v = gb[j * S + k];
            const float turned = u * cos[k] + v * sin[k];
            v = v * cos[k] - u * sin[k], u = turned;
          }
        });
      if (partial.bias) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) sa[k] += ga[k], sb[k] += gb[k];  // zeros where there is no head
        continue;
      }
      if (normed) {
        if (here && !ahead) own.fetch(x + head * o.x_stride[2], value);
        own.widen_pairs(value, here, na, nb);
        through_norm(ga, gb, na, nb, head);
      }
      if (o.out && here) own.store(out + head * o.out_stride[2], ga, gb);
    }
  }

  // The row of the block: of all heads under scope "hidden", else the sum over the slots and warps that share D
  // channels.
  __device__ __forceinline__ void keep(float (*shared)[2 * kPairs][32]) {
    float* rows = partial.rows[place.side];
    if (!rows) return;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    if (p.all_heads) {
      const int head = place.warp * slots + place.slot;
      if (head < heads) own.store(rows + (static_cast<int64_t>(place.block) * heads + head) * p.head_dim, sa, sb);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        if (step >= own.g.lanes) {
          sa[i] += __shfl_xor_sync(0xffffffffu, sa[i], step);
          sb[i] += __shfl_xor_sync(0xffffffffu, sb[i], step);
        }
      shared[thread / 32][2 * i][lane] = sa[i], shared[thread / 32][2 * i + 1][lane] = sb[i];
    }
    __syncthreads();
    if (thread >= own.g.lanes) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      sa[i] = sb[i] = 0;
      for (int w = 0; w < kRows; ++w) sa[i] += shared[w][2 * i][lane], sb[i] += shared[w][2 * i + 1][lane];
    }
    own.store(rows + static_cast<int64_t>(place.block) * p.head_dim, sa, sb);
  }

  __device__ __forceinline__ void run(int begin, int end, int warps, float (*shared)[2 * kPairs][32]) {
    const int rounds = this->rounds();
    for (int i = begin; i < end; ++i) token_gradient(i, rounds, warps);
    keep(shared);
  }
};

template <class T, Pairs mode>
__global__ void __launch_bounds__(32 * kHeldWarps)  // 168 registers
    qk_norm_rope_backward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RotarySides sides,
                                 const __grid_constant__ RotaryGrid g, const __grid_constant__ Partial sums) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], buffer);
  FASTDIT_SHARED(float[kRows][2 * kPairs][32], shared);
  FASTDIT_SHARED_DYNAMIC(table_rows, 16);
  const RotaryPlace place(g);
  FASTDIT_SHARED_ALIGNED(RotarySide, side, 8);
  copy_side(sides, place.side, side);
  const int all = static_cast<int>(p.batch * side.operand.tokens), per = g.per[place.side], begin = place.group * per;
  Backward<T, mode> backward(p, side, g, place, sums, buffer, table_rows);
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
void start(const QkNormRopeGradParams& q, const RotaryPlan& plan, const Partial& sums, Stream stream, const char* op) {
  launch(qk_norm_rope_backward_kernel<T, mode>, dim3(plan.grid()), dim3(plan.threads()), plan.shared(), stream, op,
         sizes(q.forward), q.forward, RotarySides{{{q.forward.q, q.q}, {q.forward.k, q.k}}}, plan.g, sums);
}

template <class T>
void run(const QkNormRopeGradParams& q, const RotaryPlan& plan, const Partial& sums, Stream stream, const char* op) {
  if (plan.mode == Pairs::neighbours) return start<T, Pairs::neighbours>(q, plan, sums, stream, op);
  if (plan.mode == Pairs::halves) return start<T, Pairs::halves>(q, plan, sums, stream, op);
  return start<T, Pairs::single>(q, plan, sums, stream, op);
}

bool wants(const RotaryOperand& o, const RotaryGrad& d) { return d.grad && (o.out || d.weight || d.bias); }

RotaryPlan plan_of(const QkNormRopeGradParams& q, int device, const char* op) {
  const QkNormRopeParams& p = q.forward;
  RotaryPlan plan = rotary_plan(p, device, 32 * kHeldWarps, wants(p.q, q.q), wants(p.k, q.k), op);
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
  Partial found[2] = {{{}, false}, {{}, true}};
  int strips = 0;
  for (int i = 0; i < 4; ++i) {
    Columns& c = all.of[i];
    if (!c.width) continue;
    c.from = found[i % 2].rows[i / 2] = partial;
    partial += room(c);
    strips = std::max(strips, (c.width + kStrip - 1) / kStrip);
  }
  for (const Partial& sums : found) {
    const bool other = !sums.bias && ((q.q.grad && p.q.out) || (q.k.grad && p.k.out));
    if (!sums.rows[0] && !sums.rows[1] && !other) continue;
    const auto pass = [&] { FASTDIT_DTYPE(p.dtype, run, q, plan, sums, stream, op) };
    pass();
  }
  if (strips) launch(rotary_sums_kernel, dim3(strips, 4), dim3(kStrip, kLanes), 0, stream, op, sizes(p), all);
}

}  // namespace fastdit::cuda
