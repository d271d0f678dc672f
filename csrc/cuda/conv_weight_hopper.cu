// The gradient of a convolution's weight on Hopper (sm_90a), bf16 and fp16: the sums of conv_weight.cu by wgmma, x and
// the gradient g by the copy engine.
//
//   dw[n, tap, c] = sum over b, t', p of g[b, n, t', p] * x[b, c, t' * stride + tap - pad, p + tap - pad]
//
// A block owns Cout x C of one tap, or of the three taps of a column of the kernel, and one of `parts` runs of
// rectangles of output pixels. Pixels are K: both operands lie in shared memory as they do in memory, 64 channels of a
// pixel in 128 bytes, and wgmma reads them transposed (M- and N-major). One thread feeds a ring of stages: g of a
// rectangle, and the lines of x that its taps meet. Taps of a column read that patch shifted by whole lines; a line is
// a multiple of 16 pixels, so each shift lands on the swizzle's pattern of 1024 bytes. Of 64 channels one product
// covers all three taps: the distance between spans of its N is a line's.
//
// Padding is the copy engine's zero fill. What no output meets must not be multiplied, for 0 * NaN is NaN: x ends for
// each column of the kernel where the last output does (a map each), lines beyond the last output are not walked, and
// neither are frames that a tap does not meet. Parts are fp32 and added in their order by the move: the same bits
// every time.
#include <iterator>
#include <type_traits>
#include <utility>

#include "conv_weight_hopper.cuh"
#include "mma.h"
#include "ring.h"
#include "wgmma.h"

#if defined(__CUDACC__)
#pragma nv_diag_suppress 177  // other architectures refer to little of this
#endif

namespace fastdit::cuda {
namespace weight_hopper {
namespace {

struct Maps {
  TensorMap g, x[kMostColumns], cache[kMostColumns];
};

// Columns of x that taps of column w of the kernel read: those before `end`.
__host__ __device__ inline int end_of(const ConvParams& p, int w) {
  const int shift = w * static_cast<int>(p.dilation[2]) - static_cast<int>(p.pad_w);
  return min(static_cast<int>(p.w), static_cast<int>(p.wo) + shift);
}

template <class T, int CHANNELS, int TAPS, int TILES>
struct Block {
  static constexpr bool MERGED = TAPS > 1 && CHANNELS == kChannels;
  static constexpr int N = MERGED ? TAPS * kChannels : CHANNELS, PRODUCTS = MERGED ? 1 : TAPS;
  static constexpr int SPANS = (CHANNELS + kChannels - 1) / kChannels;  // of x in a stage

  const Maps& maps;
  const ConvParams& p;
  const Plan& plan;
  char* const bytes;
  const int g_bytes, x_bytes, stage_bytes;  // of a span, of a span, of all
  int n0, c0, tap_t, tap_h, tap_w, part;
  int first, frames, begin, end;  // frames of the output that the taps meet; rectangles of this block

  __device__ Block(const Maps& m, const ConvParams& params, const Plan& how, char* shared, int parts)
      : maps(m),
        p(params),
        plan(how),
        bytes(shared),
        g_bytes(how.lines * how.columns * kSpan),
        x_bytes(how.patch_lines * how.columns * kSpan),
        stage_bytes(how.spans * g_bytes + SPANS * x_bytes) {
    int rest = static_cast<int>(blockIdx.x);
    c0 = rest % plan.tiles_c * CHANNELS, rest /= plan.tiles_c;
    tap_w = rest % static_cast<int>(p.kernel[2]), rest /= static_cast<int>(p.kernel[2]);
    tap_h = rest % plan.groups * TAPS, rest /= plan.groups;
    tap_t = rest % static_cast<int>(p.kernel[0]), rest /= static_cast<int>(p.kernel[0]);
    n0 = rest % plan.tiles_n * (2 * TILES * kChannels), part = rest / plan.tiles_n;
    const int step = static_cast<int>(p.stride[0]), out = static_cast<int>(p.to);
    const int shift = tap_t * static_cast<int>(p.dilation[0]) - static_cast<int>(p.pad_t);
    const bool zeros = p.time_pad == static_cast<int>(Pad::zeros);
    first = zeros ? taps_before(shift, 0, step, out) : 0;
    frames = (zeros ? taps_before(shift, static_cast<int>(p.cache_t + p.t), step, out) : out) - first;
    const int64_t all = p.n * frames * (plan.tiles_h * plan.tiles_w);
    begin = static_cast<int>(all * part / parts), end = static_cast<int>(all * (part + 1) / parts);
  }

  __device__ __forceinline__ char* grads(int stage, int span) const {
    return bytes + stage * stage_bytes + span * g_bytes;
  }
  __device__ __forceinline__ char* inputs(int stage) const {
    return bytes + stage * stage_bytes + plan.spans * g_bytes;
  }
  __device__ __forceinline__ uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(bytes + plan.stages * stage_bytes) + stage;
  }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return full(kMostStages + stage); }

  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < plan.stages; ++i) barrier_init(full(i), 1), barrier_init(empty(i), kConsumers / 32);
      barrier_fence_init();
    }
    __syncthreads();
  }

  // ---- the copies ---------------------------------------------------------------------------------------------
  __device__ __forceinline__ void produce() const {
    const int live = min(plan.spans, (static_cast<int>(p.cout) - n0 + kChannels - 1) / kChannels);
    const int shift_t = tap_t * static_cast<int>(p.dilation[0]) - static_cast<int>(p.pad_t);
    const int shift_h = tap_h * static_cast<int>(p.dilation[1]) - static_cast<int>(p.pad_h);
    const int shift_w = tap_w * static_cast<int>(p.dilation[2]) - static_cast<int>(p.pad_w);
    const int cached = static_cast<int>(p.cache_t), last = cached + static_cast<int>(p.t) - 1;
    const bool none = end_of(p, tap_w) <= 0;  // of x: then all of a box lies outside
    RingPlace<> ring;
#pragma unroll 1
    for (int s = begin; s < end; ++s) {
      int rest = s;
      const int w = rest % plan.tiles_w * plan.columns;
      rest /= plan.tiles_w;
      const int h = rest % plan.tiles_h * plan.lines;
      rest /= plan.tiles_h;
      const int t = first + rest % frames, b = rest / frames;
      int frame = t * static_cast<int>(p.stride[0]) + shift_t;  // of cat(cache, x)
      if (p.time_pad != static_cast<int>(Pad::zeros)) frame = min(max(frame, 0), last);
      const bool old = frame < cached;
      const TensorMap& x = old ? maps.cache[tap_w] : maps.x[tap_w];

      barrier_wait(empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(full(ring.stage), live * g_bytes + SPANS * x_bytes);
#pragma unroll 1
      for (int i = 0; i < live; ++i) {
        const int corner[5] = {n0 + i * kChannels, w, h, t, b};
        tensor_load(grads(ring.stage, i), maps.g, corner, full(ring.stage));
      }
#pragma unroll 1
      for (int i = 0; i < SPANS; ++i) {
        const int corner[5] = {c0 + i * kChannels, none ? 1 : w + shift_w, h + shift_h, old ? frame : frame - cached,
                               b};
        tensor_load(inputs(ring.stage) + i * x_bytes, x, corner, full(ring.stage));
      }
      ring.next(plan.stages);
    }
  }

  // ---- the products -------------------------------------------------------------------------------------------
  // `steps` of 16 pixels, one commit.
  template <int steps, int tiles>
  __device__ __forceinline__ void multiply(float (&sum)[tiles][PRODUCTS][N / 2], uint64_t g, uint64_t x,
                                           uint32_t shift) const {
    product_fence();
#pragma unroll
    for (int k = 0; k < steps; ++k)
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int j = 0; j < PRODUCTS; ++j)
          product<T, true, true>(sum[i][j], g + ((2 * i * g_bytes + k * kStep * kSpan) >> 4),
                                 x + ((j * shift + k * kStep * kSpan) >> 4));
    product_commit();
  }

  // The warpgroup's tiles of 64 Cout: its own number, and that and two.
  template <int tiles>
  __device__ __forceinline__ void consume() const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, group = warp / 4;
    const uint32_t shift = static_cast<uint32_t>(static_cast<int>(p.dilation[1]) * plan.columns * kSpan);
    float sum[tiles][PRODUCTS][N / 2];
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < PRODUCTS; ++j)
#pragma unroll
        for (int k = 0; k < N / 2; ++k) sum[i][j][k] = 0;
    RingPlace<> ring;
    int read = -1;  // stage of the products under way
#pragma unroll 1
    for (int s = begin; s < end; ++s) {
      const int line = s / plan.tiles_w % plan.tiles_h * plan.lines;
      int left = min(plan.lines, static_cast<int>(p.ho) - line) * plan.columns / kStep;
      uint64_t g = matrix(grads(ring.stage, group), 16, 1024, 1);
      uint64_t x = matrix(inputs(ring.stage), MERGED ? shift : x_bytes, 1024, 1);
      const auto release = [&] {  // one group under way: the stage before is read
        product_wait<1>();
        if (read >= 0 && lane == 0) barrier_arrive(empty(read));
        read = -1;
      };
      barrier_wait(full(ring.stage), ring.phase);
#pragma unroll 1
      for (; left >= kChunk; left -= kChunk) {
        multiply<kChunk>(sum, g, x, shift);
        release();
        g += kChunk * kStep * kSpan >> 4, x += kChunk * kStep * kSpan >> 4;
      }
#pragma unroll 1
      for (; left > 0; --left) {
        multiply<1>(sum, g, x, shift);
        release();
        g += kStep * kSpan >> 4, x += kStep * kSpan >> 4;
      }
      read = ring.stage;
      ring.next(plan.stages);
    }
    product_wait<0>();
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < PRODUCTS; ++j) product_values(sum[i][j]);
    if (read >= 0 && lane == 0) barrier_arrive(empty(read));
#pragma unroll
    for (int i = 0; i < tiles; ++i) store(sum[i], n0 + (2 * i + group) * kChannels + warp % 4 * 16 + lane / 4);
  }
  // A warpgroup without a row of its own lets the stages pass.
  __device__ __forceinline__ void idle() const {
    RingPlace<> ring;
#pragma unroll 1
    for (int s = begin; s < end; ++s) {
      barrier_wait(full(ring.stage), ring.phase);
      if (threadIdx.x % 32 == 0) barrier_arrive(empty(ring.stage));
      ring.next(plan.stages);
    }
  }

  __device__ __forceinline__ void store(const float (&sum)[PRODUCTS][N / 2], int row) const {
    const int area = static_cast<int>(p.kernel[1] * p.kernel[2]), width = static_cast<int>(p.kernel[2]);
    const int64_t pitch = int64_t{static_cast<int>(p.kernel[0])} * area * p.cin;  // from a row to the next
    float* const to = static_cast<float*>(p.y) + (int64_t{part} * p.cout) * pitch +
                      (tap_t * area + tap_h * width + tap_w) * p.cin + c0 + 2 * (threadIdx.x % 4);
    const int room = static_cast<int>(p.cin) - c0 - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= p.cout) continue;
      float* const from = to + (row + half * 8) * pitch;
#pragma unroll
      for (int j = 0; j < PRODUCTS; ++j)
#pragma unroll
        for (int k = 0; k < N / 8; ++k) {
          const int column = MERGED ? k * 8 % kChannels : k * 8, line = MERGED ? k * 8 / kChannels : j;
          if (column < room)
            *reinterpret_cast<float2*>(from + line * width * p.cin + column) =
                float2{sum[j][k * 4 + half * 2], sum[j][k * 4 + half * 2 + 1]};
        }
    }
  }
};

template <class T, int CHANNELS, int TAPS, int TILES>
__global__ void __launch_bounds__(kThreads, 1)
    conv_weight_hopper_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ConvParams p,
                              const __grid_constant__ Plan plan, int parts) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTDIT_SHARED_DYNAMIC(bytes, 1024);
  const Block<T, CHANNELS, TAPS, TILES> block(maps, p, plan, bytes, parts);
  block.prepare();
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) block.produce();
    return;
  }
  more_registers<kConsumerRegisters>();
  const int left = static_cast<int>(p.cout) - block.n0 - static_cast<int>(threadIdx.x) / 128 * kChannels;
  if (left <= 0) return block.idle();
  if constexpr (TILES == 2)
    if (left > 2 * kChannels) return block.template consume<2>();
  block.template consume<1>();
#endif
}

// ---- the host -----------------------------------------------------------------------------------------------
template <class T, int CHANNELS, int TAPS, int TILES>
void start(ConvParams p, const Plan& plan, float* to, int parts, Stream stream, const char* op) {
  const std::string of = sizes(p);
  Maps maps{};
  maps.g = video_map(p.y, p.dtype, {p.n, p.cout, p.to, p.ho, p.wo}, p.y_stride, plan.columns, plan.lines, op, of);
  for (int i = 0; i < p.kernel[2]; ++i) {
    const auto video = [&](const void* data, int64_t frames, const int64_t (&stride)[kAxes]) {
      return video_map(data, p.dtype, {p.n, p.cin, frames, p.h, max(end_of(p, i), 1)}, stride, plan.columns,
                       plan.patch_lines, op, of);
    };
    maps.x[i] = video(p.x, p.t, p.x_stride);
    if (p.cache_t) maps.cache[i] = video(p.cache, p.cache_t, p.cache_stride);
  }
  constexpr int SPANS = Block<T, CHANNELS, TAPS, TILES>::SPANS;
  const size_t shared =
      size_t(plan.stages) * (plan.spans * plan.lines + SPANS * plan.patch_lines) * plan.columns * kSpan +
      2 * kMostStages * 8;
  p.y = to;  // from here on
  launch(conv_weight_hopper_kernel<T, CHANNELS, TAPS, TILES>, dim3(grid(int64_t{plan.blocks} * parts, op, of)),
         dim3(kThreads), shared, stream, op, of, maps, p, plan, parts);
}

template <class T>
void run(const ConvParams& p, float* to, int parts, Stream stream, const char* op) {
  const Choice& best = choose(p, stream.device, op);
  const auto start_if = [&]<int i>(std::integral_constant<int, i>) {
    constexpr Shape shape = kShapes[i];
    if (best.shape == i) start<T, shape.channels, shape.taps, shape.tiles>(p, best.plan, to, parts, stream, op);
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (start_if(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, std::size(kShapes)>{});
}

}  // namespace
}  // namespace weight_hopper

int conv_weight_grad_hopper_parts(const ConvWeightGradParams& q, int device) {
  return conv_weight_hopper_tile(q, device).parts;
}

void conv_weight_grad_hopper(const ConvWeightGradParams& q, int parts, Stream stream, const char* op) {
  const ConvParams p = weight_hopper::prepared(q, op);
  float* to = static_cast<float*>(q.d_weight);
  if (static_cast<DType>(p.dtype) == DType::bf16)
    weight_hopper::run<bf16>(p, to, parts, stream, op);
  else
    weight_hopper::run<f16>(p, to, parts, stream, op);
}

}  // namespace fastdit::cuda
