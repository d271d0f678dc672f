// Arithmetic of an attention tile: what a word of a packed operand is, how it is multiplied, how a weight is taken.
#pragma once

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {

typedef int64_t vl __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vul __attribute__((vector_size(kVectorBytes)));

// Query vectors in a tile: with 8 rows, 3 x 8 accumulators, 3 operands and a broadcast fill 32 registers, 1 x 8
// fill 16.
#if defined(__AVX512F__)
constexpr int kTileVectors = 3;
#else
constexpr int kTileVectors = 1;
#endif
// Times 8 rows that a kernel of NV vectors takes at once: 24 accumulators hide the latency of a product, 8 don't.
template <int NV>
constexpr int kRowGroups = NV == 1 && kTileVectors == 3 ? 3 : 1;

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

// Whether any lane of a is above b's.
template <class V>
FASTDIT_INLINE bool any_above(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm256_movemask_ps((__m256)(a > b)) != 0;
  else
    return _mm256_movemask_pd((__m256d)(a > b)) != 0;
#else
  const auto above = a > b;
  bool any = false;
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) any |= above[i] != 0;
  return any;
#endif
}

// log(x) of a sum of weights, 0 or normal: exponent, and Cephes' polynomial on [sqrt(1/2), sqrt(2)). 1 ulp; log(0) =
// -inf.
FASTDIT_INLINE vf natural_log(vf x) {
  const vi e = ((vi)x - 0x3f3504f3) >> 23;
  const vf f = (vf)((vi)x - (e << 23)) - 1.0f, n = __builtin_convertvector(e, vf), z = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf y = p * f * z - n * 2.12194440e-4f - z * 0.5f + f + n * 0.693359375f;
  const vf finite = x == 0.0f ? splat(-__builtin_inff()) : y;
  return x != x ? x : finite;
}

struct Fp32Math {
  using S = float;
  using V = vf;
  using I = vi;
  using U = vu;
  using Index = int32_t;
  using Word = float;
  static constexpr int lanes = W;
  static constexpr int pair = 1;  // channels (QK) or keys (PV) in a word
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) { return FASTDIT_ISA::multiply_add(acc, splat(a), b); }
  // A weight is exp(s * c - shift) with c = scale * unit: base e keeps s - max exact where it is small.
  static constexpr double unit = 1.0;
  static FASTDIT_INLINE V power(V t) { return exp(t); }
  static FASTDIT_INLINE V log(V x) { return natural_log(x); }
  static FASTDIT_INLINE Word negate(Word x) { return -x; }
};

struct Fp64Math {
  using S = double;
  using V = vd;
  using I = vl;
  using U = vul;
  using Index = int64_t;
  using Word = double;
  static constexpr int lanes = WD;
  static constexpr int pair = 1;
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) { return acc + splat(a) * b; }
  static constexpr double unit = 1.0;
  static FASTDIT_INLINE V power(V t) { return exp(t); }
  static FASTDIT_INLINE V log(V x) {
    for (int i = 0; i < WD; ++i) x[i] = __builtin_log(x[i]);
    return x;
  }
  static FASTDIT_INLINE Word negate(Word x) { return -x; }
};

#if defined(__AVX512BF16__)
// A word is a pair of bf16: two channels of a key in QK, the same channel of two keys in PV. Sums are fp32.
struct Bf16Math {
  using S = float;
  using V = vf;
  using I = vi;
  using U = vu;
  using Index = int32_t;
  using Word = uint32_t;
  static constexpr int lanes = W;
  static constexpr int pair = 2;
  static constexpr Word one = 0x3f803f80u;  // twice
  static FASTDIT_INLINE V multiply_add(V acc, Word a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  // A weight is 2^(s * c - shift): floor, a polynomial on the fraction, exponent add. Degree 5: 7.5e-8. Degree 3 would
  // do for weights that are rounded to bf16, but their sum also gives lse, in fp32.
  static constexpr double unit = 1.44269504088896340736;
  static FASTDIT_INLINE V power(V t) {
    const vf f = (vf)_mm512_reduce_ps((__m512)t, 0x09);
    vf p = splat(1.877576410e-3f);
    p = p * f + 8.989340732e-3f;
    p = p * f + 5.582631751e-2f;
    p = p * f + 2.401536172e-1f;
    p = p * f + 6.931530732e-1f;
    p = p * f + 9.999999251e-1f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);
  }
  // Shifts are whole numbers, so that one brings along what another weighed without rounding it again.
  static FASTDIT_INLINE V whole(V t) { return (vf)_mm512_roundscale_ps((__m512)t, 0x0A); }
  static FASTDIT_INLINE void scale(Word* w, V factor) {
    const vu pair = load_raw<vu>(w);
    store_raw(w, zip_bf16((vf)(pair << 16) * factor, (vf)(pair & 0xffff0000u) * factor));
  }
  static FASTDIT_INLINE V log(V x) { return natural_log(x); }
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
