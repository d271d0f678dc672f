// Backward of norm and SiLU over the channels of a pixel, and of GroupNorm once its sums are known.
//
//   z = u * w + b, g = dy * silu'(z):     dw += g * u,  db += g
//   channel norms, u = x * inverse:       dx = inverse * (g * w - u * mean over channels of (g * w * u))
//   group, u = (x - mean) * rstd:         dx = rstd * (g * w - m1 - u * m2), the means of the group: conv_group.cu
//
// A program takes every programs-th set of pixels and sums dw and db of 16 channels a lane in registers; its lanes and
// warps are added in one order, the programs by conv_sum_rows: the same bits every time.
#include "conv_norm.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kEach = 16, kWarps = kNormThreads / 32, kMost = 32 * kEach;  // channels of a lane and, at most, a block

template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    normalize_backward_kernel(const NormSiluGradParams q, const NormSums sums, const Lanes lanes) {
  constexpr int W = 16 / sizeof(T), kPacks = kEach / W;
  FASTDIT_SHARED(float[2][kMost], total);
  const NormSiluParams& p = q.forward;
  const int C = static_cast<int>(p.c), count = static_cast<int>(p.n * p.t * p.h * p.w), step = lanes.count * W;
  const int first = static_cast<int>(blockIdx.y) * kPacks * step + lanes.lane() * W;  // of this lane's channels
  const auto norm = static_cast<Norm>(p.norm);
  const float eps = static_cast<float>(p.eps);
  float d_weight[kPacks][W] = {}, d_bias[kPacks][W] = {};

  // every thread takes part in the sums over its lanes
  for (int begin = static_cast<int>(blockIdx.x) * (kNormThreads / lanes.count); begin < count;
       begin += static_cast<int>(gridDim.x) * (kNormThreads / lanes.count)) {
    const int pixel = begin + static_cast<int>(threadIdx.x) / lanes.count;
    const bool live = pixel < count;
    const int from = live ? lanes.lane() * W : C;  // the others add nothing; pixel 0 may be being written
    const Spot s = spot_of(live ? pixel : 0, static_cast<int>(p.t), static_cast<int>(p.h), static_cast<int>(p.w));
    const T* x = static_cast<const T*>(p.x) + s.at(p.x_stride);
    const int64_t g_at = s.at(q.grad_stride);
    const auto read_g = [&](int c, float (&g)[W]) {
      if (static_cast<DType>(q.grad_dtype) == static_cast<DType>(p.dtype))
        read<T, W>(static_cast<const T*>(q.grad) + g_at, q.grad_stride[1], lanes.g_packs, c, C, g);
      else
        read<float, W>(static_cast<const float*>(q.grad) + g_at, q.grad_stride[1], lanes.g_packs, c, C, g);
    };
    // g of before the SiLU, u, and the weight
    const auto through = [&](int c, float inverse, float (&g)[W], float (&u)[W], float (&scale)[W]) {
      float shift[W];
      read<T, W>(x, p.x_stride[1], lanes.x_packs, c, C, u);
      unit<W>(u, inverse, sums.stats, norm, s.b, c, C);
      affine<W>(p, lanes, c, scale, shift);
      read_g(c, g);
      if (!q.silu) return;
#pragma unroll
      for (int k = 0; k < W; ++k) g[k] *= silu_slope<T>(u[k] * scale[k] + shift[k]);
    };

    float inverse = 1, along = 0;
    if (norm == Norm::channel_l2 || norm == Norm::channel_rms) {
      float squares = 0;
      for (int c = from; c < C; c += step) {
        float v[W];
        read<T, W>(x, p.x_stride[1], lanes.x_packs, c, C, v);
#pragma unroll
        for (int k = 0; k < W; ++k) squares += v[k] * v[k];
      }
      squares = lanes.sum(squares);
      inverse = inverse_of(squares, C, norm, eps);
      if (q.d_x) {
        for (int c = from; c < C; c += step) {
          float g[W], u[W], scale[W];
          through(c, inverse, g, u, scale);
#pragma unroll
          for (int k = 0; k < W; ++k) along += g[k] * scale[k] * u[k];
        }
        along = __fdividef(lanes.sum(along), static_cast<float>(C));
        if (norm == Norm::channel_l2 && squares <= eps * eps) along = 0;  // it was divided by a constant
      }
    }
    if (!live) continue;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int c = first + j * step;
      if (c >= C) continue;
      float g[W], u[W], scale[W];
      through(c, inverse, g, u, scale);
#pragma unroll
      for (int k = 0; k < W; ++k) d_weight[j][k] += g[k] * u[k], d_bias[j][k] += g[k];
      if (!q.d_x) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        g[k] *= scale[k];
        if (norm == Norm::group) {
          if (c + k >= C) continue;
          const float* mean = sums.moments + int64_t{2} * s.b * C + c + k;
          g[k] = (g[k] - mean[C] - u[k] * mean[0]) * sums.stats[(int64_t{2} * s.b + 1) * C + c + k];
        } else if (norm != Norm::none) {
          g[k] = (g[k] - u[k] * along) * inverse;
        }
      }
      write<T, W>(static_cast<T*>(q.d_x) + s.at(q.d_x_stride), q.d_x_stride[1], lanes.y_packs, c, C, g);
    }
  }
  if (!sums.parts) return;
#pragma unroll
  for (int j = 0; j < kPacks; ++j)
#pragma unroll
    for (int k = 0; k < W; ++k)
      for (int distance = lanes.count; distance < 32; distance *= 2) {
        d_weight[j][k] += __shfl_xor_sync(0xffffffffu, d_weight[j][k], distance);
        d_bias[j][k] += __shfl_xor_sync(0xffffffffu, d_bias[j][k], distance);
      }
  const int warp = static_cast<int>(threadIdx.x) / 32, thread = static_cast<int>(threadIdx.x) % 32;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp && thread < lanes.count)
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const int at = lanes.lane() * W + j * step + k;
          total[0][at] = turn ? total[0][at] + d_weight[j][k] : d_weight[j][k];
          total[1][at] = turn ? total[1][at] + d_bias[j][k] : d_bias[j][k];
        }
    __syncthreads();
  }
  const int c0 = static_cast<int>(blockIdx.y) * kPacks * step;
  float* part = sums.parts + int64_t{2} * static_cast<int>(blockIdx.x) * C;
  for (int i = static_cast<int>(threadIdx.x); i < kPacks * step && c0 + i < C; i += kNormThreads)
    part[c0 + i] = total[0][i], part[C + c0 + i] = total[1][i];
}

// ---- rows ---------------------------------------------------------------------------------------------------
constexpr int kColumns = 32, kRowLanes = 8;

__global__ void __launch_bounds__(kColumns* kRowLanes) sum_rows_kernel(const RowSums r) {
  FASTDIT_SHARED(float[kRowLanes][kColumns], partial);
  const int c = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x), lane = threadIdx.y;
  float sum = 0;
  if (c < r.columns)
    for (int64_t row = lane; row < r.rows; row += kRowLanes) sum += r.parts[row * r.distance + c];
  partial[lane][threadIdx.x] = sum;
  __syncthreads();
  if (lane || c >= r.columns) return;
  float total[1] = {0};
  for (int i = 0; i < kRowLanes; ++i) total[0] += partial[i][threadIdx.x];
  store_as<1>(r.to, r.dtype, c, total);
}

template <class T>
void run(const NormSiluGradParams& q, const NormSums& sums, int programs, Stream stream, const char* op) {
  const NormSiluParams& p = q.forward;
  constexpr int size = sizeof(T), W = 16 / size;
  Lanes lanes = lanes_of(p, size);
  lanes.count = 1;
  while (lanes.count < 32 && lanes.count * kEach < p.c) lanes.count *= 2;
  const int g_size = static_cast<int>(itemsize(static_cast<DType>(q.grad_dtype)));
  const bool whole = p.c % W == 0;
  lanes.g_packs = whole && packed(q.grad, q.grad_stride, g_size);
  lanes.y_packs = whole && q.d_x && packed(q.d_x, q.d_x_stride, size);
  const int64_t each = int64_t{kEach} * lanes.count;
  launch(normalize_backward_kernel<T>, dim3(programs, static_cast<unsigned>((p.c + each - 1) / each)),
         dim3(kNormThreads), 0, stream, op, sizes(p), q, sums, lanes);
}

}  // namespace

void conv_normalize_backward(const NormSiluGradParams& q, const NormSums& sums, int programs, Stream stream,
                             const char* op) {
  grid(q.forward.n * q.forward.t * q.forward.h * q.forward.w, op, sizes(q.forward));
  FASTDIT_DTYPE(q.forward.dtype, run, q, sums, programs, stream, op)
}

void conv_sum_rows(const RowSums& r, Stream stream, const char* op) {
  launch(sum_rows_kernel, dim3(static_cast<unsigned>((r.columns + kColumns - 1) / kColumns)), dim3(kColumns, kRowLanes),
         0, stream, op, "C=" + std::to_string(r.columns), r);
}

}  // namespace fastdit::cuda
