// Modulation backward: one pass over the rows, then fixed-order sums for everything that tokens share.
//
//   n = (r - mean) * root,  a = n * w + b,  h = a * (1 + scale) + shift,  r = residual + act(gate) * yn,  yn = [rms](y)
//   g = dh * (1 + scale) * w,     dr = grad_r + root * (g - mean(g) - n * mean(g * n))        (rms: without mean(g))
//   dshift += dh,  dscale += dh * a,  dweight += dh * (1 + scale) * n,  dbias += dh * (1 + scale)
//   dresidual = dr,  dgate += dr * yn * act'(gate),  dyn = dr * act(gate),  dy likewise through the rms
//
// Tokens go in chunks of kChunk consecutive rows whatever the thread count is. A chunk sums into one partial row per
// run of tokens with the same table row; partial rows are added in token order afterwards. So the bits do not depend on
// threads, and no two tokens of a row ever race. Partial rows and tables are staged (modulation_row.h), and read and
// written once for a group of rows.
#include "modulation_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kChunk = 64;

// The runs of one table: run k of all chunks belongs to table row `row[k]`; chunk c owns runs first[c] .. first[c + 1].
template <class S>
struct Runs {
  const TableGrad& grad;
  RowMap map;
  int64_t count = 0, padded;
  Scratch<int64_t> row, first;
  S* partial = nullptr;

  Runs(const TableGrad& g, const RowMap& m, int64_t width)
      : grad(g), map(m), padded(width), row(g.data ? m.tokens + 1 : 1), first(m.tokens / kChunk + 2) {
    if (!g.data) return;
    for (int64_t chunk = 0; chunk * kChunk < map.tokens; ++chunk) {
      first.get()[chunk] = count;
      const int64_t stop = (chunk + 1) * kChunk < map.tokens ? (chunk + 1) * kChunk : map.tokens;
      for (int64_t i = chunk * kChunk; i < stop; i = map.end(i)) {
        const int64_t r = map.row(i, g.rows_b);
        if (count == first.get()[chunk] || r != row.get()[count - 1]) row.get()[count++] = r;
      }
    }
    partial = static_cast<S*>(std::aligned_alloc(64, (count * padded * sizeof(S) + 127) / 64 * 64));
  }
  ~Runs() { std::free(partial); }
};

// out[row] = sum of the partial rows of that table row, in order.
template <class T, bool paired, class S>
void reduce_as(const Runs<S>& runs, int64_t C, int threads) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  const int64_t rows = runs.grad.rows, padded = runs.padded;
  Scratch<int64_t> start(rows + 2), place(runs.count + 1);  // runs by row, stable
  for (int64_t r = 0; r <= rows; ++r) start.get()[r] = 0;
  for (int64_t k = 0; k < runs.count; ++k) ++start.get()[runs.row.get()[k] + 1];
  for (int64_t r = 0; r < rows; ++r) start.get()[r + 1] += start.get()[r];
  {
    Scratch<int64_t> next(rows + 1);
    for (int64_t r = 0; r < rows; ++r) next.get()[r] = start.get()[r];
    for (int64_t k = 0; k < runs.count; ++k) place.get()[next.get()[runs.row.get()[k]]++] = k;
  }
  T* out = static_cast<T*>(runs.grad.data);
  // strips of channels, so that a single shared row still feeds every thread
  constexpr int64_t kStrip = 256;
  const int64_t strips = (padded + kStrip - 1) / kStrip;
  const int helpers = (runs.count + rows) * padded < 65536 ? 1 : threads;
  parallel_tasks(rows * strips, helpers, [&](int64_t task, int) {
    const int64_t r = task / strips, c0 = task % strips * kStrip, width = padded - c0 < kStrip ? padded - c0 : kStrip;
    S total[kStrip] = {};
    for (int64_t s = start.get()[r]; s < start.get()[r + 1]; ++s) {
      const S* from = runs.partial + place.get()[s] * padded + c0;
      for (int64_t c = 0; c < width; c += w) store_raw(total + c, load_raw<V>(total + c) + load_raw<V>(from + c));
    }
    narrow<paired>(total, out + r * C + c0, C - c0 < width ? C - c0 : width);
  });
}

template <bool paired, class S>
void reduce(const Runs<S>& runs, int64_t C, int threads) {
  if (!runs.grad.data) return;
  FASTDIT_DTYPE_SWITCH(runs.grad.dtype, T, reduce_as<T, paired>(runs, C, threads))
}

// Where a chunk adds one table's contributions: the partial row of the current run; null when nobody wants it.
template <class S>
struct Sink {
  Runs<S>& runs;
  int64_t run, last = -1, end = 0;
  S* at = nullptr;

  Sink(Runs<S>& r, int64_t chunk) : runs(r), run(r.grad.data ? r.first.get()[chunk] - 1 : 0) {}
  void move(int64_t i) {
    if (!runs.grad.data || i < end) return;
    end = runs.map.end(i);
    const int64_t r = runs.map.row(i, runs.grad.rows_b);
    if (at && r == last) return;
    last = r;
    at = runs.partial + ++run * runs.padded;
    __builtin_memset(at, 0, runs.padded * sizeof(S));
  }
};

template <class S>
struct Sinks {
  Sink<S> shift, scale, gate, weight, bias, post;

  void move(int64_t i) {
    for (Sink<S>* sink : {&shift, &scale, &gate, &weight, &bias, &post}) sink->move(i);
  }
};

template <class T, class TR>
struct Backward : Row<T, TR, false> {
  using Base = Row<T, TR, false>;
  using S = typename Base::S;
  using V = typename Base::V;
  using L = typename Base::L;
  using Base::p, Base::C, Base::value, Base::mean, Base::root, Base::affine, Base::offset, Base::scale, Base::gate,
      Base::post, Base::post_root, Base::stream, Base::padded, Base::at, Base::row_of;

  const ModulationGradParams& q;
  Scratch<S> d;  // dyn of a row, where the rms of y follows

  explicit Backward(const ModulationGradParams& params)
      : Base(params.forward, Base::streams(params.forward, params.d_residual, params.d_y, inputs(params)), true),
        q(params),
        d(padded) {}

  // Bytes that are read, twice what is written. Measured: streaming pays as soon as both together outgrow the caches,
  // also where the gradient is read next.
  static int64_t inputs(const ModulationGradParams& q) {
    const ModulationParams& p = q.forward;
    const int64_t values = p.B * p.N * p.C, wide = (p.residual ? 1 : 0) + (q.grad_r ? 1 : 0);
    return values * (wide * sizeof(TR) + (q.grad_h ? 2 : 1) * sizeof(T));
  }
  const T* grad_h(int64_t i) const {
    return row_of(static_cast<const T*>(q.grad_h), q.grad_h_stride_b, q.grad_h_stride_n, p.N, i);
  }
  const TR* grad_r(int64_t i) const {
    return row_of(static_cast<const TR*>(q.grad_r), q.grad_r_stride_b, q.grad_r_stride_n, p.N, i);
  }

  static FASTDIT_INLINE Pair<V> times(Pair<V> a, Pair<V> b) { return {a.a * b.a, a.b * b.b}; }
  static FASTDIT_INLINE Pair<V> plus(Pair<V> a, Pair<V> b) { return {a.a + b.a, a.b + b.b}; }
  static FASTDIT_INLINE void keep(S* to, int64_t c, Pair<V> v) {
    store_raw(to + c, v.a);
    store_raw(to + c + Base::w, v.b);
  }

  // What a row gives to dr = g * root - r * slope + rest, with slope = root^2 * mean(g * n) and
  // rest = mean * slope - mean(g) * root. exact: rest = mean(g), and differences come first.
  struct Means {
    S slope, rest;
  };

  // In 16 bits n is r * root - mean * root, one instruction of 32. (fp32 waits for memory, and shows what that rounds.)
  static constexpr bool folds = sizeof(T) == 2 && sizeof(TR) == 2;
  // Whether a row takes differences first all the same, so that zeros stay zeros: its mean is far from 0 in units of
  // its deviation, its deviation below eps, or it has hardly any channels.
  bool careful(int k) const {
    const S from_zero = mean[k] * root[k];
    return !(from_zero <= S(64) && -from_zero <= S(64)) || static_cast<S>(p.eps) * root[k] * root[k] > S(0.5) ||
           C < 2 * Base::w;
  }

  // Sums over h's gradient of `count` rows from i, and its table gradients. adaln: scale and shift alone, both wanted.
  template <int count, bool adaln, bool exact>
  void sums(int64_t i, const Sinks<S>& sinks, Means* means) {
    const bool weighted = !adaln && (p.weight.data || p.weight_offset != 0), biased = !adaln && p.bias.data;
    const bool scaled = adaln || p.scale.data, to_shift = adaln || sinks.shift.at, to_scale = adaln || sinks.scale.at;
    const bool to_weight = !adaln && sinks.weight.at, to_bias = !adaln && sinks.bias.at;
    S *const d_shift = sinks.shift.at, *const d_scale = sinks.scale.at, *const scale_row = scale.values;
    S *const d_weight = sinks.weight.at, *const d_bias = sinks.bias.at;
    V sum_g[count] = {}, sum_gn[count] = {}, center[count], factor[count];
    const bool claims = !stream && q.d_residual;
    const T *dh[count], *next_dh[count];
    const TR *from[count], *written[count];  // written: by outputs()
    for (int k = 0; k < count; ++k) {
      dh[k] = grad_h(i + k), from[k] = value[k];
      next_dh[k] = i + k + count < this->tokens ? grad_h(i + k + count) : dh[k];
      written[k] = claims ? static_cast<const TR*>(q.d_residual) + (i + k) * C : nullptr;
      center[k] = splat(exact ? mean[k] : -(mean[k] * root[k])), factor[k] = splat(root[k]);
    }
    const auto normed = [&](V r, int k) -> V {
      if constexpr (exact) return (r - center[k]) * factor[k];
      return multiply_add(center[k], r, factor[k]);
    };
    L::sweep(C, [&](int64_t c, auto step) {
      Pair<V> shift{}, scales{}, weights{}, biases{}, one{}, w{}, b{};
      if (to_shift) shift = at(d_shift, c);
      if (to_scale) scales = at(d_scale, c);
      if (to_weight) weights = at(d_weight, c);
      if (to_bias) biases = at(d_bias, c);
      if (scaled) one = at(scale_row, c);
      if (weighted) w = at(affine, c);
      if (biased) b = at(offset, c);
      for (int k = 0; k < count; ++k) {
        if (claims) L::ahead(written[k] + c);
        L::ahead(next_dh[k] + c);
        Pair<V> g = L::get(dh[k] + c, step);
        const Pair<V> r = L::get(from[k] + c, step), x{normed(r.a, k), normed(r.b, k)};
        if (to_shift) shift = plus(shift, g);
        if (to_scale) {
          Pair<V> a = x;
          if (weighted) a = times(a, w);
          if (biased) a = plus(a, b);
          scales = plus(scales, times(g, a));
        }
        if (scaled) g = times(g, one);
        if (to_weight) weights = plus(weights, times(g, x));
        if (to_bias) biases = plus(biases, g);
        if (weighted) g = times(g, w);
        sum_g[k] = (sum_g[k] + g.a) + g.b;  // zero beyond the row: dh is
        sum_gn[k] = (sum_gn[k] + g.a * x.a) + g.b * x.b;
      }
      if (to_shift) keep(d_shift, c, shift);
      if (to_scale) keep(d_scale, c, scales);
      if (to_weight) keep(d_weight, c, weights);
      if (to_bias) keep(d_bias, c, biases);
    });
    S total_g[count], total_gn[count];
    sum_each<count>(sum_g, total_g);
    sum_each<count>(sum_gn, total_gn);
    const S share = S(1) / static_cast<S>(C);
    for (int k = 0; k < count; ++k) {
      const S slope = root[k] * root[k] * (total_gn[k] * share),
              level = p.norm == Norm::layer ? total_g[k] * share : S(0);
      means[k] = {slope, exact ? level : unfused(mean[k] * slope) - unfused(level * root[k])};
    }
  }

  // What outputs() may take for granted. adaln: a norm with a scale alone. plain: no post norm, no tanh.
  enum class Kind { adaln, adaln_seam, plain, general };
  Kind kind(const Sinks<S>& sinks) const {
    if (p.post_norm || p.gate_act != GateAct::none) return Kind::general;
    const bool norm = q.grad_h && p.scale.data && !p.weight.data && p.weight_offset == 0 && q.d_y;
    if (norm && !p.residual && !q.grad_r) return Kind::adaln;
    return norm && p.residual && q.grad_r && q.d_residual && sinks.gate.at ? Kind::adaln_seam : Kind::plain;
  }

  // dresidual and dy of `count` rows from i, and what gate and post_weight get. bypass: `stream`, known early where
  // arithmetic is the limit.
  template <int count, Kind kind, bool exact, bool bypass>
  void outputs(int64_t i, const Sinks<S>& sinks, const Means* means) {
    const bool streamed = exact ? stream : bypass;
    constexpr bool lone = kind == Kind::adaln, seam = kind == Kind::adaln_seam, hot = lone || seam;
    constexpr bool plain = kind != Kind::general;
    const bool normed = hot || q.grad_h, scaled = hot || p.scale.data;
    const bool weighted = !hot && (p.weight.data || p.weight_offset != 0), has_residual = seam || (!lone && p.residual);
    const bool gated = seam || (!lone && p.gate.data), to_gate = seam || (!lone && sinks.gate.at);
    const bool has_dr = seam || (!lone && q.grad_r), has_dy = hot || q.d_y, has_d_residual = seam || q.d_residual;
    const bool tanh_gate = !plain && p.gate_act == GateAct::tanh, post_norm = !plain && p.post_norm;
    const bool post_weighted = post_norm && p.post_weight.data, to_post = !plain && sinks.post.at;
    S *const d_gate = sinks.gate.at, *const d_post = sinks.post.at;
    S *const scale_row = scale.values, *const gate_row = gate.values;
    const T *dh[count] = {}, *y[count], *next_y[count];
    const TR *dr[count] = {}, *next_dr[count] = {}, *from[count];
    T* dy[count];
    TR* d_residual[count];
    V sum_dy[count] = {}, center[count], factor[count], slope[count], rest[count];
    for (int k = 0; k < count; ++k) {
      const int64_t j = i + k, ahead = j + count < this->tokens ? j + count : j;
      if (normed) dh[k] = grad_h(j);
      if (has_dr) dr[k] = grad_r(j), next_dr[k] = grad_r(ahead);
      y[k] = this->y(j), next_y[k] = this->y(ahead), from[k] = value[k];
      dy[k] = static_cast<T*>(q.d_y) + j * C, d_residual[k] = static_cast<TR*>(q.d_residual) + j * C;
      if (!normed) continue;
      center[k] = splat(mean[k]), factor[k] = splat(root[k]);
      slope[k] = splat(exact ? means[k].slope : -means[k].slope), rest[k] = splat(means[k].rest);
    }
    const auto through_norm = [&](V g, V r, int k) -> V {
      if constexpr (exact) return multiply_add((g - rest[k]) * factor[k], center[k] - r, slope[k]);
      return multiply_add(multiply_add(rest[k], r, slope[k]), g, factor[k]);
    };
    L::sweep(C, [&](int64_t c, auto step) {
      Pair<V> one{}, g0{}, gates{}, posts{}, pw{};
      if (scaled) one = at(scale_row, c);
      if (weighted) one = scaled ? times(one, at(affine, c)) : at(affine, c);
      if (gated) g0 = at(gate_row, c);
      if (to_gate) gates = at(d_gate, c);
      if (to_post) posts = at(d_post, c);
      if (post_weighted) pw = at(post, c);
      for (int k = 0; k < count; ++k) {
        Pair<V> v{};
        if (normed) {
          v = L::get(dh[k] + c, step);
          if (scaled || weighted) v = times(v, one);
          const Pair<V> r = L::get(from[k] + c, step);
          v = {through_norm(v.a, r.a, k), through_norm(v.b, r.b, k)};
        }
        if (has_dr) {
          L::ahead(next_dr[k] + c);
          v = plus(v, L::get(dr[k] + c, step));
        }
        if (!has_residual) {
          L::ahead(next_y[k] + c);
          if (has_dy) L::put(dy[k] + c, v, step, streamed);
          continue;
        }
        if (has_d_residual) L::put(d_residual[k] + c, v, step, streamed);
        Pair<V> unit = L::get(y[k] + c, step);
        if (post_norm) unit = {unit.a * post_root[k], unit.b * post_root[k]};
        if (to_gate) {
          Pair<V> dg = times(v, post_weighted ? times(unit, pw) : unit);
          if (tanh_gate) dg = {dg.a * (S(1) - g0.a * g0.a), dg.b * (S(1) - g0.b * g0.b)};
          gates = plus(gates, dg);
        }
        if (gated) v = times(v, g0);
        if (to_post) posts = plus(posts, times(v, unit));
        if (post_weighted) v = times(v, pw);
        if (post_norm) {
          sum_dy[k] = multiply_add(multiply_add(sum_dy[k], v.a, unit.a), v.b, unit.b);  // zero beyond the row: y is
          keep(d.get(), c, v);
        } else if (has_dy) {
          L::put(dy[k] + c, v, step, streamed);
        }
      }
      if (to_gate) keep(d_gate, c, gates);
      if (to_post) keep(d_post, c, posts);
    });
    if (!post_norm || !has_dy) return;
    static_assert(plain || count == 1, "d holds one row");
    const S mean_dy = sum(sum_dy[0]) / static_cast<S>(C), unit_root = post_root[0];
    L::sweep(C, [&](int64_t c, auto step) {
      const Pair<V> unit = L::get(y[0] + c, step), g = at(d.get(), c);
      const Pair<V> v{(g.a - unit.a * unit_root * mean_dy) * unit_root,
                      (g.b - unit.b * unit_root * mean_dy) * unit_root};
      L::put(dy[0] + c, v, step, streamed);
    });
  }

  // The tokens i .. i + count - 1, whose rows are read.
  template <int count, bool exact>
  void gradients(int64_t i, const Sinks<S>& sinks) {
    Means means[count];
    if (q.grad_h) {
      const bool vectors = p.weight.data || p.weight_offset != 0 || p.bias.data;
      const bool adaln = !vectors && p.scale.data && sinks.shift.at && sinks.scale.at;
      adaln ? sums<count, true, exact>(i, sinks, means) : sums<count, false, exact>(i, sinks, means);
    }
    if (!q.d_y && !q.d_residual && !sinks.gate.at && !sinks.post.at) return;
    if constexpr (!exact) {
      if (stream) return outputs_of<count, exact, true>(i, sinks, means);
    }
    outputs_of<count, exact, false>(i, sinks, means);
  }
  template <int count, bool exact, bool bypass>
  FASTDIT_INLINE void outputs_of(int64_t i, const Sinks<S>& sinks, const Means* means) {
    switch (kind(sinks)) {
      case Kind::adaln:
        return outputs<count, Kind::adaln, exact, bypass>(i, sinks, means);
      case Kind::adaln_seam:
        return outputs<count, Kind::adaln_seam, exact, bypass>(i, sinks, means);
      case Kind::plain:
        return outputs<count, Kind::plain, exact, bypass>(i, sinks, means);
      case Kind::general:
        if constexpr (count == 1) outputs<1, Kind::general, exact, bypass>(i, sinks, means);
    }
  }

  // The tokens i .. i + count - 1. A row's bits are the same in every group.
  template <int count>
  void group(int64_t i, const Sinks<S>& sinks) {
    this->template read_before<count>(i, q.d_y);
    if constexpr (folds) {
      bool some = false;
      for (int k = 0; k < count; ++k) some |= q.grad_h && careful(k);
      if (!some) return gradients<count, false>(i, sinks);
      for (int k = 0; k < count; ++k) {
        value[0] = value[k], mean[0] = mean[k], root[0] = root[k], post_root[0] = post_root[k];
        careful(0) ? gradients<1, true>(i + k, sinks) : gradients<1, false>(i + k, sinks);
      }
    } else {
      gradients<count, true>(i, sinks);
    }
  }
};

template <class T, class TR>
void run(const ModulationGradParams& q) {
  using S = typename simd<T>::S;
  constexpr int step = 2 * simd<T>::width;
  constexpr bool paired = Row<T, TR, false>::paired;
  const ModulationParams& p = q.forward;
  const int64_t tokens = p.B * p.N, chunks = (tokens + kChunk - 1) / kChunk, C = p.C;
  const int64_t padded = (C + step - 1) / step * step;
  const RowMap by_row{p.shift, p.N, tokens, p.row_index, p.index_is_64};
  const RowMap by_scale{p.scale, p.N, tokens, p.row_index, p.index_is_64};
  const RowMap by_gate{p.gate, p.N, tokens, p.gate_row_index, p.index_is_64};
  Table vector = p.weight;  // a vector is a table of one row
  vector.tokens_per_row = tokens;
  const RowMap all_tokens{vector, tokens, tokens, nullptr, 0};
  Runs<S> shift(q.shift, by_row, padded), scale(q.scale, by_scale, padded), gate(q.gate, by_gate, padded);
  Runs<S> weight(q.weight, all_tokens, padded), bias(q.bias, all_tokens, padded),
      post(q.post_weight, all_tokens, padded);
  const bool one_by_one = p.post_norm || p.gate_act != GateAct::none;
  parallel_ranges(chunks, p.threads, [&](int64_t begin, int64_t end, int) {
    Backward<T, TR> row(q);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Sinks<S> sinks{{shift, chunk}, {scale, chunk}, {gate, chunk}, {weight, chunk}, {bias, chunk}, {post, chunk}};
      const int64_t stop = (chunk + 1) * kChunk < tokens ? (chunk + 1) * kChunk : tokens;
      for (int64_t i = chunk * kChunk; i < stop;) {
        const int count = row.open(i, one_by_one ? i + 1 : stop);
        sinks.move(i);
        count == 1 ? row.template group<1>(i, sinks) : row.template group<kRows>(i, sinks);
        i += count;
      }
    }
    if (row.stream) finish_streams();
  });
  for (const Runs<S>* runs : {&shift, &scale, &gate, &weight, &bias, &post}) reduce<paired>(*runs, C, p.threads);
}

}  // namespace

void modulation_backward(const ModulationGradParams& q) {
  FASTDIT_DTYPE_SWITCH(q.forward.dtype, T, {
    if (q.forward.residual_dtype == q.forward.dtype)
      run<T, T>(q);
    else if constexpr (sizeof(T) == 2)
      run<T, float>(q);
  });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
