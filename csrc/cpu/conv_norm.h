// GroupNorm's statistics: two readings of a row while it is in cache (mean, then squared deviations), the rows merged
// in double, in order: no cancellation, and the same bits for any number of threads.
#pragma once

#include "conv_rows.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int64_t kGroupBytes = int64_t{1} << 19;  // of a group: about what a core's cache holds beside its streams

// fn(vector, offset, count) over n elements `stride` apart, the last vector zero-filled.
template <class T, class F>
FASTDIT_INLINE void for_vectors(const T* x, int64_t n, int64_t stride, F&& fn) {
  constexpr int L = simd<T>::width;
  for (int64_t i = 0; i < n; i += L) {
    const int count = static_cast<int>(n - i < L ? n - i : L);
    if (stride == 1) {
      fn(count == L ? load(x + i) : load_n(x + i, count), i, count);
    } else {
      T lane[L] = {};
      for (int j = 0; j < count; ++j) lane[j] = x[(i + j) * stride];
      fn(load(lane), i, count);
    }
  }
}

struct Moments {
  double count, mean, squares;  // squares: sum of squared deviations from the mean
  void merge(const Moments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * count * o.count / total;
    mean += delta * o.count / total;
    count = total;
  }
};

// Moments of some groups over one (t, h) row. Lanes: channels when they are contiguous (of all groups), pixels
// otherwise. tmp: two tables of channels.
template <class T>
inline void row_moments(const NormSiluParams& p, const T* x, int64_t g0, int64_t g1, typename simd<T>::S* tmp,
                        Moments* out) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int L = simd<T>::width;
  const int64_t per_group = p.c / p.groups, padded = (p.c + L - 1) / L * L;
  S *total = tmp, *mean = tmp + padded;
  const auto reduce = [&](bool centred) {
    if (p.x_stride[1] == 1) {
      for (int64_t i = 0; i < padded; ++i) total[i] = S(0);
      for (int64_t w = 0; w < p.w; ++w)
        for_vectors(x + w * p.x_stride[4], p.c, 1, [&](V v, int64_t i, int) {
          const V d = centred ? v - load(mean + i) : v;  // past c the table holds zeros, as does v
          store(total + i, load(total + i) + (centred ? d * d : d));
        });
    } else {
      for (int64_t c = g0 * per_group; c < g1 * per_group; ++c) {
        const T* from = x + c * p.x_stride[1];
        const S shift = centred ? mean[c] : S(0);
        const auto add = [&](V& acc, V v) {
          v = v - shift;
          acc += centred ? v * v : v;
        };
        V acc[4] = {};
        int64_t w = 0;
        if (p.x_stride[4] == 1) {
          for (; w + 4 * L <= p.w; w += 4 * L)
            for (int k = 0; k < 4; ++k) add(acc[k], load(from + w + k * L));
        }
        S rest = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
        for (; w < p.w; ++w) {
          const S v = static_cast<S>(to_scalar(from[w * p.x_stride[4]])) - shift;
          rest += centred ? v * v : v;
        }
        total[c] = rest;
      }
    }
  };
  const double count = static_cast<double>(per_group * p.w);
  for (int64_t i = p.c; i < padded; ++i) mean[i] = S(0);
  reduce(false);
  for (int64_t g = g0; g < g1; ++g) {
    double s = 0;
    for (int64_t i = 0; i < per_group; ++i) s += total[g * per_group + i];
    const S m = static_cast<S>(s / count);  // rounded, so that the deviations are from the mean that is stored
    for (int64_t i = 0; i < per_group; ++i) mean[g * per_group + i] = m;
    out[g].count = count;
    out[g].mean = static_cast<double>(m);
  }
  reduce(true);
  for (int64_t g = g0; g < g1; ++g) {
    out[g].squares = 0;
    for (int64_t i = 0; i < per_group; ++i) out[g].squares += total[g * per_group + i];
  }
}

// Cuts the pixels of a sample anew, into rows of up to kRowPixels, where T, H and W lie one behind another in all
// tensors: short rows of many channels far apart are what a memory likes least.
inline void even_rows(NormSiluParams& p, int64_t* const* strides, int count) {
  constexpr int64_t kRowPixels = 2048;
  const int64_t all = p.t * p.h * p.w;
  int64_t step[3];
  for (int i = 0; i < count; ++i) {
    const int64_t* s = strides[i];
    step[i] = p.w > 1 ? s[4] : p.h > 1 ? s[3] : s[2];
    if ((p.h > 1 && s[3] != p.w * step[i]) || (p.t > 1 && s[2] != p.h * p.w * step[i])) return;
  }
  int64_t width = kRowPixels < all ? kRowPixels : all;
  while (all % width) --width;
  if (width <= p.w) return;
  p.t = 1, p.h = all / width, p.w = width;
  for (int i = 0; i < count; ++i) strides[i][2] = 0, strides[i][3] = width * step[i], strides[i][4] = step[i];
}

// Row i of all (n, t, h) rows.
template <class P>
FASTDIT_INLINE P group_row(const NormSiluParams& p, P base, const int64_t* s, int64_t i) {
  const int64_t rows = p.t * p.h;
  return base + i / rows * s[0] + i % rows / p.h * s[2] + i % p.h * s[3];
}

// Statistics of all groups, and the walks over them. Where channels are far apart a group is a few runs of memory: it
// is taken from its statistics to the last pass while the caches hold it, by all threads where it is more than one
// core's cache holds. Otherwise every pass goes over all rows. In any case a sum has the same terms in the same order.
template <class T>
class Groups {
  using S = typename simd<T>::S;
  static constexpr int L = simd<T>::width;

 public:
  explicit Groups(const NormSiluParams& p)
      : rows(p.t * p.h),
        per_group(p.c / p.groups),
        padded((p.c + L - 1) / L * L),
        p_(p),
        table_(3 * p.n * padded),
        inverses_(p.n * p.groups),
        moments_(p.n * rows * p.groups) {
    for (int64_t n = 0; n < p.n; ++n) {
      S* table = table_.get() + 3 * n * padded;
      for (int64_t i = 0; i < 3 * padded; ++i) table[i] = S(0);
      load_channels<S>(p.weight, p.weight_dtype, p.c, S(1), table + padded);
      load_channels<S>(p.bias, p.bias_dtype, p.c, S(0), table + 2 * padded);
    }
  }

  // of a sample's channels
  const S* mean(int64_t n) const { return table_.get() + 3 * n * padded; }
  const S* scale(int64_t n) const { return mean(n) + padded; }  // weight / deviation
  const S* bias(int64_t n) const { return mean(n) + 2 * padded; }
  const S* inverse(int64_t n) const { return inverses_.get() + n * p_.groups; }  // 1 / deviation of each group

  // Statistics, then every pass in turn, which all come back to `bytes` per value.
  template <class... Pass>
  void run(int64_t bytes, const Pass&... pass) {
    if (p_.x_stride[1] == 1 || p_.n * p_.groups < 2 * p_.threads) {
      parallel_ranges(p_.n * rows, p_.threads, [&](int64_t begin, int64_t end, int) {
        Scratch<S> tmp(2 * padded);
        for (int64_t i = begin; i < end; ++i) moments(i, 0, p_.groups, tmp.get());
      });
      for (int64_t n = 0; n < p_.n; ++n) finish(n, 0, p_.groups);
      (over_rows(pass), ...);
    } else if (per_group * rows * p_.w * bytes > kGroupBytes && rows >= 2 * p_.threads) {
      team(p_.threads, [&](int thread, int threads, auto&& wait) {
        for (int64_t task = 0; task < p_.n * p_.groups; ++task)
          over_group(task, rows * thread / threads, rows * (thread + 1) / threads, 0, wait, pass...);
      });
    } else {
      parallel_tasks(p_.n * p_.groups, p_.threads, [&](int64_t task, int thread) {
        over_group(task, 0, rows, thread, [](auto&& last) { last(); }, pass...);
      });
    }
  }

  const int64_t rows, per_group, padded;  // rows and channels of a sample; channels in whole vectors

 private:
  template <class Pass>
  void over_rows(const Pass& pass) const {
    parallel_ranges(p_.n * rows, p_.threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) pass.row(i, 0, p_.groups, -1);
    });
    for (int64_t n = 0; n < p_.n; ++n) pass.end(n, 0, p_.groups);
  }
  // Rows [begin, end) of a sample's group from their statistics to the last pass. wait: see team().
  template <class Wait, class... Pass>
  void over_group(int64_t task, int64_t begin, int64_t end, int thread, Wait&& wait, const Pass&... pass) {
    const int64_t n = task / p_.groups, g = task % p_.groups;
    Scratch<S> tmp(2 * padded);
    for (int64_t i = n * rows + begin; i < n * rows + end; ++i) moments(i, g, g + 1, tmp.get());
    wait([&] { finish(n, g, g + 1); });
    const auto one = [&](const auto& f) {
      for (int64_t i = n * rows + begin; i < n * rows + end; ++i) f.row(i, g, g + 1, thread);
      wait([&] { f.end(n, g, g + 1); });
    };
    (one(pass), ...);
  }
  void moments(int64_t i, int64_t g0, int64_t g1, S* tmp) {
    row_moments<T>(p_, group_row(p_, static_cast<const T*>(p_.x), p_.x_stride, i), g0, g1, tmp,
                   moments_.get() + i * p_.groups);
  }
  void finish(int64_t n, int64_t g0, int64_t g1) {
    S *mean = table_.get() + 3 * n * padded, *scale = mean + padded;
    for (int64_t g = g0; g < g1; ++g) {
      Moments m{0, 0, 0};
      for (int64_t r = 0; r < rows; ++r) m.merge(moments_.get()[(n * rows + r) * p_.groups + g]);
      const S inverse = static_cast<S>(1 / __builtin_sqrt(m.squares / m.count + p_.eps));
      inverses_.get()[n * p_.groups + g] = inverse;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        mean[c] = static_cast<S>(m.mean);
        scale[c] *= inverse;
      }
    }
  }

  const NormSiluParams& p_;
  Scratch<S> table_;  // per sample: mean, scale, bias of every channel
  Scratch<S> inverses_;
  Scratch<Moments> moments_;
};

// A pass: row(i, g0, g1, thread) over the rows of all samples, end(n, g0, g1) once a sample's rows are done. thread:
// whose scratch keeps a row of the group at hand until the last pass; -1 where all groups are at hand.
template <class Row, class End>
struct GroupPass {
  Row row;
  End end;
};
template <class Row, class End>
GroupPass(Row, End) -> GroupPass<Row, End>;

}  // namespace fastdit::cpu::FASTDIT_ISA
