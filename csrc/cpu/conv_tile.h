// The register tile of the convolution: kPixels pixels x (NV vectors of output channels).
//
// acc[p][v] = sum over segments, over k:  a[p][k] * b[k][v]        k runs over (kw, ci) merged, contiguous in memory
//
// Lanes are output channels, an activation is broadcast to all of them. On AVX-512 8 x 3 accumulators leave room for
// 3 weight vectors and the broadcast: 24 FMAs for 11 loads. A segment lies within one (kt, kh) tap.
#pragma once

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int kPixels = kVectorBytes == 64 ? 8 : 4;
constexpr int kMaxVectors = 3;

// A value from memory in every lane, by one load. As plain code g++ 12 loads a scalar and then spends a shuffle on the
// FMA units' ports, or folds the load into each of the NV products that use it.
FASTDIT_INLINE vf broadcast(const float* a) {
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
  vf v;
  __asm__("vbroadcastss %1, %0" : "=v"(v) : "m"(*a));
  return v;
#else
  return splat(*a);
#endif
}
FASTDIT_INLINE vd broadcast(const double* a) { return splat(*a); }

// How products are formed: element type in memory (activations and packed weights), accumulator type, elements per
// step.
struct F32Math {
  using A = float;
  using S = float;
  using V = vf;
  static constexpr int lanes = W, step = 1;
  static FASTDIT_INLINE V spread(const A* a) { return broadcast(a); }
  static FASTDIT_INLINE V fma(V acc, V a, const A* b) { return acc + a * load(b); }
};
struct F64Math {
  using A = double;
  using S = double;
  using V = vd;
  static constexpr int lanes = WD, step = 1;
  static FASTDIT_INLINE V spread(const A* a) { return broadcast(a); }
  static FASTDIT_INLINE V fma(V acc, V a, const A* b) { return acc + a * load(b); }
};
#if defined(__AVX512BF16__)
struct BF16Math {  // vdpbf16ps: two products a step, accumulated in fp32; a pair travels as the bits of a float
  typedef float pair_t __attribute__((may_alias, aligned(2)));
  using A = bf16;
  using S = float;
  using V = vf;
  static constexpr int lanes = W, step = 2;
  static FASTDIT_INLINE V spread(const A* a) { return broadcast(reinterpret_cast<const pair_t*>(a)); }
  static FASTDIT_INLINE V fma(V acc, V a, const A* b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(b), (__m512bh)a);
  }
};
#endif

template <class M>
struct Segment {
  const typename M::A* a[kPixels];
  const typename M::A* b;
  int64_t length;  // of k, a multiple of M::step
};

// Where a tile's sums go: they are added up in sum[at[p]], and the last one's total in out[offset[p] + to[i]], times
// sign[i]: a Winograd pass has up to two targets per direction. Direct: no targets, the total stays where it is.
template <class M>
struct Sink {
  typename M::S *sum, *out;
  int64_t at[kPixels], offset[kPixels];
  int valid;         // pixels of the tile that exist
  bool begun, last;  // sum holds something; nothing will be added any more
  int targets;
  int64_t to[4];
  int sign[4];    // +1 or -1
  bool first[4];  // first contribution to a target: store instead of add
};

template <class M, int NV>
FASTDIT_INLINE void deposit(typename M::S* out, const typename M::V (&acc)[NV], int sign, bool first) {
  const typename M::V c = splat(static_cast<typename M::S>(sign));
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    typename M::S* o = out + v * M::lanes;
    store(o, first ? c * acc[v] : load(o) + c * acc[v]);
  }
}

template <class M, int NV>
__attribute__((noinline)) void run_tile(const Segment<M>* segments, int count, const Sink<M>& sink) {
  using V = typename M::V;
  using A = typename M::A;
  V acc[kPixels][NV];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[p][v] = V{};
  for (int s = 0; s < count; ++s) {
    const A* b = segments[s].b;
    const int64_t length = segments[s].length;
    const A* a[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) a[p] = segments[s].a[p];
    for (int64_t k = 0; k < length; k += M::step) {
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const V ap = M::spread(a[p] + k);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[p][v] = M::fma(acc[p][v], ap, b + v * M::lanes * M::step);
      }
      b += NV * M::lanes * M::step;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    if (p >= sink.valid) break;
    typename M::S* sum = sink.sum + sink.at[p];
    if (sink.begun)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[p][v] += load(sum + v * M::lanes);
    if (sink.targets && sink.last) {
      typename M::S* out = sink.out + sink.offset[p];
      for (int i = 0; i < sink.targets; ++i) deposit<M, NV>(out + sink.to[i], acc[p], sink.sign[i], sink.first[i]);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(sum + v * M::lanes, acc[p][v]);
    }
  }
}

template <class M>
FASTDIT_INLINE void run_tile(int vectors, const Segment<M>* segments, int count, const Sink<M>& sink) {
  switch (vectors) {
    case 1:
      return run_tile<M, 1>(segments, count, sink);
    case 2:
      return run_tile<M, 2>(segments, count, sink);
    default:
      return run_tile<M, 3>(segments, count, sink);
  }
}

// Output channels in blocks of at most kMaxVectors vectors, as even as possible (64 -> 2 + 2, 128 -> 3 + 3 + 2).
struct Blocks {
  int64_t vectors, count;
  Blocks(int64_t channels, int lanes)
      : vectors((channels + lanes - 1) / lanes), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t i) const { return vectors * i / count; }
  int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

// Channels of an activated pixel in memory: pairs must not straddle two pixels.
template <class M>
FASTDIT_INLINE int64_t padded_channels(int64_t cin) {
  return (cin + M::step - 1) / M::step * M::step;
}

}  // namespace fastdit::cpu::FASTDIT_ISA
