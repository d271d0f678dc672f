// norm_silu: y = silu(norm(x) * weight + bias), over the channels of a pixel or over a group of channels of a sample.
//
// GroupNorm statistics take two readings of a row while it is in cache (mean, then squared deviations), and merge the
// rows in double, in order: no cancellation, and the same bits for any number of threads.
#include "conv_rows.h"

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
        V acc = V{};
        for_vectors(x + c * p.x_stride[1], p.w, p.x_stride[4], [&](V v, int64_t, int count) {
          V d = v;
          if (centred) {
            d = v - mean[c];
            for (int j = count; j < L; ++j) d[j] = S(0);
            d = d * d;
          }
          acc += d;
        });
        total[c] = sum(acc);
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

template <class T>
inline void group_norm_silu(const NormSiluParams& p) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  const int64_t rows = p.t * p.h, per_group = p.c / p.groups, padded = (p.c + L - 1) / L * L;
  Scratch<Moments> moments(p.n * rows * p.groups);
  const auto locate = [&](auto* base, const int64_t* s, int64_t i) {
    return base + i / rows * s[0] + i % rows / p.h * s[2] + i % p.h * s[3];
  };
  parallel_ranges(p.n * rows, p.threads, [&](int64_t begin, int64_t end, int) {
    Scratch<S> tmp(2 * padded);
    for (int64_t i = begin; i < end; ++i)
      row_moments<T>(p, locate(static_cast<const T*>(p.x), p.x_stride, i), tmp.get(), moments.get() + i * p.groups);
  });
  Scratch<S> table(3 * p.n * padded);  // per sample: mean, scale, bias
  for (int64_t n = 0; n < p.n; ++n) {
    S *mean = table.get() + 3 * n * padded, *scale = mean + padded, *bias = scale + padded;
    load_channels<S>(p.weight, p.weight_dtype, p.c, S(1), scale);
    load_channels<S>(p.bias, p.bias_dtype, p.c, S(0), bias);
    for (int64_t g = 0; g < p.groups; ++g) {
      Moments m{0, 0, 0};
      for (int64_t r = 0; r < rows; ++r) m.merge(moments.get()[(n * rows + r) * p.groups + g]);
      const S inverse = static_cast<S>(1 / __builtin_sqrt(m.squares / m.count + p.eps));
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        mean[c] = static_cast<S>(m.mean);
        scale[c] *= inverse;
      }
    }
  }
  parallel_ranges(p.n * rows, p.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const S *mean = table.get() + 3 * (i / rows) * padded, *scale = mean + padded, *bias = scale + padded;
      const T* x = locate(static_cast<const T*>(p.x), p.x_stride, i);
      T* y = locate(static_cast<T*>(p.y), p.y_stride, i);
      const auto put = [](T* dst, int64_t stride, V v, int count) {
        if (stride == 1) return count == L ? store(dst, v) : store_n(dst, v, count);
        T lane[L];
        store(lane, v);
        for (int j = 0; j < count; ++j) dst[j * stride] = lane[j];
      };
      if (p.x_stride[1] == 1 && p.c > 1) {
        for (int64_t w = 0; w < p.w; ++w)
          for_vectors(x + w * p.x_stride[4], p.c, 1, [&](V v, int64_t c, int count) {
            v = silu((v - load(mean + c)) * load(scale + c) + load(bias + c));
            put(y + w * p.y_stride[4] + c * p.y_stride[1], p.y_stride[1], v, count);
          });
      } else {
        for (int64_t c = 0; c < p.c; ++c)
          for_vectors(x + c * p.x_stride[1], p.w, p.x_stride[4], [&](V v, int64_t w, int count) {
            v = silu((v - mean[c]) * scale[c] + bias[c]);
            put(y + c * p.y_stride[1] + w * p.y_stride[4], p.y_stride[4], v, count);
          });
      }
    }
  });
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
