// Packed weights: [block of output channels][kt][kh][kw][ci][lane], each block's lanes contiguous.
//
// Winograd F(2,3) along H turns the three taps g of H into four rows U g, over H and W the nine into U g U^T, sixteen
// rows of one column; the data and output transforms are in conv.cpp:
//   U = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
#pragma once

#include "conv_tile.h"
#include "fastdit/conv.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int kWinograd = 4;  // products along a direction for two outputs

// Of a packed kernel, over H and W.
struct Taps {
  int64_t rows, columns;
};
FASTDIT_INLINE Taps packed_taps(const int64_t* kernel, int winograd) {
  switch (static_cast<Winograd>(winograd)) {
    case Winograd::rows:
      return {kWinograd, kernel[2]};
    case Winograd::tiles:
      return {kWinograd * kWinograd, 1};
    case Winograd::none:
      break;
  }
  return {kernel[1], kernel[2]};
}

// Elements one output-channel vector takes up: kt * rows * columns * padded cin * lanes.
template <class M>
FASTDIT_INLINE int64_t packed_vector(int64_t cin, const int64_t* kernel, int winograd) {
  const Taps taps = packed_taps(kernel, winograd);
  return kernel[0] * taps.rows * taps.columns * padded_channels<M>(cin) * M::lanes;
}

struct Four {
  double u[kWinograd];
};
FASTDIT_INLINE Four winograd_taps(double g0, double g1, double g2) {
  return {{g0, 0.5 * (g0 + g1 + g2), 0.5 * (g0 - g1 + g2), g2}};
}

template <class M>
FASTDIT_INLINE void put(typename M::A* dst, double value) {
  *dst = from_scalar<typename M::A>(static_cast<typename M::S>(value));
}

// v rounded to T, as A.
template <class A, class T, class TW>
FASTDIT_INLINE A rounded(TW v) {
  if constexpr (__is_same(TW, T) && __is_same(T, A)) {
    return v;
  } else {
    const T narrow = from_scalar<T>(static_cast<typename simd<T>::S>(to_scalar(v)));
    if constexpr (__is_same(T, A))
      return narrow;
    else
      return from_scalar<A>(static_cast<typename simd<A>::S>(to_scalar(narrow)));
  }
}

// Weights of type TW, rounded to x's type T, packed for M. One task packs one (block, kt).
template <class M, class TW, class T>
inline void pack(const ConvPackParams& p) {
  using S = typename M::S;
  using A = typename M::A;
  const Blocks blocks(p.cout, M::lanes);
  const int64_t cp = padded_channels<M>(p.cin);
  const Taps taps = packed_taps(p.kernel, p.winograd);
  const int64_t per_vector = packed_vector<M>(p.cin, p.kernel, p.winograd);
  const TW* weight = static_cast<const TW*>(p.weight);
  parallel_tasks(blocks.count * p.kernel[0], p.threads, [&](int64_t task, int) {
    const int64_t block = task / p.kernel[0], kt = task % p.kernel[0];
    const int64_t lanes = blocks.size(block) * M::lanes, co0 = blocks.begin(block) * M::lanes;
    A* out = static_cast<A*>(p.packed) + blocks.begin(block) * per_vector + kt * taps.rows * taps.columns * cp * lanes;
    const auto one = [&](int64_t lane, int64_t ci) {
      const int64_t co = co0 + lane;
      const TW* src = weight + co * p.stride[0] + ci * p.stride[1] + kt * p.stride[2];
      A* dst = out + ci / M::step * M::step * lanes + lane * M::step + ci % M::step;
      const auto at = [&](int64_t row, int64_t column) { return dst + (row * taps.columns + column) * cp * lanes; };
      const auto tap = [&](int64_t kh, int64_t x) { return src[kh * p.stride[3] + x * p.stride[4]]; };
      const auto along_h = [&](int64_t x) {
        const auto wide = [&](int64_t kh) -> double { return to_scalar(rounded<S, T>(tap(kh, x))); };
        return winograd_taps(wide(0), wide(1), wide(2));
      };
      if (co >= p.cout || ci >= p.cin) {
        for (int64_t i = 0; i < taps.rows * taps.columns; ++i) *at(0, i) = A{};
      } else if (p.winograd == static_cast<int>(Winograd::tiles)) {
        const Four g0 = along_h(0), g1 = along_h(1), g2 = along_h(2);
        for (int i = 0; i < kWinograd; ++i) {
          const Four both = winograd_taps(g0.u[i], g1.u[i], g2.u[i]);
          for (int j = 0; j < kWinograd; ++j) put<M>(at(kWinograd * i + j, 0), both.u[j]);
        }
      } else {
        for (int64_t x = 0; x < taps.columns; ++x) {
          if (p.winograd) {
            const Four g = along_h(x);
            for (int i = 0; i < kWinograd; ++i) put<M>(at(i, x), g.u[i]);
          } else {
            for (int64_t kh = 0; kh < taps.rows; ++kh) *at(kh, x) = rounded<A, T>(tap(kh, x));
          }
        }
      }
    };
    // along memory: a transposed weight (the gradient of the input) has its lanes side by side
    if (p.stride[0] < p.stride[1]) {
      for (int64_t ci = 0; ci < cp; ++ci)
        for (int64_t lane = 0; lane < lanes; ++lane) one(lane, ci);
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t ci = 0; ci < cp; ++ci) one(lane, ci);
    }
  });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
