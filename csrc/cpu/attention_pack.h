// Packing: q, k, v rows of any stride -> the word order that the tile kernels stream through.
//
//   Q  [channel word][lane]                            lane = query of the tile
//   K  [key / 8][channel word][8 keys]
//   V  [key block][channel / 8][key / 8 in block][key word in 8][8 channels]
//
// Channels are padded with zeros to a multiple of 8 here, never in memory the caller sees.
#pragma once

#include "attention_math.h"

namespace fastdit::cpu::FASTDIT_ISA {

// Groups of 8 keys in a block: between two softmax rescalings of the forward; in the backward, where P, dS, the packed
// keys and values, dK and dV of a block stay in the second-level cache.
template <class M>
constexpr int64_t kBlockGroups = M::pair == 2 ? 32 : 16;

// Element (or pair of elements) number `step` of a row of `dim` as a word; zero beyond it.
template <class M, class T>
FASTDIT_INLINE typename M::Word word_at(const T* row, int64_t step, int64_t dim) {
  if constexpr (M::pair == 2) {
    const int64_t c = 2 * step;
    const uint32_t lo = c < dim ? row[c].bits : 0, hi = c + 1 < dim ? row[c + 1].bits : 0;
    return lo | hi << 16;
  } else {
    return step < dim ? to_scalar(row[step]) : 0;
  }
}

// Rows of a head lie a whole token apart: no prefetcher follows them, and packing would run at the latency of memory.
// A masked load waits for every line that it touches, so whole vectors are asked for. Locality 3: into the first cache,
// to be used soon; 2: into the second.
template <int LOCALITY, class T>
FASTDIT_INLINE void ask_for_row(const T* row, int64_t dim) {
  const char* const from = reinterpret_cast<const char*>(row);
  const int64_t bytes = (dim * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, LOCALITY);
  __builtin_prefetch(from + bytes - 1, 0, LOCALITY);
}
// Rows asked for ahead of those that are packed.
constexpr int64_t kRowsAhead = 32;

#if defined(__AVX512F__)
// 16 words from `step` on, as vector lanes; masked loads touch nothing beyond the row.
template <class T>
FASTDIT_INLINE __m512 load_words(const T* row, int64_t step, int64_t dim) {
  const int64_t left = dim - step;
  return (__m512)load_n(row + step, left < 16 ? static_cast<int>(left) : 16);
}
FASTDIT_INLINE __m256i load_half_words(const void* row, int64_t step, int64_t dim) {
  const int64_t left = dim - step;
  return _mm256_maskz_loadu_epi16(below(left < 16 ? static_cast<int>(left) : 16),
                                  static_cast<const uint16_t*>(row) + step);
}
#if defined(__AVX512BF16__)
FASTDIT_INLINE __m512 load_words(const bf16* row, int64_t step, int64_t dim) {
  const int64_t left = dim - 2 * step;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(below(left < 32 ? static_cast<int>(left) : 32), row + 2 * step));
}
#endif

// 16 words of 16 rows from row `first` on, transposed; rows from `count` on are zeros.
template <class T, class RowOf>
FASTDIT_INLINE void load_transposed(__m512 (&r)[16], RowOf&& row_of, int64_t first, int64_t count, int64_t step,
                                    int64_t dim) {
  if (count - first >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load_words(row_of(first + i), step, dim);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = first + i < count ? load_words(row_of(first + i), step, dim) : _mm512_setzero_ps();
  }
  transpose16(r);
}
#endif

// Row i of `count` (row_of(i)) becomes lane i of out [steps][pitch]; lanes from count to pitch are zeros.
template <class M, class T, class RowOf>
inline void pack_queries(typename M::Word* out, int pitch, int count, int64_t dim, int64_t steps, RowOf&& row_of) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename M::Word) == 4) {
    for (int lane = 0; lane < pitch; lane += 16) {
      for (int64_t step = 0; step < steps; step += 16) {
        __m512 r[16];
        load_transposed<T>(r, row_of, lane, count, step, dim);
        typename M::Word* to = out + step * pitch + lane;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (step + i < steps) _mm512_storeu_ps(to + i * pitch, r[i]);
      }
    }
    return;
  }
#endif
  for (int lane = 0; lane < pitch; ++lane) {
    const T* row = lane < count ? row_of(lane) : nullptr;
    for (int64_t step = 0; step < steps; ++step)
      out[step * pitch + lane] = row ? word_at<M>(row, step, dim) : typename M::Word{};
  }
}

// Row i of `count` -> out [query word][pitch]: rows side by side in pairs, channels from dim to pitch are zeros.
template <class M, class T, class RowOf>
inline void pack_rows(typename M::Word* out, int64_t pitch, int count, int64_t dim, RowOf&& row_of) {
  for (int i = 0; i < count; i += M::pair, out += pitch) {
    const T *row = row_of(i), *next = M::pair == 2 && i + 1 < count ? row_of(i + 1) : nullptr;
    for (int64_t c = 0; c < pitch; c += M::lanes) {
#if defined(__AVX512BF16__)
      if constexpr (M::pair == 2) {
        const __m512i low = _mm512_cvtepu16_epi32(c < dim ? load_half_words(row, c, dim) : _mm256_setzero_si256());
        const __m512i high =
            _mm512_cvtepu16_epi32(next && c < dim ? load_half_words(next, c, dim) : _mm256_setzero_si256());
        _mm512_storeu_si512(out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        continue;
      }
#endif
      if constexpr (M::pair == 1) {
        const int64_t left = dim - c;
        store_raw(out + c, left >= M::lanes ? load(row + c) : load_n(row + c, static_cast<int>(left)));
      }
    }
    (void)next;
  }
}

// Keys begin .. count -> out [group][steps][8]; the last group is filled up with zeros. out holds an even number of
// groups, begin is a multiple of 16.
template <class M, class T, class RowOf>
inline void pack_keys(typename M::Word* out, int64_t begin, int64_t count, int64_t dim, int64_t steps, RowOf&& row_of) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename M::Word) == 4) {
    for (int64_t key = begin; key < count; key += 16) {
      typename M::Word *lo = out + key * steps, *hi = lo + 8 * steps;
      for (int64_t i = key + kRowsAhead; i < key + kRowsAhead + 16 && i < count; ++i) ask_for_row<3>(row_of(i), dim);
      for (int64_t step = 0; step < steps; step += 16) {
        __m512 r[16];
        load_transposed<T>(r, row_of, key, count, step, dim);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (step + i >= steps) break;
          _mm256_storeu_ps(reinterpret_cast<float*>(lo + (step + i) * 8), _mm512_castps512_ps256(r[i]));
          _mm256_storeu_ps(reinterpret_cast<float*>(hi + (step + i) * 8), _mm512_extractf32x8_ps(r[i], 1));
        }
      }
    }
    return;
  }
#endif
  for (int64_t key = begin; key < (count + 7) / 8 * 8; ++key) {
    typename M::Word* to = out + key / 8 * 8 * steps + key % 8;
    for (int64_t step = 0; step < steps; ++step)
      to[step * 8] = key < count ? word_at<M>(row_of(key), step, dim) : typename M::Word{};
  }
}

// Words of one group for one channel tile of V.
template <class M>
constexpr int64_t kValueWords = 8 / M::pair * 8;

// Offset of group g inside packed V, for channel tile 0; the next tile is kBlockGroups<M> * kValueWords further.
template <class M>
FASTDIT_INLINE int64_t value_offset(int64_t group, int64_t channel_tiles) {
  return (group / kBlockGroups<M> * channel_tiles * kBlockGroups<M> + group % kBlockGroups<M>)*kValueWords<M>;
}

// Group by group: what a group's tiles take are whole lines, tiles are a power of two apart.
template <class M, class T, class RowOf>
inline void pack_values(typename M::Word* out, int64_t begin, int64_t count, int64_t dim, RowOf&& row_of) {
  const int64_t tiles = (dim + 7) / 8;
  for (int64_t key = begin; key < count; key += 8) {
    const T* rows[8];
    for (int64_t i = 0; i < 8; ++i) rows[i] = key + i < count ? row_of(key + i) : nullptr;
    for (int64_t i = key + kRowsAhead; i < key + kRowsAhead + 8 && i < count; ++i) ask_for_row<3>(row_of(i), dim);
    typename M::Word* tile = out + value_offset<M>(key / 8, tiles);
    for (int64_t c = 0; c < dim; c += 8, tile += kBlockGroups<M> * kValueWords<M>) {
      typename M::Word* to = tile;
      for (int i = 0; i < 8; i += M::pair, to += 8) {
#if defined(__AVX512BF16__)
        if constexpr (M::pair == 2) {
          const __mmask8 mask = dim - c >= 8 ? 0xff : (1u << (dim - c)) - 1;
          const __m128i zero = _mm_setzero_si128();
          const __m128i a = rows[i] ? _mm_maskz_loadu_epi16(mask, rows[i] + c) : zero;
          const __m128i b = rows[i + 1] ? _mm_maskz_loadu_epi16(mask, rows[i + 1] + c) : zero;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(a, b));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi16(a, b));
        }
#endif
        if constexpr (M::pair == 1) {
          if (rows[i] && c + 8 <= dim) {
            for (int e = 0; e < 8; ++e) to[e] = to_scalar(rows[i][c + e]);
          } else {
            for (int e = 0; e < 8; ++e) to[e] = rows[i] && c + e < dim ? to_scalar(rows[i][c + e]) : 0;
          }
        }
      }
    }
  }
}

}  // namespace fastdit::cpu::FASTDIT_ISA
