// What the norms of a video share: who reads which channels of which pixel, and the formulas.
#pragma once

#include "conv.cuh"

namespace fastdit::cuda {

constexpr int kNormThreads = 256;

// `count` lanes (a power of two, at most 32) take a pixel together.
struct Lanes {
  int count, x_packs, cache_packs, g_packs, y_packs, weight_packs, bias_packs;

  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) & (count - 1); }
  __device__ __forceinline__ int pixel() const {
    return static_cast<int>(blockIdx.x) * (kNormThreads / count) + static_cast<int>(threadIdx.x) / count;
  }
  __device__ __forceinline__ float sum(float v) const {
    for (int step = count / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
  }
  unsigned blocks(const NormSiluParams& p, const char* op) const;
};

struct Spot {
  int b, t, h, w;
  __device__ __forceinline__ int64_t at(const int64_t (&stride)[kAxes]) const {
    return b * stride[0] + t * stride[2] + h * stride[3] + w * stride[4];
  }
};
__device__ __forceinline__ Spot spot_of(int pixel, int frames, int height, int width) {
  Spot s;
  s.w = pixel % width, pixel /= width;
  s.h = pixel % height, pixel /= height;
  s.t = pixel % frames, s.b = pixel / frames;
  return s;
}

// ---- channels c .. c + W of a pixel; beyond C zeros, and nothing is written -------------------------------------
template <class T, int W>
__device__ __forceinline__ void read(const T* x, int64_t stride, bool packs, int c, int C, float (&v)[W]) {
  if (packs) return widen(load_again<W>(x + c), v);
#pragma unroll
  for (int k = 0; k < W; ++k) v[k] = c + k < C ? to_float(x[(c + k) * stride]) : 0;
}
template <class T, int W>
__device__ __forceinline__ void write(T* y, int64_t stride, bool packs, int c, int C, const float (&v)[W]) {
  if (packs) return store_once(y + c, narrow<T, W>(v));
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (c + k < C) y[(c + k) * stride] = from_float<T>(v[k]);
}

template <int W>
__device__ __forceinline__ void vector(const void* p, int dtype, bool packs, int c, int C, float (&v)[W]) {
  if (packs) return load_as<W>(p, dtype, c, v);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    float one[1] = {0};
    if (c + k < C) load_as<1>(p, dtype, c + k, one);
    v[k] = one[0];
  }
}

// ---- formulas -----------------------------------------------------------------------------------------------------
template <class T>
__device__ __forceinline__ float sigmoid(float z) {
  return __fdividef(1.0f, 1.0f + (std::is_same_v<T, float> ? expf(-z) : __expf(-z)));
}

// d silu(z) / dz
template <class T>
__device__ __forceinline__ float silu_slope(float z) {
  const float s = sigmoid<T>(z);
  return s * (1.0f + z * (1.0f - s));
}

__device__ __forceinline__ float inverse_of(float squares, int C, Norm norm, float eps) {
  const float channels = static_cast<float>(C);
  if (norm == Norm::channel_rms) return rsqrtf(__fdividef(squares, channels) + eps);
  return sqrtf(channels) * (squares > eps * eps ? rsqrtf(squares) : __fdividef(1.0f, eps));
}

// x * inverse, or of a group (x - mean) * rstd
template <int W>
__device__ __forceinline__ void unit(float (&v)[W], float inverse, const float* stats, Norm norm, int b, int c, int C) {
  if (norm != Norm::group) {
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] *= inverse;
    return;
  }
  const float* mean = stats + int64_t{2} * b * C + c;
#pragma unroll
  for (int k = 0; k < W; ++k)
    if (c + k < C) v[k] = (v[k] - mean[k]) * mean[C + k];
}

template <int W>
__device__ __forceinline__ void affine(const NormSiluParams& p, const Lanes& lanes, int c, float (&scale)[W],
                                       float (&shift)[W]) {
  const int C = static_cast<int>(p.c);
#pragma unroll
  for (int k = 0; k < W; ++k) scale[k] = 1, shift[k] = 0;
  if (p.weight) vector<W>(p.weight, p.weight_dtype, lanes.weight_packs, c, C, scale);
  if (p.bias) vector<W>(p.bias, p.bias_dtype, lanes.bias_packs, c, C, shift);
}

// ---- the host -----------------------------------------------------------------------------------------------------
inline std::string sizes(const NormSiluParams& p) {
  return "B=" + std::to_string(p.n) + " C=" + std::to_string(p.c) + " T=" + std::to_string(p.t) +
         " H=" + std::to_string(p.h) + " W=" + std::to_string(p.w) + " dtype=" + std::to_string(p.dtype);
}

// Lanes for x: up to four packs each, or a lane a pixel where pixels are adjacent. The caller says whether cache,
// gradient and y come in packs.
inline Lanes lanes_of(const NormSiluParams& p, int itemsize) {
  const int W = 16 / itemsize;
  const bool whole = p.c % W == 0;
  Lanes lanes{};
  lanes.x_packs = whole && packed(p.x, p.x_stride, itemsize);
  const auto fit = [&](const void* v, int dtype) {
    return whole && v && fits(v, static_cast<int>(fastdit::itemsize(static_cast<DType>(dtype))), W, {});
  };
  lanes.weight_packs = fit(p.weight, p.weight_dtype), lanes.bias_packs = fit(p.bias, p.bias_dtype);
  lanes.count = 1;
  if (p.x_stride[1] == 1)
    while (lanes.count < 32 && lanes.count * W * 4 < p.c) lanes.count *= 2;
  return lanes;
}

inline unsigned Lanes::blocks(const NormSiluParams& p, const char* op) const {
  const int64_t pixels = p.n * p.t * p.h * p.w, each = kNormThreads / count;
  grid(pixels, op, sizes(p));
  return grid((pixels + each - 1) / each, op, sizes(p));
}

}  // namespace fastdit::cuda
