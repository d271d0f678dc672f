// A group of modulation rows in L1: what the forward and the backward share.
//
// A step takes two vectors of channels, of bf16 the even and the odd ones (pairs.h); tables are widened into the same
// order once per table row. Rows that share their table rows go in groups, so that a step reads the tables once.
#pragma once

#include "fastdit/modulation.h"
#include "moments.h"
#include "pairs.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// A step over all its channels, or over the first n of them.
struct Full {
  static constexpr bool tail = false;
};
struct Tail {
  static constexpr bool tail = true;
  int n;
};

// Two vectors of channels; paired: the even and the odd ones.
template <class S, bool paired>
struct Lanes {
  using V = typename simd<S>::V;
  static constexpr int w = simd<S>::width;

  template <class P, class Step>
  static FASTDIT_INLINE Pair<V> get(const P* p, Step step) {
    if constexpr (paired && Step::tail) {
      return load_pairs_n(p, step.n);
    } else if constexpr (paired) {
      return load_pairs(p);
    } else if constexpr (Step::tail) {
      return {load_n(p, first(step)), load_n(p + first(step), step.n - first(step))};
    } else {
      return {load(p), load(p + w)};
    }
  }
  template <class P, class Step>
  static FASTDIT_INLINE void put(P* p, Pair<V> v, Step step, bool stream = false) {
    if constexpr (paired && Step::tail) {
      store_pairs_n(p, v, step.n);
    } else if constexpr (paired) {
      store_pairs(p, v, stream);
    } else if constexpr (Step::tail) {
      store_n(p, v.a, first(step));
      store_n(p + first(step), v.b, step.n - first(step));
    } else {
      FASTDIT_ISA::put(p, v.a, stream);
      FASTDIT_ISA::put(p + w, v.b, stream);
    }
  }
  template <class Step>
  static FASTDIT_INLINE int first(Step step) {
    return step.n < w ? step.n : w;
  }
  // Asks for the lines of a step of a row that comes later. The rows are too short, and the arrays too many, for the
  // prefetcher of the machine.
  template <class P>
  static FASTDIT_INLINE void ahead(const P* p) {
    constexpr int line = 64 / sizeof(P);
    for (int i = 0; i < 2 * w; i += line) __builtin_prefetch(p + i, 0, 2);
  }
  // body(c, step) over C channels.
  template <class F>
  static FASTDIT_INLINE void sweep(int64_t C, F&& body) {
    int64_t c = 0;
    for (; c + 2 * w <= C; c += 2 * w) body(c, Full{});
    if (c < C) body(c, Tail{static_cast<int>(C - c)});
  }
};

// A table row as S, staged: padded with zeros to whole steps.
template <class S, bool paired>
void widen(const void* from, int64_t offset, int dtype, S* to, int64_t C) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  FASTDIT_DTYPE_SWITCH(dtype, T, {
    const T* p = static_cast<const T*>(from) + offset;
    if constexpr (!same<typename simd<T>::S, S>) {
      for (int64_t i = 0; i < C; ++i)
        to[i] = static_cast<S>(to_scalar(p[i]));  // then S is double, or no such tables exist
    } else {
      Lanes<S, paired && same<T, bf16>>::sweep(C, [&](int64_t c, auto step) {
        Pair<V> v = Lanes < S, paired && same < T, bf16 >> ::get(p + c, step);
        if constexpr (paired && !same<T, bf16>) v = deinterleave(v.a, v.b, std::make_integer_sequence<int, w>{});
        store_raw(to + c, v.a);
        store_raw(to + c + w, v.b);
      });
    }
  })
}

// The other way: n channels of a staged row.
template <bool paired, class S, class T>
void narrow(const S* from, T* to, int64_t n) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  if constexpr (!same<typename simd<T>::S, S>) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_scalar<T>(static_cast<typename simd<T>::S>(from[i]));
  } else {
    Lanes<S, paired && same<T, bf16>>::sweep(n, [&](int64_t c, auto step) {
      Pair<V> v{load_raw<V>(from + c), load_raw<V>(from + c + w)};
      if constexpr (paired && !same<T, bf16>) v = interleave(v.a, v.b, std::make_integer_sequence<int, w>{});
      Lanes<S, paired && same<T, bf16>>::put(to + c, v, step);
    });
  }
}

// Which row of a table a token reads.
struct RowMap {
  const Table& t;
  int64_t N, tokens;
  const void* index;
  int is64;

  int64_t value(int64_t i) const {
    return is64 ? static_cast<const int64_t*>(index)[i] : static_cast<const int32_t*>(index)[i];
  }
  int64_t offset(int64_t i) const {
    return index ? value(i) * t.stride_m : i / N * t.stride_b + i % N / t.tokens_per_row * t.stride_m;
  }
  int64_t row(int64_t i, int64_t rows_b) const { return index ? value(i) : i / N * rows_b + i % N / t.tokens_per_row; }
  // Tokens i .. end - 1 read one row; with an index there may be more of them.
  int64_t end(int64_t i) const {
    constexpr int64_t kFar = 64;
    if (index) {
      const int64_t last = i + kFar < tokens ? i + kFar : tokens;
      int64_t e = i + 1;
      while (e < last && value(e) == value(i)) ++e;
      return e;
    }
    const int64_t n = i % N, stop = (n / t.tokens_per_row + 1) * t.tokens_per_row;
    return i - n + (stop < N ? stop : N);
  }
};

// One table's current row, staged.
template <class S, bool paired>
struct Cursor {
  S* values;
  int64_t at = -1, end = 0;

  // Whether values changed. Afterwards they serve tokens i .. end - 1.
  bool move(const RowMap& map, int64_t i, int64_t C) {
    if (i < end) return false;
    if (!map.t.data) {
      end = map.tokens;
      return false;
    }
    end = map.end(i);
    const int64_t offset = map.offset(i);
    if (offset == at) return false;
    at = offset;
    widen<S, paired>(map.t.data, offset, map.t.dtype, values, C);
    return true;
  }
};

template <class T, class TR, bool native>
struct Row {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int w = simd<T>::width;
  static constexpr bool paired = same<T, bf16> && same<TR, bf16>;
  using L = Lanes<S, paired>;

  const ModulationParams& p;
  int64_t C, padded, tokens;
  bool stream;  // outputs that the caches do not hold bypass them
  bool grouped;
  bool spread = false;  // who reads the rows asks for the residual's next lines later
  Scratch<S> memory;
  Scratch<TR> stored;           // r of the group
  const TR* value[kRows] = {};  // what the norm reads: r as stored, or y where there is no residual
  S mean[kRows], root[kRows];   // of value
  S post_root[kRows];           // rsqrt(mean(y^2) + post_eps)
  S *post, *affine, *offset;    // affine = weight_offset + weight, offset = bias
  Cursor<S, paired> gate, scale, shift;

  Row(const ModulationParams& params, bool streams, bool groups)
      : p(params),
        C(p.C),
        padded((p.C + 2 * w - 1) / (2 * w) * (2 * w)),
        tokens(p.B * p.N),
        stream(streams),
        grouped(groups),
        memory(6 * padded),
        stored(kRows * padded) {
    S* m = memory.get();
    for (int64_t i = 0; i < 6 * padded; ++i) m[i] = 0;
    post = m;
    affine = m + padded;
    offset = m + 2 * padded;
    gate.values = m + 3 * padded;
    scale.values = m + 4 * padded;
    shift.values = m + 5 * padded;
    if (p.post_weight.data) widen<S, paired>(p.post_weight.data, 0, p.post_weight.dtype, post, C);
    if (p.weight.data) widen<S, paired>(p.weight.data, 0, p.weight.dtype, affine, C);
    if (p.weight_offset != 0)
      for (int64_t c = 0; c < padded; ++c)
        affine[c] = to_scalar(round_scalar(affine[c] + static_cast<S>(p.weight_offset)));
    if (p.bias.data) widen<S, paired>(p.bias.data, 0, p.bias.dtype, offset, C);
  }

  // Whether outputs of T and TR are to be streamed, beside `read` bytes of inputs that take their place in the caches;
  // every store of theirs must be aligned.
  static bool streams(const ModulationParams& p, const void* r, const void* h, int64_t read = 0) {
    const auto aligned = [&](const void* out, int64_t item) {
      return reinterpret_cast<uintptr_t>(out) % 64 == 0 && p.C * item % 64 == 0;
    };
    const int64_t bytes = p.B * p.N * p.C * ((r ? sizeof(TR) : 0) + (h ? sizeof(T) : 0));
    return aligned(r, sizeof(TR)) && aligned(h, sizeof(T)) && outgrow_caches(bytes + read);
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
  // A staged row at step c.
  static FASTDIT_INLINE Pair<V> at(const S* staged, int64_t c) {
    return {load_raw<V>(staged + c), load_raw<V>(staged + c + w)};
  }

  RowMap map(const Table& t, const void* index) const { return {t, p.N, tokens, index, p.index_is_64}; }
  template <class U>
  static U* row_of(U* base, int64_t stride_b, int64_t stride_n, int64_t N, int64_t i) {
    if (i < N || stride_b == N * stride_n) return base + i * stride_n;  // most calls: without divisions
    return base + i / N * stride_b + i % N * stride_n;
  }
  const T* y(int64_t i) const { return row_of(static_cast<const T*>(p.y), p.y_stride_b, p.y_stride_n, p.N, i); }
  const TR* residual(int64_t i) const {
    return row_of(static_cast<const TR*>(p.residual), p.residual_stride_b, p.residual_stride_n, p.N, i);
  }

  // Moves the tables to token i; how many tokens, 1 or kRows, can go together from there.
  int open(int64_t i, int64_t stop) {
    if (gate.move(map(p.gate, p.gate_row_index), i, C) && p.gate_act == GateAct::tanh)
      for (int64_t c = 0; c < padded; c += w) store_raw(gate.values + c, rounded(tanh(load(gate.values + c))));
    if (scale.move(map(p.scale, p.row_index), i, C))
      for (int64_t c = 0; c < padded; c += w) store_raw(scale.values + c, rounded(load(scale.values + c) + S(1)));
    shift.move(map(p.shift, p.row_index), i, C);
    const int64_t last = i + kRows;
    return grouped && last <= stop && last <= gate.end && last <= scale.end && last <= shift.end ? kRows : 1;
  }

  // value[k] = y, or residual + act(gate) * [rms](y) rounded as stored in r, of `count` tokens from i; their moments.
  template <int count, class Claims = NoClaim>
  FASTDIT_INLINE void read(int64_t i, Claims claim = {}) {
    for (int k = 0; k < count; ++k) {
      const T* from = y(i + k);
      if (p.residual)
        gate_residual(i + k, k, from);
      else if constexpr (same<T, TR>)
        value[k] = from;
    }
    if (p.norm == Norm::none) return;
    S square[count];
    moments<count>(value, C, p.norm == Norm::layer, mean, square, claim);
    for (int k = 0; k < count; ++k) root[k] = inverse_root(square[k] + static_cast<S>(p.eps));
  }

  // The same; asks for the lines of `out`, where those rows will be written through the caches.
  template <int count>
  FASTDIT_INLINE void read_before(int64_t i, void* out) {
    if (stream || !out) return read<count>(i);
    T* rows[count];
    for (int k = 0; k < count; ++k) rows[k] = static_cast<T*>(out) + (i + k) * C;
    read<count>(i, Claim<T>{rows});
  }

  void gate_residual(int64_t i, int k, const T* from) {
    const TR* res = residual(i);
    TR* out = p.r ? static_cast<TR*>(p.r) + i * C : nullptr;  // the backward only wants value
    TR* kept = stored.get() + k * padded;
    const bool keep = p.norm != Norm::none && (!out || stream), gated = p.gate.data;
    const bool last = i + kRows >= tokens;  // lines of the next group
    const T* next_y = last ? from : y(i + kRows);
    const TR* next_res = last ? res : residual(i + kRows);
    value[k] = keep ? kept : out;
    const int64_t width = C;
    const auto sweep = [&](auto&& element, auto stores, auto streamed, auto keeps) {
      L::sweep(width, [&](int64_t c, auto step) {
        L::ahead(next_y + c);
        if (!spread) L::ahead(next_res + c);
        const Pair<V> v = element(c, L::get(from + c, step)), r = L::get(res + c, step);
        const Pair<V> sum{r.a + v.a, r.b + v.b};
        if constexpr (stores) L::put(out + c, sum, step, streamed);
        if constexpr (keeps) L::put(kept + c, sum, step);
      });
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    const auto run = [&](auto&& element) {
      if (!out)
        sweep(element, no, no, yes);
      else if (!stream)
        sweep(element, yes, no, no);
      else if (keep)
        sweep(element, yes, yes, yes);
      else
        sweep(element, yes, yes, no);
    };
    const S* const gates = gate.values;
    if (gated && !p.post_norm) {  // the hot case, free of branches
      return run([&](int64_t c, Pair<V> v) -> Pair<V> {
        const Pair<V> g = at(gates, c);
        return {rounded(v.a * g.a), rounded(v.b * g.b)};
      });
    }
    const bool weighted = p.post_weight.data;
    if (p.post_norm) {
      S zero, square;
      moments<1>(&from, C, false, &zero, &square);
      post_root[k] = inverse_root(square + static_cast<S>(p.post_eps));
    }
    run([&](int64_t c, Pair<V> v) -> Pair<V> {
      if (p.post_norm) v = {rounded(v.a * post_root[k]), rounded(v.b * post_root[k])};
      if (p.post_norm && weighted) {
        const Pair<V> u = at(post, c);
        v = {rounded(v.a * u.a), rounded(v.b * u.b)};
      }
      if (gated) {
        const Pair<V> g = at(gates, c);
        v = {rounded(v.a * g.a), rounded(v.b * g.b)};
      }
      return v;
    });
  }
};

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
