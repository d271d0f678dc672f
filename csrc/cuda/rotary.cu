// qk_norm_rope forward: y = n(x), then (y1, y2) -> (y1 cos - y2 sin, y2 cos + y1 sin) for the pairs that rotate.
//
// Each channel is read once and written once, by the same thread, so q and k may be their own outputs. The next round
// of heads, or the next token, is on its way while one is computed.
#include "rotary.cuh"
#include "rotary.h"

namespace fastdit::cuda {
namespace {

template <class T, Pairs mode, bool native>
struct Forward : RotaryWorker<T, mode> {
  FASTDIT_ROTARY_WORKER(T, mode);
  using L = Lane<T, mode>;
  static constexpr bool ahead = mode != Pairs::single;  // single values take too many registers
  TableRow<T, native> row;
  typename L::Raw next;

  __device__ Forward(const QkNormRopeParams& params, const RotaryGrid& g, const RotaryPlace& where,
                     const RotaryOperand& operand, float (*buffer)[2][kMaxWarps], char* shared)
      : Base(params, g, where, operand, buffer), row(params, operand, g, shared) {}

  static __device__ __forceinline__ float round(float x) { return rounded<T, native>(x); }

  __device__ __forceinline__ void fetch(int i, int round) {
    const int b = i / tokens, n = i - b * tokens, head = round * slots + place.slot;
    if (head < heads)
      own.fetch(static_cast<const T*>(o.x) + b * o.x_stride[0] + n * o.x_stride[1] + head * o.x_stride[2], next);
  }

  // eager RMSNorm rounds before its affine part and after each of its steps, F.layer_norm only at the end
  __device__ __forceinline__ void normalise(float (&a)[kPairs], float (&b)[kPairs], int head) {
    constexpr int S = L::S;
    const bool rms = p.norm == RotaryNorm::rms, here = head < heads;
    const int64_t at = this->affine_at(head);
    float mean, root;
    own.statistics(a, b, here, inverse, sums, mean, root);
    if (!here) return;
    const auto step = [&](float v) { return rms ? round(v) : v; };
    own.pieces([&](int j) {
#pragma unroll
      for (int k = 0; k < S; ++k) {
        a[j * S + k] = step((a[j * S + k] - mean) * root);
        b[j * S + k] = step((b[j * S + k] - mean) * root);
      }
      if (o.weight) own.apply(o.weight, o.weight_dtype, at, j, a, b, [&](float x, float w) { return step(x * w); });
      if (o.bias) own.apply(o.bias, o.bias_dtype, at, j, a, b, [&](float x, float w) { return step(x + w); });
      if (!rms)
#pragma unroll
        for (int k = 0; k < S; ++k) a[j * S + k] = round(a[j * S + k]), b[j * S + k] = round(b[j * S + k]);
    });
  }

  template <bool rounds>
  __device__ __forceinline__ void turn(float (&a)[kPairs], float (&b)[kPairs]) const {
    own.pieces([&](int j) {
      if (own.pair(j) >= own.g.turning) return;
      float c[L::S], s[L::S];
      row.read(own.pair(j), place, c, s);
#pragma unroll
      for (int k = 0; k < L::S; ++k) {
        float &x = a[j * L::S + k], &y = b[j * L::S + k];
        const float xc = rounded<T, rounds>(x * c[k]), ys = rounded<T, rounds>(y * s[k]);
        const float yc = rounded<T, rounds>(y * c[k]), xs = rounded<T, rounds>(x * s[k]);
        x = xc - ys, y = yc + xs;
      }
    });
  }

  __device__ __forceinline__ void run(int begin, int end, int warps) {
    const int rounds = this->rounds();
    if (begin >= end || place.warp >= rounds) return;
    if (ahead) fetch(begin, place.warp);
    for (int i = begin; i < end; ++i) {
      const int b = i / tokens, n = i - b * tokens;
      const bool turns = row.turns(n);
      if (turns && !row.per_head) row.load(b, n);
      T* out = static_cast<T*>(o.out) + b * o.out_stride[0] + n * o.out_stride[1];
      for (int r = place.warp; r < rounds; r += warps) {
        const int head = r * slots + place.slot;
        const bool here = head < heads;
        float x[kPairs], y[kPairs];
        if (!ahead) fetch(i, r);
        own.widen_pairs(next, here, x, y);
        if (ahead && r + warps < rounds)
          fetch(i, r + warps);
        else if (ahead && i + 1 < end)
          fetch(i + 1, place.warp);
        if (turns && row.per_head) row.load(b, n, head, here, place);
        if (p.norm != RotaryNorm::none) normalise(x, y, head);
        if (!here) continue;
        if (turns) {
          if (row.rounds())
            turn<native>(x, y);
          else
            turn<false>(x, y);
        }
        own.store(out + head * o.out_stride[2], x, y);
      }
    }
  }
};

template <class T, Pairs mode, bool native>
__global__ void __launch_bounds__(mode == Pairs::single ? 512 : 640)  // 128 registers, or 96
    qk_norm_rope_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RotarySides sides,
                        const __grid_constant__ RotaryGrid g) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], buffer);
  FASTDIT_SHARED_DYNAMIC(table_rows, 16);
  const RotaryPlace place(g);
  FASTDIT_SHARED_ALIGNED(RotarySide, side, 8);
  copy_side(sides, place.side, side);
  const RotaryOperand& o = side.operand;
  const int rows = static_cast<int>(p.batch * o.tokens), per = g.per[place.side], begin = place.group * per;
  Forward<T, mode, native> forward(p, g, place, o, buffer, table_rows);
  forward.run(min(begin, rows), min(begin + per, rows), g.warps);
}

template <class T, Pairs mode>
void start(const QkNormRopeParams& p, const RotaryPlan& plan, Stream stream, const char* op) {
  constexpr bool half = sizeof(T) == 2;
  const auto kernel = half && p.native ? qk_norm_rope_kernel<T, mode, half> : qk_norm_rope_kernel<T, mode, false>;
  launch(kernel, dim3(plan.grid()), dim3(plan.threads()), plan.shared(), stream, op, sizes(p), p,
         RotarySides{{{p.q, {}}, {p.k, {}}}}, plan.g);
}

template <class T>
void run(const QkNormRopeParams& p, const RotaryPlan& plan, Stream stream, const char* op) {
  if (plan.mode == Pairs::neighbours) return start<T, Pairs::neighbours>(p, plan, stream, op);
  if (plan.mode == Pairs::halves) return start<T, Pairs::halves>(p, plan, stream, op);
  return start<T, Pairs::single>(p, plan, stream, op);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p, Stream stream, const char* op) {
  const RotaryPlan plan = rotary_plan(p, stream.device, 640, true, true, op);
  if (!plan.grid()) return;
  FASTDIT_DTYPE(p.dtype, run, p, plan, stream, op)
}

}  // namespace fastdit::cuda
