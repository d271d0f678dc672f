// One row of modulation in L1: what the forward and the backward share.
#pragma once

#include "fastdit/modulation.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class T, class S>
void widen_as(const void* from, S* to, int64_t C) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  const T* p = static_cast<const T*>(from);
  int64_t c = 0;
  if constexpr (sizeof(typename simd<T>::S) == sizeof(S)) {
    for (; c + w <= C; c += w) store_raw(to + c, static_cast<V>(load(p + c)));
  }
  for (; c < C; ++c) to[c] = static_cast<S>(to_scalar(p[c]));
}

template <class S>
void widen(const void* from, int64_t offset, int dtype, S* to, int64_t C) {
  FASTDIT_DTYPE_SWITCH(dtype, T, widen_as<T>(static_cast<const T*>(from) + offset, to, C));
}

// One table's current row, widened; `row` reports whether it moved.
template <class S>
struct Cursor {
  S* values;
  int64_t offset = -1;

  bool move(const Table& t, int64_t b, int64_t n, int64_t N, const void* index, int is64, int64_t C) {
    if (!t.data) return false;
    int64_t at;
    if (index) {
      const int64_t i = b * N + n;
      at = (is64 ? static_cast<const int64_t*>(index)[i] : static_cast<const int32_t*>(index)[i]) * t.stride_m;
    } else {
      at = b * t.stride_b + (n / t.tokens_per_row) * t.stride_m;
    }
    if (at == offset) return false;
    offset = at;
    widen(t.data, at, t.dtype, values, C);
    return true;
  }
};

template <class S>
FASTDIT_INLINE S inverse_root(S x) {
  return S(1) / (sizeof(S) == 8 ? static_cast<S>(__builtin_sqrt(x)) : static_cast<S>(__builtin_sqrtf(x)));
}

template <class P, class S>
S sum_squares(const P* row, S mean, int64_t C) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  V a{}, b{}, d{}, e{};
  int64_t c = 0;
  for (; c + 4 * w <= C; c += 4 * w) {
    const V u = load(row + c) - mean, v = load(row + c + w) - mean;
    const V x = load(row + c + 2 * w) - mean, y = load(row + c + 3 * w) - mean;
    a += u * u;
    b += v * v;
    d += x * x;
    e += y * y;
  }
  for (; c + w <= C; c += w) {
    const V u = load(row + c) - mean;
    a += u * u;
  }
  S tail = 0;
  for (; c < C; ++c) tail += (to_scalar(row[c]) - mean) * (to_scalar(row[c]) - mean);
  return sum((a + b) + (d + e)) + tail;
}

template <class T, class TR, bool native>
struct Row {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int w = simd<T>::width;

  const ModulationParams& p;
  int64_t C, padded;
  bool stream;  // outputs larger than the caches bypass them
  Scratch<S> memory;
  Scratch<TR> stored;         // r of this token
  const TR* value = nullptr;  // what the norm reads: r as stored, or y where there is no residual
  S *post, *affine, *offset;  // affine = weight_offset + weight, offset = bias
  Cursor<S> gate, scale, shift;

  explicit Row(const ModulationParams& params)
      : p(params), C(p.C), padded((p.C + w - 1) / w * w), stream(streams(params)), memory(6 * padded), stored(padded) {
    S* m = memory.get();
    for (int64_t i = 0; i < 6 * padded; ++i) m[i] = 0;
    post = m;
    affine = m + padded;
    offset = m + 2 * padded;
    gate.values = m + 3 * padded;
    scale.values = m + 4 * padded;
    shift.values = m + 5 * padded;
    if (p.post_weight.data) widen(p.post_weight.data, 0, p.post_weight.dtype, post, C);
    if (p.weight.data) widen(p.weight.data, 0, p.weight.dtype, affine, C);
    if (p.weight_offset != 0)
      for (int64_t c = 0; c < C; ++c) affine[c] = to_scalar(round_scalar(affine[c] + static_cast<S>(p.weight_offset)));
    if (p.bias.data) widen(p.bias.data, 0, p.bias.dtype, offset, C);
  }

  static bool streams(const ModulationParams& p) {
    const auto aligned = [&](const void* out, int64_t item) {
      return reinterpret_cast<uintptr_t>(out) % 64 == 0 && p.C * item % 64 == 0;
    };
    const int64_t bytes = p.B * p.N * p.C * ((p.r ? sizeof(TR) : 0) + (p.h ? sizeof(T) : 0));
    return aligned(p.r, sizeof(TR)) && aligned(p.h, sizeof(T)) && 2 * bytes > last_level_cache();
  }
  static auto round_scalar(S x) {
    if constexpr (native)
      return from_scalar<T>(x);
    else
      return x;
  }
  static FASTDIT_INLINE V rounded(V v) {
    if constexpr (native)
      return round_to<T>(v);
    else
      return v;
  }

  S total = 0;      // sum of value
  S post_root = 1;  // rsqrt(mean(y^2) + post_eps)

  // value = y, or residual + act(gate) * [rms](y) rounded as stored in r.
  void gate_residual(int64_t b, int64_t n) {
    const T* y = static_cast<const T*>(p.y) + b * p.y_stride_b + n * p.y_stride_n;
    V sum_a{}, sum_b{};
    int64_t c = 0;
    if (!p.residual) {
      if constexpr (sizeof(T) == sizeof(TR)) value = reinterpret_cast<const TR*>(y);  // then T is TR
      if (p.norm != Norm::layer) return;
      for (; c + 2 * w <= C; c += 2 * w) {
        sum_a += load(y + c);
        sum_b += load(y + c + w);
      }
      for (; c < C; c += w) sum_a += c + w <= C ? load(y + c) : load_n(y + c, static_cast<int>(C - c));
      total = sum(sum_a + sum_b);
      return;
    }
    if (gate.move(p.gate, b, n, p.N, p.gate_row_index, p.index_is_64, C) && p.gate_act == GateAct::tanh)
      for (int64_t c = 0; c < padded; c += w) store_raw(gate.values + c, rounded(tanh(load(gate.values + c))));
    const bool gated = p.gate.data;
    const TR* residual = static_cast<const TR*>(p.residual) + b * p.residual_stride_b + n * p.residual_stride_n;
    TR* out = p.r ? static_cast<TR*>(p.r) + (b * p.N + n) * C : nullptr;  // the backward only wants value
    value = stored.get();
    if (p.post_norm) post_root = inverse_root(sum_squares(y, S(0), C) / static_cast<S>(C) + static_cast<S>(p.post_eps));
    const bool post = p.post_norm, weighted = p.post_weight.data;
    auto element = [&](int64_t c, V from, V res) {
      V v = from;
      if (post) {
        v = rounded(v * post_root);
        if (weighted) v = rounded(v * load(this->post + c));
      }
      if (gated) v = rounded(v * load(gate.values + c));
      return res + v;
    };
    for (; c + w <= C; c += w) {
      const V v = element(c, load(y + c), load(residual + c));
      if (out) put(out + c, v, stream);
      store(stored.get() + c, v);
      sum_a += round_to<TR>(v);
    }
    if (const int tail = static_cast<int>(C - c); tail) {
      const V v = element(c, load_n(y + c, tail), load_n(residual + c, tail));
      if (out) store_n(out + c, v, tail);
      store(stored.get() + c, v);
      sum_a += round_to<TR>(v);  // zero beyond the row: y, residual and gate are
    }
    total = sum(sum_a + sum_b);
  }

  // Statistics of value, as the norm takes them.
  void statistics(S& mean, S& root) const {
    mean = p.norm == Norm::layer ? total / static_cast<S>(C) : S(0);
    root = inverse_root(sum_squares(value, mean, C) / static_cast<S>(C) + static_cast<S>(p.eps));
  }

  void move_norm_tables(int64_t b, int64_t n) {
    if (scale.move(p.scale, b, n, p.N, p.row_index, p.index_is_64, C))
      for (int64_t c = 0; c < padded; c += w) store_raw(scale.values + c, rounded(load(scale.values + c) + S(1)));
    shift.move(p.shift, b, n, p.N, p.row_index, p.index_is_64, C);
  }
};

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
