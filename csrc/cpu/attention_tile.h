// One tile of queries against a list of key groups, everything transposed: lanes are queries.
//
//   S^T = K Q^T             [8 keys][lanes]      per group; in 16 bits it stays in registers
//   P^T = power(S^T c - m)  [8 keys][lanes]      m: the largest score so far; in 16 bits, when it last rose by kRise
//   O^T += V^T P^T          [8 channels][lanes]  per channel tile and block of groups; rescaled once per block
//
// A lane never meets another, so a query's result does not depend on the tile it sits in.
#pragma once

#include "attention_pack.h"

namespace fastdit::cpu::FASTDIT_ISA {

// What the queries of a tile see. Keys of a windowed sequence lie on a grid (t, h, w), a group of them in a cube.
template <class M>
struct TileView {
  static constexpr int lanes = kTileVectors * M::lanes;
  alignas(64) typename M::Index end[lanes];       // plain sequence: first key not seen
  alignas(64) typename M::Index start[3][lanes];  // window: first visible index of each axis
  int64_t size[3];                                // of the window, the same for all lanes
  int64_t cube[3], cubes[3];                      // keys of a group, and groups, along each axis
  bool windowed;
};

template <class M>
struct TileBuffers {
  typename M::Word *q, *k, *v;  // packed operands
  typename M::Word* p;          // [key words of a block][pitch] weights
  typename M::S* o;             // [channels][pitch]
  int64_t* groups;              // key groups to visit: 2 * group + (1 if partly masked)
};

// acc[r][n] += sum_t a[r / 8][t][r % 8] * b[t][n]: the kernel of every product whose lanes are queries.
template <class M, int NV, int G, int PITCH = NV * M::lanes>
FASTDIT_INLINE void multiply(typename M::V (&acc)[8 * G][NV], const typename M::Word* const (&a)[G],
                             const typename M::Word* b, int64_t steps) {
  for (int64_t t = 0; t < steps; ++t, b += PITCH) {
    typename M::V bv[NV];
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) bv[n] = load_raw<typename M::V>(b + n * M::lanes);
#pragma GCC unroll 3
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) acc[8 * g + r][n] = M::multiply_add(acc[8 * g + r][n], a[g][t * 8 + r], bv[n]);
      }
    }
  }
}

#if defined(__FMA__)
constexpr int64_t kScoreChain = 32, kGradChain = 16;
#else  // every product rounds, too
constexpr int64_t kScoreChain = 16, kGradChain = 8;
#endif

// multiply() in chains of at most CHAIN products, whose sums meet in memory: fp32 shows the rounding of long ones. The
// backward takes its scores in the very chains of the forward, so that what lse holds of their rounding cancels.
template <class M, int NV, int G, int64_t CHAIN>
FASTDIT_INLINE void multiply_in_chains(typename M::V (&acc)[8 * G][NV], const typename M::Word* const (&a)[G],
                                       const typename M::Word* b, int64_t steps) {
  using V = typename M::V;
  if (M::pair == 2 || steps <= CHAIN) return multiply<M, NV, G>(acc, a, b, steps);
  alignas(64) typename M::S sums[8 * G * NV * M::lanes];
  for (int64_t at = 0; at < steps; at += CHAIN) {
    V part[8 * G][NV] = {};
    const typename M::Word* from[G];
    for (int g = 0; g < G; ++g) from[g] = a[g] + at * 8;
    multiply<M, NV, G>(part, from, b + at * NV * M::lanes, steps - at < CHAIN ? steps - at : CHAIN);
#pragma GCC unroll 24
    for (int r = 0; r < 8 * G; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) {
        typename M::S* to = sums + (r * NV + n) * M::lanes;
        store_raw(to, at ? load_raw<V>(to) + part[r][n] : part[r][n]);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < 8 * G; ++r) {
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) acc[r][n] = load_raw<V>(sums + (r * NV + n) * M::lanes);
  }
}

// Sets what belongs to invisible keys of one group to `value`.
template <class M, int NV, int PITCH = NV * M::lanes>
inline void mask_group(typename M::S* s, int64_t group, const TileView<M>& view, typename M::S value) {
  using V = typename M::V;
  using I = typename M::I;
  using Index = typename M::Index;
  const V hidden = splat(value);
  if (!view.windowed) {
    for (int r = 0; r < 8; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) {
        const I seen = load_raw<I>(view.end + n * M::lanes) > (I{} + static_cast<Index>(group * 8 + r));
        typename M::S* p = s + r * PITCH + n * M::lanes;
        store_raw(p, seen ? load_raw<V>(p) : hidden);
      }
    }
    return;
  }
  const int64_t at[3] = {group / (view.cubes[1] * view.cubes[2]), group / view.cubes[2] % view.cubes[1],
                         group % view.cubes[2]};
  // by axis and place in the cube: start <= index < start + size, in one unsigned comparison
#if defined(__AVX512F__)
  using Seen = uint16_t;
#else
  using Seen = I;
#endif
  Seen seen[3][8][NV];
  for (int axis = 0; axis < 3; ++axis) {
    const I size = I{} + static_cast<Index>(view.size[axis]);
    for (int64_t i = 0; i < view.cube[axis]; ++i) {
      const I index = I{} + static_cast<Index>(at[axis] * view.cube[axis] + i);
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) {
        const I offset = index - load_raw<I>(view.start[axis] + n * M::lanes);
#if defined(__AVX512F__)
        if constexpr (sizeof(Index) == 4)
          seen[axis][i][n] = _mm512_cmplt_epu32_mask((__m512i)offset, (__m512i)size);
        else
          seen[axis][i][n] = _mm512_cmplt_epu64_mask((__m512i)offset, (__m512i)size);
#else
        seen[axis][i][n] = (I)((typename M::U)offset < (typename M::U)size);
#endif
      }
    }
  }
  int r = 0;
  for (int64_t t = 0; t < view.cube[0]; ++t) {
    for (int64_t h = 0; h < view.cube[1]; ++h) {
      for (int64_t w = 0; w < view.cube[2]; ++w, ++r) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) {
          typename M::S* p = s + r * PITCH + n * M::lanes;
          const Seen all = seen[0][t][n] & seen[1][h][n] & seen[2][w][n];
#if defined(__AVX512F__)
          if constexpr (sizeof(Index) == 4)
            store_raw(p, _mm512_mask_loadu_ps((__m512)hidden, all, p));
          else
            store_raw(p, _mm512_mask_loadu_pd((__m512d)hidden, static_cast<__mmask8>(all), p));
#else
          store_raw(p, all ? load_raw<V>(p) : hidden);
#endif
        }
      }
    }
  }
}

// The softmax of a tile's lanes. A weight is power(s * c - shift); in 16 bits a score above `limit` takes the shift
// with it, elsewhere `limit` is the maximum.
template <class M>
struct Softmax {
  static constexpr int lanes = kTileVectors * M::lanes;
  alignas(64) typename M::S shift[lanes], limit[lanes];  // limit = (shift + kRise) / c; -inf: no visible key yet
  alignas(64) typename M::S keep[lanes];                 // what O and sums before this block are to be scaled by
  // Sums of the block's weights: lse is made of `sum`, O is divided by `rounded`, of the words that multiply V, which
  // makes it a mean of values, whatever a weight is rounded to: with one key O = v. Where no word rounds it is `sum`.
  alignas(64) typename M::S sum[lanes], rounded[lanes];
};
constexpr int kRise = 8;  // weights stay below power(kRise)

// Lanes with a score above their limit take its shift and bring along what was weighed before; others keep their bits.
template <class M, int NV>
inline void raise_shift(const typename M::V (&top)[NV], typename M::S c, Softmax<M>& softmax, typename M::Word* p,
                        const typename M::Word* end) {
  using V = typename M::V;
  using S = typename M::S;
  const V lowest = splat(-static_cast<S>(__builtin_inff())), one = splat(S{1});
  V factor[NV];
  for (int n = 0; n < NV; ++n) {
    const int at = n * M::lanes;
    const V shift = load_raw<V>(softmax.shift + at), limit = load_raw<V>(softmax.limit + at);
    const V next = M::whole(top[n] * c), brought = limit == lowest ? V{} : M::power(shift - next);
    factor[n] = top[n] > limit ? brought : one;
    store_raw(softmax.shift + at, top[n] > limit ? next : shift);
    store_raw(softmax.limit + at, top[n] > limit ? (next + static_cast<S>(kRise)) / c : limit);
    store_raw(softmax.keep + at, load_raw<V>(softmax.keep + at) * factor[n]);
    store_raw(softmax.sum + at, load_raw<V>(softmax.sum + at) * factor[n]);
    store_raw(softmax.rounded + at, load_raw<V>(softmax.rounded + at) * factor[n]);
  }
  for (; p < end; p += NV * M::lanes)
    for (int n = 0; n < NV; ++n) M::scale(p + n * M::lanes, factor[n]);
}

// Masks the scores of a group, if it is marked, and sees to their shift.
template <class M, int NV>
__attribute__((noinline)) void settle_group(typename M::S* s, int64_t group, const TileView<M>& view, typename M::S c,
                                            Softmax<M>& softmax, typename M::Word* p, const typename M::Word* end) {
  using V = typename M::V;
  if (group & 1) mask_group<M, NV>(s, group >> 1, view, -static_cast<typename M::S>(__builtin_inff()));
  V top[NV];
  bool raised = false;
  for (int n = 0; n < NV; ++n) {
    top[n] = load_raw<V>(s + n * M::lanes);
    for (int r = 1; r < 8; ++r) top[n] = higher(top[n], load_raw<V>(s + (r * NV + n) * M::lanes));
    raised |= any_above(top[n], load_raw<V>(softmax.limit + n * M::lanes));
  }
  if (raised) raise_shift<M, NV>(top, c, softmax, p, end);
}

// Weights of G groups of 8 keys, behind those from buf.p to `to`. Not inlined: 24 accumulators need all registers.
template <class M, int NV, int G>
__attribute__((noinline)) void softmax_groups(const TileBuffers<M>& buf, const TileView<M>& view, const int64_t* groups,
                                              int64_t steps, typename M::S c, Softmax<M>& softmax,
                                              typename M::Word* to) {
  using V = typename M::V;
  constexpr int64_t pitch = NV * M::lanes;
  V acc[8 * G][NV] = {};
  const typename M::Word* from[G];
  for (int g = 0; g < G; ++g) from[g] = buf.k + (groups[g] >> 1) * 8 * steps;
  multiply_in_chains<M, NV, G, kScoreChain>(acc, from, buf.q, steps);
#pragma GCC unroll 3
  for (int g = 0; g < G; ++g, to += 8 / M::pair * pitch) {
    bool unsettled = groups[g] & 1;
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) {
      V top = acc[8 * g][n];
#pragma GCC unroll 7
      for (int r = 1; r < 8; ++r) top = higher(top, acc[8 * g + r][n]);
      unsettled |= any_above(top, load_raw<V>(softmax.limit + n * M::lanes));
    }
    if (__builtin_expect(unsettled, 0)) {
      alignas(64) typename M::S s[8 * pitch];
#pragma GCC unroll 24
      for (int i = 0; i < 8 * NV; ++i) store_raw(s + i * M::lanes, acc[8 * g + i / NV][i % NV]);
      settle_group<M, NV>(s, groups[g], view, c, softmax, buf.p, to);
#pragma GCC unroll 24
      for (int i = 0; i < 8 * NV; ++i) acc[8 * g + i / NV][i % NV] = load_raw<V>(s + i * M::lanes);
    }
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) {
      const V shift = load_raw<V>(softmax.shift + n * M::lanes);
      V sum = {}, rounded = {};  // of 8 keys: short chains keep the rounding of long sums small
#pragma GCC unroll 8
      for (int r = 0; r < 8; r += 2) {
        const V p = M::power(acc[8 * g + r][n] * c - shift), next = M::power(acc[8 * g + r + 1][n] * c - shift);
        sum = sum + p + next;
        const auto words = zip_bf16(p, next);
        rounded = M::multiply_add(rounded, M::one, (V)words);
        store_raw(to + r / 2 * pitch + n * M::lanes, words);
      }
      store_raw(softmax.sum + n * M::lanes, load_raw<V>(softmax.sum + n * M::lanes) + sum);
      store_raw(softmax.rounded + n * M::lanes, load_raw<V>(softmax.rounded + n * M::lanes) + rounded);
    }
  }
}

template <class M, int NV>
inline void softmax_block_of_pairs(const TileBuffers<M>& buf, const TileView<M>& view, const int64_t* groups,
                                   int64_t count, int64_t steps, typename M::S c, Softmax<M>& softmax) {
  constexpr int G = kRowGroups<NV>;
  constexpr int64_t size = 8 / M::pair * NV * M::lanes;
  int64_t i = 0;
  for (; i + G <= count; i += G) softmax_groups<M, NV, G>(buf, view, groups + i, steps, c, softmax, buf.p + i * size);
  if constexpr (G == 3) {
    if (count - i == 2) softmax_groups<M, NV, 2>(buf, view, groups + i, steps, c, softmax, buf.p + i * size), i += 2;
    if (i < count) softmax_groups<M, NV, 1>(buf, view, groups + i, steps, c, softmax, buf.p + i * size);
  }
}

// Scores of G groups of 8 keys, and the running maximum of each lane. Not inlined: its 24 accumulators, operands and
// broadcast need all registers for themselves.
template <class M, int NV, int G>
__attribute__((noinline)) void score_groups(const typename M::Word* k, const int64_t* groups, const typename M::Word* q,
                                            int64_t steps, typename M::S* s, typename M::S* max) {
  using V = typename M::V;
  V acc[8 * G][NV] = {};
  const typename M::Word* from[G];
  for (int g = 0; g < G; ++g) from[g] = k + (groups[g] >> 1) * 8 * steps;
  multiply_in_chains<M, NV, G, kScoreChain>(acc, from, q, steps);
#pragma GCC unroll 3
  for (int n = 0; n < NV; ++n) {
    V top = load_raw<V>(max + n * M::lanes);
#pragma GCC unroll 24
    for (int r = 0; r < 8 * G; ++r) {
      store_raw(s + (r * NV + n) * M::lanes, acc[r][n]);
      top = higher(top, acc[r][n]);
    }
    store_raw(max + n * M::lanes, top);
  }
}

// Scores of G groups with their masks.
template <class M, int NV, int G>
inline void score_some(const TileBuffers<M>& buf, const TileView<M>& view, const int64_t* groups, int64_t steps,
                       typename M::S* s, typename M::S* max) {
  using V = typename M::V;
  alignas(64) typename M::S unused[NV * M::lanes];
  bool masked = false;
  for (int g = 0; g < G; ++g) masked |= groups[g] & 1;
  if (masked) __builtin_memcpy(unused, max, sizeof(unused));
  score_groups<M, NV, G>(buf.k, groups, buf.q, steps, s, masked ? unused : max);
  if (!masked) return;
  for (int g = 0; g < G; ++g) {
    if (groups[g] & 1)
      mask_group<M, NV>(s + g * 8 * NV * M::lanes, groups[g] >> 1, view, -static_cast<typename M::S>(__builtin_inff()));
  }
  for (int n = 0; n < NV; ++n) {
    V top = load_raw<V>(max + n * M::lanes);
    for (int r = 0; r < 8 * G; ++r) top = higher(top, load_raw<V>(s + (r * NV + n) * M::lanes));
    store_raw(max + n * M::lanes, top);
  }
}

template <class M, int NV>
inline void score_block(const TileBuffers<M>& buf, const TileView<M>& view, const int64_t* groups, int64_t count,
                        int64_t steps, typename M::S* s, typename M::S* max) {
  constexpr int G = kRowGroups<NV>;
  constexpr int64_t size = 8 * NV * M::lanes;
  int64_t i = 0;
  for (; i + G <= count; i += G) score_some<M, NV, G>(buf, view, groups + i, steps, s + i * size, max);
  if constexpr (G == 3) {
    if (count - i == 2) score_some<M, NV, 2>(buf, view, groups + i, steps, s + i * size, max), i += 2;
    if (i < count) score_some<M, NV, 1>(buf, view, groups + i, steps, s + i * size, max);
  }
}

// Scores -> weights power(s * c - shift), in place; sum[n] = their sum over the block, 32 rows at a time: short chains
// keep the rounding of long sums small.
template <class M, int NV>
inline void weigh_block(typename M::S* s, int64_t rows, typename M::S c, const typename M::V (&shift)[NV],
                        typename M::V (&sum)[NV]) {
  using V = typename M::V;
  for (int64_t chunk = 0; chunk < rows; chunk += 32) {
    V part[NV] = {};
    const int64_t end = rows < chunk + 32 ? rows : chunk + 32;
    for (int64_t r = chunk; r < end; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n, s += M::lanes) {
        const V p = M::power(load_raw<V>(s) * c - shift[n]);
        part[n] += p;
        store_raw(s, p);
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) sum[n] += part[n];
  }
}

// A block against its own maximum: weights above one round too coarsely for fp32's gradients (1.2 in rms, 2.7 at most).
template <class M, int NV>
inline void softmax_block(const TileBuffers<M>& buf, const TileView<M>& view, const int64_t* groups, int64_t count,
                          int64_t steps, typename M::S c, Softmax<M>& softmax) {
  using V = typename M::V;
  const V lowest = splat(-static_cast<typename M::S>(__builtin_inff()));
  V top[NV], shift[NV], sum[NV] = {};
  for (int n = 0; n < NV; ++n) top[n] = load_raw<V>(softmax.limit + n * M::lanes);
  score_block<M, NV>(buf, view, groups, count, steps, buf.p, softmax.limit);
  for (int n = 0; n < NV; ++n) {
    const V highest = load_raw<V>(softmax.limit + n * M::lanes), before = load_raw<V>(softmax.shift + n * M::lanes);
    shift[n] = highest == lowest ? V{} : highest * c;  // no key so far: power(-inf - 0) = 0
    store_raw(softmax.keep + n * M::lanes, top[n] == lowest ? V{} : M::power(before - shift[n]));
    store_raw(softmax.shift + n * M::lanes, shift[n]);
  }
  weigh_block<M, NV>(buf.p, count * 8, c, shift, sum);
  for (int n = 0; n < NV; ++n) store_raw(softmax.sum + n * M::lanes, sum[n]);
}

template <int N>
struct Count {
  static constexpr int value = N;
};
// fn(Count<G>, first tile) over all tiles of 8 channels, G at a time and what is left.
template <int G, class F>
FASTDIT_INLINE void each_channel_tile(int64_t tiles, F&& fn) {
  int64_t tile = 0;
  for (; tile + G <= tiles; tile += G) fn(Count<G>(), tile);
  if constexpr (G == 3) {
    if (tiles - tile == 2) fn(Count<2>(), tile), tile += 2;
    if (tile < tiles) fn(Count<1>(), tile);
  }
}

// 8 * G channels of O^T = O^T * keep + V^T P^T; the block is summed apart first, which keeps the rounding of long sums
// small.
template <class M, int NV, int G>
__attribute__((noinline)) void value_tile(const typename M::Word* v, const typename M::Word* p, const int64_t* groups,
                                          int64_t count, int64_t channel_tiles, typename M::S* o,
                                          const typename M::S* keep) {
  using V = typename M::V;
  constexpr int64_t steps = 8 / M::pair;
  V acc[8 * G][NV] = {};
  for (int64_t i = 0; i < count; ++i, p += steps * NV * M::lanes) {
    const typename M::Word* from[G];
    for (int g = 0; g < G; ++g)
      from[g] = v + g * kBlockGroups<M> * kValueWords<M> + value_offset<M>(groups[i] >> 1, channel_tiles);
    multiply<M, NV, G>(acc, from, p, steps);
  }
#pragma GCC unroll 24
  for (int r = 0; r < 8 * G; ++r) {
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n, o += M::lanes)
      store_raw(o, keep ? load_raw<V>(o) * load_raw<V>(keep + n * M::lanes) + acc[r][n] : acc[r][n]);
  }
}

// Visits the groups; leaves O^T unscaled in buf.o, and its sums and shifts in `softmax`.
template <class M, int NV>
inline void attend_tile(const TileBuffers<M>& buf, const TileView<M>& view, int64_t count, int64_t steps,
                        int64_t channel_tiles, typename M::S c, Softmax<M>& softmax) {
  using V = typename M::V;
  using S = typename M::S;
  constexpr int64_t pitch = NV * M::lanes;
  V sum[NV] = {}, rounded[NV] = {};
  for (int n = 0; n < NV; ++n) {
    store_raw(softmax.shift + n * M::lanes, V{});
    store_raw(softmax.limit + n * M::lanes, splat(-static_cast<S>(__builtin_inff())));
  }
  for (int64_t at = 0; at < count; at += kBlockGroups<M>) {
    const int64_t block = count - at < kBlockGroups<M> ? count - at : kBlockGroups<M>, *groups = buf.groups + at;
    for (int n = 0; n < NV; ++n) {
      store_raw(softmax.keep + n * M::lanes, splat(S{1}));
      store_raw(softmax.sum + n * M::lanes, V{});
      store_raw(softmax.rounded + n * M::lanes, V{});
    }
    if constexpr (M::pair == 2)
      softmax_block_of_pairs<M, NV>(buf, view, groups, block, steps, c, softmax);
    else
      softmax_block<M, NV>(buf, view, groups, block, steps, c, softmax);
    for (int n = 0; n < NV; ++n) {
      const V keep = load_raw<V>(softmax.keep + n * M::lanes);
      sum[n] = sum[n] * keep + load_raw<V>(softmax.sum + n * M::lanes);
      rounded[n] = M::pair == 1 ? sum[n] : rounded[n] * keep + load_raw<V>(softmax.rounded + n * M::lanes);
    }
    each_channel_tile<kRowGroups<NV>>(channel_tiles, [&](auto tiles, int64_t tile) {
      value_tile<M, NV, decltype(tiles)::value>(buf.v + tile * kBlockGroups<M> * kValueWords<M>, buf.p, groups, block,
                                                channel_tiles, buf.o + tile * 8 * pitch, at ? softmax.keep : nullptr);
    });
  }
  if (count == 0) __builtin_memset(buf.o, 0, channel_tiles * 8 * pitch * sizeof(S));
  for (int n = 0; n < NV; ++n) {
    store_raw(softmax.sum + n * M::lanes, sum[n]);
    store_raw(softmax.rounded + n * M::lanes, rounded[n]);
  }
}

// Columns [dim][pitch] times one factor per column -> rows of T.
template <class M, class T, class RowOf>
inline void store_columns(const typename M::S* from, int pitch, int count, int64_t dim, const typename M::S* factors,
                          RowOf&& row_of) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename M::S) == 4) {
    for (int first = 0; first < count; first += 16) {
      const __m512 factor = _mm512_loadu_ps(factors + first);
      for (int64_t c = 0; c < dim; c += 16) {
        __m512 r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          r[i] = c + i < dim ? _mm512_mul_ps(_mm512_loadu_ps(from + (c + i) * pitch + first), factor)
                             : _mm512_setzero_ps();
        transpose16(r);
        const int64_t left = dim - c;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (first + i >= count) break;
          T* to = row_of(first + i) + c;
          if (left >= 16)
            store(to, (vf)r[i]);
          else
            store_n(to, (vf)r[i], static_cast<int>(left));
        }
      }
    }
    return;
  }
#endif
  for (int lane = 0; lane < count; ++lane) {
    T* row = row_of(lane);
    for (int64_t c = 0; c < dim; ++c) row[c] = from_scalar<T>(from[c * pitch + lane] * factors[lane]);
  }
}

// O^T / rounded -> rows of o; lse = shift / unit + log(sum).
template <class M, class T, class RowOf, class LseOf>
inline void store_tile(const typename M::S* o, int pitch, int count, int64_t dim, const Softmax<M>& softmax,
                       RowOf&& row_of, LseOf&& lse_of, bool want_lse) {
  using V = typename M::V;
  using S = typename M::S;
  S inverse[kTileVectors * M::lanes];
  for (int n = 0; n < pitch; n += M::lanes) {
    const V sum = load_raw<V>(softmax.rounded + n);
    store_raw(inverse + n, sum == S{0} ? V{} : S{1} / sum);
  }
  if (want_lse) {
    S lse[kTileVectors * M::lanes];
    for (int n = 0; n < pitch; n += M::lanes)
      store_raw(lse + n,
                load_raw<V>(softmax.shift + n) * static_cast<S>(1 / M::unit) + M::log(load_raw<V>(softmax.sum + n)));
    for (int lane = 0; lane < count; ++lane) *lse_of(lane) = lse[lane];
  }
  store_columns<M, T>(o, pitch, count, dim, inverse, row_of);
}

}  // namespace fastdit::cpu::FASTDIT_ISA
