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
// The first n (<= 2 * width) channels; the rest read as zero / stay untouched.
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE Pair<V> load_pairs_n(const T* p, int n) {
  constexpr int width = simd<T>::width;
  const int head = n < width ? n : width;
  return deinterleave(load_n(p, head), load_n(p + head, n - head), std::make_integer_sequence<int, width>{});
}
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE void store_pairs_n(T* p, Pair<V> v, int n) {
  constexpr int width = simd<T>::width;
  const int head = n < width ? n : width;
  const Pair<V> rows = interleave(v.a, v.b, std::make_integer_sequence<int, width>{});
  store_n(p, rows.a, head);
  store_n(p + head, rows.b, n - head);
}
#if defined(__AVX512F__)
template <>
FASTDIT_INLINE Pair<vf> load_pairs_n<bf16, vf>(const bf16* p, int n) {
  const vu words = (vu)_mm512_maskz_loadu_epi16(below(n), p);
  return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}
template <>
FASTDIT_INLINE void store_pairs_n<bf16, vf>(bf16* p, Pair<vf> v, int n) {
  bf16 whole[2 * W];
  store_pairs(whole, v);
  _mm512_mask_storeu_epi16(p, below(n), load_raw<__m512i>(whole));
}
#endif

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
