// The convolution's weight: its gradient as a GEMM over pixels, and the moves between its layouts.
//
//   dw[n, tap, c] = sum over b, t', p of g[b, n, t', p] * x[b, c, t' * stride + tap - pad, p * stride + tap - pad]
//
// A block owns one tap, SIDE of Cout by SIDE of C, and one of `parts` runs of pixel sets; a set is kPixels of one
// output frame, so frames that a tap does not meet bound the walk. Both tiles lie in shared memory as they do in
// memory, pixel by pixel, and are transposed on their way to registers. Parts are fp32 and added by the move: the same
// bits every time.
#include "conv_product.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 128, kPixels = 32, kStages = 3;
constexpr int kLanes = kThreads / kPixels;  // threads that copy a pixel

template <class T, int SIDE>
struct WeightTile {
  static constexpr int PER = 16 / sizeof(T), CHUNKS = SIDE / PER, MI = SIDE / 32, NI = SIDE / 16;
  using Rows = Tile<SIDE* static_cast<int>(sizeof(T)) / 2>;  // SIDE channels each
  using Sums = Accumulator<T, MI, NI>;
  static constexpr int BYTES = kPixels * SIDE * static_cast<int>(sizeof(T));

  const ConvWeightGradParams& q;
  const ConvParams& p;
  char* const bytes;
  int n0, c0, tap, shift_t, shift_h, shift_w, first, frames, begin, end, part;

  __device__ WeightTile(const ConvWeightGradParams& params, char* shared, int parts)
      : q(params), p(params.forward), bytes(shared) {
    const int taps_w = static_cast<int>(p.kernel[2]), taps_h = static_cast<int>(p.kernel[1]);
    const int taps = taps_w * taps_h * static_cast<int>(p.kernel[0]);
    const int tiles_c = (static_cast<int>(p.cin) + SIDE - 1) / SIDE,
              tiles_n = (static_cast<int>(p.cout) + SIDE - 1) / SIDE;
    int rest = static_cast<int>(blockIdx.x);
    c0 = rest % tiles_c * SIDE, rest /= tiles_c;
    tap = rest % taps, rest /= taps;
    n0 = rest % tiles_n * SIDE, part = rest / tiles_n;
    shift_w = tap % taps_w * static_cast<int>(p.dilation[2]) - static_cast<int>(p.pad_w);
    shift_h = tap / taps_w % taps_h * static_cast<int>(p.dilation[1]) - static_cast<int>(p.pad_h);
    shift_t = tap / (taps_w * taps_h) * static_cast<int>(p.dilation[0]) - static_cast<int>(p.pad_t);
    // output frames whose tap meets a frame
    const int step = static_cast<int>(p.stride[0]), out = static_cast<int>(p.to);
    const bool zeros = p.time_pad == static_cast<int>(Pad::zeros);
    first = zeros ? taps_before(shift_t, 0, step, out) : 0;
    frames = (zeros ? taps_before(shift_t, static_cast<int>(p.cache_t + p.t), step, out) : out) - first;
    const int64_t all = p.n * frames * sets();
    begin = static_cast<int>(all * part / parts), end = static_cast<int>(all * (part + 1) / parts);
  }
  __device__ __forceinline__ int sets() const { return (static_cast<int>(p.ho * p.wo) + kPixels - 1) / kPixels; }

  // A set of pixels of a frame of the walk.
  struct Place {
    int set, t, b;
  };
  __device__ __forceinline__ void advance(Place& at) const {
    if (++at.set < sets()) return;
    at.set = 0;
    if (++at.t < first + frames) return;
    at.t = first, ++at.b;
  }

  __device__ __forceinline__ Rows grads(int step) const { return {bytes + step % kStages * (2 * BYTES)}; }
  __device__ __forceinline__ Rows inputs(int step) const { return {bytes + step % kStages * (2 * BYTES) + BYTES}; }

  // One row of a tile: channels from c0 on of `channels`.
  __device__ __forceinline__ void copy(Rows to, int row, const T* from, bool there, int c, int channels) const {
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x) % kLanes; chunk < CHUNKS; chunk += kLanes) {
      const int at = c + chunk * PER;
      const int full = there ? min(max((channels - at) * static_cast<int>(sizeof(T)), 0), 16) : 0;
      copy_async<16>(to.at(row, chunk), full ? from + at : from, full);
    }
  }
  __device__ __forceinline__ void fetch(const Place& at, int step) const {
    const int row = static_cast<int>(threadIdx.x) / kLanes, pixel = at.set * kPixels + row;
    const int width = static_cast<int>(p.wo), out_h = pixel / width, out_w = pixel - out_h * width;
    const bool live = out_h < p.ho;
    const T* g = static_cast<const T*>(q.grad);
    copy(grads(step), row,
         live ? g + at.b * q.grad_stride[0] + at.t * q.grad_stride[2] + out_h * q.grad_stride[3] +
                    out_w * q.grad_stride[4]
              : g,
         live, n0, static_cast<int>(p.cout));
    const Frame<T> x = frame_of<T>(p, at.b, at.t * static_cast<int>(p.stride[0]) + shift_t);
    const int h = fold(out_h * static_cast<int>(p.stride[1]) + shift_h, static_cast<int>(p.h), p.space_pad);
    const int w = fold(out_w * static_cast<int>(p.stride[2]) + shift_w, static_cast<int>(p.w), p.space_pad);
    const bool inside = live && h >= 0 && h < p.h && w >= 0 && w < p.w;
    copy(inputs(step), row, inside ? x.data + h * x.stride_h + w * x.stride_w : x.data, inside, c0,
         static_cast<int>(p.cin));
  }

  __device__ __forceinline__ void product(Sums& sum, Rows g, Rows x, int n, int c) const {
    uint32_t a[Sums::LOADS][MI][4], b[Sums::LOADS][NI][2];
    if constexpr (std::is_same_v<T, float>) {  // ldmatrix transposes 16-bit values only
      const int row = static_cast<int>(threadIdx.x) % 4, column = static_cast<int>(threadIdx.x) % 32 / 4;
      const auto value = [](Rows tile, int k, int m) {
        return reinterpret_cast<const uint32_t*>(tile.at(k, m / 4))[m % 4];
      };
#pragma unroll
      for (int k = 0; k < kPixels; k += 16) {
#pragma unroll
        for (int l = 0; l < 2; ++l) {
          const int first_row = k + 8 * l + row;
#pragma unroll
          for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) a[l][i][e] = value(g, first_row + e / 2 * 4, n + i * 16 + column + e % 2 * 8);
#pragma unroll
          for (int j = 0; j < NI; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) b[l][j][e] = value(x, first_row + e * 4, c + j * 8 + column);
        }
        sum.add(a, b);
      }
    } else {
      const Fragments<Operand::a_by_k, SIDE> from_g(g);
      const Fragments<Operand::b_by_k, SIDE> from_x(x);
#pragma unroll
      for (int k = 0; k < kPixels; k += 16) {
#pragma unroll
        for (int i = 0; i < MI; ++i) from_g(a[0][i], k, n + i * 16);
#pragma unroll
        for (int j = 0; j < NI; j += 2) {
          uint32_t two[4];
          from_x(two, k, c + j * 8);
          b[0][j][0] = two[0], b[0][j][1] = two[1], b[0][j + 1][0] = two[2], b[0][j + 1][1] = two[3];
        }
        sum.add(a, b);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int n = warp / 2 * (SIDE / 2), c = warp % 2 * (SIDE / 2);
    const bool live = n0 + n < p.cout && c0 + c < p.cin;  // of this warp
    const int steps = end - begin;
    Sums total;
    if (steps > 0) {
      Place next{begin % sets(), first + begin / sets() % frames, begin / sets() / frames};
      for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) fetch(next, s), advance(next);
        copy_commit();
      }
      for (int s = 0; s < steps; ++s) {
        copy_wait<kStages - 2>();
        __syncthreads();
        if (s + kStages - 1 < steps) fetch(next, s + kStages - 1), advance(next);
        copy_commit();
        if (live) product(total, grads(s), inputs(s), n, c);
      }
    }
    const int taps = static_cast<int>(p.kernel[0] * p.kernel[1] * p.kernel[2]);
    float* to = static_cast<float*>(q.d_weight) + (int64_t{part} * p.cout * taps + tap) * p.cin;
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = n0 + n + i * 16 + k / 2 * 8 + lane / 4, column = c0 + c + j * 8 + lane % 4 * 2 + k % 2;
          if (row < p.cout && column < p.cin) to[int64_t{row} * taps * p.cin + column] = total.value(i, j, k);
        }
  }
};

template <class T, int SIDE>
__global__ void __launch_bounds__(kThreads, SIDE == 96 ? 3 : 2)
    weight_grad_kernel(const ConvWeightGradParams q, int parts) {
  FASTDIT_SHARED_DYNAMIC(bytes, 128);
  const WeightTile<T, SIDE> tile(q, bytes, parts);
  tile.run();
}

// The side of a tile that covers Cout and C best: a tile costs its products, and its reading. fp32 has registers
// for 64.
int side(const ConvParams& p) {
  if (static_cast<DType>(p.dtype) == DType::f32) return 64;
  const auto cost = [&](int64_t side) {
    return ((p.cout + side - 1) / side) * ((p.cin + side - 1) / side) * (side * side + 32 * side);
  };
  return cost(96) <= cost(128) ? 96 : 128;
}
int64_t tiles(const ConvParams& p) {
  const int64_t s = side(p);
  return ((p.cout + s - 1) / s) * ((p.cin + s - 1) / s) * p.kernel[0] * p.kernel[1] * p.kernel[2];
}

template <class T, int SIDE>
void start(const ConvWeightGradParams& q, int parts, Stream stream, const char* op) {
  const std::string of = sizes(q.forward);
  launch(weight_grad_kernel<T, SIDE>, dim3(grid(tiles(q.forward) * parts, op, of)), dim3(kThreads),
         size_t(2) * kStages * WeightTile<T, SIDE>::BYTES, stream, op, of, q, parts);
}

template <class T>
void run(const ConvWeightGradParams& q, int parts, Stream stream, const char* op) {
  if constexpr (std::is_same_v<T, float>)
    return start<T, 64>(q, parts, stream, op);
  else
    return side(q.forward) == 96 ? start<T, 96>(q, parts, stream, op) : start<T, 128>(q, parts, stream, op);
}

// A thread takes a channel of a row with all its taps: those are neighbours where channels are not.
__global__ void __launch_bounds__(256, 4) move_weight_kernel(const WeightMove m) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x, C = static_cast<unsigned>(m.c), n = i / C, c = i - n * C;
  if (n >= m.n) return;
  const int64_t from = n * m.from_stride[0] + c * m.from_stride[1], to = n * m.to_stride[0] + c * m.to_stride[1];
  for (int t = 0; t < m.kernel[0]; ++t)
    for (int h = 0; h < m.kernel[1]; ++h)
      for (int w = 0; w < m.kernel[2]; ++w) {
        const int64_t at = from + t * m.from_stride[2] + h * m.from_stride[3] + w * m.from_stride[4];
        float sum[1] = {0}, v[1];
        for (int64_t part = 0; part < m.parts; ++part) {
          load_as<1>(m.from, m.from_dtype, at + part * m.part_stride, v);
          sum[0] = part ? sum[0] + v[0] : v[0];
        }
        store_as<1>(m.to, m.to_dtype, to + t * m.to_stride[2] + h * m.to_stride[3] + w * m.to_stride[4], sum);
      }
}

}  // namespace

// Blocks for two rounds of the device, each with eight sets of pixels at least.
int conv_weight_grad_parts(const ConvWeightGradParams& q, int device) {
  const ConvParams& p = q.forward;
  const int64_t sets = p.n * p.to * ((p.ho * p.wo + kPixels - 1) / kPixels), blocks = tiles(p);
  int64_t parts = int64_t{4} * processors(device) / blocks;
  if (parts > sets / 8) parts = sets / 8;
  return static_cast<int>(parts < 1 ? 1 : parts);
}

void conv_weight_grad(const ConvWeightGradParams& q, int parts, Stream stream, const char* op) {
  const ConvParams& p = q.forward;
  check_packed(p, packed(q.grad, q.grad_stride, static_cast<int>(itemsize(static_cast<DType>(p.dtype)))), op);
  if (p.n * p.to * p.ho * p.wo > 0x7fffffff)
    throw std::invalid_argument(std::string(op) + ": too many pixels; got " + sizes(p) + ", expected fewer than 2^31");
  FASTDIT_DTYPE(p.dtype, run, q, parts, stream, op)
}

void conv_move_weight(const WeightMove& m, Stream stream, const char* op) {
  const std::string of = "Cout=" + std::to_string(m.n) + " C=" + std::to_string(m.c);
  launch(move_weight_kernel, dim3(grid((m.n * m.c + 255) / 256, op, of)), dim3(256), 0, stream, op, of, m);
}

}  // namespace fastdit::cuda
