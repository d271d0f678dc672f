// GroupNorm of a video in small steps around conv_norm.cu: statistics, and the sums of its backward.
//
//   mean, M2 per (sample, program, channel) -> combined per group by Chan's formula -> (x - mean) * rstd * w + b
//   backward: S2 = sum g * u, S1 = sum g per channel, then over a group the means of w * S2 and w * S1
//
// A program takes every programs-th set of pixels of its sample; no square of a mean is ever subtracted, and all sums
// have one order: the same bits every time.
#include "conv_norm.cuh"

namespace fastdit::cuda {
namespace {

// Threads of a block as rows of pixels by lanes of packs; a block owns `count * W` channels.
template <int W>
struct Walk {
  const int lane, row, rows, c, C;
  __device__ Walk(const Lanes& lanes, int channels)
      : lane(lanes.lane()),
        row(static_cast<int>(threadIdx.x) / lanes.count),
        rows(kNormThreads / lanes.count),
        c((static_cast<int>(blockIdx.y) * lanes.count + lane) * W),
        C(channels) {}
  __device__ __forceinline__ int sample(int programs) const { return static_cast<int>(blockIdx.x) / programs; }
  template <class F>
  __device__ __forceinline__ void pixels(const NormSiluParams& p, int programs, F&& body) const {
    const int count = static_cast<int>(p.t * p.h * p.w), b = sample(programs);
    for (int i = (static_cast<int>(blockIdx.x) - b * programs) * rows + row; i < count; i += programs * rows) {
      Spot s = spot_of(i, static_cast<int>(p.t), static_cast<int>(p.h), static_cast<int>(p.w));
      s.b = b;
      body(s);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    statistics_kernel(const NormSiluParams p, float* parts, int programs, const Lanes lanes) {
  constexpr int W = 16 / sizeof(T);
  FASTDIT_SHARED(float[kNormThreads], shared_seen);
  FASTDIT_SHARED(float[W][kNormThreads], shared_mean);
  FASTDIT_SHARED(float[W][kNormThreads], shared_m2);
  const Walk<W> walk(lanes, static_cast<int>(p.c));
  float mean[W] = {}, m2[W] = {}, seen = 0;
  if (walk.c < walk.C)
    walk.pixels(p, programs, [&](const Spot& s) {
      float v[W];
      read<T, W>(static_cast<const T*>(p.x) + s.at(p.x_stride), p.x_stride[1], lanes.x_packs, walk.c, walk.C, v);
      seen += 1;
      const float share = __fdividef(1.0f, seen);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float step = v[k] - mean[k];
        mean[k] += step * share;
        m2[k] += step * (v[k] - mean[k]);
      }
    });
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = walk.rows / 2; half > 0; half /= 2) {  // the upper half of the rows goes to the lower
    if (walk.row >= half && walk.row < 2 * half) {
      shared_seen[thread] = seen;
#pragma unroll
      for (int k = 0; k < W; ++k) shared_mean[k][thread] = mean[k], shared_m2[k][thread] = m2[k];
    }
    __syncthreads();
    if (walk.row < half) {
      const int other = thread + half * lanes.count;
      const float more = shared_seen[other], all = seen + more, share = all > 0 ? __fdividef(more, all) : 0;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float step = shared_mean[k][other] - mean[k];
        mean[k] += step * share;
        m2[k] += shared_m2[k][other] + step * step * seen * share;
      }
      seen = all;
    }
  }
  if (walk.row) return;
  float* part = parts + int64_t{3} * static_cast<int>(blockIdx.x) * walk.C;
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (const int c = walk.c + k; c < walk.C) part[c] = seen, part[walk.C + c] = mean[k], part[2 * walk.C + c] = m2[k];
}

template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    sums_kernel(const NormSiluGradParams q, const float* stats, float* parts, int programs, const Lanes lanes) {
  constexpr int W = 16 / sizeof(T);
  FASTDIT_SHARED(float[2][W][kNormThreads], shared);
  const NormSiluParams& p = q.forward;
  const Walk<W> walk(lanes, static_cast<int>(p.c));
  float along[W] = {}, plain[W] = {};
  if (walk.c < walk.C)
    walk.pixels(p, programs, [&](const Spot& s) {
      float g[W];
      read<T, W>(static_cast<const T*>(q.grad) + s.at(q.grad_stride), q.grad_stride[1], lanes.g_packs, walk.c, walk.C,
                 g);
      if (p.x) {
        float u[W], scale[W], shift[W];
        read<T, W>(static_cast<const T*>(p.x) + s.at(p.x_stride), p.x_stride[1], lanes.x_packs, walk.c, walk.C, u);
        unit<W>(u, 1, stats, Norm::group, s.b, walk.c, walk.C);
        affine<W>(p, lanes, walk.c, scale, shift);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          g[k] *= silu_slope<T>(u[k] * scale[k] + shift[k]);
          along[k] += g[k] * u[k];
        }
      }
#pragma unroll
      for (int k = 0; k < W; ++k) plain[k] += g[k];
    });
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = walk.rows / 2; half > 0; half /= 2) {
    if (walk.row >= half && walk.row < 2 * half)
#pragma unroll
      for (int k = 0; k < W; ++k) shared[0][k][thread] = along[k], shared[1][k][thread] = plain[k];
    __syncthreads();
    if (walk.row < half)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        along[k] += shared[0][k][thread + half * lanes.count];
        plain[k] += shared[1][k][thread + half * lanes.count];
      }
  }
  if (walk.row) return;
  float* part = parts + int64_t{2} * static_cast<int>(blockIdx.x) * walk.C;
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (const int c = walk.c + k; c < walk.C) part[c] = along[k], part[walk.C + c] = plain[k];
}

// ---- a group, by one block ----------------------------------------------------------------------------------------
constexpr int kGroupThreads = 128;

// The sum over the block, the same in every thread.
__device__ __forceinline__ float block_sum(float v, float (&shared)[kGroupThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the last sum was read
  shared[thread] = v;
  for (int half = kGroupThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  return shared[0];
}

__global__ void __launch_bounds__(kGroupThreads)
    combine_kernel(const float* parts, float* stats, int programs, int groups, int C, float eps) {
  FASTDIT_SHARED(float[kGroupThreads], shared);
  const int b = static_cast<int>(blockIdx.x) / groups, run = C / groups;
  const int c0 = (static_cast<int>(blockIdx.x) - b * groups) * run;
  const float* mine = parts + int64_t{3} * b * programs * C + c0;
  const auto over = [&](auto&& term) {
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < programs * run; i += kGroupThreads) {
      const float* part = mine + int64_t{3} * (i / run) * C + i % run;
      sum += term(part[0], part[C], part[2 * C]);
    }
    return block_sum(sum, shared);
  };
  const float seen = over([](float n, float, float) { return n; });
  const float mean = __fdividef(over([](float n, float m, float) { return n * m; }), seen);
  const float m2 = over([mean](float n, float m, float square) { return square + n * (m - mean) * (m - mean); });
  const float root = rsqrtf(__fdividef(m2, seen) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < run; i += kGroupThreads) {
    stats[int64_t{2} * b * C + c0 + i] = mean;
    stats[(int64_t{2} * b + 1) * C + c0 + i] = root;
  }
}

__global__ void __launch_bounds__(kGroupThreads)
    moments_kernel(const NormSiluParams p, const float* parts, float* sums, float* moments, int programs) {
  FASTDIT_SHARED(float[kGroupThreads], shared);
  const int groups = static_cast<int>(p.groups), C = static_cast<int>(p.c), run = C / groups;
  const int b = static_cast<int>(blockIdx.x) / groups, c0 = (static_cast<int>(blockIdx.x) - b * groups) * run;
  const float count = static_cast<float>(p.t * p.h * p.w * run);
  for (int which = 0; which < 2; ++which) {
    float moment = 0;
    for (int i = static_cast<int>(threadIdx.x); i < run; i += kGroupThreads) {
      const int c = c0 + i;
      float sum = 0, weight[1] = {1};
      for (int k = 0; k < programs; ++k) sum += parts[(int64_t{2} * (b * programs + k) + which) * C + c];
      sums[(int64_t{2} * b + which) * C + c] = sum;
      if (p.weight) load_as<1>(p.weight, p.weight_dtype, c, weight);
      moment += weight[0] * sum;
    }
    moment = __fdividef(block_sum(moment, shared), count);
    for (int i = static_cast<int>(threadIdx.x); i < run; i += kGroupThreads)
      moments[(int64_t{2} * b + which) * C + c0 + i] = moment;
  }
}

// ---- the host -----------------------------------------------------------------------------------------------------
Lanes group_lanes(const NormSiluParams& p, const void* data, const int64_t (&stride)[kAxes], int itemsize) {
  NormSiluParams like = p;
  like.x = data;
  std::copy(stride, stride + kAxes, like.x_stride);
  Lanes lanes = lanes_of(like, itemsize);
  while (lanes.count > 1 && lanes.count < 32 && lanes.count * (16 / itemsize) < p.c) lanes.count *= 2;
  return lanes;
}
template <class T>
dim3 blocks(const NormSiluParams& p, const Lanes& lanes, int programs, const char* op) {
  const int64_t each = lanes.count * (16 / sizeof(T));
  return {grid(p.n * programs, op, sizes(p)), static_cast<unsigned>((p.c + each - 1) / each)};
}

template <class T>
void statistics(const NormSiluParams& p, float* parts, int programs, Stream stream, const char* op) {
  const Lanes lanes = group_lanes(p, p.x, p.x_stride, sizeof(T));
  launch(statistics_kernel<T>, blocks<T>(p, lanes, programs, op), dim3(kNormThreads), 0, stream, op, sizes(p), p, parts,
         programs, lanes);
}

template <class T>
void sums(const NormSiluGradParams& q, const float* stats, float* parts, int programs, Stream stream, const char* op) {
  const NormSiluParams& p = q.forward;
  Lanes lanes = group_lanes(p, q.grad, q.grad_stride, sizeof(T));
  lanes.g_packs = lanes.x_packs;
  lanes.x_packs = p.c % (16 / sizeof(T)) == 0 && packed(p.x, p.x_stride, sizeof(T));
  launch(sums_kernel<T>, blocks<T>(p, lanes, programs, op), dim3(kNormThreads), 0, stream, op, sizes(p), q, stats,
         parts, programs, lanes);
}

}  // namespace

int conv_processors(int device) { return processors(device); }

void conv_group_statistics(const NormSiluParams& p, float* parts, int programs, Stream stream, const char* op) {
  FASTDIT_DTYPE(p.dtype, statistics, p, parts, programs, stream, op)
}

void conv_group_combine(const NormSiluParams& p, const float* parts, float* stats, int programs, Stream stream,
                        const char* op) {
  launch(combine_kernel, dim3(grid(p.n * p.groups, op, sizes(p))), dim3(kGroupThreads), 0, stream, op, sizes(p), parts,
         stats, programs, static_cast<int>(p.groups), static_cast<int>(p.c), static_cast<float>(p.eps));
}

void conv_group_sums(const NormSiluGradParams& q, const float* stats, float* parts, int programs, Stream stream,
                     const char* op) {
  FASTDIT_DTYPE(q.forward.dtype, sums, q, stats, parts, programs, stream, op)
}

void conv_group_moments(const NormSiluParams& p, const float* parts, float* sums, float* moments, int programs,
                        Stream stream, const char* op) {
  launch(moments_kernel, dim3(grid(p.n * p.groups, op, sizes(p))), dim3(kGroupThreads), 0, stream, op, sizes(p), p,
         parts, sums, moments, programs);
}

}  // namespace fastdit::cuda
