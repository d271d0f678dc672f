// Modulation forward, one row at a time:
//   r = residual + act(gate) * [rms](y)
//   h = n(r) * (1 + scale) + shift
//
// Three passes over a row that stays in L1 in its own dtype: its sum, its centred squares, h. So memory sees each
// tensor exactly once. Table rows are widened when the row map moves to another row: N / M tokens share one, and a
// per-token table costs one more pass over L1.
#include "modulation_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class T, class TR, bool native>
struct Forward : Row<T, TR, native> {
  using Base = Row<T, TR, native>;
  using S = typename Base::S;
  using V = typename Base::V;
  static constexpr int w = Base::w;
  using Base::Base, Base::p, Base::C, Base::value, Base::affine, Base::offset, Base::scale, Base::shift, Base::rounded,
      Base::stream;

  // h = n(value) * (1 + scale) + shift
  void norm_modulate(int64_t b, int64_t n) {
    this->move_norm_tables(b, n);
    S mean, root;
    this->statistics(mean, root);
    T* out = static_cast<T*>(p.h) + (b * p.N + n) * C;
    const bool has_weight = p.weight.data || p.weight_offset != 0, has_bias = p.bias.data;
    const bool has_scale = p.scale.data, has_shift = p.shift.data;
    const bool rms = p.norm == Norm::rms;
    auto run = [&](auto&& element) {
      int64_t c = 0;
      for (; c + w <= C; c += w) put(out + c, element(c, load(value + c)), stream);
      if (const int tail = static_cast<int>(C - c); tail) store_n(out + c, element(c, load_n(value + c, tail)), tail);
    };
    if (!has_weight && !has_bias && has_scale && has_shift) {  // adaLN-Zero: the hot case, free of branches
      run([&](int64_t c, V r) {
        const V x = rounded((r - mean) * root);
        return rounded(x * load(scale.values + c)) + load(shift.values + c);
      });
      return;
    }
    run([&](int64_t c, V r) {
      V x = (r - mean) * root;
      if (rms) x = rounded(x);  // eager RMSNorm rounds before its affine part, F.layer_norm only after it
      if (has_weight) x = x * load(affine + c);
      if (rms && has_weight) x = rounded(x);
      if (has_bias) x = x + load(offset + c);
      x = rounded(x);
      if (has_scale) x = rounded(x * load(scale.values + c));
      if (has_shift) x = x + load(shift.values + c);
      return x;
    });
  }
};

template <class T, class TR, bool native>
void run(const ModulationParams& p) {
  const int64_t rows = p.B * p.N;
  // below about 64 KB a second thread costs more than it saves
  const int threads = rows * p.C < 16384 ? 1 : p.threads;
  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int) {
    Forward<T, TR, native> row(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.N, n = i % p.N;
      row.gate_residual(b, n);
      if (p.norm != Norm::none) row.norm_modulate(b, n);
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
