// The convolution's virtual input cat(cache, x), padded in time and space by choice of frame and row: what the forward
// and the weight gradient share. Nothing of it exists in memory but the activated rows that are at hand.
#pragma once

#include "conv_rows.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int64_t kKeepBytes = int64_t{64} << 20;  // scratch kept between calls

// The calling thread's scratch, kept between calls: fresh pages for every convolution cost more than its prologue.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return static_cast<char*>(data_);
  }
  void trim(int64_t bytes) {
    if (size_ <= bytes) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};
inline thread_local Workspace workspace;

struct Range {
  int64_t begin, end;  // end exclusive; empty: begin == end
  int64_t size() const { return end - begin; }
  void cover(int64_t i) {
    if (i < 0) return;
    if (begin == end) {
      begin = i, end = i + 1;
    } else {
      begin = i < begin ? i : begin;
      end = i + 1 > end ? i + 1 : end;
    }
  }
};

// Arithmetic of an element type on this ISA.
template <class T>
struct MathOf {
  using type = F32Math;
};
template <>
struct MathOf<double> {
  using type = F64Math;
};
#if defined(__AVX512BF16__)
template <>
struct MathOf<bf16> {
  using type = BF16Math;
};
#endif

template <class T, class M>
class Input {
 protected:
  using S = typename M::S;
  using A = typename M::A;

  explicit Input(const ConvParams& p) : p_(p), cp_(padded_channels<M>(p.cin)) {
    const int64_t reach = (p.wo - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1;
    row_pixels_ = max(reach, p.pad_w + p.w);
    row_ = row_pixels_ * cp_;
  }

  static int64_t pieces(int64_t n, int64_t m) { return (n + m - 1) / m; }
  static int64_t round_up(int64_t n, int64_t m) { return pieces(n, m) * m; }
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

  // With up > 1 only every up-th position holds something, as in the gradient of a strided convolution.
  static int64_t position(int64_t i, int64_t up, int64_t n, int pad) {
    if (up > 1) {
      if (i % up) return -1;
      i /= up;
    }
    return map_index(i, n, pad);
  }
  // Frame of cat(cache, x) under tap kt of output frame t; -1: a zero frame.
  int64_t frame_at(int64_t t, int64_t kt) const {
    return position(t * p_.stride[0] + kt * p_.dilation[0] - (p_.pad_t - p_.cache_t), p_.up[0], p_.cache_t + p_.t,
                    p_.time_pad);
  }
  int64_t row_at(int64_t y, int64_t kh) const {
    return position(y * p_.stride[1] + kh * p_.dilation[1] - p_.pad_h, p_.up[1], p_.h, p_.space_pad);
  }
  Range frames_of(int64_t begin, int64_t end) const {
    Range r{0, 0};
    for (int64_t t = begin; t < end; ++t)
      for (int64_t kt = 0; kt < p_.kernel[0]; ++kt) r.cover(frame_at(t, kt));
    return r;
  }
  Range rows_of(int64_t begin, int64_t end) const {
    Range r{0, 0};
    for (int64_t y = begin; y < end; ++y)
      for (int64_t kh = 0; kh < p_.kernel[1]; ++kh) r.cover(row_at(y, kh));
    return r;
  }
  // Most frames and rows that so many output frames and rows can see.
  int64_t frames_under(int64_t frames) const {
    const int64_t span = (frames - 1) * p_.stride[0] + (p_.kernel[0] - 1) * p_.dilation[0];
    return min(p_.cache_t + p_.t, span / p_.up[0] + 1);
  }
  int64_t rows_under(int64_t rows) const {
    const int64_t span = (rows - 1) * p_.stride[1] + (p_.kernel[1] - 1) * p_.dilation[1];
    return min(p_.h, span / p_.up[1] + 1);
  }

  // weight: room for cin values and a vector more
  void prologue(S* weight) {
    fn_ = Prologue<S>{p_.norm, p_.silu, static_cast<S>(p_.norm_eps), S(1) / static_cast<S>(p_.cin), nullptr, nullptr};
    if (!p_.norm) return;
    load_channels<S>(p_.norm_weight, p_.norm_weight_dtype, p_.cin, S(1), weight);
    const S root = p_.norm == static_cast<int>(Norm::channel_l2) ? __builtin_sqrt(static_cast<S>(p_.cin)) : S(1);
    for (int64_t i = 0; i < p_.cin; ++i) weight[i] *= root;
    fn_.weight = weight;
  }

  // columns: of the row with its sides; tmp: cin * M::lanes values
  void activate(int64_t n, int64_t frame, int64_t row, Range columns, S* tmp, A* dst) const {
    const bool cached = frame < p_.cache_t;
    const int64_t* stride = cached ? p_.cache_stride : p_.x_stride;
    const T* src = static_cast<const T*>(cached ? p_.cache : p_.x) + n * stride[0] +
                   (cached ? frame : frame - p_.cache_t) * stride[2] + row * stride[3];
    activate_row<T, M>(p_, src, stride, columns.begin, columns.end, fn_, tmp, dst);
  }

  const ConvParams& p_;
  const int64_t cp_;          // channels of an activated pixel
  int64_t row_pixels_, row_;  // columns of an activated row with its sides; elements of it
  Prologue<S> fn_{};
};

}  // namespace fastdit::cpu::FASTDIT_ISA
