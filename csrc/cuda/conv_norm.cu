// Norm over the channels of a pixel, SiLU, and the moves of a video between layouts.
//
//   y = act(n(x) * weight + bias)    n: x * sqrt(C) / max(||x||, eps) | x * rsqrt(mean(x^2) + eps) | (x - mean) * rstd
//
// A group of lanes takes a pixel of cat(cache, x), each lane packs of 16 bytes of its channels; the second reading of a
// pixel comes from L1. Where pixels, not channels, are adjacent, a lane has a pixel to itself and neighbours read
// neighbouring pixels. Without norm and act it is the layout pass of causal_conv3d and next_cache, bit for bit.
//
// It runs once before a convolution, not in it: inside, every value would pass SiLU once per patch and tile of Cout,
// two special-function operations each, of which a multiprocessor does 16 a clock; here it hides behind the memory.
#include "conv_norm.cuh"

namespace fastdit::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kNormThreads, 4)
    normalize_kernel(const NormSiluParams p, const Cache cache, int silu, const float* stats, const Lanes lanes) {
  constexpr int W = 16 / sizeof(T);
  const int C = static_cast<int>(p.c), pixel = lanes.pixel(), count = static_cast<int>(p.n * p.t * p.h * p.w);
  const Spot s = spot_of(min(pixel, count - 1), static_cast<int>(p.t), static_cast<int>(p.h), static_cast<int>(p.w));
  const int cached = static_cast<int>(cache.frames);
  const bool old = s.t < cached;
  const auto stride = [&](int axis) { return old ? cache.stride[axis] : p.x_stride[axis]; };
  const T* x = static_cast<const T*>(old ? cache.data : p.x) + s.b * stride(0) +
               (old ? s.t : s.t - cached) * stride(2) + s.h * stride(3) + s.w * stride(4);
  T* y = static_cast<T*>(p.y) + s.at(p.y_stride);
  const bool x_packs = old ? lanes.cache_packs : lanes.x_packs;
  const auto norm = static_cast<Norm>(p.norm);

  float inverse = 1;
  if (norm == Norm::channel_l2 || norm == Norm::channel_rms) {
    float squares = 0;
    for (int c = lanes.lane() * W; c < C; c += lanes.count * W) {
      float v[W];
      read<T, W>(x, stride(1), x_packs, c, C, v);
#pragma unroll
      for (int k = 0; k < W; ++k) squares += v[k] * v[k];
    }
    inverse = inverse_of(lanes.sum(squares), C, norm, static_cast<float>(p.eps));
  }
  if (pixel >= count) return;
  for (int c = lanes.lane() * W; c < C; c += lanes.count * W) {
    float v[W];
    read<T, W>(x, stride(1), x_packs, c, C, v);
    if (norm != Norm::none || silu) {
      float scale[W], shift[W];
      unit<W>(v, inverse, stats, norm, s.b, c, C);
      affine<W>(p, lanes, c, scale, shift);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        v[k] = v[k] * scale[k] + shift[k];
        if (silu) v[k] *= sigmoid<T>(v[k]);
      }
    }
    write<T, W>(y, p.y_stride[1], lanes.y_packs, c, C, v);
  }
}

template <class T>
void normalize(const NormSiluParams& p, const Cache& cache, int silu, const float* stats, Stream stream,
               const char* op) {
  constexpr int size = sizeof(T);
  Lanes lanes = lanes_of(p, size);
  lanes.cache_packs = cache.frames == 0 || (packed(cache.data, cache.stride, size) && p.c % (16 / size) == 0);
  lanes.y_packs = packed(p.y, p.y_stride, size) && p.c % (16 / size) == 0;
  const std::string of = sizes(p);
  launch(normalize_kernel<T>, dim3(lanes.blocks(p, op)), dim3(kNormThreads), 0, stream, op, of, p, cache, silu, stats,
         lanes);
}

}  // namespace

void conv_normalize(const NormSiluParams& p, const Cache& cache, int silu, const float* stats, Stream stream,
                    const char* op) {
  FASTDIT_DTYPE(p.dtype, normalize, p, cache, silu, stats, stream, op)
}

}  // namespace fastdit::cuda
