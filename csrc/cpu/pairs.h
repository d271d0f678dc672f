// Neighbouring channels taken apart on load and put together again on store, for kernels whose lanes may come in any
// order, or that work on pairs. For bf16 this is cheaper than the natural order: a shift and a mask each way.
#pragma once

#include <utility>

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class V>
struct Pair {
  V a, b;  // channels 2i and 2i + 1
};

template <int... I, class V>
FASTDIT_INLINE V shuffle(V x, V y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, I...);
}
template <class V, int... I>
FASTDIT_INLINE Pair<V> deinterleave(V x, V y, std::integer_sequence<int, I...>) {
  return {shuffle(x, y, std::integer_sequence<int, 2 * I...>{}),
          shuffle(x, y, std::integer_sequence<int, 2 * I + 1 ...>{})};
}
template <class V, int... I>
FASTDIT_INLINE Pair<V> interleave(V x, V y, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return {shuffle(x, y, std::integer_sequence<int, I / 2 + I % 2 * n...>{}),
          shuffle(x, y, std::integer_sequence<int, n / 2 + I / 2 + I % 2 * n...>{})};
}

// 2 * width channels from p. bf16 pairs are 32-bit words: a shift and a mask take them apart.
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE Pair<V> load_pairs(const T* p) {
  constexpr int width = simd<T>::width;
  return deinterleave(load(p), load(p + width), std::make_integer_sequence<int, width>{});
}
template <>
FASTDIT_INLINE Pair<vf> load_pairs<bf16, vf>(const bf16* p) {
  const vu words = load_raw<vu>(p);
  return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE void store_pairs(T* p, Pair<V> v, bool stream = false) {
  constexpr int width = simd<T>::width;
  const Pair<V> rows = interleave(v.a, v.b, std::make_integer_sequence<int, width>{});
  put(p, rows.a, stream);
  put(p + width, rows.b, stream);
}
FASTDIT_INLINE vu bf16_bits(vf v) {  // in the upper halves, rounded to nearest even; the lower halves are rubbish
  const vu u = (vu)v;
  const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return (nan & (u | 0x400000u)) | (~nan & (u + 0x7fffu + ((u >> 16) & 1u)));
}
template <>
FASTDIT_INLINE void store_pairs<bf16, vf>(bf16* p, Pair<vf> v, bool stream) {
#if defined(__AVX512BF16__)
  put_raw(p, zip_bf16(v.a, v.b), stream);
#else
  put_raw(p, (bf16_bits(v.a) >> 16) | (bf16_bits(v.b) & 0xffff0000u), stream);
#endif
}
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE Pair<V> load_pairs_n(const T* p, int64_t n) {
  T padded[2 * simd<T>::width] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load_pairs(padded);
}
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE void store_pairs_n(T* p, Pair<V> v, int64_t n) {
  T padded[2 * simd<T>::width];
  store_pairs(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
