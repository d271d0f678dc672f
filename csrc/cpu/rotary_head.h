// The heads of one token, forward: norm by given statistics, rotation, store. Include only from csrc/cpu/rotary.cpp.
#pragma once

#include "rotary_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// Channel vectors of one head after its norm. For the interleaved layout weight and bias are staged per block of two
// vectors: the even channels, then the odd ones.
template <class T, RotaryNorm kNorm, int kAffine, bool kNative>
struct Normed {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int width = simd<T>::width;
  const T* x;
  const S* weight;
  const S* bias;
  V mean, rstd;
  const T* next;  // the same head of the next token

  FASTDIT_INLINE V finish(V v, V w, V b) const {
    if constexpr (kNorm == RotaryNorm::none) return v;
    v = kNorm == RotaryNorm::layer ? (v - mean) * rstd : v * rstd;
    // F.layer_norm rounds once, after its affine part; RMSNorm before it and after each of its steps
    if constexpr (kNative && kNorm == RotaryNorm::rms) v = round_to<T>(v);
    if constexpr (kAffine >= 1) v = v * w;
    if constexpr (kNative && kNorm == RotaryNorm::rms && kAffine >= 1) v = round_to<T>(v);
    if constexpr (kAffine == 2) v = v + b;
    if constexpr (kNative && (kNorm == RotaryNorm::layer || kAffine == 2)) v = round_to<T>(v);
    return v;
  }
  FASTDIT_INLINE V affine(V v, int64_t i) const {
    return finish(v, kAffine >= 1 ? load(weight + i) : V{}, kAffine == 2 ? load(bias + i) : V{});
  }
  FASTDIT_INLINE V at(int64_t i) const {
    fetch(next + i);
    return affine(load(x + i), i);
  }
  FASTDIT_INLINE V at(int64_t i, int n) const {
    fetch(next + i);
    fetch(next + i + width);
    return finish(load_n(x + i, n), kAffine >= 1 ? load_n(weight + i, n) : V{},
                  kAffine == 2 ? load_n(bias + i, n) : V{});
  }
  FASTDIT_INLINE Pair<V> affine(Pair<V> v, int64_t i) const { return {affine(v.a, i), affine(v.b, i + width)}; }
  FASTDIT_INLINE Pair<V> pairs(int64_t i) const {
    ahead(i);
    return affine(load_pairs(x + i), i);
  }
  FASTDIT_INLINE Pair<V> pairs(int64_t i, int n) const {
    ahead(i);
    fetch(next + i + 2 * width);
    return affine(load_pairs_n(x + i, n), i);
  }
  FASTDIT_INLINE void ahead(int64_t i) const {
    fetch(next + i);
    if constexpr (sizeof(T) > 2) fetch(next + i + width);
  }
};

// a * c + b * s, each product rounded to T when asked for.
template <class T, bool kRound, class V>
FASTDIT_INLINE V combine(V a, V c, V b, V s) {
  if constexpr (kRound) return round_to<T>(a * c) + round_to<T>(b * s);
  return a * c + b * s;
}
template <class T, bool kRound, class V>
FASTDIT_INLINE Pair<V> rotate(Pair<V> v, V c, V s) {
  return {combine<T, kRound>(v.a, c, v.b, -s), combine<T, kRound>(v.b, c, v.a, s)};
}

template <class T, bool kRound, class Head, class S = typename simd<T>::S>
FASTDIT_INLINE void interleaved(const Head& x, T* y, int64_t channels, const Rotation<S>& r, bool stream) {
  using V = typename simd<T>::V;
  constexpr int width = simd<T>::width, block = 2 * width;
  int64_t i = 0;
  for (; i + block <= r.rotated; i += block) {
    store_pairs(y + i, rotate<T, kRound>(x.pairs(i), load(r.c + i / 2), load(r.s + i / 2)), stream);
  }
  if (i < r.rotated) {  // a block with a tail, or with channels that do not rotate
    const int n = static_cast<int>(channels - i < block ? channels - i : block);
    const int turning = static_cast<int>(r.rotated - i) / 2;
    const Pair<V> v = x.pairs(i, n);
    Pair<V> w = rotate<T, kRound>(v, load_n(r.c + i / 2, turning), load_n(r.s + i / 2, turning));
    w = {first_lanes(turning, w.a, v.a), first_lanes(turning, w.b, v.b)};
    store_pairs_n(y + i, w, n);
    i += n;
  }
  for (; i + block <= channels; i += block) store_pairs(y + i, x.pairs(i), stream);
  if (i < channels) store_pairs_n(y + i, x.pairs(i, static_cast<int>(channels - i)), static_cast<int>(channels - i));
}

template <class T, bool kRound, class Head, class S = typename simd<T>::S>
FASTDIT_INLINE void half(const Head& x, T* y, int64_t channels, const Rotation<S>& r, bool stream) {
  using V = typename simd<T>::V;
  constexpr int width = simd<T>::width;
  const S* c = r.c;
  const S* s = r.s;
  int64_t lo = 0;
  for (int section = 0; r.rotated > 0 && section < r.sections; ++section) {
    const int64_t pairs = r.pairs[section], hi = lo + pairs;
    int64_t i = 0;
    for (; i + width <= pairs; i += width) {
      const Pair<V> v = rotate<T, kRound>(Pair<V>{x.at(lo + i), x.at(hi + i)}, load(c + i), load(s + i));
      put(y + lo + i, v.a, stream);
      put(y + hi + i, v.b, stream);
    }
    if (i < pairs) {
      const int n = static_cast<int>(pairs - i);
      const Pair<V> in{x.at(lo + i, n), x.at(hi + i, n)};
      const Pair<V> v = rotate<T, kRound>(in, load_n(c + i, n), load_n(s + i, n));
      store_n(y + lo + i, v.a, n);
      store_n(y + hi + i, v.b, n);
    }
    c += pairs;
    s += pairs;
    lo += 2 * pairs;
  }
  int64_t i = r.rotated;
  for (; i + width <= channels; i += width) put(y + i, x.at(i), stream);
  if (i < channels) {
    const int n = static_cast<int>(channels - i);
    store_n(y + i, x.at(i, n), n);
  }
}

// All heads of a token; mean and rstd of each.
template <class T>
struct Heads {
  using S = typename simd<T>::S;
  const T* x;
  T* y;
  int64_t count, x_stride, y_stride, channels;
  const S* weight;
  const S* bias;
  int64_t affine_stride;  // of weight and bias from head to head
  const S* mean;
  const S* rstd;
  int64_t stat_stride;  // 0: one for all heads
  bool stream;          // store past the caches
  int64_t next;         // how far x of the next token is; 0: there is none
};
template <class T>
using HeadsFn = void (*)(const Heads<T>& heads, const Rotation<typename simd<T>::S>& r);

template <class T, RotaryNorm kNorm, int kAffine, bool kNative, bool kInterleaved>
void process(const Heads<T>& o, const Rotation<typename simd<T>::S>& r) {
  for (int64_t h = 0; h < o.count; ++h) {
    const Normed<T, kNorm, kAffine, kNative> x{o.x + h * o.x_stride,
                                               o.weight + h * o.affine_stride,
                                               o.bias + h * o.affine_stride,
                                               splat(o.mean[h * o.stat_stride]),
                                               splat(o.rstd[h * o.stat_stride]),
                                               o.x + h * o.x_stride + o.next};
    T* y = o.y + h * o.y_stride;
    if constexpr (kInterleaved) {
      kNative&& r.round_products ? interleaved<T, kNative>(x, y, o.channels, r, o.stream)
                                 : interleaved<T, false>(x, y, o.channels, r, o.stream);
    } else {
      kNative&& r.round_products ? half<T, kNative>(x, y, o.channels, r, o.stream)
                                 : half<T, false>(x, y, o.channels, r, o.stream);
    }
  }
}

template <class T, bool kNative, bool kInterleaved>
HeadsFn<T> pick(RotaryNorm norm, int affine) {
  constexpr RotaryNorm rms = RotaryNorm::rms, layer = RotaryNorm::layer;
  static constexpr HeadsFn<T> table[2][3] = {
      {&process<T, rms, 0, kNative, kInterleaved>, &process<T, rms, 1, kNative, kInterleaved>,
       &process<T, rms, 2, kNative, kInterleaved>},
      {&process<T, layer, 0, kNative, kInterleaved>, &process<T, layer, 1, kNative, kInterleaved>,
       &process<T, layer, 2, kNative, kInterleaved>}};
  if (norm == RotaryNorm::none) return &process<T, RotaryNorm::none, 0, kNative, kInterleaved>;
  return table[norm == layer][affine];
}
template <class T>
HeadsFn<T> pick(const QkNormRopeParams& p, int affine) {
  constexpr bool rounds = sizeof(T) == 2;  // in fp32 and fp64 the two laws are one
  const bool interleaved = p.layout == RotaryLayout::interleaved;
  if (p.native && rounds) {
    return interleaved ? pick<T, rounds, true>(p.norm, affine) : pick<T, rounds, false>(p.norm, affine);
  }
  return interleaved ? pick<T, false, true>(p.norm, affine) : pick<T, false, false>(p.norm, affine);
}

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
