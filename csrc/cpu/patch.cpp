// y[row, d] = sum_k patch(row)[k] * weight[d, k] + bias[d] + pos[row, d],  k = (c, dt, dh, dw).
//
// Lanes are outputs: a register tile holds kRows tokens x kVectors vectors of outputs. Weights are packed once per
// call into panels [D / columns][K][columns]; a thread gathers a block of patches straight from the video into
// [tile][K][kRows] and runs every panel over it, so x is read once and y written once, with no patch matrix between.
// Each output is one chain over k, so neither the tiling, the packing of items nor the threads change a bit of it.
#include "fastdit/patch.h"

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int kRows = 6;
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int kTiles = 16;  // tiles per block: 96 tokens, whose patches stay in L2 while the panels pass
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 24 accumulators + 4 weights + 1 broadcast of 32 registers
#else
constexpr int kVectors = 2;  // 12 + 2 + 1 of 16
#endif

// A is the element type of the packed operands: float, double, or bf16 in pairs for the dot-product instruction.
template <class A>
constexpr int kGroup = sizeof(A) == 2 ? 2 : 1;
template <class A>
constexpr int kColumns = kVectors * simd<A>::width;

template <class A, class T>
FASTDIT_INLINE A convert(T x) {
  return static_cast<A>(to_scalar(x));
}
template <>
FASTDIT_INLINE bf16 convert<bf16, bf16>(bf16 x) {
  return x;
}

FASTDIT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One panel of weights, [K / group][columns][group], zero beyond K and D.
template <class A, class T>
void pack_panel(const PatchEmbedParams& p, int64_t panel, const int64_t* k_offset, int64_t k_size, A* dst) {
  constexpr int N = kColumns<A>, G = kGroup<A>;
  const int64_t first = panel * N, columns = p.dim - first < N ? p.dim - first : N;
  if (columns < N || k_size % G) __builtin_memset(dst, 0, round_up(k_size, G) * N * sizeof(A));
  for (int64_t n = 0; n < columns; ++n) {
    const T* w = static_cast<const T*>(p.weight) + (first + n) * p.weight_stride[0];
    for (int64_t k = 0; k < k_size; ++k) dst[(k / G * N + n) * G + k % G] = convert<A>(w[k_offset[k]]);
  }
}

// n tokens along W, `step` elements apart, into lanes [lane, lane + n) of a tile [K / group][kRows][group].
template <class A, class T>
void gather(const PatchEmbedParams& p, const PatchItem& item, const T* x, int64_t step, A* tile, int lane, int n) {
  constexpr int G = kGroup<A>;
  const int64_t pw = p.patch[2], sw = item.stride[4];
  const bool pairs = G == 2 && pw % 2 == 0 && sw == 1;
  int64_t k = 0;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t dt = 0; dt < p.patch[0]; ++dt)
      for (int64_t dh = 0; dh < p.patch[1]; ++dh) {
        const T* row = x + c * item.stride[1] + dt * item.stride[2] + dh * item.stride[3];
        if (pairs) {
          for (int64_t dw = 0; dw < pw; dw += 2, k += 2)
            for (int i = 0; i < n; ++i) __builtin_memcpy(tile + (k / 2 * kRows + lane + i) * 2, row + i * step + dw, 4);
        } else {
          for (int64_t dw = 0; dw < pw; ++dw, ++k) {
            A* out = tile + (k / G * kRows + lane) * G + k % G;
            for (int i = 0; i < n; ++i) out[i * G] = convert<A>(row[i * step + dw * sw]);
          }
        }
      }
}

template <class V>
using Tile = V[kRows][kVectors];

// out = a * b, or out += a * b.
template <bool ADD, class A, class V>
FASTDIT_INLINE void multiply(const A* a, const A* b, int64_t steps, Tile<V>& out) {
  constexpr int width = simd<A>::width;
  V acc[kRows][kVectors];  // a local array stays in registers, the caller's would be stored on every step
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = V{};
  for (int64_t k = 0; k < steps; ++k) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(A) == 2) {
      __m512bh w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load_raw<__m512bh>(b + j * 2 * width);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int pair;
        __builtin_memcpy(&pair, a + 2 * i, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], x, w[j]);
      }
      a += 2 * kRows, b += 2 * kColumns<A>;
      continue;
    }
#endif
    if constexpr (sizeof(A) != 2) {
      V w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load(b + j * width);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const V x = splat(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = multiply_add(acc[i][j], x, w[j]);
      }
      a += kRows, b += kColumns<A>;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) out[i][j] = ADD ? out[i][j] + acc[i][j] : acc[i][j];
}

// A sum in fp32 is one of sums of so many products: a single chain shows the rounding of long ones.
constexpr int64_t kChain = 32;

template <class A, class V>
FASTDIT_INLINE void multiply_in_chains(const A* a, const A* b, int64_t steps, Tile<V>& out) {
  if (sizeof(A) != 4 || steps <= kChain) return multiply<false>(a, b, steps, out);
  multiply<false>(a, b, kChain, out);
  for (int64_t at = kChain; at < steps; at += kChain)
    multiply<true>(a + at * kRows, b + at * kColumns<A>, steps - at < kChain ? steps - at : kChain, out);
}

// 64 aligned bytes past the caches: y is far larger than they are and is not read back here.
#if defined(__AVX512F__)
constexpr bool kCanStream = true;
FASTDIT_INLINE __m256i half(vf v, bf16) {
  __m256i h;
  store(reinterpret_cast<bf16*>(&h), v);
  return h;
}
FASTDIT_INLINE __m256i half(vf v, f16) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
FASTDIT_INLINE void stream_pair(float* y, vf a, vf b) {
  _mm512_stream_ps(y, (__m512)a);
  _mm512_stream_ps(y + 16, (__m512)b);
}
FASTDIT_INLINE void stream_pair(double* y, vd a, vd b) {
  _mm512_stream_pd(y, (__m512d)a);
  _mm512_stream_pd(y + 8, (__m512d)b);
}
template <class T>
FASTDIT_INLINE void stream_pair(T* y, vf a, vf b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(y),
                      _mm512_inserti64x4(_mm512_zextsi256_si512(half(a, T{})), half(b, T{}), 1));
}
FASTDIT_INLINE void stream_fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T, class V>
FASTDIT_INLINE void stream_pair(T*, V, V) {}
FASTDIT_INLINE void stream_fence() {}
#endif

// One row of a tile: + bias + pos, rounded once. `columns` of the panel exist.
template <class T, class V>
FASTDIT_INLINE void finish(V (&acc)[kVectors], const typename simd<T>::S* bias, const void* pos, int64_t pos_first,
                           bool pos_f32, T* y, int columns, bool stream) {
  constexpr int width = simd<T>::width;
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) acc[j] += load(bias + j * width);
  if (columns == kVectors * width) {
    if (pos) {
      if (sizeof(T) == 2 && pos_f32) {
        const auto* row = static_cast<const typename simd<T>::S*>(pos) + pos_first;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[j] += load(row + j * width);
      } else {
        const T* row = static_cast<const T*>(pos) + pos_first;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[j] += load(row + j * width);
      }
    }
    if (stream) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j += 2) stream_pair(y + j * width, acc[j], acc[j + 1]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(y + j * width, acc[j]);
    }
    return;
  }
  for (int j = 0; j * width < columns; ++j) {
    const int n = columns - j * width < width ? columns - j * width : width;
    if (pos) {
      const int64_t at = pos_first + j * width;
      acc[j] += sizeof(T) == 2 && pos_f32 ? load_n(static_cast<const typename simd<T>::S*>(pos) + at, n)
                                          : load_n(static_cast<const T*>(pos) + at, n);
    }
    store_n(y + j * width, acc[j], n);
  }
}

// Patches and position rows of the tokens [first, first + count), across items.
template <class T, class A>
void gather_block(const PatchEmbedParams& p, int64_t first, int64_t count, int64_t tile_size, A* patches,
                  const void** pos) {
  const int64_t pos_itemsize = itemsize(static_cast<DType>(p.pos_dtype));
  const PatchItem* item = p.items;
  for (int64_t i = 0; i < count;) {
    const int64_t row = first + i;
    while (item + 1 < p.items + p.num_items && row >= item[1].first_row) ++item;
    int64_t token = row - item->first_row;
    const int64_t tokens = item->grid[0] * item->grid[1] * item->grid[2];
    const int64_t b = token / tokens;
    token -= b * tokens;
    const int64_t w = token % item->grid[2], line = token / item->grid[2];
    const int64_t h = line % item->grid[1], t = line / item->grid[1];
    const int lane = static_cast<int>(i % kRows);
    int64_t n = kRows - lane;
    if (n > count - i) n = count - i;
    if (n > item->grid[2] - w) n = item->grid[2] - w;
    const int64_t step = p.patch[2] * item->stride[4];
    const T* x = static_cast<const T*>(item->x) + b * item->stride[0] + t * p.patch[0] * item->stride[2] +
                 h * p.patch[1] * item->stride[3] + w * step;
    gather(p, *item, x, step, patches + i / kRows * tile_size, lane, static_cast<int>(n));
    for (int64_t j = 0; j < n; ++j)
      pos[i + j] = item->pos ? static_cast<const char*>(item->pos) +
                                   (b * item->pos_stride[0] + (token + j) * item->pos_stride[1]) * pos_itemsize
                             : nullptr;
    i += n;
  }
}

template <class T, class A>
void embed(const PatchEmbedParams& p) {
  using S = typename simd<T>::S;
  constexpr int N = kColumns<A>, G = kGroup<A>;
  const int64_t k_size = p.channels * p.patch[0] * p.patch[1] * p.patch[2];
  const int64_t steps = round_up(k_size, G) / G, panels = (p.dim + N - 1) / N;
  const int64_t panel_size = steps * G * N, tile_size = steps * G * kRows;
  const bool weight_f32 = static_cast<DType>(p.weight_dtype) == DType::f32;
  const bool bias_f32 = static_cast<DType>(p.bias_dtype) == DType::f32;
  const bool pos_f32 = static_cast<DType>(p.pos_dtype) == DType::f32;

  const Scratch<int64_t> k_offset(k_size);
  int64_t k = 0;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t t = 0; t < p.patch[0]; ++t)
      for (int64_t h = 0; h < p.patch[1]; ++h)
        for (int64_t w = 0; w < p.patch[2]; ++w)
          k_offset.get()[k++] =
              c * p.weight_stride[1] + t * p.weight_stride[2] + h * p.weight_stride[3] + w * p.weight_stride[4];
  const Scratch<A> weights(panels * panel_size);
  const Scratch<S> bias(panels * N);
  parallel_ranges(panels, p.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t panel = begin; panel < end; ++panel) {
      A* dst = weights.get() + panel * panel_size;
      if (sizeof(A) == sizeof(S) && sizeof(T) == 2 && weight_f32) {
        if constexpr (sizeof(A) == 4) pack_panel<A, float>(p, panel, k_offset.get(), k_size, dst);
      } else {
        pack_panel<A, T>(p, panel, k_offset.get(), k_size, dst);
      }
      for (int64_t d = panel * N; d < (panel + 1) * N; ++d) {
        S b = 0;
        if (p.bias && d < p.dim)
          b = sizeof(T) == 2 && bias_f32 ? static_cast<S>(static_cast<const float*>(p.bias)[d])
                                         : to_scalar(static_cast<const T*>(p.bias)[d]);
        bias.get()[d] = b;
      }
    }
  });

  const int64_t y_bytes = p.rows * p.dim * static_cast<int64_t>(sizeof(T));
  const bool stream =
      kCanStream && y_bytes > kStreamBytes && reinterpret_cast<uintptr_t>(p.y) % 64 == 0 && p.dim * sizeof(T) % 64 == 0;
  parallel_ranges((p.rows + kRows - 1) / kRows, p.threads, [&](int64_t begin, int64_t end, int) {
    const Scratch<A> patches(kTiles * tile_size);
    __builtin_memset(patches.get(), 0, kTiles * tile_size * sizeof(A));  // the lanes and the half pair never written
    const void* pos[kTiles * kRows];
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      const int64_t first = tile * kRows, stop = (tile + kTiles < end ? tile + kTiles : end) * kRows;
      const int64_t count = (stop < p.rows ? stop : p.rows) - first;
      gather_block<T>(p, first, count, tile_size, patches.get(), pos);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t d = panel * N;
        const int columns = static_cast<int>(p.dim - d < N ? p.dim - d : N);
        for (int64_t r = 0; r < count; r += kRows) {
          typename simd<T>::V acc[kRows][kVectors];
          multiply_in_chains(patches.get() + r / kRows * tile_size, weights.get() + panel * panel_size, steps, acc);
          T* y = static_cast<T*>(p.y) + (first + r) * p.dim + d;
          const int rows = static_cast<int>(count - r < kRows ? count - r : kRows);
#pragma GCC unroll 6
          for (int i = 0; i < kRows; ++i)
            if (i < rows) finish(acc[i], bias.get() + d, pos[r + i], d, pos_f32, y + i * p.dim, columns, stream);
        }
      }
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void patch_embed3d_forward(const PatchEmbedParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
      if (static_cast<DType>(p.dtype) == DType::bf16 && p.weight_dtype == p.dtype) return embed<bf16, bf16>(p);
#endif
    embed<T, typename simd<T>::S>(p);
  });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
