// dweight[co][ci][kt][kh][kw] = sum over pixels of grad[co][pixel] * act(norm(cat(cache, x)))[ci][pixel under the tap]
//
// A GEMM whose inner dimension is pixels. Input and gradient are taken in strips (some frames x some rows), activated
// as in the forward and laid out as panels [channel block][row][pixels of a step][channels]: for vdpbf16ps a step is a
// pair of neighbouring pixels, so taps of odd shift along W read a second copy of the row, one pixel further on.
//
// A tile is kPixels input channels (broadcast) x NV vectors of output channels, summed over a chunk of pixels in
// registers; chunks are added to fp32 sums in memory in the order of pixels. Chunks depend on the shape alone and a sum
// belongs to one task, so the bits depend on neither strips nor threads. Frames and rows that do not exist are skipped.
#include "conv_input.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kPanelBytes = int64_t{6}
                                << 20;  // panels in flight, however many threads: strips set the order of sums
constexpr int64_t kChain = 128;         // steps summed in one register
constexpr int64_t kAddends = 16;        // of dbias, likewise
constexpr int64_t kTasks = 32;
constexpr int kInputs = kPixels;  // input channels of a tile

// out[i][v] += sum over rows, over k:  a[k][i] * b[k][v]
template <class M, int NV>
__attribute__((noinline)) void add_tile(const typename M::A* a, const typename M::A* b, const int64_t* a_row,
                                        const int64_t* b_row, int64_t rows, int64_t steps, typename M::S* out) {
  using V = typename M::V;
  using A = typename M::A;
  V acc[kInputs][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
  for (int64_t r = 0; r < rows; ++r) {
    const A *x = a + a_row[r], *g = b + b_row[r];
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kInputs; ++i) {
        const V xi = M::spread(x + i * M::step);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = M::fma(acc[i][v], xi, g + v * M::lanes * M::step);
      }
      x += kInputs * M::step;
      g += NV * M::lanes * M::step;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      typename M::S* o = out + (i * NV + v) * M::lanes;
      store(o, load(o) + acc[i][v]);
    }
}

// N channels of the pixels of one step, side by side: dst[channel][pixel].
template <class M, int N>
FASTDIT_INLINE void lay(typename M::A* dst, const typename M::A* const* pixel) {
  if constexpr (M::step == 1) {
    __builtin_memcpy(dst, pixel[0], N * sizeof(*dst));
  } else {
    typedef uint16_t narrow __attribute__((vector_size(N * 2)));
    typedef uint32_t wide __attribute__((vector_size(N * 4)));
    const wide a = __builtin_convertvector(load_raw<narrow>(pixel[0]), wide);
    const wide b = __builtin_convertvector(load_raw<narrow>(pixel[1]), wide);
    store_raw(dst, a | b << 16);
  }
}

template <class T, class M>
class WeightGrad : Input<T, M> {
  using Base = Input<T, M>;
  using S = typename M::S;
  using A = typename M::A;
  using V = typename M::V;
  using Base::p_, Base::cp_, Base::row_, Base::row_pixels_;
  using Base::round_up, Base::min, Base::max, Base::frame_at, Base::row_at;
  static constexpr int64_t kStep = M::step, kLanes = M::lanes;

 public:
  explicit WeightGrad(const ConvWeightGradParams& q)
      : Base(q.forward),
        q_(q),
        blocks_(p_.cout, M::lanes),
        inputs_(Base::pieces(p_.cin, kInputs)),
        taps_(p_.kernel[1] * p_.kernel[2]),
        steps_(Base::pieces(p_.wo, kStep)) {
    const int64_t shift = (p_.kernel[2] - 1) * p_.dilation[2];
    copies_ = p_.stride[2] == 1 ? min(kStep, shift + 1) : p_.kernel[2];
    x_row_ = (p_.stride[2] == 1 ? steps_ + shift / kStep : steps_) * kInputs * kStep;
    grad_pixel_ = padded_channels<M>(p_.cout);
    grad_row_ = steps_ * kStep * blocks_.vectors * kLanes;
    pieces_ = Base::pieces(steps_, kChain);
    piece_ = Base::pieces(steps_, pieces_);
    chunk_rows_ = max(1, kChain / steps_);
    groups_ = min(inputs_, Base::pieces(kTasks, blocks_.count));
    as_rows_ = p_;
    as_rows_.cin = p_.cout, as_rows_.w = p_.wo, as_rows_.pad_w = 0;
    as_rows_.space_pad = static_cast<int>(Pad::zeros);
    plan();
  }

  void run() {
    const int threads = p_.threads < 1 ? 1 : p_.threads;
    const int64_t channels = max(p_.cin, p_.cout);
    const int64_t zeros = max(cp_, grad_pixel_) + 64;
    // of one thread: an activated row, channels of kLanes pixels, offsets of a chunk's rows
    const int64_t row_bytes = round_up((max(row_, p_.wo * grad_pixel_) + 64) * sizeof(A), 64);
    const int64_t tmp_bytes = round_up(channels * kLanes * sizeof(S), 64);
    offsets_ = p_.kernel[1] * chunk_rows_;
    const int64_t per_thread = row_bytes + tmp_bytes + round_up((2 * offsets_ + p_.kernel[1]) * sizeof(int64_t), 64);
    sums_size_ = blocks_.vectors * kLanes * p_.kernel[0] * taps_ * inputs_ * kInputs;
    const int64_t weight_bytes = round_up((p_.cin + 2 * kLanes) * sizeof(S), 64);
    const int64_t x_bytes = round_up(x_size_ * sizeof(A), 64), grad_bytes = round_up(grad_size_ * sizeof(A), 64);
    const int64_t bias_bytes = round_up(strip_frames_ * strip_rows_ * bias_row() * sizeof(S), 64);
    char* at = workspace.get(x_bytes + grad_bytes + bias_bytes + weight_bytes + round_up(zeros * sizeof(A), 64) +
                             round_up(sums_size_ * sizeof(S), 64) + per_thread * threads + 1024);
    const auto take = [&at](int64_t bytes) {
      char* here = at;
      at += round_up(bytes, 64);
      return here;
    };
    x_ = reinterpret_cast<A*>(take(x_bytes));
    grad_ = reinterpret_cast<A*>(take(grad_bytes));
    bias_rows_ = reinterpret_cast<S*>(take(bias_bytes));
    Base::prologue(reinterpret_cast<S*>(take(weight_bytes)));
    zero_ = reinterpret_cast<A*>(take(zeros * sizeof(A)));
    __builtin_memset(static_cast<void*>(zero_), 0, zeros * sizeof(A));
    sums_ = reinterpret_cast<S*>(take(sums_size_ * sizeof(S)));
    row_bytes_ = row_bytes, tmp_bytes_ = tmp_bytes, per_thread_ = per_thread, threads_ = at;
    if (q_.d_bias)
      for (int64_t c = 0; c < p_.cout; ++c) q_.d_bias[c] = 0;
    for (n_ = 0; n_ < p_.n; ++n_)
      for (t0_ = 0; t0_ < p_.to; t0_ += strip_frames_)
        for (y0_ = 0; y0_ < p_.ho; y0_ += strip_rows_) strip();
    workspace.trim(kKeepBytes);
  }

 private:
  int64_t bias_row() const { return blocks_.vectors * kLanes; }
  int64_t x_elements(int64_t frames, int64_t rows) const {
    return Base::frames_under(frames) * Base::rows_under(rows) * inputs_ * copies_ * x_row_;
  }
  // Strips: as little activated twice as the budget allows.
  void plan() {
    const int64_t budget = kPanelBytes / int64_t(sizeof(A));
    const auto size = [&](int64_t frames, int64_t rows) {
      return x_elements(frames, rows) + frames * rows * grad_row_;
    };
    double best = 0;
    for (int64_t frames = p_.to;; frames = max(1, frames > 32 ? 32 : frames / 2)) {
      int64_t rows = round_up(p_.ho, chunk_rows_);
      while (rows > chunk_rows_ && size(frames, rows) > budget) rows = round_up(rows / 2, chunk_rows_);
      while (rows < p_.ho && size(frames, rows + chunk_rows_) <= budget) rows += chunk_rows_;
      const double total = double(size(frames, rows));
      const double cost = total / double(frames * min(rows, p_.ho)) + (total > double(budget) ? 1e30 * total : 0);
      if (best == 0 || cost < best) {
        best = cost;
        strip_frames_ = frames;
        strip_rows_ = rows;
      }
      if (frames == 1) break;
    }
    x_size_ = x_elements(strip_frames_, strip_rows_) + 64;
    grad_size_ = strip_frames_ * strip_rows_ * grad_row_ + 64;
  }

  A* thread_row(int thread) const { return reinterpret_cast<A*>(threads_ + thread * per_thread_); }
  S* thread_tmp(int thread) const { return reinterpret_cast<S*>(threads_ + thread * per_thread_ + row_bytes_); }
  int64_t* thread_offsets(int thread) const {
    return reinterpret_cast<int64_t*>(threads_ + thread * per_thread_ + row_bytes_ + tmp_bytes_);
  }

  void strip() {
    t1_ = min(p_.to, t0_ + strip_frames_);
    y1_ = min(p_.ho, y0_ + strip_rows_);
    frames_ = Base::frames_of(t0_, t1_);
    in_rows_ = Base::rows_of(y0_, y1_);
    const int64_t rows = y1_ - y0_, of_grad = (t1_ - t0_) * rows;
    const int64_t of_x = q_.d_weight ? frames_.size() * in_rows_.size() : 0;
    parallel_tasks(of_grad + of_x, p_.threads, [&](int64_t i, int thread) {
      if (i < of_grad)
        lay_grad(i / rows, i % rows, thread);
      else
        lay_input((i - of_grad) / in_rows_.size(), (i - of_grad) % in_rows_.size(), thread);
    });
    if (q_.d_bias)
      for (int64_t i = 0; i < of_grad; ++i)
        for (int64_t c = 0; c < p_.cout; ++c) q_.d_bias[c] += bias_rows_[i * bias_row() + c];
    if (!q_.d_weight) return;
    const bool first = n_ == 0 && t0_ == 0 && y0_ == 0;
    const bool last = n_ == p_.n - 1 && t1_ == p_.to && y1_ == p_.ho;
    parallel_tasks(blocks_.count * groups_, p_.threads, [&](int64_t i, int thread) {
      const int64_t group = i % groups_, block = i / groups_;
      const Range inputs{inputs_ * group / groups_, inputs_ * (group + 1) / groups_};
      if (first)
        __builtin_memset(static_cast<void*>(sums(block, inputs.begin, 0)), 0,
                         (sums(block, inputs.end, 0) - sums(block, inputs.begin, 0)) * sizeof(S));
      switch (blocks_.size(block)) {
        case 1:
          multiply<1>(block, inputs, thread_offsets(thread));
          break;
        case 2:
          multiply<2>(block, inputs, thread_offsets(thread));
          break;
        default:
          multiply<3>(block, inputs, thread_offsets(thread));
      }
      if (last) FASTDIT_DTYPE_SWITCH(q_.weight_dtype, TW, finish<TW>(block, inputs))
    });
  }

  // ---- panels ---------------------------------------------------------------------------------------
  A* x_panel(int64_t frame, int64_t input, int64_t copy) const {
    return x_ + ((frame * inputs_ + input) * copies_ + copy) * in_rows_.size() * x_row_;
  }
  A* grad_panel(int64_t t, int64_t block) const {
    const int64_t rows = y1_ - y0_;
    return grad_ + t * rows * grad_row_ + blocks_.begin(block) * kLanes * rows * steps_ * kStep;
  }

  void lay_input(int64_t frame, int64_t row, int thread) const {
    A* pixels = thread_row(thread);
    Base::activate(n_, frames_.begin + frame, in_rows_.begin + row, Range{0, row_pixels_}, thread_tmp(thread), pixels);
    const int64_t columns = x_row_ / (kInputs * kStep), stride = p_.stride[2];
    for (int64_t input = 0; input < inputs_; ++input)
      for (int64_t copy = 0; copy < copies_; ++copy) {
        A* dst = x_panel(frame, input, copy) + row * x_row_;
        for (int64_t i = 0; i < columns; ++i) {
          const A* at[kStep];
          for (int64_t s = 0; s < kStep; ++s) {
            const int64_t x = (i * kStep + s) * stride + (stride == 1 ? copy : copy * p_.dilation[2]);
            at[s] = x < row_pixels_ ? pixels + x * cp_ + input * kInputs : zero_;
          }
          lay<M, kInputs>(dst + i * kInputs * kStep, at);
        }
      }
  }

  void lay_grad(int64_t t, int64_t row, int thread) const {
    A* pixels = thread_row(thread);
    const int64_t* stride = q_.grad_stride;
    const T* src = static_cast<const T*>(q_.grad) + n_ * stride[0] + (t0_ + t) * stride[2] + (y0_ + row) * stride[3];
    const Prologue<S> none{0, 0, S(0), S(0), nullptr, nullptr};
    activate_row<T, M>(as_rows_, src, stride, 0, p_.wo, none, thread_tmp(thread), pixels);
    if (q_.d_bias) {
      S* total = bias_rows_ + (t * (y1_ - y0_) + row) * bias_row();
      for (int64_t c = 0; c < bias_row(); c += kLanes) {
        V sum = V{};
        for (int64_t begin = 0; begin < p_.wo; begin += kAddends) {
          V part = V{};
          for (int64_t x = begin; x < min(p_.wo, begin + kAddends); ++x) part += load(pixels + x * grad_pixel_ + c);
          sum += part;
        }
        store(total + c, sum);
      }
    }
    if (!q_.d_weight) return;
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const int64_t lanes = blocks_.size(block) * kLanes;
      A* dst = grad_panel(t, block) + row * steps_ * kStep * lanes;
      for (int64_t i = 0; i < steps_; ++i) {
        const A* at[kStep];
        for (int64_t s = 0; s < kStep; ++s) {
          const int64_t x = i * kStep + s;
          at[s] = x < p_.wo ? pixels + x * grad_pixel_ + blocks_.begin(block) * kLanes : zero_;
        }
        for (int64_t c = 0; c < lanes; c += kLanes) {
          lay<M, kLanes>(dst + (i * lanes + c) * kStep, at);
          for (int64_t s = 0; s < kStep; ++s) at[s] = i * kStep + s < p_.wo ? at[s] + kLanes : zero_;
        }
      }
    }
  }

  // ---- sums -----------------------------------------------------------------------------------------
  // [block][input block][kt][kh][kw][kInputs][lanes]
  S* sums(int64_t block, int64_t input, int64_t kt) const {
    const int64_t lanes = blocks_.size(block) * kLanes, frame = taps_ * kInputs, all = p_.kernel[0] * frame;
    return sums_ + blocks_.begin(block) * kLanes * inputs_ * all + (input * all + kt * frame) * lanes;
  }

  template <int NV>
  void multiply(int64_t block, const Range& inputs, int64_t* offsets) const {
    constexpr int64_t lanes = NV * kLanes;
    int64_t *x_rows = offsets, *grad_rows = offsets + offsets_, *counts = offsets + 2 * offsets_;
    for (int64_t y = y0_; y < y1_; y += chunk_rows_) {
      const int64_t end = min(y1_, y + chunk_rows_);
      for (int64_t kh = 0; kh < p_.kernel[1]; ++kh) {
        int64_t count = 0;
        for (int64_t i = y; i < end; ++i) {
          const int64_t row = row_at(i, kh);
          if (row < 0) continue;
          x_rows[kh * chunk_rows_ + count] = (row - in_rows_.begin) * x_row_;
          grad_rows[kh * chunk_rows_ + count++] = (i - y0_) * steps_ * kStep * lanes;
        }
        counts[kh] = count;
      }
      for (int64_t t = t0_; t < t1_; ++t)
        for (int64_t k = 0; k < steps_; k += piece_)
          for (int64_t kt = 0; kt < p_.kernel[0]; ++kt) {
            const int64_t frame = frame_at(t, kt);
            if (frame < 0) continue;
            for (int64_t input = inputs.begin; input < inputs.end; ++input)
              for (int64_t kh = 0; kh < p_.kernel[1]; ++kh) {
                if (!counts[kh]) continue;
                S* out = sums(block, input, kt) + kh * p_.kernel[2] * kInputs * lanes;
                for (int64_t kw = 0; kw < p_.kernel[2]; ++kw, out += kInputs * lanes) {
                  const int64_t shift = kw * p_.dilation[2];
                  const int64_t copy = p_.stride[2] == 1 ? shift % kStep : kw;
                  const int64_t skip = p_.stride[2] == 1 ? shift / kStep : 0;
                  add_tile<M, NV>(x_panel(frame - frames_.begin, input, copy) + (k + skip) * kInputs * kStep,
                                  grad_panel(t - t0_, block) + k * kStep * lanes, x_rows + kh * chunk_rows_,
                                  grad_rows + kh * chunk_rows_, counts[kh], min(piece_, steps_ - k), out);
                }
              }
          }
    }
  }

  // One rounding, and the store in the weight's layout: a vector of output channels is turned, by way of L1, into one
  // run of taps per channel.
  template <class TW>
  void finish(int64_t block, const Range& inputs) const {
    using SW = typename simd<TW>::S;
    const int64_t* stride = q_.d_weight_stride;
    const int64_t taps = p_.kernel[0] * taps_, run = kInputs * taps, lanes = blocks_.size(block) * kLanes;
    const bool dense = stride[4] == 1 && stride[3] == p_.kernel[2] && stride[2] == taps_ && stride[1] == taps;
    Scratch<TW> turned(kLanes * run);
    for (int64_t input = inputs.begin; input < inputs.end; ++input)
      for (int64_t skip = 0; skip < lanes; skip += kLanes) {
        const S* from = sums(block, input, 0) + skip;
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t i = 0; i < kInputs; ++i, from += lanes) {
            TW column[kLanes];
            if constexpr (sizeof(SW) == sizeof(S)) {
              store(column, load(from));
            } else {
              for (int64_t j = 0; j < kLanes; ++j) column[j] = from_scalar<TW>(static_cast<SW>(from[j]));
            }
            for (int64_t j = 0; j < kLanes; ++j) turned.get()[j * run + i * taps + tap] = column[j];
          }
        const int64_t co = blocks_.begin(block) * kLanes + skip;
        const int64_t channels = min(kLanes, p_.cout - co), width = min(kInputs, p_.cin - input * kInputs);
        for (int64_t j = 0; j < channels; ++j) {
          TW* out = static_cast<TW*>(q_.d_weight) + (co + j) * stride[0] + input * kInputs * stride[1];
          const TW* row = turned.get() + j * run;
          if (dense) {
            __builtin_memcpy(static_cast<void*>(out), row, width * taps * sizeof(TW));
            continue;
          }
          for (int64_t i = 0; i < width; ++i)
            for (int64_t kt = 0; kt < p_.kernel[0]; ++kt)
              for (int64_t kh = 0; kh < p_.kernel[1]; ++kh)
                for (int64_t kw = 0; kw < p_.kernel[2]; ++kw)
                  out[i * stride[1] + kt * stride[2] + kh * stride[3] + kw * stride[4]] = *row++;
        }
      }
  }

  const ConvWeightGradParams& q_;
  const Blocks blocks_;                  // of output channels
  const int64_t inputs_, taps_, steps_;  // blocks of input channels; taps of a frame; steps of an output row
  int64_t copies_, x_row_;               // of an input row; elements of one copy for one block
  int64_t grad_pixel_, grad_row_;        // elements
  int64_t pieces_, piece_, chunk_rows_;  // a chunk: rows of up to kChain steps, or a piece of one row
  int64_t groups_;                       // tasks along the input channels
  ConvParams as_rows_;                   // the gradient as activate_row takes it
  int64_t strip_frames_ = 1, strip_rows_ = 1, x_size_ = 0, grad_size_ = 0, sums_size_ = 0;
  A *x_ = nullptr, *grad_ = nullptr, *zero_ = nullptr;
  S *bias_rows_ = nullptr, *sums_ = nullptr;
  char* threads_ = nullptr;
  int64_t row_bytes_ = 0, tmp_bytes_ = 0, per_thread_ = 0, offsets_ = 0;
  int64_t n_ = 0, t0_ = 0, t1_ = 0, y0_ = 0, y1_ = 0;  // the strip at hand, and its input frames and rows
  Range frames_{0, 0}, in_rows_{0, 0};
};

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& q) {
  FASTDIT_DTYPE_SWITCH(q.forward.dtype, T, (WeightGrad<T, MathOf<T>::type>(q).run()))
}

}  // namespace fastdit::cpu::FASTDIT_ISA
