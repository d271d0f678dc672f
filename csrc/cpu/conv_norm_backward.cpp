// Backward of norm_silu, and of the convolution's prologue act(norm(x)).
//
//   n = x * r (group: (x - mean) * r),  z = n * w + b,  y = silu(z)
//   g = grad * silu'(z),  dw += g * n,  db += g,  gw = g * w
//   dx = r * (gw - n * mean(gw * n))           mean over the channels of a pixel; l2: r = sqrt(C) / max(||x||, eps),
//   and
//                                              without the second term where eps won; no norm: dx = g
//   dx = r * (gw - mean(gw) - n * mean(gw * n))   group: over the channels of a group and all pixels
//
// What pixels share is summed in fp32 over chunks of at most kChunk pixels of a row, and over chunks in double, in
// order: the same bits for any number of threads. A pixel is read before it is written: d_x may lie over grad.
#include "conv_norm.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kChunk = 128, kRun = 16;
constexpr int64_t kKept = int64_t{1} << 19;  // most values of a group kept for its second pass

FASTDIT_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDIT_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// n (<= width) elements `stride` apart, zeros after them.
template <class P>
FASTDIT_INLINE typename simd<P>::V get(const P* p, int64_t stride, int n) {
  constexpr int L = simd<P>::width;
  if (stride == 1) return n >= L ? load(p) : load_n(p, n);
  P lane[L] = {};
  for (int j = 0; j < L && j < n; ++j) lane[j] = p[j * stride];
  return load(lane);
}
template <class P>
FASTDIT_INLINE void put(P* p, int64_t stride, typename simd<P>::V v, int n) {
  constexpr int L = simd<P>::width;
  if (stride == 1) return n >= L ? store(p, v) : store_n(p, v, n);
  P lane[L];
  store(lane, v);
  for (int j = 0; j < L && j < n; ++j) p[j * stride] = lane[j];
}

// Derivative of the activation at z, times grad, where x is of T.
template <class T, class V>
FASTDIT_INLINE V through_act(V grad, V z, int silu) {
  if (!silu) return grad;
  const V s = sigmoid_of<T>(z);
  return grad * s * (1 + z * (1 - s));
}

// The pixels of x, grad and d_x as few long rows: neighbouring axes that lie alike in all three become one.
struct Pixels {
  int64_t size[4], stride[3][4];  // (n, t, h, w); x, grad, d_x
  explicit Pixels(const NormSiluGradParams& q) {
    const NormSiluParams& p = q.forward;
    const int64_t sizes[4] = {p.n, p.t, p.h, p.w};
    for (int i = 0; i < 4; ++i) {
      const int from = i ? i + 1 : 0;
      size[i] = sizes[i];
      stride[0][i] = p.x_stride[from], stride[1][i] = q.grad_stride[from], stride[2][i] = q.d_x_stride[from];
    }
    for (int merged = 0; merged < 3; ++merged) {
      bool alike = true;
      for (auto& s : stride) alike &= size[2] == 1 || size[3] == 1 || s[2] == s[3] * size[3];
      if (!alike) break;
      for (auto& s : stride) {
        if (size[3] == 1) s[3] = s[2];
        s[2] = s[1], s[1] = s[0], s[0] = 0;
      }
      size[3] *= size[2], size[2] = size[1], size[1] = size[0], size[0] = 1;
    }
  }
  int64_t rows() const { return size[0] * size[1] * size[2]; }
  int64_t at(int which, int64_t row, int64_t w) const {
    const int64_t* s = stride[which];
    return row / (size[1] * size[2]) * s[0] + row / size[2] % size[1] * s[1] + row % size[2] * s[2] + w * s[3];
  }
};

// Sums over partial rows (dweight | dbias), each `padded` long, in order.
template <class S>
void reduce(const S* partial, int64_t count, int64_t padded, int64_t c, double* d_weight, double* d_bias) {
  for (int64_t k = 0; k < count; ++k, partial += 2 * padded) {
    if (d_weight)
      for (int64_t i = 0; i < c; ++i) d_weight[i] += static_cast<double>(partial[i]);
    if (d_bias)
      for (int64_t i = 0; i < c; ++i) d_bias[i] += static_cast<double>(partial[padded + i]);
  }
}

template <class T, class G>
class ChannelBackward {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int L = simd<T>::width;
  static constexpr int kTogether = 64 / (L * int(sizeof(T))) > 0 ? 64 / (L * int(sizeof(T))) : 1;  // a cache line

 public:
  explicit ChannelBackward(const NormSiluGradParams& q)
      : q_(q), p_(q.forward), pixels_(q), padded_((p_.c + L - 1) / L * L), table_(2 * padded_) {
    load_channels<S>(p_.weight, p_.weight_dtype, p_.c, S(1), table_.get());
    load_channels<S>(p_.bias, p_.bias_dtype, p_.c, S(0), table_.get() + padded_);
    for (int64_t i = p_.c; i < padded_; ++i) table_.get()[i] = table_.get()[padded_ + i] = S(0);
    l2_ = p_.norm == static_cast<int>(Norm::channel_l2);
    norm_ = p_.norm != static_cast<int>(Norm::none);
    root_ = __builtin_sqrt(static_cast<S>(p_.c));
    mean_ = S(1) / static_cast<S>(p_.c);
  }

  void run() {
    const int64_t pieces = (pixels_.size[3] + kChunk - 1) / kChunk, chunks = pixels_.rows() * pieces;
    const bool shared = q_.d_weight || q_.d_bias;
    Scratch<S> partials(shared ? chunks * 2 * padded_ : 1);
    parallel_ranges(chunks, p_.threads, [&](int64_t begin, int64_t end, int) {
      Scratch<S> tmp(2 * padded_ * max(L * kTogether, kRun)), lanes(2 * padded_ * L);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = k / pieces, w = k % pieces * kChunk;
        const int64_t count = pixels_.size[3] - w < kChunk ? pixels_.size[3] - w : kChunk;
        const T* x = static_cast<const T*>(p_.x) + pixels_.at(0, row, w);
        const G* grad = static_cast<const G*>(q_.grad) + pixels_.at(1, row, w);
        T* d_x = q_.d_x ? static_cast<T*>(q_.d_x) + pixels_.at(2, row, w) : nullptr;
        S* partial = shared ? partials.get() + k * 2 * padded_ : nullptr;
        if (p_.x_stride[1] == 1 && q_.grad_stride[1] == 1 && (!d_x || q_.d_x_stride[1] == 1) && p_.c > 1)
          channels_last(x, grad, d_x, count, tmp.get(), partial);
        else
          strided(x, grad, d_x, count, tmp.get(), partial, lanes.get());
      }
    });
    if (shared) reduce(partials.get(), chunks, padded_, p_.c, q_.d_weight, q_.d_bias);
  }

 private:
  // scale: what x is multiplied with; pull: 1/C, or 0 where the norm is a constant
  FASTDIT_INLINE void factors(S squares, S& scale, S& pull) const {
    scale = S(1), pull = S(0);
    if (!norm_) return;
    pull = mean_;
    if (l2_) {
      const S length = __builtin_sqrt(squares), eps = static_cast<S>(p_.eps);
      const bool clamped = length < eps;
      scale = root_ / (clamped ? eps : length);
      if (clamped) pull = S(0);
    } else {
      scale = S(1) / __builtin_sqrt(squares * mean_ + static_cast<S>(p_.eps));
    }
  }

  // kRun pixels at a time, so that their reductions do not wait for each other.
  void channels_last(const T* x, const G* grad, T* d_x, int64_t count, S* tmp, S* partial) const {
    const S *weight = table_.get(), *bias = weight + padded_;
    const int64_t c = p_.c, xs = pixels_.stride[0][3], gs = pixels_.stride[1][3], ds = pixels_.stride[2][3];
    if (partial) __builtin_memset(static_cast<void*>(partial), 0, 2 * padded_ * sizeof(S));
    for (int64_t w = 0; w < count; w += kRun, x += kRun * xs, grad += kRun * gs, d_x += d_x ? kRun * ds : 0) {
      const int pixels = static_cast<int>(min(kRun, count - w));
      S scale[kRun], pull[kRun], back[kRun];
      for (int j = 0; j < pixels; ++j) {
        V squares = V{};
        if (norm_)
          for (int64_t i = 0; i < c; i += L) {
            const V v = get(x + j * xs + i, 1, static_cast<int>(c - i));
            squares += v * v;
          }
        back[j] = sum(squares);
      }
      for (int j = 0; j < pixels; ++j) factors(back[j], scale[j], pull[j]);
      V dot[kRun] = {};
      for (int64_t i = 0; i < c; i += L) {
        const int n = static_cast<int>(c - i);
        const V factor = load(weight + i), shift = load(bias + i);
        V d_weight = V{}, d_bias = V{};
        for (int j = 0; j < pixels; ++j) {
          const V unit = get(x + j * xs + i, 1, n) * scale[j];
          V g = through_act<T>(get(grad + j * gs + i, 1, n), unit * factor + shift, q_.silu);
          d_weight += g * unit;
          d_bias += g;
          g *= factor;
          dot[j] += g * unit;
          store(tmp + j * padded_ + i, g);
        }
        if (partial) {
          store(partial + i, load(partial + i) + d_weight);
          store(partial + padded_ + i, load(partial + padded_ + i) + d_bias);
        }
      }
      if (!d_x) continue;
      for (int j = 0; j < pixels; ++j) back[j] = sum(dot[j]) * pull[j];
      for (int j = 0; j < pixels; ++j)
        for (int64_t i = 0; i < c; i += L) {
          const int n = static_cast<int>(c - i);
          const V unit = get(x + j * xs + i, 1, n) * scale[j];
          put(d_x + j * ds + i, 1, scale[j] * (load(tmp + j * padded_ + i) - unit * back[j]), n);
        }
    }
  }

  // Lanes are pixels, as many at a time as fill a cache line. lanes: per channel the partial sums of each lane.
  void strided(const T* x, const G* grad, T* d_x, int64_t count, S* tmp, S* partial, S* lanes) const {
    constexpr int K = kTogether;
    const S *weight = table_.get(), *bias = weight + padded_;
    const int64_t c = p_.c, xs = pixels_.stride[0][3], gs = pixels_.stride[1][3], ds = pixels_.stride[2][3];
    S *units = tmp, *through = tmp + padded_ * L * K;
    if (partial) __builtin_memset(static_cast<void*>(lanes), 0, 2 * c * L * sizeof(S));
    for (int64_t w = 0; w < count; w += K * L) {
      V scale[K], pull[K], squares[K] = {}, dot[K] = {};
      for (int64_t i = 0; i < c; ++i)
        for (int k = 0; k < K; ++k) {
          const int n = static_cast<int>(count - w) - k * L;
          const V v = n > 0 ? get(x + i * p_.x_stride[1] + (w + k * L) * xs, xs, n) : V{};
          squares[k] += v * v;
          store(units + (i * K + k) * L, v);
        }
      for (int k = 0; k < K; ++k)
        for (int j = 0; j < L; ++j) {
          S a, b;
          factors(squares[k][j], a, b);
          const bool exists = w + k * L + j < count;  // a missing pixel is zeros: no infinity may come of it
          scale[k][j] = exists ? a : S(1), pull[k][j] = b;
        }
      for (int64_t i = 0; i < c; ++i) {
        V d_weight = V{}, d_bias = V{};
        for (int k = 0; k < K; ++k) {
          const int n = static_cast<int>(count - w) - k * L;
          const V unit = load(units + (i * K + k) * L) * scale[k];
          V g = n > 0 ? get(grad + i * q_.grad_stride[1] + (w + k * L) * gs, gs, n) : V{};
          g = through_act<T>(g, unit * weight[i] + bias[i], q_.silu);
          d_weight += g * unit;
          d_bias += g;
          g *= weight[i];
          dot[k] += g * unit;
          store(units + (i * K + k) * L, unit);
          store(through + (i * K + k) * L, g);
        }
        if (partial) {
          store(lanes + 2 * i * L, load(lanes + 2 * i * L) + d_weight);
          store(lanes + (2 * i + 1) * L, load(lanes + (2 * i + 1) * L) + d_bias);
        }
      }
      if (!d_x) continue;
      for (int k = 0; k < K; ++k) dot[k] *= pull[k];
      for (int64_t i = 0; i < c; ++i)
        for (int k = 0; k < K; ++k) {
          const int n = static_cast<int>(count - w) - k * L;
          if (n <= 0) break;
          const V v = scale[k] * (load(through + (i * K + k) * L) - load(units + (i * K + k) * L) * dot[k]);
          put(d_x + i * q_.d_x_stride[1] + (w + k * L) * ds, ds, v, n);
        }
    }
    if (!partial) return;
    for (int64_t i = 0; i < c; ++i) {
      partial[i] = sum(load(lanes + 2 * i * L));
      partial[padded_ + i] = sum(load(lanes + (2 * i + 1) * L));
    }
  }

  const NormSiluGradParams& q_;
  const NormSiluParams& p_;
  const Pixels pixels_;
  const int64_t padded_;
  Scratch<S> table_;  // weight, bias
  bool l2_, norm_;
  S root_, mean_;
};

template <class T, class G>
class GroupBackward {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  static constexpr int L = simd<T>::width;

 public:
  explicit GroupBackward(const NormSiluGradParams& q)
      : q_(q),
        p_(q_.forward),
        groups_(p_),
        rows_(groups_.rows),
        padded_(groups_.padded),
        affine_(p_.c),
        back_(3 * p_.n * padded_),
        partials_(p_.n * rows_ * 2 * padded_),
        totals_(p_.n * 2 * p_.c),
        width_((p_.w + L - 1) / L * L),
        keeps_(q_.d_x && rows_ * groups_.per_group * width_ <= kKept),
        kept_(keeps_ ? rows_ * groups_.per_group * width_ * max(1, p_.threads) : 1) {
    for (int64_t i = 0; i < 3 * p_.n * padded_; ++i) back_.get()[i] = S(0);
    for (int64_t i = 0; i < p_.n * 2 * p_.c; ++i) totals_.get()[i] = 0;
    load_channels<S>(p_.weight, p_.weight_dtype, p_.c, S(1), affine_.get());
    last_ = p_.x_stride[1] == 1 && q_.grad_stride[1] == 1 && (!q_.d_x || q_.d_x_stride[1] == 1) && p_.c > 1;
  }

  void run() {
    groups_.run(sizeof(T) + (keeps_ ? sizeof(S) : sizeof(G)),
                GroupPass{[&](int64_t i, int64_t g0, int64_t g1, int thread) { sums(i, g0, g1, kept(i, thread)); },
                          [&](int64_t n, int64_t g0, int64_t g1) { means(n, g0, g1); }},
                GroupPass{[&](int64_t i, int64_t g0, int64_t g1, int thread) {
                            if (q_.d_x) write(i, g0, g1, kept(i, thread));
                          },
                          [](int64_t, int64_t, int64_t) {}});
    for (int64_t n = 0; n < p_.n; ++n)
      for (int64_t c = 0; c < p_.c; ++c) {
        const double* of = totals_.get() + n * 2 * p_.c + c;
        if (q_.d_weight) q_.d_weight[c] += of[0];
        if (q_.d_bias) q_.d_bias[c] += of[p_.c];
      }
  }

 private:
  const T* x(int64_t i) const { return group_row(p_, static_cast<const T*>(p_.x), p_.x_stride, i); }
  const G* grad(int64_t i) const { return group_row(p_, static_cast<const G*>(q_.grad), q_.grad_stride, i); }

  // Where the first pass leaves g = grad * silu'(z) of a row for the second, (channel of the group, pixel); or null.
  S* kept(int64_t i, int thread) const {
    return keeps_ && thread >= 0 ? kept_.get() + (thread * rows_ + i % rows_) * groups_.per_group * width_ : nullptr;
  }

  // (dweight | dbias) of one row
  void sums(int64_t i, int64_t g0, int64_t g1, S* keep) {
    const int64_t n = i / rows_, per_group = groups_.per_group;
    const S *mean = groups_.mean(n), *scale = groups_.scale(n), *bias = groups_.bias(n), *inverse = groups_.inverse(n);
    const T* from = x(i);
    const G* given = grad(i);
    const int64_t xs = p_.x_stride[4], gs = q_.grad_stride[4];
    S *d_weight = partials_.get() + i * 2 * padded_, *d_bias = d_weight + padded_;
    if (last_) {
      __builtin_memset(static_cast<void*>(d_weight), 0, 2 * padded_ * sizeof(S));
      for (int64_t w = 0; w < p_.w; ++w)
        for (int64_t c = 0; c < p_.c; c += L) {
          const int count = static_cast<int>(p_.c - c);
          const V d = get(from + w * xs + c, 1, count) - load(mean + c);
          const V g = through_act<T>(get(given + w * gs + c, 1, count), d * load(scale + c) + load(bias + c), 1);
          store(d_weight + c, load(d_weight + c) + g * d);
          store(d_bias + c, load(d_bias + c) + g);
        }
      for (int64_t c = 0; c < p_.c; ++c) d_weight[c] *= inverse[c / per_group];
    } else {
      for (int64_t c = g0 * per_group; c < g1 * per_group; ++c) {
        const S centre = mean[c], factor = scale[c], shift = bias[c];
        V to_weight = V{}, to_bias = V{};
        for (int64_t w = 0; w < p_.w; w += L) {
          const int count = static_cast<int>(p_.w - w);
          const V d = get(from + c * p_.x_stride[1] + w * xs, xs, count) - centre;
          const V g = through_act<T>(get(given + c * q_.grad_stride[1] + w * gs, gs, count), d * factor + shift, 1);
          to_weight += g * d;  // beyond the row: grad is zero
          to_bias += g;
          if (keep) store(keep + w, g);
        }
        if (keep) keep += width_;
        d_weight[c] = sum(to_weight) * inverse[c / per_group];
        d_bias[c] = sum(to_bias);
      }
    }
  }

  // What every pixel of a group subtracts: over a sample's rows, in order.
  void means(int64_t n, int64_t g0, int64_t g1) {
    const int64_t per_group = groups_.per_group;
    const double count = static_cast<double>(per_group * rows_ * p_.w);
    double *weights = totals_.get() + n * 2 * p_.c, *biases = weights + p_.c;
    const int64_t first = g0 * per_group;
    reduce(partials_.get() + n * rows_ * 2 * padded_ + first, rows_, padded_, (g1 - g0) * per_group, weights + first,
           biases + first);
    S *inverse = back_.get() + 3 * n * padded_, *plain = inverse + padded_, *along = plain + padded_;
    for (int64_t g = g0; g < g1; ++g) {
      double of_bias = 0, of_weight = 0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        of_bias += static_cast<double>(affine_.get()[c]) * biases[c];
        of_weight += static_cast<double>(affine_.get()[c]) * weights[c];
      }
      const S r = groups_.inverse(n)[g];
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        inverse[c] = r;
        plain[c] = static_cast<S>(of_bias / count) * r;
        along[c] = static_cast<S>(of_weight / count) * r;
      }
    }
  }

  void write(int64_t i, int64_t g0, int64_t g1, const S* keep) const {
    const int64_t n = i / rows_, per_group = groups_.per_group;
    const S *mean = groups_.mean(n), *scale = groups_.scale(n), *bias = groups_.bias(n);
    const S *inverse = back_.get() + 3 * n * padded_, *plain = inverse + padded_, *along = plain + padded_;
    const T* from = x(i);
    const G* given = grad(i);
    T* out = group_row(p_, static_cast<T*>(q_.d_x), q_.d_x_stride, i);
    const int64_t xs = p_.x_stride[4], gs = q_.grad_stride[4], ds = q_.d_x_stride[4];
    if (last_) {
      for (int64_t w = 0; w < p_.w; ++w)
        for (int64_t c = 0; c < p_.c; c += L) {
          const int count = static_cast<int>(p_.c - c);
          const V d = get(from + w * xs + c, 1, count) - load(mean + c), factor = load(scale + c);
          const V g = through_act<T>(get(given + w * gs + c, 1, count), d * factor + load(bias + c), 1);
          put(out + w * ds + c, 1, g * factor - load(plain + c) - d * load(inverse + c) * load(along + c), count);
        }
    } else {
      for (int64_t c = g0 * per_group; c < g1 * per_group; ++c) {
        const S centre = mean[c], factor = scale[c], shift = bias[c], constant = plain[c], unit = inverse[c],
                slope = along[c];
        const auto column = [&](auto&& gradient) {
          for (int64_t w = 0; w < p_.w; w += L) {
            const int count = static_cast<int>(p_.w - w);
            const V d = get(from + c * p_.x_stride[1] + w * xs, xs, count) - centre;
            const V g = gradient(d, w, count);
            put(out + c * q_.d_x_stride[1] + w * ds, ds, g * factor - constant - d * unit * slope, count);
          }
        };
        if (keep) {
          column([&](V, int64_t w, int) { return load(keep + w); });
          keep += width_;
        } else {
          column([&](V d, int64_t w, int count) {
            return through_act<T>(get(given + c * q_.grad_stride[1] + w * gs, gs, count), d * factor + shift, 1);
          });
        }
      }
    }
  }

  const NormSiluGradParams q_;
  const NormSiluParams& p_;
  Groups<T> groups_;
  const int64_t rows_, padded_;
  Scratch<S> affine_;
  Scratch<S> back_;         // per sample: 1 / deviation, mean(gw) and mean(gw * n) times it
  Scratch<S> partials_;     // per row: dweight, dbias
  Scratch<double> totals_;  // per sample: likewise
  const int64_t width_;     // of a row, in whole vectors
  const bool keeps_;
  Scratch<S> kept_;  // per thread
  bool last_;
};

template <class T, class G>
void backward(const NormSiluGradParams& q) {
  if (q.forward.norm != static_cast<int>(Norm::group)) return ChannelBackward<T, G>(q).run();
  NormSiluGradParams even = q;
  int64_t* strides[] = {even.forward.x_stride, even.grad_stride, even.d_x_stride};
  even_rows(even.forward, strides, q.d_x ? 3 : 2);
  GroupBackward<T, G>(even).run();
}

}  // namespace

void norm_silu_backward(const NormSiluGradParams& q) {
  if (q.forward.n * q.forward.c * q.forward.t * q.forward.h * q.forward.w == 0) return;
  FASTDIT_DTYPE_SWITCH(q.forward.dtype, T, {
    if (q.grad_dtype == q.forward.dtype)
      backward<T, T>(q);
    else
      backward<T, typename simd<T>::S>(q);
  })
}

}  // namespace fastdit::cpu::FASTDIT_ISA
