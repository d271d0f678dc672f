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

  // adaLN-Zero, free of branches. Pointers and tables are locals: as members they would be loaded after every store.
  template <int count, bool streamed>
  FASTDIT_INLINE void modulate(T* out, const TR* const* next) {
    V center[count], factor[count];
    const TR *from[count], *later[count];
    for (int k = 0; k < count; ++k)
      center[k] = splat(mean[k]), factor[k] = splat(root[k]), from[k] = value[k], later[k] = next ? next[k] : nullptr;
    const S *one_scale = scale.values, *one_shift = shift.values;
    const int64_t width = C;
    const auto run = [&](auto prefetches) {
      L::sweep(width, [&](int64_t c, auto step) {
        const Pair<V> s = at(one_scale, c), b = at(one_shift, c);
        for (int k = 0; k < count; ++k) {
          if constexpr (prefetches) L::ahead(later[k] + c);
          const Pair<V> r = L::get(from[k] + c, step);
          const Pair<V> x{rounded((r.a - center[k]) * factor[k]), rounded((r.b - center[k]) * factor[k])};
          L::put(out + k * width + c, Pair<V>{rounded(x.a * s.a) + b.a, rounded(x.b * s.b) + b.b}, step, streamed);
        }
      });
    };
    if (next)
      run(std::true_type{});
    else
      run(std::false_type{});
  }

  // h = n(value) * (1 + scale) + shift for `count` tokens from i.
  template <int count>
  FASTDIT_INLINE void norm_modulate(int64_t i) {
    T* out = static_cast<T*>(p.h) + i * C;
    const bool has_weight = p.weight.data || p.weight_offset != 0, has_bias = p.bias.data;
    const bool has_scale = p.scale.data, has_shift = p.shift.data;
    const bool rms = p.norm == Norm::rms;
    // Rows whose lines are asked for meanwhile. Measured: fp32 rows without a residual gain only where outputs are
    // streamed.
    const TR* rows[count];
    const TR* const* const next = p.residual || sizeof(T) == 2 || stream ? rows : nullptr;
    for (int k = 0; k < count; ++k)
      rows[k] = !p.residual                    ? value[k] + count * p.y_stride_n
                : i + k + kRows < this->tokens ? this->residual(i + k + kRows)
                                               : value[k];
    if (!has_weight && !has_bias && has_scale && has_shift) {  // adaLN-Zero: the hot case, free of branches
      if (stream)
        modulate<count, true>(out, next);
      else
        modulate<count, false>(out, next);
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
        if (next) L::ahead(next[k] + c);
        const Pair<V> r = L::get(value[k] + c, step);
        const int64_t d = c + L::w;
        const Pair<V> h{element(r.a, affine + c, offset + c, scale.values + c, shift.values + c),
                        element(r.b, affine + d, offset + d, scale.values + d, shift.values + d)};
        L::put(out + k * C + c, h, step, stream);
      });
    }
  }

  template <int count>
  FASTDIT_INLINE void tokens_from(int64_t i) {
    this->template read_before<count>(i, p.h);
    if (p.norm != Norm::none) norm_modulate<count>(i);
  }
};

template <class T, class TR, bool native>
void run(const ModulationParams& p) {
  const int64_t rows = p.B * p.N;
  // below about 64 KB a second thread costs more than it saves
  const int threads = rows * p.C < 16384 ? 1 : p.threads;
  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int) {
    // Measured: fp32 rows are faster one by one as long as a row and its tables stay in L1, with a residual up to 1,024
    // channels.
    const bool groups = sizeof(T) == 2 || 3 * p.C * int64_t{sizeof(T)} > (p.residual ? 12 : 32) * 1024;
    Forward<T, TR, native> row(p, Row<T, TR, native>::streams(p, p.r, p.h), groups);
    row.spread = p.norm != Norm::none;
    for (int64_t i = begin; i < end;) {
      const int count = row.open(i, end);
      count == 1 ? row.template tokens_from<1>(i) : row.template tokens_from<kRows>(i);
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
