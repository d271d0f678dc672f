// norm_silu: y = silu(norm(x) * weight + bias), over the channels of a pixel or over a group of channels of a sample.
#include "conv_norm.h"

namespace fastdit::cpu::FASTDIT_ISA {

template <class T>
inline void channel_norm_silu(const NormSiluParams& p) {
  using S = typename simd<T>::S;
  constexpr int L = simd<T>::width;
  Scratch<S> table(2 * (p.c + L));
  S *weight = table.get(), *bias = weight + p.c + L;
  load_channels<S>(p.weight, p.weight_dtype, p.c, S(1), weight);
  load_channels<S>(p.bias, p.bias_dtype, p.c, S(0), bias);
  const S root = p.norm == static_cast<int>(Norm::channel_l2) ? __builtin_sqrt(static_cast<S>(p.c)) : S(1);
  for (int64_t i = 0; i < p.c; ++i) weight[i] *= root;
  const Prologue<S> f{p.norm, 1, static_cast<S>(p.eps), S(1) / static_cast<S>(p.c), weight, p.bias ? bias : nullptr};
  parallel_ranges(p.n * p.t * p.h, p.threads, [&](int64_t begin, int64_t end, int) {
    Scratch<S> tmp(p.c * L);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (p.t * p.h), t = i / p.h % p.t, h = i % p.h;
      const auto row = [&](auto* base, const int64_t* s) { return base + n * s[0] + t * s[2] + h * s[3]; };
      const T* x = row(static_cast<const T*>(p.x), p.x_stride);
      T* y = row(static_cast<T*>(p.y), p.y_stride);
      if (p.x_stride[1] == 1 && p.y_stride[1] == 1) {
        for (int64_t w = 0; w < p.w; ++w)
          pixel_channels_last<T, T>(x + w * p.x_stride[4], p.c, f, y + w * p.y_stride[4]);
      } else {
        pixels_strided<T, T>(x, p.x_stride[1], p.x_stride[4], p.w, p.c, f, tmp.get(), y, p.y_stride[4], p.y_stride[1]);
      }
    }
  });
}

template <class T>
inline void group_norm_silu(const NormSiluParams& given) {
  NormSiluParams p = given;
  int64_t* strides[] = {p.x_stride, p.y_stride};
  even_rows(p, strides, 2);
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  Groups<T> groups(p);
  const auto put = [](T* dst, int64_t stride, V v, int count) {
    if (stride == 1) return count == L ? store(dst, v) : store_n(dst, v, count);
    T lane[L];
    store(lane, v);
    for (int j = 0; j < count; ++j) dst[j * stride] = lane[j];
  };
  const auto row = [&](int64_t i, int64_t g0, int64_t g1, int) {
    const int64_t n = i / groups.rows;
    const auto *mean = groups.mean(n), *scale = groups.scale(n), *bias = groups.bias(n);
    const T* x = group_row(p, static_cast<const T*>(p.x), p.x_stride, i);
    T* y = group_row(p, static_cast<T*>(p.y), p.y_stride, i);
    if (p.x_stride[1] == 1 && p.c > 1) {
      for (int64_t w = 0; w < p.w; ++w)
        for_vectors(x + w * p.x_stride[4], p.c, 1, [&](V v, int64_t c, int count) {
          v = silu<T>((v - load(mean + c)) * load(scale + c) + load(bias + c));
          put(y + w * p.y_stride[4] + c * p.y_stride[1], p.y_stride[1], v, count);
        });
    } else {
      for (int64_t c = g0 * groups.per_group; c < g1 * groups.per_group; ++c) {
        const auto centre = mean[c], factor = scale[c], shift = bias[c];
        for_vectors(x + c * p.x_stride[1], p.w, p.x_stride[4], [&](V v, int64_t w, int count) {
          v = silu<T>((v - centre) * factor + shift);
          put(y + c * p.y_stride[1] + w * p.y_stride[4], p.y_stride[4], v, count);
        });
      }
    }
  };
  groups.run(sizeof(T), GroupPass{row, [](int64_t, int64_t, int64_t) {}});
}

void norm_silu_forward(const NormSiluParams& p) {
  if (p.n * p.c * p.t * p.h * p.w == 0) return;
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
    if (p.norm == static_cast<int>(Norm::group))
      group_norm_silu<T>(p);
    else
      channel_norm_silu<T>(p);
  })
}

}  // namespace fastdit::cpu::FASTDIT_ISA
