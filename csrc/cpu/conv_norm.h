// GroupNorm's statistics: two readings of a row while it is in cache (mean, then squared deviations), the rows merged
// in double, in order: no cancellation, and the same bits for any number of threads.
#pragma once

#include "conv_rows.h"

namespace fastdit::cpu::FASTDIT_ISA {

// fn(vector, offset, count) over n elements `stride` apart, the last vector zero-filled.
template <class T, class F>
FASTDIT_INLINE void for_vectors(const T* x, int64_t n, int64_t stride, F&& fn) {
  constexpr int L = simd<T>::width;
  for (int64_t i = 0; i < n; i += L) {
    const int count = static_cast<int>(n - i < L ? n - i : L);
    if (stride == 1) {
      fn(count == L ? load(x + i) : load_n(x + i, count), i, count);
    } else {
      T lane[L] = {};
      for (int j = 0; j < count; ++j) lane[j] = x[(i + j) * stride];
      fn(load(lane), i, count);
    }
  }
}

struct Moments {
  double count, mean, squares;  // squares: sum of squared deviations from the mean
  void merge(const Moments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * count * o.count / total;
    mean += delta * o.count / total;
    count = total;
  }
};

// Moments of every group over one (t, h) row. Lanes: channels when they are contiguous, pixels otherwise.
template <class T>
inline void row_moments(const NormSiluParams& p, const T* x, typename simd<T>::S* tmp, Moments* out) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  const int64_t per_group = p.c / p.groups, padded = (p.c + L - 1) / L * L;
  S *total = tmp, *mean = tmp + padded;
  const auto reduce = [&](bool centred) {
    for (int64_t i = 0; i < padded; ++i) total[i] = S(0);
    if (p.x_stride[1] == 1) {
      for (int64_t w = 0; w < p.w; ++w)
        for_vectors(x + w * p.x_stride[4], p.c, 1, [&](V v, int64_t i, int) {
          const V d = centred ? v - load(mean + i) : v;  // past c the table holds zeros, as does v
          store(total + i, load(total + i) + (centred ? d * d : d));
        });
    } else {
      for (int64_t c = 0; c < p.c; ++c) {
        const T* from = x + c * p.x_stride[1];
        const S shift = centred ? mean[c] : S(0);
        const auto add = [&](V& acc, V v) {
          v = v - shift;
          acc += centred ? v * v : v;
        };
        V acc[4] = {};
        int64_t w = 0;
        if (p.x_stride[4] == 1) {
          for (; w + 4 * L <= p.w; w += 4 * L)
            for (int k = 0; k < 4; ++k) add(acc[k], load(from + w + k * L));
        }
        S rest = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
        for (; w < p.w; ++w) {
          const S v = static_cast<S>(to_scalar(from[w * p.x_stride[4]])) - shift;
          rest += centred ? v * v : v;
        }
        total[c] = rest;
      }
    }
  };
  const double count = static_cast<double>(per_group * p.w);
  for (int64_t i = 0; i < padded; ++i) mean[i] = S(0);
  reduce(false);
  for (int64_t g = 0; g < p.groups; ++g) {
    double s = 0;
    for (int64_t i = 0; i < per_group; ++i) s += total[g * per_group + i];
    const S m = static_cast<S>(s / count);  // rounded, so that the deviations are from the mean that is stored
    for (int64_t i = 0; i < per_group; ++i) mean[g * per_group + i] = m;
    out[g].count = count;
    out[g].mean = static_cast<double>(m);
  }
  reduce(true);
  for (int64_t g = 0; g < p.groups; ++g) {
    out[g].squares = 0;
    for (int64_t i = 0; i < per_group; ++i) out[g].squares += total[g * per_group + i];
  }
}

// Cuts the pixels of a sample anew, into rows of up to kRowPixels, where T, H and W lie one behind another in all
// tensors: short rows of many channels far apart are what a memory likes least.
inline void even_rows(NormSiluParams& p, int64_t* const* strides, int count) {
  constexpr int64_t kRowPixels = 2048;
  const int64_t all = p.t * p.h * p.w;
  int64_t step[3];
  for (int i = 0; i < count; ++i) {
    const int64_t* s = strides[i];
    step[i] = p.w > 1 ? s[4] : p.h > 1 ? s[3] : s[2];
    if ((p.h > 1 && s[3] != p.w * step[i]) || (p.t > 1 && s[2] != p.h * p.w * step[i])) return;
  }
  int64_t width = kRowPixels < all ? kRowPixels : all;
  while (all % width) --width;
  if (width <= p.w) return;
  p.t = 1, p.h = all / width, p.w = width;
  for (int i = 0; i < count; ++i) strides[i][2] = 0, strides[i][3] = width * step[i], strides[i][4] = step[i];
}

// Row i of all (n, t, h) rows.
template <class P>
FASTDIT_INLINE P group_row(const NormSiluParams& p, P base, const int64_t* s, int64_t i) {
  const int64_t rows = p.t * p.h;
  return base + i / rows * s[0] + i % rows / p.h * s[2] + i % p.h * s[3];
}

// table: per sample mean, weight / deviation and bias of every channel, each padded to whole vectors. inverse: per
// sample and group 1 / deviation, or null.
template <class T>
inline void group_tables(const NormSiluParams& p, typename simd<T>::S* table, typename simd<T>::S* inverses = nullptr) {
  using S = typename simd<T>::S;
  constexpr int L = simd<T>::width;
  const int64_t rows = p.t * p.h, per_group = p.c / p.groups, padded = (p.c + L - 1) / L * L;
  Scratch<Moments> moments(p.n * rows * p.groups);
  parallel_ranges(p.n * rows, p.threads, [&](int64_t begin, int64_t end, int) {
    Scratch<S> tmp(2 * padded);
    for (int64_t i = begin; i < end; ++i)
      row_moments<T>(p, group_row(p, static_cast<const T*>(p.x), p.x_stride, i), tmp.get(),
                     moments.get() + i * p.groups);
  });
  for (int64_t n = 0; n < p.n; ++n) {
    S *mean = table + 3 * n * padded, *scale = mean + padded, *bias = scale + padded;
    load_channels<S>(p.weight, p.weight_dtype, p.c, S(1), scale);
    load_channels<S>(p.bias, p.bias_dtype, p.c, S(0), bias);
    for (int64_t g = 0; g < p.groups; ++g) {
      Moments m{0, 0, 0};
      for (int64_t r = 0; r < rows; ++r) m.merge(moments.get()[(n * rows + r) * p.groups + g]);
      const S inverse = static_cast<S>(1 / __builtin_sqrt(m.squares / m.count + p.eps));
      if (inverses) inverses[n * p.groups + g] = inverse;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        mean[c] = static_cast<S>(m.mean);
        scale[c] *= inverse;
      }
    }
  }
}

}  // namespace fastdit::cpu::FASTDIT_ISA
