// Gradients of qk_norm_rope: one read of x and of the output's gradient, one write of dx.
//
//   n = (x - mean) * root,  a = n * w + b,  y = R(angle) a            (rms: without mean)
//   da = R(-angle) dy,  dw += da * n,  db += da,  g = da * w,  dx = root * (g - mean(g) - n * mean(g * n))
//   dcos += dy1 * a1 + dy2 * a2,  dsin += dy2 * a1 - dy1 * a2          for the pair (1, 2), in a pass of its own
//
// A token goes over its cached channels three times: statistics, the two means of g, dx. Tokens go in chunks whose size
// depends on shapes alone; a chunk sums dw and db into rows of its own, which are added in order afterwards. So the
// bits do not depend on threads.
#include "rotary_walk.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// All heads of a token; strides from head to head.
template <class T>
struct GradHeads {
  using S = typename simd<T>::S;
  const T* x;
  const T* g;  // dy
  T* dx;
  int64_t count, x_stride, g_stride, dx_stride, channels;
  const S* weight;
  const S* bias;
  S* dw;
  S* db;
  int64_t affine_stride;
  const S* mean;
  const S* rstd;
  S* cross;  // sum of g * (x - mean), then mean of g * n
  S* total;  // sum of g, then its mean
  int64_t stat_stride;
  S scale;  // 1 / count of a statistic
  bool stream;
  int64_t next_x = 0, next_g = 0;  // how far the next token is

  void advance() {
    x += x_stride, g += g_stride;
    if (dx) dx += dx_stride;
    if (weight) weight += affine_stride;
    if (bias) bias += affine_stride;
    if (dw) dw += affine_stride;
    if (db) db += affine_stride;
    mean += stat_stride, rstd += stat_stride, cross += stat_stride, total += stat_stride;
  }
};

template <class T, RotaryNorm kNorm, bool kAffine, bool kInterleaved>
struct Kernel {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr bool layer = kNorm == RotaryNorm::layer;

  static void sums(const GradHeads<T>& o, const Rotation<S>& r) {
    int64_t h = 0;
    if (o.stat_stride) {
      for (; h + kRows <= o.count; h += kRows) sums<kRows>(o, h, r);
    }
    for (; h < o.count; ++h) sums<1>(o, h, r);
  }

  // Of `count` heads from `first`, side by side: their chains overlap, and they share what belongs to no head.
  template <int count>
  FASTDIT_INLINE static void sums(const GradHeads<T>& o, int64_t first, const Rotation<S>& r) {
    const T *x[count], *dy[count];
    const S* const weight = o.weight + first * o.affine_stride;
    V mean[count], cross[count] = {}, total[count] = {};
    for (int k = 0; k < count; ++k) {
      x[k] = o.x + (first + k) * o.x_stride, dy[k] = o.g + (first + k) * o.g_stride;
      mean[k] = splat(o.mean[(first + k) * o.stat_stride]);
    }
    walk<T, kInterleaved>(o.channels, r, [&](auto site) {
      const Pair<V> angle = site.angle(r);
      Pair<V> w{};
      if constexpr (kAffine) w = site.vectors(weight);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        site.ahead(dy[k] + o.next_g);  // x's are asked for with the stores
        const Pair<V> at = site.get(x[k]);
        Pair<V> g = site.turn_back(site.get(dy[k]), angle);
        if constexpr (kAffine) g = {unfused(g.a * w.a), unfused(g.b * w.b)};
        if constexpr (layer) {
          total[k] += g.a + g.b;
          cross[k] = multiply_add(multiply_add(cross[k], g.a, at.a - mean[k]), g.b, at.b - mean[k]);
        } else {
          cross[k] = multiply_add(multiply_add(cross[k], g.a, at.a), g.b, at.b);
        }
      }
    });
    S sums[2][count];
    sum_each<count>(cross, sums[0]);
    if constexpr (layer) sum_each<count>(total, sums[1]);
    for (int k = 0; k < count; ++k) {
      o.cross[(first + k) * o.stat_stride] += sums[0][k];
      if constexpr (layer) o.total[(first + k) * o.stat_stride] += sums[1][k];
    }
  }

  static void gradients(const GradHeads<T>& o, const Rotation<S>& r) {
    if constexpr (kInterleaved) {
      if (o.affine_stride == 0) return gradients<true>(o, r);
    }
    gradients<false>(o, r);
  }

  // kShared: block by block. What the heads share, cos, sin, weight, dw and db, then stays in registers.
  template <bool kShared>
  static void gradients(const GradHeads<T>& o, const Rotation<S>& r) {
    const auto turn = [&](auto site, int64_t begin, int64_t end) {
      const Pair<V> angle = site.angle(r);
      Pair<V> dw{}, db{}, w{};
      if constexpr (kAffine) w = site.vectors(o.weight + begin * o.affine_stride);
      for (int64_t h = begin; h < end; ++h) {
        const T *const x = o.x + h * o.x_stride, *const dy = o.g + h * o.g_stride;
        site.ahead(kNorm == RotaryNorm::none ? dy + o.next_g : x + o.next_x);
        Pair<V> g = site.turn_back(site.get(dy), angle);
        if constexpr (kNorm != RotaryNorm::none) {
          const int64_t at = h * o.stat_stride;
          const V rstd = splat(o.rstd[at]), mean_gn = splat(o.cross[at]);
          Pair<V> n = site.get(x);
          if constexpr (layer) n = {n.a - splat(o.mean[at]), n.b - splat(o.mean[at])};
          n = {n.a * rstd, n.b * rstd};
          dw = {dw.a + g.a * n.a, dw.b + g.b * n.b};
          db = {db.a + g.a, db.b + g.b};
          if constexpr (kAffine) g = {g.a * w.a, g.b * w.b};
          if constexpr (layer) g = {g.a - splat(o.total[at]), g.b - splat(o.total[at])};
          g = {(g.a - n.a * mean_gn) * rstd, (g.b - n.b * mean_gn) * rstd};
        }
        if (o.dx) site.put(o.dx + h * o.dx_stride, g, o.stream);
      }
      if (o.dw) site.add(o.dw + begin * o.affine_stride, dw);
      if (o.db) site.add(o.db + begin * o.affine_stride, db);
    };
    if constexpr (kShared) {
      walk<T, kInterleaved>(o.channels, r, [&](auto site) { turn(site, 0, o.count); });
    } else {
      for (int64_t h = 0; h < o.count; ++h)
        walk<T, kInterleaved>(o.channels, r, [&](auto site) { turn(site, h, h + 1); });
    }
  }

  // Adds to the table row of a head.
  static void table(const GradHeads<T>& o, const Rotation<S>& r, S* dcos, S* dsin) {
    const V mean = splat(*o.mean), rstd = splat(*o.rstd);
    walk<T, kInterleaved>(o.channels, r, [&](auto site) {
      const Pair<V> g = site.get(o.g);
      Pair<V> a = site.get(o.x);
      if constexpr (layer) a = {a.a - mean, a.b - mean};
      if constexpr (kNorm != RotaryNorm::none) a = {a.a * rstd, a.b * rstd};
      if constexpr (kAffine) {
        const Pair<V> w = site.vectors(o.weight);
        a = {a.a * w.a, a.b * w.b};
        if (o.bias) {
          const Pair<V> b = site.vectors(o.bias);
          a = {a.a + b.a, a.b + b.b};
        }
      }
      site.keep(dcos, g.a * a.a + g.b * a.b);
      site.keep(dsin, g.b * a.a - g.a * a.b);
    });
  }
};

template <class T>
struct Kernels {
  using S = typename simd<T>::S;
  void (*sums)(const GradHeads<T>&, const Rotation<S>&) = nullptr;  // null: without a norm there are none
  void (*gradients)(const GradHeads<T>&, const Rotation<S>&) = nullptr;
  void (*table)(const GradHeads<T>&, const Rotation<S>&, S*, S*) = nullptr;  // fp64 alone

  template <RotaryNorm kNorm, bool kAffine, bool kInterleaved>
  void take() {
    using K = Kernel<T, kNorm, kAffine, kInterleaved>;
    if constexpr (kNorm != RotaryNorm::none) sums = &K::sums;
    gradients = &K::gradients;
    if constexpr (sizeof(S) == 8) table = &K::table;
  }
  template <bool kInterleaved>
  void choose(RotaryNorm norm, bool affine) {
    constexpr RotaryNorm rms = RotaryNorm::rms, layer = RotaryNorm::layer;
    if (norm == RotaryNorm::none) return take<RotaryNorm::none, false, kInterleaved>();
    if (norm == rms) return affine ? take<rms, true, kInterleaved>() : take<rms, false, kInterleaved>();
    return affine ? take<layer, true, kInterleaved>() : take<layer, false, kInterleaved>();
  }
  Kernels(const QkNormRopeParams& p, bool affine) {
    p.layout == RotaryLayout::interleaved ? choose<true>(p.norm, affine) : choose<false>(p.norm, affine);
  }
};

// Tokens of a chunk: by shapes alone, so that the order of every sum is fixed.
int64_t chunk_size(int64_t tokens) { return tokens >= 1024 ? 64 : tokens / 16 + 1; }

// dw and db of every chunk, in Affine's order.
template <class T>
struct Partials {
  using S = typename simd<T>::S;
  const RotaryOperand& o;
  const RotaryGrad& d;
  int64_t heads, channels, stride, chunk, chunks;
  bool interleaved;
  Scratch<S> rows;

  Partials(const QkNormRopeParams& p, const RotaryOperand& operand, const RotaryGrad& grad)
      : o(operand),
        d(grad),
        heads(p.all_heads ? o.heads : 1),
        channels(p.head_dim),
        stride(Affine<T>::padded(channels)),
        chunk(chunk_size(p.batch * o.tokens)),
        chunks((p.batch * o.tokens + chunk - 1) / chunk),
        interleaved(p.layout == RotaryLayout::interleaved),
        rows(chunks * line()) {}

  int64_t line() const { return ((d.weight != nullptr) + (d.bias != nullptr)) * width(); }
  int64_t width() const { return heads * stride; }
  // Zeroed rows of a chunk; null: nobody wants them.
  void open(int64_t at, S*& dw, S*& db) const {
    S* row = rows.get() + at * line();
    __builtin_memset(row, 0, line() * sizeof(S));
    dw = d.weight ? row : nullptr;
    db = d.bias ? row + line() - width() : nullptr;
  }

  void reduce(int threads) const {
    constexpr int64_t kStrip = 256;
    const int64_t line = this->line();
    S* total = rows.get();  // the first chunk's
    parallel_tasks((line + kStrip - 1) / kStrip, chunks * line < kGrain ? 1 : threads, [&](int64_t strip, int) {
      const int64_t end = (strip + 1) * kStrip < line ? (strip + 1) * kStrip : line;
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t i = strip * kStrip; i < end; ++i) total[i] += total[c * line + i];
    });
    write(total, d.weight, o.weight_dtype);
    write(total + line - width(), d.bias, o.bias_dtype);
  }

 private:
  void write(const S* from, void* to, int dtype) const {
    if (!to) return;
    FASTDIT_DTYPE_SWITCH(dtype, U, {
      U* out = static_cast<U*>(to);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < channels; ++i) {
          const S v = from[h * stride + Affine<T>::place(i, interleaved)];
          out[h * channels + i] = from_scalar<U>(static_cast<typename simd<U>::S>(v));
        }
      }
    })
  }
};

template <class T>
struct GradWorker : Operand<T> {
  using Base = Operand<T>;
  using S = typename Base::S;
  using Base::p, Base::o, Base::weight, Base::bias, Base::mean, Base::rstd;

  const RotaryGrad& d;
  Kernels<T> kernels;
  Scratch<S> means;  // cross and total of every head
  Outlet<T> outlet;

  GradWorker(const QkNormRopeParams& params, const RotaryOperand& operand, const RotaryGrad& grad)
      : Base(params, operand),
        d(grad),
        kernels(params, weight.data() != nullptr),
        means(2 * (o.heads + 1)),
        outlet(params, operand, 3) {}

  bool wanted() const { return o.out || d.weight || d.bias; }

  GradHeads<T> heads(const T* x, const T* dy, T* dx, S* dw, S* db) const {
    const int64_t stat_stride = p.all_heads ? 0 : 1, run = p.all_heads ? o.heads : 1;
    return {x,
            dy,
            dx,
            o.heads,
            o.x_stride[2],
            d.grad_stride[2],
            o.out_stride[2],
            p.head_dim,
            weight.data(),
            bias.data(),
            dw,
            db,
            this->affine_stride(),
            mean.get(),
            rstd.get(),
            means.get(),
            means.get() + o.heads,
            stat_stride,
            S{1} / static_cast<S>(run * p.head_dim),
            outlet.by_head()};
  }

  // calls pass(heads, rotation) with all heads, or head by head where each has a table row of its own.
  template <class F>
  void each(GradHeads<T> all, int64_t b, int64_t n, Stage<S>& stage, const Rotation<S>* row, F&& pass) const {
    if (row) return pass(all, *row);
    all.count = 1;
    for (int64_t h = 0; h < o.heads; ++h, all.advance()) pass(all, stage.dense(o.table, b, n - p.rope_start, h));
  }

  // row: as in the forward. Returns it.
  const Rotation<S>* token(int64_t b, int64_t n, Stage<S>& stage, const Rotation<S>* row, S* dw, S* db) const {
    T* const dx = o.out ? static_cast<T*>(o.out) + b * o.out_stride[0] + n * o.out_stride[1] : nullptr;
    GradHeads<T> all =
        heads(static_cast<const T*>(o.x) + b * o.x_stride[0] + n * o.x_stride[1],
              static_cast<const T*>(d.grad) + b * d.grad_stride[0] + n * d.grad_stride[1], outlet.open(dx), dw, db);
    if (n + 1 < o.tokens) all.next_x = o.x_stride[1], all.next_g = d.grad_stride[1];
    this->statistics(all.x);
    if (!row && !(this->rotates(n) && this->rows_per_head())) row = this->row(b, n, stage);
    if (kernels.sums) {
      for (int64_t i = 0; i < 2 * o.heads; ++i) means.get()[i] = 0;
      each(all, b, n, stage, row, kernels.sums);
      for (int64_t i = 0; i < (p.all_heads ? 1 : o.heads); ++i) {
        all.cross[i] *= all.rstd[i] * all.scale;
        all.total[i] *= all.scale;
      }
    }
    each(all, b, n, stage, row, kernels.gradients);
    outlet.close(dx);
    return row;
  }
};

// dx, dw and db of q and k, or of one of them.
template <class T>
void run(const QkNormRopeGradParams& g, bool with_q, bool with_k) {
  using S = typename simd<T>::S;
  const QkNormRopeParams& p = g.forward;
  const int64_t tokens = with_q ? p.q.tokens : p.k.tokens, rows = p.batch * tokens;
  if (rows == 0) return;
  const Partials<T> q_sums(p, p.q, g.q), k_sums(p, p.k, g.k);
  const int64_t chunk = chunk_size(rows), channels = (with_q * p.q.heads + with_k * p.k.heads) * p.head_dim;
  parallel_ranges((rows + chunk - 1) / chunk, thread_count(p, rows * channels), [&](int64_t begin, int64_t end, int) {
    const GradWorker<T> q(p, p.q, g.q), k(p, p.k, g.k);
    Stage<S> stage(p);
    const bool q_turn = with_q && q.wanted(), k_turn = with_k && k.wanted(), shared = k.shares(q);
    for (int64_t c = begin; c < end; ++c) {
      S *q_dw = nullptr, *q_db = nullptr, *k_dw = nullptr, *k_db = nullptr;
      if (q_turn) q_sums.open(c, q_dw, q_db);
      if (k_turn) k_sums.open(c, k_dw, k_db);
      const int64_t stop = (c + 1) * chunk < rows ? (c + 1) * chunk : rows;
      for (int64_t r = c * chunk; r < stop; ++r) {
        const int64_t b = r / tokens, n = r % tokens;
        const Rotation<S>* row = nullptr;
        if (q_turn) row = q.token(b, n, stage, row, q_dw, q_db);
        if (k_turn) k.token(b, n, stage, shared ? row : nullptr, k_dw, k_db);
      }
    }
    finish_streams();
  });
  if (with_q && g.q.grad) q_sums.reduce(p.threads);
  if (with_k && g.k.grad) k_sums.reduce(p.threads);
}

// ---- tables -------------------------------------------------------------------------------------------

// The heads of a token at `row`, contiguous and in fp64.
void widen_heads(const void* base, int64_t row, int dtype, int64_t heads, int64_t stride, int64_t channels,
                 double* to) {
  FASTDIT_DTYPE_SWITCH(dtype, T, {
    const T* from = static_cast<const T*>(base) + row;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < channels; ++i) to[h * channels + i] = to_scalar(from[h * stride + i]);
  })
}

// The gradients of cos and sin that one operand gives: a row for every rotated token (and head, where the table has
// heads), then the sums over what shares a row of the table. In fp64: few models learn a table, and a table may be
// small.
void run_tables(const QkNormRopeGradParams& g, const RotaryOperand& o, const RotaryGrad& d) {
  const QkNormRopeParams& p = g.forward;
  const RotaryAxes* axes = o.use_axes && g.axes.count ? &g.axes : nullptr;
  if (!d.grad || (!axes && !d.table.cos)) return;
  const int64_t rest = o.tokens - p.rope_start, length = p.rope_len < rest ? p.rope_len : rest, pairs = p.rotated / 2;
  const int64_t per_token = !axes && d.table.cos_stride[2] ? o.heads : 1, tokens = p.batch * length;
  const int threads = thread_count(p, tokens * o.heads * p.head_dim);
  Scratch<double> memory(tokens * per_token * 2 * pairs);
  const auto line = [&](int64_t b, int64_t n, int64_t h) {
    return memory.get() + ((b * length + n) * per_token + h) * 2 * pairs;
  };
  parallel_ranges(tokens, threads, [&](int64_t begin, int64_t end, int) {
    RotaryOperand wide = o;
    RotaryGrad wide_grad = d;
    wide.x_stride[2] = wide_grad.grad_stride[2] = p.head_dim;
    const GradWorker<double> worker(p, wide, wide_grad);
    const Rotation<double> turning = Stage<double>(p).shape();
    Scratch<double> x(o.heads * p.head_dim), dy(o.heads * p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / length, n = i % length, token = n + p.rope_start;
      widen_heads(o.x, b * o.x_stride[0] + token * o.x_stride[1], p.dtype, o.heads, o.x_stride[2], p.head_dim, x.get());
      widen_heads(d.grad, b * d.grad_stride[0] + token * d.grad_stride[1], p.dtype, o.heads, d.grad_stride[2],
                  p.head_dim, dy.get());
      worker.statistics(x.get());
      GradHeads<double> heads = worker.heads(x.get(), dy.get(), nullptr, nullptr, nullptr);
      __builtin_memset(line(b, n, 0), 0, per_token * 2 * pairs * sizeof(double));
      for (int64_t h = 0; h < o.heads; ++h, heads.advance()) {
        double* at = line(b, n, per_token == 1 ? 0 : h);
        worker.kernels.table(heads, turning, at, at + pairs);
      }
    }
  });
  if (axes) {
    parallel_tasks(2 * axes->count, threads, [&](int64_t task, int) {
      const int a = static_cast<int>(task / 2);
      int64_t from = task % 2 * pairs;
      for (int i = 0; i < a; ++i) from += axes->width[i];
      double* out = static_cast<double*>(const_cast<void*>(task % 2 ? axes->sin[a] : axes->cos[a]));
      GridCursor cursor{p.axes};
      for (int64_t i = 0; i < tokens; ++i) {
        int64_t position[3];
        cursor.locate(i / length, i % length, position);
        const double* row = line(i / length, i % length, 0) + from;
        double* to = out + position[a] * axes->width[a];
        for (int64_t c = 0; c < axes->width[a]; ++c) to[c] += row[c];
      }
    });
    return;
  }
  constexpr int64_t kStrip = 32;
  const int64_t strips = (pairs + kStrip - 1) / kStrip;
  parallel_tasks(2 * strips, threads, [&](int64_t task, int) {
    const bool sine = task % 2;
    const int64_t first = task / 2 * kStrip, stop = first + kStrip < pairs ? first + kStrip : pairs;
    const int64_t* stride = sine ? d.table.sin_stride : d.table.cos_stride;
    double* out = static_cast<double*>(const_cast<void*>(sine ? d.table.sin : d.table.cos));
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t h = 0; h < per_token; ++h) {
        const double* row = line(i / length, i % length, h) + sine * pairs;
        double* to = out + i / length * stride[0] + i % length * stride[1] + h * stride[2];
        for (int64_t c = first; c < stop; ++c) to[c] += row[c];
      }
    }
  });
}

}  // namespace

void qk_norm_rope_backward(const QkNormRopeGradParams& g) {
  FASTDIT_DTYPE_SWITCH(g.forward.dtype, T, {
    if (g.forward.q.tokens == g.forward.k.tokens && g.q.grad && g.k.grad) {
      run<T>(g, true, true);
    } else {
      if (g.q.grad) run<T>(g, true, false);
      if (g.k.grad) run<T>(g, false, true);
    }
  })
  run_tables(g, g.forward.q, g.q);
  run_tables(g, g.forward.k, g.k);
}

}  // namespace fastdit::cpu::FASTDIT_ISA
