// What the rotary forward and backward share: pairs of channels, table rows, statistics, staged affine vectors.
//
// Interleaved pairs are taken apart on load, so that the rotation is four products on whole vectors with the tables as
// they lie in memory, and put together again on store.
#pragma once

#include "fastdit/rotary.h"
#include "moments.h"
#include "pairs.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// ---- what rotates a token -------------------------------------------------------------------------------

// What rotates the heads of a token: R/2 cosines and sines. half: for `sections` runs of `pairs` pairs.
template <class S>
struct Rotation {
  int64_t rotated = 0;          // R, 0 for a token outside the slice
  bool round_products = false;  // tables of x's dtype under the native law
  int sections = 1;
  int64_t pairs[3] = {0, 0, 0};
  const S* c = nullptr;
  const S* s = nullptr;
};

// ---- statistics ---------------------------------------------------------------------------------------

enum class Moment { sum, squares, centered };  // of x, x^2, (x - shift)^2

template <Moment kMoment, class V>
FASTDIT_INLINE V accumulate(V acc, V v, V shift) {
  if constexpr (kMoment == Moment::sum) return acc + v;
  if constexpr (kMoment == Moment::centered) v = v - shift;
  return acc + v * v;
}
template <Moment kMoment, class T, class V>
FASTDIT_INLINE void accumulate(V* acc, const T* x, V shift) {  // two vectors of x
  acc[0] = accumulate<kMoment>(acc[0], load(x), shift);
  acc[1] = accumulate<kMoment>(acc[1], load(x + simd<T>::width), shift);
}
template <Moment kMoment>
FASTDIT_INLINE void accumulate(vf* acc, const bf16* x, vf shift) {
#if defined(__AVX512BF16__)
  if constexpr (kMoment == Moment::squares) {
    const __m512bh v = load_raw<__m512bh>(x);
    acc[0] = (vf)_mm512_dpbf16_ps((__m512)acc[0], v, v);
    return;
  }
#endif
  const Pair<vf> v = load_pairs(x);
  acc[0] = accumulate<kMoment>(acc[0], v.a, shift);
  acc[1] = accumulate<kMoment>(acc[1], v.b, shift);
}

template <Moment kMoment, class T>
FASTDIT_INLINE typename simd<T>::S moment(const T* x, int64_t n, typename simd<T>::S shift) {
  using V = typename simd<T>::V;
  constexpr int block = 2 * simd<T>::width;
  const V center = splat(shift);
  V acc[4] = {};
  int64_t i = 0;
  for (; i + 2 * block <= n; i += 2 * block) {
    accumulate<kMoment>(acc, x + i, center);
    accumulate<kMoment>(acc + 2, x + i + block, center);
  }
  for (; i + block <= n; i += block) accumulate<kMoment>(acc, x + i, center);
  if (i < n) {
    constexpr int width = simd<T>::width;
    const int left = static_cast<int>(n - i), head = left < width ? left : width;
    V a = load_n(x + i, head), b = load_n(x + i + head, left - head);  // zero beyond the row
    if constexpr (kMoment == Moment::centered)
      a = first_lanes(head, a - center, V{}), b = first_lanes(left - head, b - center, V{});
    constexpr Moment of = kMoment == Moment::sum ? Moment::sum : Moment::squares;
    acc[0] = accumulate<of>(acc[0], a, V{});
    acc[1] = accumulate<of>(acc[1], b, V{});
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The same over H heads; contiguous ones are one run.
template <Moment kMoment, class T>
FASTDIT_INLINE typename simd<T>::S moment(const T* x, int64_t heads, int64_t stride, int64_t channels,
                                          typename simd<T>::S shift) {
  if (stride == channels || heads == 1) return moment<kMoment>(x, heads * channels, shift);
  typename simd<T>::S total = 0;
  for (int64_t h = 0; h < heads; ++h) total += moment<kMoment>(x + h * stride, channels, shift);
  return total;
}

// Asks for a line that the next token will want. The rows of a token are too short, and the arrays too many, for the
// prefetcher of the machine: without this a long video runs at the latency of memory. Spread over the arithmetic: in a
// burst the requests wait for one another. Behind a tail the line that follows is asked for, too: a masked load waits
// for all lines that it touches, and the last head's touches a token that nobody has asked for yet.
template <class T>
FASTDIT_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
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

// The table row of a token (and head): in place where it is S with stride 1, else staged here.
template <class S>
class Stage {
 public:
  explicit Stage(const QkNormRopeParams& p)
      : axes_(p.axes), cursor_{p.axes}, pairs_(p.rotated / 2), native_dtype_(p.native ? p.dtype : -1), row_(p.rotated) {
    rotation_.rotated = p.rotated;
    rotation_.pairs[0] = pairs_;
    if (p.layout == RotaryLayout::axis_half) {
      rotation_.sections = p.axes.count ? p.axes.count : 3;
      for (int a = 0; a < rotation_.sections; ++a) rotation_.pairs[a] = p.axes.count ? p.axes.width[a] : pairs_ / 3;
    }
  }

  const Rotation<S>& shape() const { return rotation_; }  // of a rotated token, without its row
  const Rotation<S>& dense(const RotaryTable& t, int64_t b, int64_t n, int64_t h) {
    const int64_t size = itemsize(static_cast<DType>(t.dtype));
    const auto row = [&](const void* base, const int64_t* stride) {
      return static_cast<const char*>(base) + (b * stride[0] + n * stride[1] + h * stride[2]) * size;
    };
    rotation_.c = widen<S>(row(t.cos, t.cos_stride), t.dtype, t.cos_stride[3], pairs_, row_.get());
    rotation_.s = widen<S>(row(t.sin, t.sin_stride), t.dtype, t.sin_stride[3], pairs_, row_.get() + pairs_);
    rotation_.round_products = t.dtype == native_dtype_;
    return rotation_;
  }

  const Rotation<S>& from_axes(int64_t b, int64_t n) {
    int64_t position[3];
    cursor_.locate(b, n, position);
    const int64_t size = itemsize(static_cast<DType>(axes_.dtype));
    S* c = row_.get();
    S* s = c + pairs_;
    for (int a = 0; a < axes_.count; ++a) {
      const int64_t width = axes_.width[a], offset = position[a] * width * size;
      copy(static_cast<const char*>(axes_.cos[a]) + offset, width, c);
      copy(static_cast<const char*>(axes_.sin[a]) + offset, width, s);
      c += width;
      s += width;
    }
    rotation_.c = row_.get();
    rotation_.s = row_.get() + pairs_;
    rotation_.round_products = axes_.dtype == native_dtype_;
    return rotation_;
  }

 private:
  void copy(const char* src, int64_t width, S* out) {
    const S* from = widen<S>(src, axes_.dtype, 1, width, out);
    if (from != out) __builtin_memcpy(out, from, width * sizeof(S));
  }

  const RotaryAxes& axes_;
  GridCursor cursor_;
  int64_t pairs_;
  int native_dtype_;
  Scratch<S> row_;
  Rotation<S> rotation_;
};

// Weight or bias as S, each head padded to whole blocks; interleaved: each block its even channels, then its odd ones.
template <class T, class S = typename simd<T>::S>
class Affine {
 public:
  Affine(const void* src, int dtype, bool ones, int64_t heads, int64_t channels, bool interleaved)
      : stride_(padded(channels)), natural_(src ? heads * channels : 0), staged_(src || ones ? heads * stride_ : 0) {
    if (!src && !ones) return;
    const S* from = src ? widen<S>(src, dtype, 1, heads * channels, natural_.get()) : nullptr;
    data_ = staged_.get();
    for (int64_t i = 0; i < heads * stride_; ++i) data_[i] = 0;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < channels; ++i) {
        data_[h * stride_ + place(i, interleaved)] = from ? from[h * channels + i] : S{1};
      }
    }
  }
  static int64_t padded(int64_t channels) { return (channels + kBlock - 1) / kBlock * kBlock; }
  static int64_t place(int64_t channel, bool interleaved) {
    const int64_t i = channel % kBlock;
    return channel - i + (interleaved ? i / 2 + i % 2 * kBlock / 2 : i);
  }
  const S* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  static constexpr int kBlock = 2 * simd<T>::width;
  int64_t stride_;
  Scratch<S> natural_, staged_;
  S* data_ = nullptr;
};

// ---- streaming ----------------------------------------------------------------------------------------

// Where a call moves more than the caches hold, outputs bypass them: an ordinary store would fetch each line first, a
// third of the traffic. Every store must then be aligned, and the line filled from one place: by a head, or, where
// heads end within lines, by a token that is put together first. tensors: of the size of q and k together that a call
// reads and writes.
template <class T>
class Outlet {
 public:
  Outlet(const QkNormRopeParams& p, const RotaryOperand& o, int tensors)
      : channels_(o.heads * p.head_dim), way_(choose(p, o, tensors)), token_(way_ == Way::tokens ? channels_ : 1) {}

  bool by_head() const { return way_ == Way::heads; }
  T* open(T* out) const { return way_ == Way::tokens ? token_.get() : out; }  // heads are as far apart as in out
  void close(T* out) const {
    if (way_ != Way::tokens) return;
    typedef uint8_t bytes __attribute__((vector_size(kVectorBytes)));
    constexpr int64_t step = kVectorBytes / sizeof(T);
    for (int64_t i = 0; i < channels_; i += step) put_raw(out + i, load_raw<bytes>(token_.get() + i), true);
  }

 private:
  enum class Way { cached, heads, tokens };
  static Way choose(const QkNormRopeParams& p, const RotaryOperand& o, int tensors) {
    const auto lines = [](int64_t channels) { return channels * static_cast<int64_t>(sizeof(T)) % 64 == 0; };
    const int64_t heads = p.q.tokens * p.q.heads + p.k.tokens * p.k.heads;
    if (o.out == o.x || !outgrow_caches(tensors * p.batch * heads * p.head_dim * int64_t{sizeof(T)}))
      return Way::cached;
    if (reinterpret_cast<uintptr_t>(o.out) % 64 || !lines(o.out_stride[0]) || !lines(o.out_stride[1]))
      return Way::cached;
    const bool halves = p.layout != RotaryLayout::half || lines(p.rotated / 2);
    if (halves && p.layout != RotaryLayout::axis_half && lines(p.head_dim) && lines(o.out_stride[2])) return Way::heads;
    const bool whole = o.out && o.out_stride[2] == p.head_dim && lines(o.heads * p.head_dim);
    return whole ? Way::tokens : Way::cached;
  }

  int64_t channels_;
  Way way_;
  Scratch<T> token_;
};

// ---- one operand --------------------------------------------------------------------------------------

// q or k: its affine vectors, and the statistics of the token at hand.
template <class T>
struct Operand {
  using S = typename simd<T>::S;

  Operand(const QkNormRopeParams& params, const RotaryOperand& operand)
      : p(params),
        o(operand),
        weight(o.weight, o.weight_dtype, o.bias, vectors(), p.head_dim, interleaved()),
        bias(o.bias, o.bias_dtype, false, vectors(), p.head_dim, interleaved()),
        mean(o.heads + 1),
        rstd(o.heads + 1) {
    for (int64_t h = 0; h <= o.heads; ++h) mean.get()[h] = 0, rstd.get()[h] = 1;
  }

  bool interleaved() const { return p.layout == RotaryLayout::interleaved; }
  int64_t vectors() const { return p.all_heads ? o.heads : 1; }  // heads with a weight of their own
  int64_t affine_stride() const { return p.all_heads && weight.data() ? weight.stride() : 0; }
  bool rotates(int64_t token) const {
    return (o.table.cos || o.use_axes) && token >= p.rope_start && token - p.rope_start < p.rope_len;
  }
  bool rows_per_head() const { return !o.use_axes && (o.table.cos_stride[2] != 0 || o.table.sin_stride[2] != 0); }
  bool shares(const Operand& q) const {  // the row that q has staged
    const RotaryTable &a = o.table, &b = q.o.table;
    bool same = a.cos == b.cos && a.sin == b.sin && a.dtype == b.dtype && o.use_axes == q.o.use_axes;
    for (int i = 0; i < 4; ++i) same = same && a.cos_stride[i] == b.cos_stride[i] && a.sin_stride[i] == b.sin_stride[i];
    return same && !rows_per_head();
  }
  // The rotation of token n, where all heads share it.
  const Rotation<S>* row(int64_t b, int64_t n, Stage<S>& stage) const {
    static constexpr Rotation<S> kNone{};
    if (!rotates(n)) return &kNone;
    return o.use_axes ? &stage.from_axes(b, n - p.rope_start) : &stage.dense(o.table, b, n - p.rope_start, 0);
  }

  // Of every head before the first is rotated: their chains of sums, roots and divisions overlap.
  void statistics(const T* x) const {
    if (p.norm == RotaryNorm::none) return;
    const bool layer = p.norm == RotaryNorm::layer;
    const int64_t rows = p.all_heads ? 1 : o.heads, run = p.all_heads ? o.heads : 1, stride = o.x_stride[2];
    const double scale = 1.0 / static_cast<double>(run * p.head_dim);
    S *m = mean.get(), *r = rstd.get();
    if (sizeof(T) == 2 && layer && !p.all_heads) {  // one reading; fp32 gains nothing by it
      const T* heads[kRows];
      int64_t h = 0;
      for (; h + kRows <= rows; h += kRows) {
        for (int k = 0; k < kRows; ++k) heads[k] = x + (h + k) * stride;
        moments<kRows>(heads, p.head_dim, true, m + h, r + h);
      }
      for (; h < rows; ++h) heads[0] = x + h * stride, moments<1>(heads, p.head_dim, true, m + h, r + h);
      for (h = 0; h < rows; ++h) r[h] = inverse_root(r[h] + static_cast<S>(p.eps));
      return;
    }
    for (int64_t h = 0; h < rows; ++h) {
      const T* head = x + h * stride;
      if (layer) {
        m[h] = moment<Moment::sum>(head, run, stride, p.head_dim, S{0}) * static_cast<S>(scale);
        r[h] = moment<Moment::centered>(head, run, stride, p.head_dim, m[h]);
      } else {
        r[h] = moment<Moment::squares>(head, run, stride, p.head_dim, S{0});
      }
    }
    for (int64_t h = 0; h < rows; ++h) r[h] = static_cast<S>(1.0 / std::sqrt(r[h] * scale + p.eps));
  }

  const QkNormRopeParams& p;
  const RotaryOperand& o;
  Affine<T> weight, bias;
  Scratch<S> mean, rstd;
};

// A thread is worth waking for this many channels.
constexpr int64_t kGrain = 32768;

inline int thread_count(const QkNormRopeParams& p, int64_t channels) {
  const int64_t useful = channels / kGrain + 1;
  return static_cast<int>(useful < p.threads ? useful : p.threads);
}

}  // namespace
}  // namespace fastdit::cpu::FASTDIT_ISA
