// The five products of the backward for one tile of queries and one block of keys.
//
//   P^T  = power(K Q^T c - lse)        [8 keys][lanes]      dS^T = P^T * (V dO^T - delta)
//   dV  += P^T dO,   dK += dS^T Q      [8 keys][channels]   weights broadcast from their rows, lanes are channels
//   dQ^T += K^T dS^T                   [8 channels][lanes]  as the forward's V^T P^T
//
// Nothing is transposed between the products: a row of weights is a row of words, pairs of queries, as it stands.
#pragma once

#include "attention_tile.h"

namespace fastdit::cpu::FASTDIT_ISA {

template <class M>
constexpr int kLanes = kTileVectors * M::lanes;  // of a full tile: pitch of weights
template <class M>
constexpr int kRowWords = kLanes<M> / M::pair;  // words of a row of weights

// What one (tile of queries, head) brings.
template <class M>
struct QueryTile {
  typename M::Word *q, *d_o;            // [channel word][lane]
  typename M::Word *q_rows, *d_o_rows;  // [query word][channel], channels padded to whole vectors
  typename M::S *shift, *delta;         // [lane]: lse in units of power(), sum(do * o) - dlse
  typename M::S* dq;                    // [channel][lane]
};

// What one block of keys brings, and the weights of a tile against it.
template <class M>
struct KeyBlock {
  typename M::Word *k, *v;       // [group][channel word][8 keys]
  typename M::Word* k_columns;   // [channel / 8][group][key word][8 channels]
  typename M::S *dk, *dv;        // [key][channel], channels padded to whole vectors
  typename M::Word *p, *ds;      // [key][query word]
  typename M::Word* ds_columns;  // [key word][lane]; the same as ds where a word is one element
  typename M::S* weights;        // [24][lane]: P of a few groups in full precision
};

// A row of lanes -> their words, in order.
template <class M>
FASTDIT_INLINE void store_words(typename M::Word* to, typename M::V v) {
  if constexpr (M::pair == 2)
    store(reinterpret_cast<bf16*>(to), v);
  else
    store_raw(to, v);
}

// P of G groups of 8 keys. Not inlined: 24 accumulators need the registers for themselves.
template <class M, int NV, int G>
__attribute__((noinline)) void weigh_groups(const typename M::Word* k, const int64_t* groups, const typename M::Word* q,
                                            int64_t steps, typename M::S c, const typename M::S* shift,
                                            typename M::S* out) {
  using V = typename M::V;
  V acc[8 * G][NV] = {};
  const typename M::Word* from[G];
  for (int g = 0; g < G; ++g) from[g] = k + (groups[g] >> 1) * 8 * steps;
  multiply_in_chains<M, NV, G, kScoreChain>(acc, from, q, steps);
#pragma GCC unroll 3
  for (int n = 0; n < NV; ++n) {
    const V s = load_raw<V>(shift + n * M::lanes);
#pragma GCC unroll 24
    for (int r = 0; r < 8 * G; ++r) store_raw(out + r * kLanes<M> + n * M::lanes, M::power(acc[r][n] * c - s));
  }
}

// dS of G groups from P, and both in the orders that the other products read.
template <class M, int NV, int G>
__attribute__((noinline)) void grad_groups(const typename M::Word* v, const int64_t* groups,
                                           const typename M::Word* d_o, int64_t steps, const typename M::S* delta,
                                           const typename M::S* weights, typename M::Word* p, typename M::Word* ds,
                                           typename M::Word* ds_columns) {
  using V = typename M::V;
  V acc[8 * G][NV] = {};
  const typename M::Word* from[G];
  for (int g = 0; g < G; ++g) from[g] = v + (groups[g] >> 1) * 8 * steps;
  multiply_in_chains<M, NV, G, kGradChain>(acc, from, d_o, steps);  // dP - delta cancels: shorter chains
#pragma GCC unroll 3
  for (int n = 0; n < NV; ++n) {
    const V d = load_raw<V>(delta + n * M::lanes);
    const int at = n * M::lanes / M::pair;
#pragma GCC unroll 24
    for (int r = 0; r < 8 * G; ++r) {
      const V w = load_raw<V>(weights + r * kLanes<M> + n * M::lanes);
      acc[r][n] = w * (acc[r][n] - d);
      if constexpr (M::pair == 2) store_words<M>(p + r * kRowWords<M> + at, w);
      store_words<M>(ds + r * kRowWords<M> + at, acc[r][n]);
    }
    if constexpr (M::pair == 2) {
#pragma GCC unroll 12
      for (int r = 0; r < 8 * G; r += 2)
        store_raw(ds_columns + r / 2 * kLanes<M> + n * M::lanes, zip_bf16(acc[r][n], acc[r + 1][n]));
    }
  }
}

// 8 rows of dK or dV per group, NV vectors of channels: += weights [8][query words] x rows [query words][channels].
template <class M, int NV>
__attribute__((noinline)) void add_rows(const typename M::Word* weights, const int64_t* groups, int64_t count,
                                        const typename M::Word* rows, int64_t pitch, int64_t steps,
                                        typename M::S* out) {
  using V = typename M::V;
  for (int64_t i = 0; i < count; ++i, weights += 8 * kRowWords<M>) {
    V acc[8][NV] = {};
    const typename M::Word *a = weights, *b = rows;
    for (int64_t t = 0; t < steps; ++t, ++a, b += pitch) {
      V bv[NV];
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) bv[n] = load_raw<V>(b + n * M::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) acc[r][n] = M::multiply_add(acc[r][n], a[r * kRowWords<M>], bv[n]);
      }
    }
    typename M::S* to = out + (groups[i] >> 1) * 8 * pitch;
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) {
        typename M::S* at = to + r * pitch + n * M::lanes;
        store_raw(at, load_raw<V>(at) + acc[r][n]);
      }
    }
  }
}

template <class M>
inline void add_all_rows(const typename M::Word* weights, const int64_t* groups, int64_t count,
                         const typename M::Word* rows, int64_t pitch, int64_t steps, typename M::S* out) {
  for (int64_t c = 0; c < pitch;) {
    const int64_t left = (pitch - c) / M::lanes;
#if defined(__AVX512F__)
    const int vectors = left == 4 ? 2 : static_cast<int>(left < 3 ? left : 3);  // 4 = 2 + 2: one vector alone waits
#else
    const int vectors = static_cast<int>(left < 1 ? left : 1);
#endif
    switch (vectors) {
#if defined(__AVX512F__)
      case 3:
        add_rows<M, 3>(weights, groups, count, rows + c, pitch, steps, out + c);
        break;
      case 2:
        add_rows<M, 2>(weights, groups, count, rows + c, pitch, steps, out + c);
        break;
#endif
      default:
        add_rows<M, 1>(weights, groups, count, rows + c, pitch, steps, out + c);
    }
    c += vectors * M::lanes;
  }
}

// 8 * G channels of dQ^T += K^T dS^T.
template <class M, int NV, int G>
__attribute__((noinline)) void add_queries(const typename M::Word* k, const typename M::Word* ds, const int64_t* groups,
                                           int64_t count, int64_t channel_tiles, typename M::S* dq) {
  using V = typename M::V;
  constexpr int64_t steps = 8 / M::pair;
  V acc[8 * G][NV] = {};
  for (int64_t i = 0; i < count; ++i, ds += steps * kLanes<M>) {
    const typename M::Word* from[G];
    for (int g = 0; g < G; ++g)
      from[g] = k + g * kBlockGroups<M> * kValueWords<M> + value_offset<M>(groups[i] >> 1, channel_tiles);
    multiply<M, NV, G, kLanes<M>>(acc, from, ds, steps);
  }
#pragma GCC unroll 24
  for (int r = 0; r < 8 * G; ++r) {
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n, dq += M::lanes) store_raw(dq, load_raw<V>(dq) + acc[r][n]);
  }
}

struct GradWanted {
  bool q, k, v;
};

// P and dS of G groups, number i and on of the tile's list.
template <class M, int NV, int G>
inline void grad_some(const QueryTile<M>& tile, const KeyBlock<M>& block, const TileView<M>& view,
                      const int64_t* groups, int64_t i, int64_t first, int64_t steps, typename M::S c,
                      GradWanted want) {
  const int64_t keys = i * 8;
  typename M::S* weights = M::pair == 2 ? block.weights : block.weights + keys * kLanes<M>;
  weigh_groups<M, NV, G>(block.k, groups + i, tile.q, steps, c, tile.shift, weights);
  for (int g = 0; g < G; ++g) {
    if (groups[i + g] & 1)
      mask_group<M, NV, kLanes<M>>(weights + g * 8 * kLanes<M>, first + (groups[i + g] >> 1), view, 0);
  }
  if (want.q || want.k)
    return grad_groups<M, NV, G>(block.v, groups + i, tile.d_o, steps, tile.delta, weights,
                                 block.p + keys * kRowWords<M>, block.ds + keys * kRowWords<M>,
                                 block.ds_columns + keys / M::pair * kLanes<M>);
  for (int r = 0; r < 8 * G && M::pair == 2; ++r) {
    for (int n = 0; n < NV; ++n)
      store_words<M>(block.p + (keys + r) * kRowWords<M> + n * M::lanes / M::pair,
                     load_raw<typename M::V>(weights + r * kLanes<M> + n * M::lanes));
  }
}

// All of it. groups: 2 * group + (1 if partly masked), group counted from the block's first, which is `first` of the
// sequence (masks know keys by their place in the sequence).
template <class M, int NV>
inline void grad_tile(const QueryTile<M>& tile, const KeyBlock<M>& block, const TileView<M>& view,
                      const int64_t* groups, int64_t count, int64_t first, int64_t queries, int64_t steps,
                      int64_t channel_tiles, int64_t pitch, typename M::S c, GradWanted want) {
  constexpr int G = kRowGroups<NV>;
  int64_t i = 0;
  for (; i + G <= count; i += G) grad_some<M, NV, G>(tile, block, view, groups, i, first, steps, c, want);
  if constexpr (G == 3) {
    if (count - i == 2) grad_some<M, NV, 2>(tile, block, view, groups, i, first, steps, c, want), i += 2;
    if (i < count) grad_some<M, NV, 1>(tile, block, view, groups, i, first, steps, c, want);
  }
  const int64_t words = (queries + M::pair - 1) / M::pair;
  if (want.v) add_all_rows<M>(block.p, groups, count, tile.d_o_rows, pitch, words, block.dv);
  if (want.k) add_all_rows<M>(block.ds, groups, count, tile.q_rows, pitch, words, block.dk);
  if (!want.q) return;
  each_channel_tile<G>(channel_tiles, [&](auto tiles, int64_t t) {
    add_queries<M, NV, decltype(tiles)::value>(block.k_columns + t * kBlockGroups<M> * kValueWords<M>, block.ds_columns,
                                               groups, count, channel_tiles, tile.dq + t * 8 * NV * M::lanes);
  });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
