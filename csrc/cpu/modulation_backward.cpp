// Modulation backward: one pass over the rows, then fixed-order sums for everything that tokens share.
//
//   n = (r - mean) * root,  a = n * w + b,  h = a * (1 + scale) + shift,  r = residual + act(gate) * yn,  yn = [rms](y)
//   g = dh * (1 + scale) * w,     dr = grad_r + root * (g - mean(g) - n * mean(g * n))        (rms: without mean(g))
//   dshift += dh,  dscale += dh * a,  dweight += dh * (1 + scale) * n,  dbias += dh * (1 + scale)
//   dresidual = dr,  dgate += dr * yn * act'(gate),  dyn = dr * act(gate),  dy likewise through the rms
//
// Tokens go in chunks of kChunk consecutive rows whatever the thread count is. A chunk sums into one partial row per
// run of tokens with the same table row; partial rows are added in token order afterwards. So the bits do not depend on
// threads, and no two tokens of a row ever race.
#include "modulation_row.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kChunk = 64;

FASTDIT_INLINE int64_t table_row(const Table& t, int64_t rows_b, int64_t i, int64_t N, const void* index, int is64) {
  if (index) return is64 ? static_cast<const int64_t*>(index)[i] : static_cast<const int32_t*>(index)[i];
  return i / N * rows_b + i % N / t.tokens_per_row;
}

// The runs of one table: run k of all chunks belongs to table row `row[k]`; chunk c owns runs first[c] .. first[c + 1].
template <class S>
struct Runs {
  const TableGrad& grad;
  int64_t count = 0;
  Scratch<int64_t> row, first;
  S* partial = nullptr;

  Runs(const TableGrad& g, const Table& t, int64_t tokens, int64_t N, const void* index, int is64, int64_t C)
      : grad(g), row(g.data ? tokens + 1 : 1), first(tokens / kChunk + 2) {
    if (!g.data) return;
    for (int64_t i = 0; i < tokens; ++i) {
      if (i % kChunk == 0) first.get()[i / kChunk] = count;
      const int64_t r = table_row(t, g.rows_b, i, N, index, is64);
      if (i % kChunk == 0 || r != row.get()[count - 1]) row.get()[count++] = r;
    }
    partial = static_cast<S*>(std::aligned_alloc(64, (count * C * sizeof(S) + 127) / 64 * 64));
  }
  ~Runs() { std::free(partial); }
};

// out[row] = sum of the partial rows of that table row, in order.
template <class T, class S>
void reduce_as(const Runs<S>& runs, int64_t C, int threads) {
  using V = typename simd<S>::V;
  constexpr int w = simd<S>::width;
  const int64_t rows = runs.grad.rows;
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
  const int64_t strips = (C + kStrip - 1) / kStrip;
  parallel_tasks(rows * strips, threads, [&](int64_t task, int) {
    const int64_t r = task / strips, c0 = task % strips * kStrip, width = C - c0 < kStrip ? C - c0 : kStrip;
    S total[kStrip] = {};
    for (int64_t s = start.get()[r]; s < start.get()[r + 1]; ++s) {
      const S* from = runs.partial + place.get()[s] * C + c0;
      int64_t c = 0;
      for (; c + w <= width; c += w) store_raw(total + c, load_raw<V>(total + c) + load_raw<V>(from + c));
      for (; c < width; ++c) total[c] += from[c];
    }
    for (int64_t c = 0; c < width; ++c) {
      if constexpr (sizeof(typename simd<T>::S) == sizeof(S))
        out[r * C + c0 + c] = from_scalar<T>(total[c]);
      else
        out[r * C + c0 + c] = static_cast<T>(total[c]);
    }
  });
}

template <class S>
void reduce(const Runs<S>& runs, int64_t C, int threads) {
  if (!runs.grad.data) return;
  if constexpr (sizeof(S) == 8) {
    reduce_as<double>(runs, C, threads);  // fp64 inputs have fp64 tables: promote() leaves nothing else
  } else {
    switch (static_cast<DType>(runs.grad.dtype)) {
      case DType::f32:
        return reduce_as<float>(runs, C, threads);
      case DType::bf16:
        return reduce_as<bf16>(runs, C, threads);
      case DType::f16:
        return reduce_as<f16>(runs, C, threads);
      case DType::f64:
        return;
    }
  }
}

// Where a chunk adds one table's contributions: the partial row of the current run.
template <class S>
struct Sink {
  Runs<S>& runs;
  int64_t run, last = -1;
  S* at = nullptr;

  Sink(Runs<S>& r, int64_t chunk) : runs(r), run(r.grad.data ? r.first.get()[chunk] - 1 : 0) {}
  void move(const Table& t, int64_t i, int64_t N, const void* index, int is64, int64_t C) {
    if (!runs.grad.data) return;
    const int64_t r = table_row(t, runs.grad.rows_b, i, N, index, is64);
    if (at && r == last) return;
    last = r;
    at = runs.partial + ++run * C;
    for (int64_t c = 0; c < C; ++c) at[c] = 0;
  }
};

template <class V, class S>
FASTDIT_INLINE void add(S* at, int64_t c, V v) {
  store_raw(at + c, load_raw<V>(at + c) + v);
}

template <class T, class TR>
struct Backward : Row<T, TR, false> {
  using Base = Row<T, TR, false>;
  using S = typename Base::S;
  using V = typename Base::V;
  static constexpr int w = Base::w;
  using Base::Base, Base::p, Base::C, Base::value, Base::affine, Base::offset, Base::scale, Base::gate, Base::post,
      Base::post_root;

  // Calls body(c, width) per vector of the row; the last may be narrower.
  template <class F>
  static FASTDIT_INLINE void sweep(int64_t C, F&& body) {
    int64_t c = 0;
    for (; c + w <= C; c += w) body(c, w);
    if (c < C) body(c, static_cast<int>(C - c));
  }
  template <class P>
  static FASTDIT_INLINE V get(const P* from, int64_t c, int width) {
    return width == w ? load(from + c) : load_n(from + c, width);
  }
  template <class P>
  static FASTDIT_INLINE void put(P* to, int64_t c, V v, int width) {
    if (width == w)
      store(to + c, v);
    else
      store_n(to + c, v, width);
  }
  static FASTDIT_INLINE void accumulate(S* at, int64_t c, V v, int width) {
    if (width == w) return add(at, c, v);
    for (int i = 0; i < width; ++i) at[c + i] += v[i];
  }

  // d (scratch of C): gradient of r. Returns with dresidual and dy written.
  void row(const ModulationGradParams& q, int64_t b, int64_t n, S* d, Sink<S>& shift_sink, Sink<S>& scale_sink,
           Sink<S>& gate_sink, Sink<S>& weight_sink, Sink<S>& bias_sink, Sink<S>& post_sink) {
    const int64_t i = b * p.N + n;
    shift_sink.move(p.shift, i, p.N, p.row_index, p.index_is_64, C);
    scale_sink.move(p.scale, i, p.N, p.row_index, p.index_is_64, C);
    gate_sink.move(p.gate, i, p.N, p.gate_row_index, p.index_is_64, C);
    weight_sink.move(p.weight, 0, 1, nullptr, 0, C);
    bias_sink.move(p.bias, 0, 1, nullptr, 0, C);
    post_sink.move(p.post_weight, 0, 1, nullptr, 0, C);
    this->gate_residual(b, n);

    const TR* grad_r =
        q.grad_r ? static_cast<const TR*>(q.grad_r) + b * q.grad_r_stride_b + n * q.grad_r_stride_n : nullptr;
    if (q.grad_h) {
      this->move_norm_tables(b, n);
      S mean, root;
      this->statistics(mean, root);
      const T* dh = static_cast<const T*>(q.grad_h) + b * q.grad_h_stride_b + n * q.grad_h_stride_n;
      const bool weighted = p.weight.data || p.weight_offset != 0, biased = p.bias.data, scaled = p.scale.data;
      V sum_g{}, sum_gn{};
      sweep(C, [&](int64_t c, int width) {
        V g = get(dh, c, width);
        const V x = (get(value, c, width) - mean) * root;
        if (shift_sink.at) accumulate(shift_sink.at, c, g, width);
        if (scale_sink.at) {
          V a = x;
          if (weighted) a = a * load(affine + c);
          if (biased) a = a + load(offset + c);
          accumulate(scale_sink.at, c, g * a, width);
        }
        if (scaled) g = g * load(scale.values + c);
        if (weight_sink.at) accumulate(weight_sink.at, c, g * x, width);
        if (bias_sink.at) accumulate(bias_sink.at, c, g, width);
        if (weighted) g = g * load(affine + c);
        sum_g += g;  // zero beyond the row: dh is
        sum_gn += g * x;
        store_raw(d + c, g);
      });
      const S mean_g = p.norm == Norm::layer ? sum(sum_g) / static_cast<S>(C) : S(0);
      const S mean_gn = sum(sum_gn) / static_cast<S>(C);
      sweep(C, [&](int64_t c, int width) {
        const V x = (get(value, c, width) - mean) * root;
        V v = (load(d + c) - mean_g - x * mean_gn) * root;
        if (grad_r) v = v + get(grad_r, c, width);
        store_raw(d + c, v);
      });
    } else {
      sweep(C, [&](int64_t c, int width) { store_raw(d + c, get(grad_r, c, width)); });
    }

    T* dy = q.d_y ? static_cast<T*>(q.d_y) + i * C : nullptr;
    if (!p.residual) {
      if (dy) sweep(C, [&](int64_t c, int width) { put(dy, c, load(d + c), width); });
      return;
    }
    if (q.d_residual) {
      TR* out = static_cast<TR*>(q.d_residual) + i * C;
      sweep(C, [&](int64_t c, int width) { put(out, c, load(d + c), width); });
    }
    const T* y = static_cast<const T*>(p.y) + b * p.y_stride_b + n * p.y_stride_n;
    const bool gated = p.gate.data, tanh_gate = p.gate_act == GateAct::tanh, normed = p.post_norm;
    const bool weighted = p.post_weight.data;
    V sum_dy{};
    sweep(C, [&](int64_t c, int width) {
      V g = load(d + c), yn = get(y, c, width);
      if (normed) yn = yn * post_root;
      const V unit = yn;
      if (weighted) yn = yn * load(post + c);
      if (gate_sink.at) {
        V dgate = g * yn;
        if (tanh_gate) dgate = dgate * (S(1) - load(gate.values + c) * load(gate.values + c));
        accumulate(gate_sink.at, c, dgate, width);
      }
      if (gated) g = g * load(gate.values + c);
      if (post_sink.at) accumulate(post_sink.at, c, g * unit, width);
      if (weighted) g = g * load(post + c);
      if (normed) {
        sum_dy += g * unit;  // zero beyond the row: y is
        store_raw(d + c, g);
      } else if (dy) {
        put(dy, c, g, width);
      }
    });
    if (normed && dy) {
      const S mean_dy = sum(sum_dy) / static_cast<S>(C);
      sweep(C, [&](int64_t c, int width) {
        const V unit = get(y, c, width) * post_root;
        put(dy, c, (load(d + c) - unit * mean_dy) * post_root, width);
      });
    }
  }
};

template <class T, class TR>
void run(const ModulationGradParams& q) {
  using S = typename simd<T>::S;
  constexpr int w = simd<T>::width;
  const ModulationParams& p = q.forward;
  const int64_t tokens = p.B * p.N, chunks = (tokens + kChunk - 1) / kChunk, C = p.C;
  Runs<S> shift(q.shift, p.shift, tokens, p.N, p.row_index, p.index_is_64, C);
  Runs<S> scale(q.scale, p.scale, tokens, p.N, p.row_index, p.index_is_64, C);
  Runs<S> gate(q.gate, p.gate, tokens, p.N, p.gate_row_index, p.index_is_64, C);
  Table vector = p.weight;  // a vector is a table of one row
  vector.tokens_per_row = tokens;
  Runs<S> weight(q.weight, vector, tokens, tokens, nullptr, 0, C);
  Runs<S> bias(q.bias, vector, tokens, tokens, nullptr, 0, C);
  Runs<S> post(q.post_weight, vector, tokens, tokens, nullptr, 0, C);
  parallel_ranges(chunks, p.threads, [&](int64_t begin, int64_t end, int) {
    Backward<T, TR> row(p);
    Scratch<S> d((C + w - 1) / w * w);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Sink<S> shift_sink(shift, chunk), scale_sink(scale, chunk), gate_sink(gate, chunk);
      Sink<S> weight_sink(weight, chunk), bias_sink(bias, chunk), post_sink(post, chunk);
      const int64_t stop = (chunk + 1) * kChunk < tokens ? (chunk + 1) * kChunk : tokens;
      for (int64_t i = chunk * kChunk; i < stop; ++i)
        row.row(q, i / p.N, i % p.N, d.get(), shift_sink, scale_sink, gate_sink, weight_sink, bias_sink, post_sink);
    }
  });
  const Runs<S>* all[] = {&shift, &scale, &gate, &weight, &bias, &post};
  for (const Runs<S>* runs : all) reduce(*runs, C, p.threads);
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
