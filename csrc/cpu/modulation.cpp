// Modulation forward:
//   r = residual + act(gate) * [rms](y)
//   h = n(r) * (1 + scale) + shift
//
// A few rows at a time stay in L1 in their own dtype from their statistics to h, so memory sees each tensor exactly
// once. The lines of the rows after them are asked for meanwhile.
#include "modulation_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class T, class TR, bool native>
struct Forward : Row<T, TR, native> {
  using Base = Row<T, TR, native>;
  using S = typename Base::S;
  using V = typename Base::V;
  using L = typename Base::L;
  using Base::Base, Base::p, Base::C, Base::value, Base::mean, Base::root, Base::affine, Base::offset, Base::scale,
      Base::shift, Base::rounded, Base::stream, Base::at;

  // h = n(value) * (1 + scale) + shift for `count` tokens from i.
  template <int count>
  void norm_modulate(int64_t i) {
    T* out = static_cast<T*>(p.h) + i * C;
    const bool has_weight = p.weight.data || p.weight_offset != 0, has_bias = p.bias.data;
    const bool has_scale = p.scale.data, has_shift = p.shift.data;
    const bool rms = p.norm == Norm::rms;
    const T* next[count];  // y is read here for the first time only where there is no residual
    for (int k = 0; k < count; ++k)
      next[k] = p.residual || i + k + count >= this->tokens ? nullptr : this->y(i + k + count);
    // measured: fp32 rows gain from it only where outputs are streamed
    const bool ahead = next[count - 1] && (sizeof(T) == 2 || stream);
    if (!has_weight && !has_bias && has_scale && has_shift) {  // adaLN-Zero: the hot case, free of branches
      V center[count], factor[count];
      for (int k = 0; k < count; ++k) center[k] = splat(mean[k]), factor[k] = splat(root[k]);
      L::sweep(C, [&](int64_t c, auto step) {
        const Pair<V> s = at(scale.values, c), b = at(shift.values, c);
        for (int k = 0; k < count; ++k) {
          if (ahead) L::ahead(next[k] + c);
          const Pair<V> r = L::get(value[k] + c, step);
          const Pair<V> x{rounded((r.a - center[k]) * factor[k]), rounded((r.b - center[k]) * factor[k])};
          L::put(out + k * C + c, Pair<V>{rounded(x.a * s.a) + b.a, rounded(x.b * s.b) + b.b}, step, stream);
        }
      });
      return;
    }
    for (int k = 0; k < count; ++k) {
      const auto element = [&](V r, const S* weight, const S* bias, const S* one_scale, const S* one_shift) {
        V x = (r - mean[k]) * root[k];
        if (rms) x = rounded(x);  // eager RMSNorm rounds before its affine part, F.layer_norm only after it
        if (has_weight) x = x * load(weight);
        if (rms && has_weight) x = rounded(x);
        if (has_bias) x = x + load(bias);
        x = rounded(x);
        if (has_scale) x = rounded(x * load(one_scale));
        if (has_shift) x = x + load(one_shift);
        return x;
      };
      L::sweep(C, [&](int64_t c, auto step) {
        if (ahead) L::ahead(next[k] + c);
        const Pair<V> r = L::get(value[k] + c, step);
        const int64_t d = c + L::w;
        const Pair<V> h{element(r.a, affine + c, offset + c, scale.values + c, shift.values + c),
                        element(r.b, affine + d, offset + d, scale.values + d, shift.values + d)};
        L::put(out + k * C + c, h, step, stream);
      });
    }
  }
};

template <class T, class TR, bool native>
void run(const ModulationParams& p) {
  const int64_t rows = p.B * p.N;
  // below about 64 KB a second thread costs more than it saves
  const int threads = rows * p.C < 16384 ? 1 : p.threads;
  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int) {
    Forward<T, TR, native> row(p, Row<T, TR, native>::streams(p, p.r, p.h));
    constexpr bool groups = sizeof(T) == 2;  // measured: of fp32 one by one is faster
    for (int64_t i = begin; i < end;) {
      const int count = row.open(i, groups ? end : i + 1);
      for (int k = 0; k < count; ++k) row.read(i + k, k);
      if (p.norm != Norm::none) {
        if (groups && count == kRows)
          row.template norm_modulate<groups ? kRows : 1>(i);
        else
          row.template norm_modulate<1>(i);
      }
      i += count;
    }
    if (row.stream) finish_streams();
  });
}

template <class T, class TR>
void by_law(const ModulationParams& p) {
  if (p.native && sizeof(T) == 2)
    run<T, TR, true>(p);
  else
    run<T, TR, false>(p);  // in fp32 and fp64 every operation rounds to the dtype anyway
}

}  // namespace

void modulation_forward(const ModulationParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
    if (p.residual_dtype == p.dtype)
      by_law<T, T>(p);
    else if constexpr (sizeof(T) == 2)
      by_law<T, float>(p);
  });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
