// Input rows of the convolution: gathered from either layout, normalised, activated, rounded to x's dtype, and written
// channels-innermost with their side columns, so that the taps along W and the channels are one contiguous run.
#pragma once

#include "conv_tile.h"
#include "fastdit/conv.h"

namespace fastdit::cpu::FASTDIT_ISA {

// Index of the element that stands at i once [0, n) is padded; -1 where that is a zero.
FASTDIT_INLINE int64_t map_index(int64_t i, int64_t n, int pad) {
  if (i >= 0 && i < n) return i;
  switch (static_cast<Pad>(pad)) {
    case Pad::zeros:
      return -1;
    case Pad::edge:
      return i < 0 ? 0 : n - 1;
    case Pad::reflect:
      break;
  }
  return i < 0 ? -i : 2 * (n - 1) - i;
}

// 1 / (1 + exp(-v)) to 2 ulp. Without a division on AVX-512, where it would be half of what an activation costs.
FASTDIT_INLINE vf quick_sigmoid(vf v) {
#if defined(__AVX512F__)
  // v is the second operand: a NaN stays
  v = (vf)_mm512_min_ps(_mm512_set1_ps(200), _mm512_max_ps(_mm512_set1_ps(-200), (__m512)v));
  const vf n = (vf)_mm512_roundscale_ps((__m512)(v * -1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
  const vf r = (-v - n * 0.693359375f) + n * 2.12194440e-4f;  // -v - n ln2, in two pieces
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps((__m512)p, (__m512)n), _mm512_set1_ps(1));
  const __m512 finite = _mm512_min_ps(_mm512_set1_ps(3e38f), d);
  const __m512 y = _mm512_rcp14_ps(finite);
  return (vf)_mm512_fmadd_ps(y, _mm512_fnmadd_ps(finite, y, _mm512_set1_ps(1)), y);
#else
  return sigmoid(v);
#endif
}
FASTDIT_INLINE vd quick_sigmoid(vd v) { return sigmoid(v); }

// The sigmoid of a value that will be rounded to T.
template <class T, class V>
FASTDIT_INLINE V sigmoid_of(V v) {
  if constexpr (sizeof(T) == 2)
    return sigmoid_to<T>(v);
  else
    return quick_sigmoid(v);
}
template <class T, class V>
FASTDIT_INLINE V silu(V v) {
  return v * sigmoid_of<T>(v);
}

// A channel vector of any dtype as an array of S; absent (null) reads as `fill`.
template <class S>
inline void load_channels(const void* src, int dtype, int64_t n, S fill, S* dst) {
  if (!src) {
    for (int64_t i = 0; i < n; ++i) dst[i] = fill;
    return;
  }
  FASTDIT_DTYPE_SWITCH(dtype, T, {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<S>(to_scalar(static_cast<const T*>(src)[i]));
  })
}

// What is done to a pixel's channels. `weight` is padded to a whole vector and already holds every constant factor.
template <class S>
struct Prologue {
  int norm;
  int silu;
  S eps, mean_factor;  // mean_factor = 1 / C
  const S* weight;     // (C), or null when all ones
  const S* bias;       // (C), or null
};

template <class S>
FASTDIT_INLINE S inverse_norm(S sum_of_squares, const Prologue<S>& f) {
  if (f.norm == static_cast<int>(Norm::channel_l2)) {
    const S root = __builtin_sqrt(sum_of_squares);
    return S(1) / (root > f.eps || root != root ? root : f.eps);
  }
  return S(1) / __builtin_sqrt(sum_of_squares * f.mean_factor + f.eps);
}

// v -> act(v * scale * weight + bias), rounded to T unless the store to A does that
template <class T, class A, class V, class S>
FASTDIT_INLINE V apply(V v, V scale, const Prologue<S>& f, V weight, V bias) {
  if (f.norm) v = v * scale * weight + bias;
  if (f.silu) v = silu<T>(v);
  if constexpr (sizeof(A) > sizeof(T)) v = round_to<T>(v);
  return v;
}

// One pixel whose channels are contiguous.
template <class T, class A>
inline void pixel_channels_last(const T* x, int64_t c, const Prologue<typename simd<T>::S>& f, A* dst) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  V scale = splat(S(1));
  if (f.norm) {
    V squares = V{}, more = V{};
    int64_t i = 0;
    for (; i + 2 * L <= c; i += 2 * L) {
      const V a = load(x + i), b = load(x + i + L);
      squares += a * a;
      more += b * b;
    }
    for (; i < c; i += L) {
      const V a = i + L <= c ? load(x + i) : load_n(x + i, static_cast<int>(c - i));
      squares += a * a;
    }
    scale = splat(inverse_norm<S>(sum(squares + more), f));
  }
  for (int64_t i = 0; i < c; i += L) {
    const int n = static_cast<int>(c - i < L ? c - i : L);
    V v = n == L ? load(x + i) : load_n(x + i, n);
    const V w = f.weight ? load(f.weight + i) : splat(S(1));  // the tables are padded to whole vectors
    const V b = f.bias ? load(f.bias + i) : V{};
    v = apply<T, A>(v, scale, f, w, b);
    if (n == L)
      store(dst + i, v);
    else
      store_n(dst + i, v, n);
  }
}

// A run of pixels whose channels are `cs` apart: lanes are pixels. tmp: c * width values.
template <class T, class A>
inline void pixels_strided(const T* x, int64_t cs, int64_t ws, int64_t pixels, int64_t c,
                           const Prologue<typename simd<T>::S>& f, typename simd<T>::S* tmp, A* dst, int64_t dst_pixel,
                           int64_t dst_channel) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  // blocks end where cache lines do: the lines of all channels may fall into one set
  const int ahead = ws == 1 ? static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % L) : 0;
  for (int64_t p = 0, end = L - ahead; p < pixels; p = end, end += L) {
    const int n = static_cast<int>((pixels < end ? pixels : end) - p);
    V squares = V{};
    for (int64_t i = 0; i < c; ++i) {
      const T* src = x + i * cs + p * ws;
      V v;
      if (ws == 1) {
        v = n == L ? load(src) : load_n(src, n);
      } else {
        T lane[L] = {};
        for (int j = 0; j < n; ++j) lane[j] = src[j * ws];
        v = load(lane);
      }
      squares += v * v;
      store(tmp + i * L, v);
    }
    V scale = splat(S(1));
    if (f.norm)
      for (int j = 0; j < L; ++j) scale[j] = inverse_norm<S>(squares[j], f);
    for (int64_t i = 0; i < c; ++i) {
      const V w = splat(f.weight ? f.weight[i] : S(1)), b = splat(f.bias ? f.bias[i] : S(0));
      const V v = apply<T, A>(load(tmp + i * L), scale, f, w, b);
      if (dst_pixel == 1) {
        A* d = dst + i * dst_channel + p;
        if (n == L)
          store(d, v);
        else
          store_n(d, v, n);
      } else {
        store(tmp + i * L, v);
      }
    }
    if (dst_pixel == 1) continue;
    for (int j = 0; j < n; ++j) {
      A* d = dst + (p + j) * dst_pixel;
      for (int64_t i = 0; i < c; ++i) d[i * dst_channel] = from_scalar<A>(tmp[i * L + j]);
    }
  }
}

// Columns [begin, end) of an activated row: pad_w columns, x's own, and as many more as are asked for.
// tmp: cin * width values.
template <class T, class M>
inline void activate_row(const ConvParams& p, const T* x, const int64_t* stride, int64_t begin, int64_t end,
                         const Prologue<typename M::S>& f, typename M::S* tmp, typename M::A* dst) {
  using A = typename M::A;
  const int64_t cp = padded_channels<M>(p.cin);
  const auto pixels = [&](int64_t from, int64_t count, A* to) {
    if (stride[1] == 1 || p.cin == 1) {
      for (int64_t i = 0; i < count; ++i) pixel_channels_last<T, A>(x + (from + i) * stride[4], p.cin, f, to + i * cp);
    } else {
      pixels_strided<T, A>(x + from * stride[4], stride[1], stride[4], count, p.cin, f, tmp, to, cp, 1);
    }
    if (cp != p.cin)
      for (int64_t i = 0; i < count; ++i) to[i * cp + p.cin] = A{};
  };
  const int64_t near = p.pad_w < begin ? begin : p.pad_w;
  const int64_t far = p.pad_w + p.w < end ? p.pad_w + p.w : end;
  if (near < far) pixels(near - p.pad_w, far - near, dst + (near - begin) * cp);
  for (int64_t i = begin; i < end; ++i) {
    if (i == near && near < far) i = far;
    if (i == end) break;
    A* to = dst + (i - begin) * cp;
    const int64_t from = map_index(i - p.pad_w, p.w, p.space_pad), at = from + p.pad_w;
    if (from < 0)
      __builtin_memset(static_cast<void*>(to), 0, cp * sizeof(A));
    else if (at >= near && at < far)
      __builtin_memcpy(static_cast<void*>(to), dst + (at - begin) * cp, cp * sizeof(A));
    else
      pixels(from, 1, to);
  }
}

}  // namespace fastdit::cpu::FASTDIT_ISA
