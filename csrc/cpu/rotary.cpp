// out = rotate(n(x)) for q and k: one read and one write of each.
//
// A task is a run of tokens. Of each token the table row is staged once in L1 (for interleaved pairs as two rows of R
// values, cos twice and -sin, +sin), then every head of q and k takes it: statistics of the head (or of all heads), and
// a second pass over the same, still cached, channels that normalises, rotates and stores. Where q and k have as many
// tokens they share the staged row.
#include "fastdit/rotary.h"

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// Lanes (1, 0, 3, 2, ...): the other channel of each interleaved pair.
FASTDIT_INLINE vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xB1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0xB1);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}
FASTDIT_INLINE vd swap_pairs(vd v) {
#if defined(__AVX512F__)
  return (vd)_mm512_permute_pd((__m512d)v, 0x55);
#elif defined(__AVX2__)
  return (vd)_mm256_permute_pd((__m256d)v, 0x5);
#else
  return __builtin_shufflevector(v, v, 1, 0);
#endif
}

// ---- one head -----------------------------------------------------------------------------------------

// What rotates the heads of a token. interleaved: c, s hold R values (c0 c0 c1 c1 .., -s0 s0 -s1 s1 ..), zero padded to
// a vector. half: R/2 values, for `sections` runs of `pairs` pairs.
template <class S>
struct Rotation {
  int64_t rotated = 0;  // R, 0 for a token outside the slice
  bool interleaved = false;
  bool round_products = false;  // tables of x's dtype under the native law
  int sections = 1;
  int64_t pairs[3] = {0, 0, 0};
  const S* c = nullptr;
  const S* s = nullptr;
};

// Channel vectors of one head after its norm.
template <class T, RotaryNorm kNorm, int kAffine, bool kNative>
struct Normed {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  const T* x;
  const S* weight;
  const S* bias;
  V mean, rstd;

  FASTDIT_INLINE V finish(V v, V w, V b) const {
    if constexpr (kNorm == RotaryNorm::none) return v;
    v = kNorm == RotaryNorm::layer ? (v - mean) * rstd : v * rstd;
    // F.layer_norm rounds once, after its affine part; RMSNorm before it and after each of its steps
    if constexpr (kNative && kNorm == RotaryNorm::rms) v = round_to<T>(v);
    if constexpr (kAffine >= 1) v = v * w;
    if constexpr (kNative && kNorm == RotaryNorm::rms && kAffine >= 1) v = round_to<T>(v);
    if constexpr (kAffine == 2) v = v + b;
    if constexpr (kNative && (kNorm == RotaryNorm::layer || kAffine == 2)) v = round_to<T>(v);
    return v;
  }
  FASTDIT_INLINE V at(int64_t i) const {
    return finish(load(x + i), kAffine >= 1 ? load(weight + i) : V{}, kAffine == 2 ? load(bias + i) : V{});
  }
  FASTDIT_INLINE V at(int64_t i, int n) const {
    return finish(load_n(x + i, n), kAffine >= 1 ? load_n(weight + i, n) : V{},
                  kAffine == 2 ? load_n(bias + i, n) : V{});
  }
};

// a * c + b * s, each product rounded to T when asked for.
template <class T, bool kRound, class V>
FASTDIT_INLINE V combine(V a, V c, V b, V s) {
  if constexpr (kRound) return round_to<T>(a * c) + round_to<T>(b * s);
  return a * c + b * s;
}

template <class T, bool kRound, class Head, class S = typename simd<T>::S>
FASTDIT_INLINE void rotate_interleaved(const Head& x, T* y, const Rotation<S>& r) {
  constexpr int width = simd<T>::width;
  int64_t i = 0;
  for (; i + width <= r.rotated; i += width) {
    const auto v = x.at(i);
    store(y + i, combine<T, kRound>(v, load(r.c + i), swap_pairs(v), load(r.s + i)));
  }
  if (i < r.rotated) {
    const int n = static_cast<int>(r.rotated - i);
    const auto v = x.at(i, n);
    store_n(y + i, combine<T, kRound>(v, load(r.c + i), swap_pairs(v), load(r.s + i)), n);
  }
}

template <class T, bool kRound, class Head, class S = typename simd<T>::S>
FASTDIT_INLINE void rotate_half(const Head& x, T* y, const Rotation<S>& r) {
  constexpr int width = simd<T>::width;
  const S* c = r.c;
  const S* s = r.s;
  int64_t lo = 0;
  for (int section = 0; section < r.sections; ++section) {
    const int64_t pairs = r.pairs[section], hi = lo + pairs;
    int64_t i = 0;
    for (; i + width <= pairs; i += width) {
      const auto a = x.at(lo + i), b = x.at(hi + i), cv = load(c + i), sv = load(s + i);
      store(y + lo + i, combine<T, kRound>(a, cv, b, -sv));
      store(y + hi + i, combine<T, kRound>(b, cv, a, sv));
    }
    if (i < pairs) {
      const int n = static_cast<int>(pairs - i);
      const auto a = x.at(lo + i, n), b = x.at(hi + i, n), cv = load_n(c + i, n), sv = load_n(s + i, n);
      store_n(y + lo + i, combine<T, kRound>(a, cv, b, -sv), n);
      store_n(y + hi + i, combine<T, kRound>(b, cv, a, sv), n);
    }
    c += pairs;
    s += pairs;
    lo += 2 * pairs;
  }
}

template <class T>
using HeadFn = void (*)(const T* x, T* y, int64_t channels, const typename simd<T>::S* weight,
                        const typename simd<T>::S* bias, typename simd<T>::S mean, typename simd<T>::S rstd,
                        const Rotation<typename simd<T>::S>& r);

template <class T, RotaryNorm kNorm, int kAffine, bool kNative>
void head(const T* x, T* y, int64_t channels, const typename simd<T>::S* weight, const typename simd<T>::S* bias,
          typename simd<T>::S mean, typename simd<T>::S rstd, const Rotation<typename simd<T>::S>& r) {
  constexpr int width = simd<T>::width;
  const Normed<T, kNorm, kAffine, kNative> n{x, weight, bias, splat(mean), splat(rstd)};
  if (r.rotated > 0) {
    if (kNative && r.round_products) {
      r.interleaved ? rotate_interleaved<T, kNative>(n, y, r) : rotate_half<T, kNative>(n, y, r);
    } else {
      r.interleaved ? rotate_interleaved<T, false>(n, y, r) : rotate_half<T, false>(n, y, r);
    }
  }
  int64_t i = r.rotated;
  for (; i + width <= channels; i += width) store(y + i, n.at(i));
  if (i < channels) {
    const int rest = static_cast<int>(channels - i);
    store_n(y + i, n.at(i, rest), rest);
  }
}

template <class T, RotaryNorm kNorm, bool kNative>
HeadFn<T> pick_affine(int affine) {
  return affine == 0   ? &head<T, kNorm, 0, kNative>
         : affine == 1 ? &head<T, kNorm, 1, kNative>
                       : &head<T, kNorm, 2, kNative>;
}
template <class T>
HeadFn<T> pick(RotaryNorm norm, int affine, bool native) {
  constexpr bool rounds = sizeof(T) == 2;  // in fp32 and fp64 the two laws are one
  native = native && rounds;
  switch (norm) {
    case RotaryNorm::rms:
      return native ? pick_affine<T, RotaryNorm::rms, rounds>(affine) : pick_affine<T, RotaryNorm::rms, false>(affine);
    case RotaryNorm::layer:
      return native ? pick_affine<T, RotaryNorm::layer, rounds>(affine)
                    : pick_affine<T, RotaryNorm::layer, false>(affine);
    default:
      return native ? &head<T, RotaryNorm::none, 0, rounds> : &head<T, RotaryNorm::none, 0, false>;
  }
}

// ---- statistics ---------------------------------------------------------------------------------------

// sum((x - shift)^2), or sum(x) when not kSquare. Four chains hide the latency of the adds.
template <bool kSquare, class T>
FASTDIT_INLINE typename simd<T>::S moment(const T* x, int64_t n, typename simd<T>::S shift) {
  using V = typename simd<T>::V;
  constexpr int width = simd<T>::width;
  const V center = splat(shift);
  V acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for (int j = 0; j < 4; ++j) {
      const V v = load(x + i + j * width) - center;
      acc[j] = kSquare ? acc[j] + v * v : acc[j] + v;
    }
  }
  for (; i + width <= n; i += width) {
    const V v = load(x + i) - center;
    acc[0] = kSquare ? acc[0] + v * v : acc[0] + v;
  }
  typename simd<T>::S total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < n; ++i) {
    const typename simd<T>::S v = to_scalar(x[i]) - shift;
    total += kSquare ? v * v : v;
  }
  return total;
}

// The same over H heads; contiguous ones are one run.
template <bool kSquare, class T>
FASTDIT_INLINE typename simd<T>::S moment(const T* x, int64_t heads, int64_t stride, int64_t channels,
                                          typename simd<T>::S shift) {
  if (stride == channels || heads == 1) return moment<kSquare>(x, heads * channels, shift);
  typename simd<T>::S total = 0;
  for (int64_t h = 0; h < heads; ++h) total += moment<kSquare>(x + h * stride, channels, shift);
  return total;
}

// ---- tables -------------------------------------------------------------------------------------------

// count values of any dtype and stride as S; the values themselves where they are that already.
template <class S>
const S* widen(const void* src, int dtype, int64_t stride, int64_t count, S* buffer) {
  constexpr int own = static_cast<int>(sizeof(S) == 8 ? DType::f64 : DType::f32);
  if (dtype == own && stride == 1) return static_cast<const S*>(src);
  FASTDIT_DTYPE_SWITCH(dtype, U, {
    const U* p = static_cast<const U*>(src);
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<S>(to_scalar(p[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<S>(to_scalar(p[i * stride]));
    }
  })
  return buffer;
}

// Position of a token in its grid.
struct GridCursor {
  const RotaryAxes& axes;
  int64_t segment = 0, first = 0;  // packed: the segment last looked at and its first token

  int64_t size(int64_t seg, int a) const { return axes.grids[seg * axes.count + a]; }
  int64_t tokens(int64_t seg) const {
    int64_t n = 1;
    for (int a = 0; a < axes.count; ++a) n *= size(seg, a);
    return n;
  }
  void locate(int64_t sample, int64_t token, int64_t* position) {
    int64_t seg = axes.segments == 1 ? 0 : sample;
    if (axes.packed) {
      while (token - first >= tokens(segment)) first += tokens(segment++);
      seg = segment;
      token -= first;
    }
    for (int a = axes.count - 1; a >= 0; --a) {  // the last axis runs fastest
      const int64_t n = size(seg, a);
      position[a] = token % n;
      token /= n;
    }
  }
};

// The table row of a token (and head) in the form that `head` reads.
template <class S>
class Stage {
 public:
  explicit Stage(const QkNormRopeParams& p)
      : axes_(p.axes), cursor_{p.axes}, pairs_(p.rotated / 2), raw_(p.rotated), rows_(2 * padded(p.rotated)) {
    rotation_.rotated = p.rotated;
    rotation_.interleaved = p.layout == RotaryLayout::interleaved;
    rotation_.pairs[0] = pairs_;
    if (p.layout == RotaryLayout::axis_half) {
      rotation_.sections = p.axes.count ? p.axes.count : 3;
      for (int a = 0; a < rotation_.sections; ++a) rotation_.pairs[a] = p.axes.count ? p.axes.width[a] : pairs_ / 3;
    }
    for (int64_t i = 0; i < 2 * padded(p.rotated); ++i) rows_.get()[i] = 0;
    native_dtype_ = p.native ? p.dtype : -1;
  }

  const Rotation<S>& dense(const RotaryTable& t, int64_t b, int64_t n, int64_t h) {
    const int64_t size = itemsize(static_cast<DType>(t.dtype));
    const auto row = [&](const void* base, const int64_t* stride) {
      return static_cast<const char*>(base) + (b * stride[0] + n * stride[1] + h * stride[2]) * size;
    };
    const S* c = widen<S>(row(t.cos, t.cos_stride), t.dtype, t.cos_stride[3], pairs_, raw_.get());
    const S* s = widen<S>(row(t.sin, t.sin_stride), t.dtype, t.sin_stride[3], pairs_, raw_.get() + pairs_);
    return finish(c, s, t.dtype);
  }

  const Rotation<S>& from_axes(int64_t b, int64_t n) {
    int64_t position[3];
    cursor_.locate(b, n, position);
    const int64_t size = itemsize(static_cast<DType>(axes_.dtype));
    S* c = raw_.get();
    S* s = c + pairs_;
    for (int a = 0; a < axes_.count; ++a) {
      const int64_t width = axes_.width[a], offset = position[a] * width * size;
      copy(static_cast<const char*>(axes_.cos[a]) + offset, width, c);
      copy(static_cast<const char*>(axes_.sin[a]) + offset, width, s);
      c += width;
      s += width;
    }
    return finish(raw_.get(), raw_.get() + pairs_, axes_.dtype);
  }

 private:
  static int64_t padded(int64_t n) { return (n + 2 * W - 1) / W * W; }

  void copy(const char* src, int64_t width, S* out) {
    const S* from = widen<S>(src, axes_.dtype, 1, width, out);
    if (from != out) __builtin_memcpy(out, from, width * sizeof(S));
  }

  const Rotation<S>& finish(const S* c, const S* s, int dtype) {
    rotation_.round_products = dtype == native_dtype_;
    if (!rotation_.interleaved) {
      rotation_.c = c;
      rotation_.s = s;
      return rotation_;
    }
    S* cc = rows_.get();
    S* ss = cc + padded(rotation_.rotated);
    for (int64_t i = 0; i < pairs_; ++i) {
      cc[2 * i] = cc[2 * i + 1] = c[i];
      ss[2 * i] = -s[i];
      ss[2 * i + 1] = s[i];
    }
    rotation_.c = cc;
    rotation_.s = ss;
    return rotation_;
  }

  const RotaryAxes& axes_;
  GridCursor cursor_;
  int64_t pairs_;
  int native_dtype_;
  Scratch<S> raw_, rows_;
  Rotation<S> rotation_;
};

// ---- one operand, one token ---------------------------------------------------------------------------

template <class T>
class Worker {
  using S = typename simd<T>::S;

 public:
  Worker(const QkNormRopeParams& p, const RotaryOperand& o)
      : p_(p),
        o_(o),
        count_(p.all_heads ? o.heads * p.head_dim : p.head_dim),
        weight_buffer_(o.weight || o.bias ? count_ : 0),
        bias_buffer_(o.bias ? count_ : 0) {
    if (o.weight) {
      weight_ = widen<S>(o.weight, o.weight_dtype, 1, count_, weight_buffer_.get());
    } else if (o.bias) {
      for (int64_t i = 0; i < count_; ++i) weight_buffer_.get()[i] = 1;
      weight_ = weight_buffer_.get();
    }
    if (o.bias) bias_ = widen<S>(o.bias, o.bias_dtype, 1, count_, bias_buffer_.get());
    head_ = pick<T>(p.norm, bias_ ? 2 : weight_ ? 1 : 0, p.native);
  }

  bool rotates(int64_t token) const {
    return (o_.table.cos || o_.use_axes) && token >= p_.rope_start && token < p_.rope_start + p_.rope_len;
  }
  bool rows_per_head() const { return !o_.use_axes && (o_.table.cos_stride[2] != 0 || o_.table.sin_stride[2] != 0); }
  bool shares(const Worker& q) const {  // the row that q has staged
    const RotaryTable &a = o_.table, &b = q.o_.table;
    bool same = a.cos == b.cos && a.sin == b.sin && a.dtype == b.dtype && o_.use_axes == q.o_.use_axes;
    for (int i = 0; i < 4; ++i) same = same && a.cos_stride[i] == b.cos_stride[i] && a.sin_stride[i] == b.sin_stride[i];
    return same && !rows_per_head();
  }

  // row: what the token's rotation is when all heads share it; null: stage it here.
  const Rotation<S>* token(int64_t b, int64_t n, Stage<S>& stage, const Rotation<S>* row) const {
    const T* x = static_cast<const T*>(o_.x) + b * o_.x_stride[0] + n * o_.x_stride[1];
    T* y = static_cast<T*>(o_.out) + b * o_.out_stride[0] + n * o_.out_stride[1];
    const int64_t D = p_.head_dim, at = n - p_.rope_start;
    static constexpr Rotation<S> kNone{};
    const bool per_head = rotates(n) && rows_per_head();
    if (!rotates(n)) {
      row = &kNone;
    } else if (!per_head && !row) {
      row = o_.use_axes ? &stage.from_axes(b, at) : &stage.dense(o_.table, b, at, 0);
    }
    S mean = 0, rstd = 1;
    if (p_.all_heads) statistics(x, o_.heads, o_.x_stride[2], mean, rstd);
    for (int64_t h = 0; h < o_.heads; ++h) {
      const T* xh = x + h * o_.x_stride[2];
      const int64_t affine = p_.all_heads ? h * D : 0;
      if (!p_.all_heads) statistics(xh, 1, D, mean, rstd);
      if (per_head) row = &stage.dense(o_.table, b, at, h);
      head_(xh, y + h * o_.out_stride[2], D, weight_ ? weight_ + affine : nullptr, bias_ ? bias_ + affine : nullptr,
            mean, rstd, *row);
    }
    return row;
  }

 private:
  FASTDIT_INLINE void statistics(const T* x, int64_t heads, int64_t stride, S& mean, S& rstd) const {
    if (p_.norm == RotaryNorm::none) return;
    const S scale = S{1} / static_cast<S>(heads * p_.head_dim);
    if (p_.norm == RotaryNorm::layer) mean = moment<false>(x, heads, stride, p_.head_dim, S{0}) * scale;
    rstd = S{1} / std::sqrt(moment<true>(x, heads, stride, p_.head_dim, mean) * scale + static_cast<S>(p_.eps));
  }

  const QkNormRopeParams& p_;
  const RotaryOperand& o_;
  int64_t count_;
  Scratch<S> weight_buffer_, bias_buffer_;
  const S* weight_ = nullptr;
  const S* bias_ = nullptr;
  HeadFn<T> head_;
};

// A thread is worth waking for this many channels.
constexpr int64_t kGrain = 32768;

int thread_count(const QkNormRopeParams& p, int64_t channels) {
  const int64_t useful = channels / kGrain + 1;
  return static_cast<int>(useful < p.threads ? useful : p.threads);
}

template <class T>
void run(const QkNormRopeParams& p, const RotaryOperand& o) {
  const int64_t rows = p.batch * o.tokens;
  parallel_ranges(rows, thread_count(p, rows * o.heads * p.head_dim), [&](int64_t begin, int64_t end, int) {
    const Worker<T> worker(p, o);
    Stage<typename simd<T>::S> stage(p);
    for (int64_t r = begin; r < end; ++r) worker.token(r / o.tokens, r % o.tokens, stage, nullptr);
  });
}

template <class T>
void run_both(const QkNormRopeParams& p) {
  const int64_t rows = p.batch * p.q.tokens, heads = p.q.heads + p.k.heads;
  parallel_ranges(rows, thread_count(p, rows * heads * p.head_dim), [&](int64_t begin, int64_t end, int) {
    const Worker<T> q(p, p.q), k(p, p.k);
    Stage<typename simd<T>::S> stage(p);
    const bool shared = k.shares(q);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.q.tokens, n = r % p.q.tokens;
      const auto* row = q.token(b, n, stage, nullptr);
      k.token(b, n, stage, shared ? row : nullptr);
    }
  });
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
    if (p.q.tokens == p.k.tokens) {
      run_both<T>(p);
    } else {
      run<T>(p, p.q);
      run<T>(p, p.k);
    }
  })
}

}  // namespace fastdit::cpu::FASTDIT_ISA
