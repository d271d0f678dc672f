// Arithmetic of an attention tile: what a word of a packed operand is, how it is multiplied, how exp2 is taken.
#pragma once

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {

typedef int64_t vl __attribute__((vector_size(kVectorBytes)));

// Query vectors in a tile: with 8 rows, 3 x 8 accumulators, 3 operands and a broadcast fill 32 registers, 1 x 8
// fill 16.
#if defined(__AVX512F__)
constexpr int kTileVectors = 3;
#else
constexpr int kTileVectors = 1;
#endif

// The larger one; b where either is NaN. (A vector a > b ? a : b is not turned into one vmaxps.)
template <class V>
FASTDIT_INLINE V higher(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

// 2^t for t <= 0, -inf included: floor, a polynomial on the fraction, exponent add.
#if defined(__AVX512F__)
FASTDIT_INLINE vf exp2_fraction(vf t) { return (vf)_mm512_reduce_ps((__m512)t, 0x09); }
FASTDIT_INLINE vf exp2_scale(vf p, vf t) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)t); }
#else
FASTDIT_INLINE vf exp2_fraction(vf t) {  // t - floor(t); where t < -126 the result is not used
  vf nearest = (vmax(t, splat(-127.0f)) + 12582912.0f) - 12582912.0f;
  const vf f = t - nearest;
  return f < 0.0f ? f + 1.0f : f;
}
FASTDIT_INLINE vf exp2_scale(vf p, vf t) {
  const vf c = vmax(t, splat(-126.0f));
  vf nearest = (c + 12582912.0f) - 12582912.0f;
  nearest = nearest > c ? nearest - 1.0f : nearest;
  const vf y = p * (vf)((__builtin_convertvector(nearest, vi) + 127) << 23);
  return t != t ? t : (t < -126.0f ? splat(0.0f) : y);
}
#endif

struct Fp32Math {
  using S = float;
  using V = vf;
  using I = vi;
  using Index = int32_t;
  using Word = float;
  static constexpr int lanes = W;
  static constexpr int pair = 1;  // channels (QK) or keys (PV) in a word
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) { return acc + splat(a) * b; }
  static FASTDIT_INLINE V exp2(V t) {  // degree 6: 2e-9
    const vf f = exp2_fraction(t);
    vf p = splat(2.170225317e-04f);
    p = p * f + 1.243968849e-03f;
    p = p * f + 9.678840923e-03f;
    p = p * f + 5.548334202e-02f;
    p = p * f + 2.402298363e-01f;
    p = p * f + 6.931469838e-01f;
    p = p * f + 1.0f;
    return exp2_scale(p, t);
  }
  static FASTDIT_INLINE S log(S x) { return __builtin_logf(x); }
  static FASTDIT_INLINE Word negate(Word x) { return -x; }
};

struct Fp64Math {
  using S = double;
  using V = vd;
  using I = vl;
  using Index = int64_t;
  using Word = double;
  static constexpr int lanes = WD;
  static constexpr int pair = 1;
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) { return acc + splat(a) * b; }
  static FASTDIT_INLINE V exp2(V t) {
    V y = {};
    for (int i = 0; i < WD; ++i) y[i] = __builtin_exp2(t[i]);
    return y;
  }
  static FASTDIT_INLINE S log(S x) { return __builtin_log(x); }
  static FASTDIT_INLINE Word negate(Word x) { return -x; }
};

#if defined(__AVX512BF16__)
// A word is a pair of bf16: two channels of a key in QK, the same channel of two keys in PV. Sums are fp32.
struct Bf16Math {
  using S = float;
  using V = vf;
  using I = vi;
  using Index = int32_t;
  using Word = uint32_t;
  static constexpr int lanes = W;
  static constexpr int pair = 2;
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static FASTDIT_INLINE V exp2(V t) {  // degree 3: 7.5e-5, a hundredth of the rounding to bf16 that follows
    const vf f = exp2_fraction(t);
    vf p = splat(7.802449948e-02f);
    p = p * f + 2.260671884e-01f;
    p = p * f + 6.958335292e-01f;
    p = p * f + 9.999252191e-01f;
    return exp2_scale(p, t);
  }
  static FASTDIT_INLINE S log(S x) { return __builtin_logf(x); }
  static FASTDIT_INLINE Word negate(Word x) { return x ^ 0x80008000u; }
};
#endif

template <class T>
struct MathFor {
  using type = Fp32Math;
};
template <>
struct MathFor<double> {
  using type = Fp64Math;
};
#if defined(__AVX512BF16__)
template <>
struct MathFor<bf16> {
  using type = Bf16Math;
};
#endif

#if defined(__AVX512F__)
// 16 rows of 16 words -> 16 columns.
FASTDIT_INLINE void transpose16(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4i + j]: column 4c + j of rows 4i .. 4i + 3 in 128-bit part c
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 lo01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), hi01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 lo23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 hi23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(lo01, lo23, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(lo01, lo23, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(hi01, hi23, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(hi01, hi23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

}  // namespace fastdit::cpu::FASTDIT_ISA
