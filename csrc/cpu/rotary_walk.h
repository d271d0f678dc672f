// The channels of one head as pairs of vectors that turn together, whatever the layout. Include only from
// csrc/cpu/rotary_backward.cpp.
#pragma once

#include "rotary_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

enum class Turn { none, some, all };  // of the lanes

template <class T, bool kInterleaved, Turn kTurn, bool kTail>
struct Site {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int width = simd<T>::width;
  int64_t a, b;  // interleaved: block of channels from a, its affine vectors at a and b. half: two vectors at a and b
  int64_t pair;  // place in the table row
  int na = 0, nb = 0;  // of a tail. interleaved: channels, pairs that turn. half: lanes of a and of b

  FASTDIT_INLINE Pair<V> get(const T* x) const {
    if constexpr (kInterleaved) {
      return kTail ? load_pairs_n(x + a, na) : load_pairs(x + a);
    } else {
      return kTail ? Pair<V>{load_n(x + a, na), load_n(x + b, nb)} : Pair<V>{load(x + a), load(x + b)};
    }
  }
  FASTDIT_INLINE void put(T* y, Pair<V> v, bool stream) const {
    if constexpr (kInterleaved) {
      kTail ? store_pairs_n(y + a, v, na) : store_pairs(y + a, v, stream);
    } else if constexpr (kTail) {
      store_n(y + a, v.a, na);
      store_n(y + b, v.b, nb);
    } else {
      FASTDIT_ISA::put(y + a, v.a, stream);
      FASTDIT_ISA::put(y + b, v.b, stream);
    }
  }
  FASTDIT_INLINE void ahead(const T* x) const {
    fetch(x + a);
    if constexpr (!kInterleaved || sizeof(T) > 2) fetch(x + b);
    if constexpr (kTail) fetch(x + b + width);
  }
  // Vectors in Affine's order, padded to whole blocks for the interleaved layout.
  FASTDIT_INLINE Pair<V> vectors(const S* w) const {
    if constexpr (kTail && !kInterleaved) return {load_n(w + a, na), load_n(w + b, nb)};
    return {load(w + a), load(w + b)};
  }
  FASTDIT_INLINE void add(S* w, Pair<V> v) const {
    if constexpr (kTail && !kInterleaved) {
      store_n(w + a, load_n(w + a, na) + v.a, na);
      store_n(w + b, load_n(w + b, nb) + v.b, nb);
    } else {
      store_raw(w + a, load_raw<V>(w + a) + v.a);
      store_raw(w + b, load_raw<V>(w + b) + v.b);
    }
  }
  FASTDIT_INLINE int turning() const { return kInterleaved ? nb : na; }
  FASTDIT_INLINE Pair<V> angle(const Rotation<S>& r) const {  // cos, sin
    if constexpr (kTurn == Turn::none) return Pair<V>{};
    if constexpr (kTail) return Pair<V>{load_n(r.c + pair, turning()), load_n(r.s + pair, turning())};
    return Pair<V>{load(r.c + pair), load(r.s + pair)};
  }
  // The gradient before the rotation from the one after it: the opposite angle.
  FASTDIT_INLINE Pair<V> turn_back(Pair<V> g, Pair<V> angle) const {
    if constexpr (kTurn == Turn::none) return g;
    const V c = angle.a, s = angle.b;
    const Pair<V> out{multiply_add(unfused(g.b * s), g.a, c), multiply_add(unfused(g.b * c), -g.a, s)};
    if constexpr (kTurn == Turn::some) return {first_lanes(turning(), out.a, g.a), first_lanes(turning(), out.b, g.b)};
    return out;
  }
  // Adds to a row of table gradients.
  FASTDIT_INLINE void keep(S* row, V v) const {
    if constexpr (kTurn == Turn::none) return;
    if (kTail) {
      store_n(row + pair, load_n(row + pair, turning()) + v, turning());
    } else {
      store_raw(row + pair, load_raw<V>(row + pair) + v);
    }
  }
};

// visit(site) for every pair of vectors of a head.
template <class T, bool kInterleaved, class F, class S = typename simd<T>::S>
FASTDIT_INLINE void walk(int64_t channels, const Rotation<S>& r, F&& visit) {
  constexpr int width = simd<T>::width, block = 2 * width;
  if constexpr (kInterleaved) {
    int64_t i = 0;
    for (; i + block <= r.rotated; i += block) visit(Site<T, true, Turn::all, false>{i, i + width, i / 2});
    if (i < r.rotated) {  // a block with a tail, or with channels that do not rotate
      const int n = static_cast<int>(channels - i < block ? channels - i : block);
      visit(Site<T, true, Turn::some, true>{i, i + width, i / 2, n, static_cast<int>(r.rotated - i) / 2});
      i += n;
    }
    for (; i + block <= channels; i += block) visit(Site<T, true, Turn::none, false>{i, i + width, 0});
    if (i < channels) visit(Site<T, true, Turn::none, true>{i, i + width, 0, static_cast<int>(channels - i), 0});
  } else {
    int64_t lo = 0, pair = 0;
    for (int section = 0; r.rotated > 0 && section < r.sections; ++section) {
      const int64_t pairs = r.pairs[section], hi = lo + pairs;
      int64_t i = 0;
      for (; i + width <= pairs; i += width) visit(Site<T, false, Turn::all, false>{lo + i, hi + i, pair + i});
      const int n = static_cast<int>(pairs - i);
      if (n > 0) visit(Site<T, false, Turn::all, true>{lo + i, hi + i, pair + i, n, n});
      pair += pairs;
      lo += 2 * pairs;
    }
    int64_t i = r.rotated;
    for (; i + block <= channels; i += block) visit(Site<T, false, Turn::none, false>{i, i + width, 0});
    const int n = static_cast<int>(channels - i), na = n < width ? n : width;
    if (n > 0) visit(Site<T, false, Turn::none, true>{i, i + na, 0, na, n - na});
  }
}

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
