// Mean and mean square of rows, several rows at once: their chains of additions overlap, and their lanes are added up
// together. A row's bits are the same in every group.
#pragma once

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int kRows = 4;  // of a group

// to[k] = sum(from[k]), in sum's order.
template <int count, class V, class S>
FASTDIT_INLINE void sum_each(const V* from, S* to) {
#if defined(__AVX512F__)
  if constexpr (count == 4 && sizeof(S) == 4) {
    __m128 q[4];
    for (int k = 0; k < 4; ++k) {
      const __m512 v = (__m512)from[k];
      const __m256 half = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
      q[k] = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    }
    const __m128 ab = _mm_unpacklo_ps(q[0], q[1]) + _mm_unpackhi_ps(q[0], q[1]);  // a b a b
    const __m128 cd = _mm_unpacklo_ps(q[2], q[3]) + _mm_unpackhi_ps(q[2], q[3]);
    _mm_storeu_ps(to, _mm_movelh_ps(ab, cd) + _mm_movehl_ps(cd, ab));
    return;
  }
#endif
  for (int k = 0; k < count; ++k) to[k] = sum(from[k]);
}

template <class S>
FASTDIT_INLINE S inverse_root(S x) {
  return S(1) / (sizeof(S) == 8 ? static_cast<S>(__builtin_sqrt(x)) : static_cast<S>(__builtin_sqrtf(x)));
}

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Of rows that will be written after the moments: their lines are on the way to the caches while sums run, which wait
// for nothing else.
template <class H>
struct Claim {
  H* const* rows;
  FASTDIT_INLINE void operator()(int k, int64_t c, int n) const {
    constexpr int line = 64 / sizeof(H);
    for (int i = 0; i < n; i += line) __builtin_prefetch(rows[k] + c + i, 0, 2);
  }
};
struct NoClaim {
  FASTDIT_INLINE void operator()(int, int64_t, int) const {}
};

// Sums of x - pivot and of its square over a row, for rows of any type.
template <int count, class P, class S, class Claims = NoClaim>
FASTDIT_INLINE void sums_about(const P* const* rows, const S* pivot, int64_t C, S* total, S* square,
                               Claims claim = {}) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width, chains = 4;  // of every count: a row's bits do not depend on its group
  V t[count * chains] = {}, q[count * chains] = {}, about[count];
  const P* from[count];
  for (int k = 0; k < count; ++k) about[k] = splat(pivot[k]), from[k] = rows[k];
  int64_t c = 0;
  for (; c + chains * w <= C; c += chains * w) {
    for (int k = 0; k < count; ++k) claim(k, c, chains * w);
    for (int j = 0; j < chains; ++j)
      for (int k = 0; k < count; ++k) {
        const V u = load(from[k] + c + j * w) - about[k];
        t[j * count + k] += u;
        q[j * count + k] += u * u;
      }
  }
  for (int k = 0; k < count; ++k) {
    for (int64_t i = c; i + w <= C; i += w) {
      const V u = load(from[k] + i) - about[k];
      t[k] += u;
      q[k] += u * u;
    }
    t[k] = (t[k] + t[count + k]) + (t[2 * count + k] + t[3 * count + k]);
    q[k] = (q[k] + q[count + k]) + (q[2 * count + k] + q[3 * count + k]);
  }
  sum_each<count>(t, total);
  sum_each<count>(q, square);
  if (C % w == 0) return;
  for (int k = 0; k < count; ++k) {
    S rest = 0, rest_square = 0;
    for (int64_t i = C / w * w; i < C; ++i) {
      const S u = to_scalar(from[k][i]) - pivot[k];
      rest += u;
      rest_square += u * u;
    }
    total[k] += rest;
    square[k] += rest_square;
  }
}

#if defined(__AVX512BF16__)
// The same about 0: exact products, summed in fp32.
template <int count, class Claims>
FASTDIT_INLINE void sums_of_bf16(const bf16* const* rows, int64_t C, float* total, float* square, Claims claim) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 t[count] = {}, q[count] = {};
  const auto take = [&](int k, __m512bh u) {
    t[k] = _mm512_dpbf16_ps(t[k], u, ones);
    q[k] = _mm512_dpbf16_ps(q[k], u, u);
  };
  const bf16* from[count];
  for (int k = 0; k < count; ++k) from[k] = rows[k];
  int64_t c = 0;
  for (; c + 32 <= C; c += 32)
    for (int k = 0; k < count; ++k) claim(k, c, 32), take(k, load_raw<__m512bh>(from[k] + c));
  if (c < C) {
    const __mmask32 some = below(static_cast<int>(C - c));
    for (int k = 0; k < count; ++k) take(k, (__m512bh)_mm512_maskz_loadu_epi16(some, from[k] + c));
  }
  sum_each<count>(reinterpret_cast<const vf*>(t), total);
  sum_each<count>(reinterpret_cast<const vf*>(q), square);
}
#endif

// The mean of a row, of a long one a value near it: of 4 of its vectors.
template <class P, class S = typename simd<P>::S>
FASTDIT_INLINE S near_mean(const P* row, int64_t C) {
  constexpr int w = simd<S>::width;
  if (C >= 16 * w) {
    const int64_t apart = C / 4;
    return sum((load(row) + load(row + apart)) + (load(row + 2 * apart) + load(row + 3 * apart))) / S(4 * w);
  }
  typename simd<S>::V total[4] = {};
  int64_t c = 0;
  for (; c + 4 * w <= C; c += 4 * w)
    for (int j = 0; j < 4; ++j) total[j] += load(row + c + j * w);
  for (; c + w <= C; c += w) total[0] += load(row + c);
  S rest = 0;
  for (; c < C; ++c) rest += to_scalar(row[c]);
  return (sum((total[0] + total[1]) + (total[2] + total[3])) + rest) * (S(1) / static_cast<S>(C));
}

// Mean (0 unless centred) and mean square about it, of `count` rows. One reading takes both about a value near the
// mean; what cancels in their difference is bounded, and a row where it is more is read again.
template <int count, class P, class S = typename simd<P>::S, class Claims = NoClaim>
FASTDIT_INLINE void moments(const P* const* rows, int64_t C, bool centred, S* mean, S* square, Claims claim = {}) {
  const S scale = S(1) / static_cast<S>(C);
  S pivot[count] = {}, total[count];
  S most = 4;  // (mean - pivot)^2 / variance: two bits of fp32 and of fp64
#if defined(__AVX512BF16__)
  if constexpr (same<P, bf16>) {
    most = 64;  // six bits, far below what bf16 rounds away
    sums_of_bf16<count>(rows, C, total, square, claim);
  } else
#endif
  {
    if (centred)
      for (int k = 0; k < count; ++k) pivot[k] = unfused(near_mean(rows[k], C));
    sums_about<count>(rows, pivot, C, total, square, claim);
  }
  // sums about pivot -> moments; how far the mean is from it
  const auto settle = [&](auto about, auto sum, auto& middle, auto& spread) {
    if (!centred) sum = decltype(sum){};
    const auto away = unfused(sum * scale);
    middle = about + away;
    spread = unfused((spread - away * sum) * scale);  // one product to fuse: of two, now one, now the other
    return away;
  };
  bool settled[count];
  if constexpr (count * sizeof(S) == 16) {
    typedef S row __attribute__((vector_size(16)));
    row middle, spread = load_raw<row>(square);
    const row away = settle(load_raw<row>(pivot), load_raw<row>(total), middle, spread);
    store_raw(mean, middle);
    store_raw(square, spread);
    const auto fine = spread * most > away * away;
    if (!centred || (load_raw<uint64_t>(&fine) & load_raw<uint64_t>(&fine[2])) == ~uint64_t{}) return;
    for (int k = 0; k < count; ++k) settled[k] = fine[k];
  } else {
    for (int k = 0; k < count; ++k) {
      const S away = settle(pivot[k], total[k], mean[k], square[k]);
      settled[k] = !centred || square[k] * most > away * away;
    }
  }
  for (int k = 0; k < count; ++k) {
    if (settled[k]) continue;
    pivot[k] = mean[k];
    sums_about<1>(rows + k, pivot + k, C, total + k, square + k);
    settle(pivot[k], total[k], mean[k], square[k]);
  }
}

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
