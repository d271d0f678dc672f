// Packed weights: [block of output channels][kt][kh or Winograd row][kw][ci][lane], each block's lanes contiguous.
//
// Winograd F(2,3) along H turns the three taps g of H into four rows U g; its data and output transforms are in
// conv.cpp:
//   U = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
#pragma once

#include "conv_tile.h"
#include "fastdit/conv.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int kWinogradRows = 4;

FASTDIT_INLINE int64_t packed_rows(const int64_t* kernel, int winograd) { return winograd ? kWinogradRows : kernel[1]; }

// Elements one output-channel vector takes up: kt * rows * kw * padded cin * lanes.
template <class M>
FASTDIT_INLINE int64_t packed_vector(int64_t cin, const int64_t* kernel, int winograd) {
  return kernel[0] * packed_rows(kernel, winograd) * kernel[2] * padded_channels<M>(cin) * M::lanes;
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
  const int64_t cp = padded_channels<M>(p.cin), rows = packed_rows(p.kernel, p.winograd), kw = p.kernel[2];
  const int64_t per_vector = packed_vector<M>(p.cin, p.kernel, p.winograd);
  const TW* weight = static_cast<const TW*>(p.weight);
  parallel_tasks(blocks.count * p.kernel[0], p.threads, [&](int64_t task, int) {
    const int64_t block = task / p.kernel[0], kt = task % p.kernel[0];
    const int64_t lanes = blocks.size(block) * M::lanes, co0 = blocks.begin(block) * M::lanes;
    A* out = static_cast<A*>(p.packed) + blocks.begin(block) * per_vector + kt * rows * kw * cp * lanes;
    const auto one = [&](int64_t lane, int64_t ci) {
      const int64_t co = co0 + lane;
      const TW* src = weight + co * p.stride[0] + ci * p.stride[1] + kt * p.stride[2];
      A* dst = out + ci / M::step * M::step * lanes + lane * M::step + ci % M::step;
      const int64_t row = kw * cp * lanes;
      const bool exists = co < p.cout && ci < p.cin;
      for (int64_t x = 0; x < kw; ++x, dst += cp * lanes) {
        if (!exists) {
          for (int64_t kh = 0; kh < rows; ++kh) dst[kh * row] = A{};
          continue;
        }
        const auto tap = [&](int64_t kh) { return src[kh * p.stride[3] + x * p.stride[4]]; };
        if (!p.winograd) {
          for (int64_t kh = 0; kh < rows; ++kh) dst[kh * row] = rounded<A, T>(tap(kh));
        } else {
          const auto wide = [&](int64_t kh) -> double { return to_scalar(rounded<S, T>(tap(kh))); };
          const double g0 = wide(0), g1 = wide(1), g2 = wide(2);
          put<M>(dst, g0);
          put<M>(dst + row, 0.5 * (g0 + g1 + g2));
          put<M>(dst + 2 * row, 0.5 * (g0 - g1 + g2));
          put<M>(dst + 3 * row, g2);
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
