// Gradients of rotary tables, which few models learn: what every rotated token adds to its row of cos and of sin, and
// the sums of those rows over the positions of an axis. Values are read one by one, whatever the layout.
//
//   (a1, a2) = n(x),  (g1, g2) = dy:   dcos += g1 a1 + g2 a2,  dsin += g2 a1 - g1 a2
#include "rotary.cuh"
#include "rotary.h"
#include "strips.h"

namespace fastdit::cuda {
namespace {

template <class T>
struct Rows : RotaryWorker<T, Pairs::single> {
  FASTDIT_ROTARY_WORKER(T, Pairs::single);
  using L = Lane<T, Pairs::single>;
  const RotaryGrad& d;
  const RotaryTableRows& out;
  float cos[kPairs], sin[kPairs];

  __device__ Rows(const QkNormRopeParams& params, const RotarySide& side, const RotaryGrid& g, const RotaryPlace& where,
                  const RotaryTableRows& rows, float (*buffer)[2][kMaxWarps])
      : Base(params, g, where, side.operand, buffer), d(side.grad), out(rows) {}

  __device__ __forceinline__ void normalise(float (&a)[kPairs], float (&b)[kPairs], int head) {
    const bool here = head < heads;
    const int64_t at = this->affine_at(head);
    float mean, root;
    own.statistics(a, b, here, inverse, sums, mean, root);
    if (!here) return;
    own.pieces([&](int j) {
      a[j] = (a[j] - mean) * root, b[j] = (b[j] - mean) * root;
      if (o.weight) own.apply(o.weight, o.weight_dtype, at, j, a, b, [](float x, float w) { return x * w; });
      if (o.bias) own.apply(o.bias, o.bias_dtype, at, j, a, b, [](float x, float w) { return x + w; });
    });
  }

  __device__ __forceinline__ void store(int64_t row) const {
    own.pieces([&](int j) {
      const int pair = own.pair(j);
      if (pair >= own.g.turning) return;
      out.cos[row * own.g.turning + pair] = cos[j], out.sin[row * own.g.turning + pair] = sin[j];
    });
  }

  // The sum over the slots, and over the warps of the group, in their order.
  __device__ __forceinline__ void share(float (*shared)[2 * kPairs][32]) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        if (step >= own.g.lanes) {
          cos[i] += __shfl_xor_sync(0xffffffffu, cos[i], step);
          sin[i] += __shfl_xor_sync(0xffffffffu, sin[i], step);
        }
    if (own.g.warps == 1) return;
    __syncthreads();  // the last token's values have been read
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      shared[place.warp][2 * i][lane] = cos[i], shared[place.warp][2 * i + 1][lane] = sin[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      cos[i] = sin[i] = 0;
      for (int w = 0; w < own.g.warps; ++w) cos[i] += shared[w][2 * i][lane], sin[i] += shared[w][2 * i + 1][lane];
    }
  }

  __device__ __forceinline__ void run(int begin, int end, float (*shared)[2 * kPairs][32]) {
    const int rounds = this->rounds(), length = static_cast<int>(out.length);
    for (int i = begin; i < end; ++i) {
      const int b = i / length, n = i - b * length, token = n + static_cast<int>(p.rope_start);
      const T* x = static_cast<const T*>(o.x) + b * o.x_stride[0] + token * o.x_stride[1];
      const T* g = static_cast<const T*>(d.grad) + b * d.grad_stride[0] + token * d.grad_stride[1];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) cos[k] = sin[k] = 0;
      for (int r = place.warp; r < rounds; r += own.g.warps) {
        const int head = r * slots + place.slot;
        const bool here = head < heads;
        typename L::Raw raw;
        float na[kPairs], nb[kPairs], ga[kPairs], gb[kPairs];
        if (here) own.fetch(x + head * o.x_stride[2], raw);
        own.widen_pairs(raw, here, na, nb);
        if (p.norm != RotaryNorm::none) normalise(na, nb, head);
        if (here) own.fetch(g + head * d.grad_stride[2], raw);
        own.widen_pairs(raw, here, ga, gb);
        if (here)
          own.each(
              [&](int k, int) { cos[k] += ga[k] * na[k] + gb[k] * nb[k], sin[k] += gb[k] * na[k] - ga[k] * nb[k]; });
        if (!out.per_head) continue;
        if (here) store(static_cast<int64_t>(i) * heads + head);
#pragma unroll
        for (int k = 0; k < kPairs; ++k) cos[k] = sin[k] = 0;
      }
      if (out.per_head) continue;
      share(shared);
      if (place.warp == 0 && place.slot == 0) store(i);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kHeldWarps)
    rotary_table_rows_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RotarySides sides,
                             const __grid_constant__ RotaryGrid g, const __grid_constant__ RotaryTableRows out) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], buffer);
  FASTDIT_SHARED(float[kHeldWarps][2 * kPairs][32], shared);
  FASTDIT_SHARED_ALIGNED(RotarySide, side, 8);
  const RotaryPlace place(g);
  copy_side(sides, place.side, side);
  const int all = static_cast<int>(p.batch * out.length), per = g.per[place.side], begin = place.group * per;
  Rows<T> rows(p, side, g, place, out, buffer);
  rows.run(min(begin, all), min(begin + per, all), shared);
}

template <class T>
void run(const QkNormRopeGradParams& q, const RotaryPlan& plan, const RotaryTableRows& rows, Stream stream,
         const char* op) {
  launch(rotary_table_rows_kernel<T>, dim3(plan.grid()), dim3(plan.threads()), 0, stream, op, sizes(q.forward),
         q.forward, RotarySides{{{q.forward.q, q.q}, {q.forward.k, q.k}}}, plan.g, rows);
}

// ---- the tables of the axes -------------------------------------------------------------------------------
constexpr int kLanes = 8;

// Block (i, axis): the sum of the rows of all tokens at position i of the axis, in fp64 and in a fixed order.
__global__ void __launch_bounds__(kStrip* kLanes)
    rotary_axes_sums_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RotaryAxes sums,
                            const __grid_constant__ RotaryTableRows rows) {
  FASTDIT_SHARED(double[2][kLanes][kStrip], partial);
  const RotaryAxes& x = p.axes;
  const int axis = static_cast<int>(blockIdx.y), position = static_cast<int>(blockIdx.x);
  const int width = static_cast<int>(x.width[axis]), pairs = static_cast<int>(p.rotated / 2);
  if (position >= x.size[axis]) return;
  const int begin = static_cast<int>((axis > 0 ? x.width[0] : 0) + (axis > 1 ? x.width[1] : 0));
  const int lane = static_cast<int>(threadIdx.y), column = static_cast<int>(threadIdx.x);
  const int length = static_cast<int>(rows.length), all = static_cast<int>(p.batch * length);
  for (int first = 0; first < width; first += kStrip) {
    const int c = first + column;
    double cos = 0, sin = 0;
    int segment = 0, from = 0, end = 0;  // packed: the grid at hand, its first token, and where it ends
    const auto tokens = [&](int s) {
      int n = 1;
      for (int a = 0; a < x.count; ++a) n *= x.grids[s * x.count + a];
      return n;
    };
    if (x.packed) end = tokens(0);
    for (int i = lane; i < all; i += kLanes) {
      const int b = i / length;
      int n = i - b * length;
      if (x.packed) {
        while (n >= end && segment + 1 < x.segments) from = end, end += tokens(++segment);
        n -= from;
      } else {
        segment = min(b, static_cast<int>(x.segments) - 1);
      }
      for (int a = x.count - 1; a > axis; --a) n /= max(x.grids[segment * x.count + a], 1);
      if (axis > 0) n %= max(x.grids[segment * x.count + axis], 1);
      if (n != position || c >= width) continue;
      cos += static_cast<double>(rows.cos[static_cast<int64_t>(i) * pairs + begin + c]);
      sin += static_cast<double>(rows.sin[static_cast<int64_t>(i) * pairs + begin + c]);
    }
    partial[0][lane][column] = cos, partial[1][lane][column] = sin;
    __syncthreads();
    if (lane == 0 && c < width) {
      cos = sin = 0;
      for (int k = 0; k < kLanes; ++k) cos += partial[0][k][column], sin += partial[1][k][column];
      const int64_t at = static_cast<int64_t>(position) * width + c;
      static_cast<double*>(const_cast<void*>(sums.cos[axis]))[at] = cos;
      static_cast<double*>(const_cast<void*>(sums.sin[axis]))[at] = sin;
    }
    __syncthreads();
  }
}

}  // namespace

void rotary_table_rows(const QkNormRopeGradParams& q, const RotaryTableRows& rows, Stream stream, const char* op) {
  QkNormRopeGradParams only = q;  // the tokens that rotate
  only.forward.q.tokens = only.forward.k.tokens = rows.length;
  const RotaryPlan plan = rotary_plan(only.forward, stream.device, 32 * kHeldWarps, q.q.grad, q.k.grad, op);
  if (!plan.grid()) return;
  FASTDIT_DTYPE(q.forward.dtype, run, only, plan, rows, stream, op)
}

void rotary_axes_sums(const QkNormRopeParams& p, const RotaryAxes& sums, const RotaryTableRows& rows, Stream stream,
                      const char* op) {
  int64_t most = 0;
  for (int a = 0; a < p.axes.count; ++a) most = std::max(most, p.axes.size[a]);
  if (!most) return;
  launch(rotary_axes_sums_kernel, dim3(static_cast<unsigned>(most), static_cast<unsigned>(p.axes.count)),
         dim3(kStrip, kLanes), 0, stream, op, sizes(p), p, sums, rows);
}

}  // namespace fastdit::cuda
