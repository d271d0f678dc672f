// y = conv3d(act(norm(cat(cache, x)))) + bias + residual, causal in time.
//
// The input is taken in strips (some frames x some rows): a strip's rows are activated once into a buffer, every thread
// helping; then its outputs are computed, one task per (output channels, frame, region of pixels). Padding in T and H
// is a choice of row: frames and rows that do not exist are skipped, not convolved.
//
// Winograd F(2,3) along H: from four input rows d, two output rows with 4 instead of 6 row products,
//   V = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),  M_j = U_j * V_j,  y0 = M0 + M1 + M2,  y1 = M1 - M2 - M3.
//
// A sum's order depends on the output alone, never on strips, threads or chunks: chunked == whole, bitwise.
#include "fastdit/conv.h"

#include "conv_input.h"
#include "conv_pack.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kStripBytes = int64_t{3} << 19;  // activated rows in flight per thread: about its share of the caches
constexpr int64_t kMaxChain = 160;                 // products summed in one register: short chains, small error
constexpr int64_t kMaxGradChain =
    64;  // what the norm's backward subtracts magnifies errors; bf16 rounds coarser anyway
constexpr int64_t kRegionPixels = 128;
constexpr int64_t kMinTasks = 32;

template <class T, class M>
class Conv : Input<T, M> {
  using Base = Input<T, M>;
  using S = typename M::S;
  using A = typename M::A;
  using V = typename M::V;
  using Base::p_, Base::cp_, Base::row_;
  using Base::round_up, Base::min, Base::max, Base::frame_at, Base::row_at, Base::activate;

 public:
  explicit Conv(const ConvParams& p) : Base(p), blocks_(p.cout, M::lanes), rows_(packed_rows(p.kernel, p.winograd)) {
    runs_ = p.dilation[2] == 1 ? 1 : p.kernel[2];
    run_length_ = p.kernel[2] / runs_ * cp_;
    const int64_t chain = (p.gradient && M::step == 1 ? kMaxGradChain : kMaxChain) * M::step;
    cuts_ = (run_length_ + chain - 1) / chain;
    piece_ = round_up((run_length_ + cuts_ - 1) / cuts_, M::step);
    together_ = max(1, min(kMaxSegments, chain / piece_));
    group_pixels_ = p.winograd ? 2 : 1;
    plan();
  }

  void run() {
    const int64_t table = round_up(p_.cin, M::lanes) + M::lanes;
    const int64_t bias = blocks_.vectors * M::lanes;
    const int64_t region = region_rows_ * region_cols_ * kMaxVectors * M::lanes;
    const int64_t temp =
        p_.cin * M::lanes + (p_.winograd ? 4 * row_ : 0) * int64_t(sizeof(A)) / int64_t(sizeof(S)) + 64;
    const int64_t tables =
        (3 * (kRegionPixels + kPixels) + rows_ * region_rows_) * int64_t(sizeof(int64_t) / sizeof(S));
    region_ = round_up(region, 64);
    const int64_t per_thread = round_up(max(region_ + tables, temp), 64);
    const int threads = p_.threads < 1 ? 1 : p_.threads;
    const int64_t rows = round_up(strip_elements_ * sizeof(A), 64), zero = round_up(row_ * sizeof(A), 64);
    char* at = workspace.get(rows + zero + (table + bias + per_thread * threads) * int64_t(sizeof(S)) + 1024);
    strip_ = reinterpret_cast<A*>(at);
    zero_ = reinterpret_cast<A*>(at += rows);
    S* weight = reinterpret_cast<S*>(at += zero);
    bias_ = reinterpret_cast<S*>(at += round_up(table * sizeof(S), 64));
    temp_ = reinterpret_cast<S*>(at += round_up(bias * sizeof(S), 64));
    per_thread_ = per_thread;
    __builtin_memset(static_cast<void*>(zero_), 0, row_ * sizeof(A));
    Base::prologue(weight);
    for (int64_t i = p_.cout; i < bias; ++i) bias_[i] = S(0);
    load_channels<S>(p_.bias, p_.bias_dtype, p_.cout, S(0), bias_);
    for (n_ = 0; n_ < p_.n; ++n_)
      for (t0_ = 0; t0_ < p_.to; t0_ += strip_frames_)
        for (y0_ = 0; y0_ < p_.ho; y0_ += strip_rows_) strip();
    workspace.trim(kKeepBytes);
  }

 private:
  int64_t strip_size(int64_t frames, int64_t rows) const {
    const int64_t in_frames = Base::frames_under(frames);
    const int64_t in_rows = p_.winograd ? round_up(rows, 2) * 2 : Base::rows_under(rows);
    return in_frames * in_rows * row_;
  }

  // Strips: as few rows activated twice as the budget allows; no result depends on them. Regions: enough tasks for many
  // cores, the same regions for any number of them.
  void plan() {
    const int64_t budget = kStripBytes * max(2, p_.threads) / int64_t(sizeof(A));
    double best = 0;
    for (int64_t frames = p_.to;; frames = frames > 32 ? 32 : frames / 2) {
      if (frames < 1) frames = 1;
      int64_t rows = p_.ho;
      while (rows > 2 && strip_size(frames, rows) > budget) rows = round_up(rows / 2, 2);
      while (rows > 2 && rows < p_.ho && strip_size(frames, rows + 2) <= budget) rows += 2;
      rows = min(rows, p_.ho);
      const int64_t size = strip_size(frames, rows);
      const double halo =
          p_.winograd ? 1 + double(rows + 2) / double(2 * rows) : 1;  // rows activated for their neighbours
      const double cost = double(size) * halo / double(frames * rows) + (size > budget ? 1e30 * double(size) : 0);
      if (best == 0 || cost < best) {
        best = cost;
        strip_frames_ = frames;
        strip_rows_ = rows;
      }
      if (frames == 1) break;
    }
    strip_elements_ = strip_size(strip_frames_, strip_rows_);
    const int64_t wide = kRegionPixels / group_pixels_;
    const int64_t columns = (p_.wo + wide - 1) / wide;
    region_cols_ = min(p_.wo, round_up((p_.wo + columns - 1) / columns, kPixels));
    region_rows_ = min(strip_rows_, max(1, kRegionPixels / region_cols_));
    if (p_.winograd) region_rows_ = round_up(region_rows_, 2);
    const auto tasks = [&] {
      return strip_frames_ * ((strip_rows_ + region_rows_ - 1) / region_rows_) *
             ((p_.wo + region_cols_ - 1) / region_cols_) * blocks_.count;
    };
    while (tasks() < kMinTasks && region_rows_ >= 2 * group_pixels_)
      region_rows_ = round_up(region_rows_ / 2, group_pixels_);
  }

  // ---- one strip ------------------------------------------------------------------------------------
  void strip() {
    t1_ = min(p_.to, t0_ + strip_frames_);
    y1_ = min(p_.ho, y0_ + strip_rows_);
    frames_ = Base::frames_of(t0_, t1_);
    if (p_.winograd) {
      slots_ = (y1_ - y0_ + 1) / 2 * kWinogradRows;
      transform();
    } else {
      in_rows_ = Base::rows_of(y0_, y1_);
      slots_ = in_rows_.size();
      parallel_ranges(frames_.size() * slots_, p_.threads, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i)
          activate(n_, frames_.begin + i / slots_, in_rows_.begin + i % slots_, temp_ + thread * per_thread_,
                   strip_ + i * row_);
      });
    }
    const int64_t down = (y1_ - y0_ + region_rows_ - 1) / region_rows_;
    const int64_t across = (p_.wo + region_cols_ - 1) / region_cols_;
    parallel_tasks(blocks_.count * (t1_ - t0_) * down * across, p_.threads, [&](int64_t task, int thread) {
      Region r;
      const int64_t x = task % across * region_cols_, y = y0_ + task / across % down * region_rows_;
      r.x = Range{x, min(p_.wo, x + region_cols_)};
      r.y = Range{y, min(y1_, y + region_rows_)};
      r.t = t0_ + task / (across * down) % (t1_ - t0_);
      r.block = task / (across * down * (t1_ - t0_));
      r.lanes = blocks_.size(r.block) * M::lanes;
      r.out = temp_ + thread * per_thread_;
      convolve(r, reinterpret_cast<int64_t*>(r.out + region_));
      finish(r);
    });
  }

  // Winograd's data transform: slots (4 per pair of output rows) of every frame. Rows 2 and 3 of a pair are 0 and 1 of
  // the next.
  void transform() {
    const int64_t pairs = slots_ / kWinogradRows;
    parallel_ranges(frames_.size() * pairs, p_.threads, [&](int64_t begin, int64_t end, int thread) {
      S* tmp = temp_ + thread * per_thread_;
      A* ring = reinterpret_cast<A*>(tmp + round_up(p_.cin * M::lanes, 16));
      const A* d[4] = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t frame = frames_.begin + i / pairs, pair = i % pairs;
        const bool follows = i > begin && pair > 0;
        for (int64_t r = 0; r < 4; ++r) {
          if (follows && r < 2) {
            d[r] = d[r + 2];
            continue;
          }
          const int64_t y = y0_ + 2 * pair;
          const int64_t row = map_index(y + r - p_.pad_h, p_.h, p_.space_pad);
          A* dst = ring + (2 * (pair % 2) + r) % 4 * row_;
          // below the last output row (odd heights) nothing is read: any row that exists will do
          d[r] = row < 0 || row >= p_.h ? zero_ : dst;
          if (d[r] == dst) activate(n_, frame, row, tmp, dst);
        }
        A* v = strip_ + i * kWinogradRows * row_;
        for (int64_t k = 0; k < row_; k += M::lanes) {
          const int n = static_cast<int>(row_ - k);
          const auto at = [&](int r) { return n >= M::lanes ? load(d[r] + k) : load_n(d[r] + k, n); };
          const V d0 = at(0), d1 = at(1), d2 = at(2), d3 = at(3);
          const V out[4] = {d0 - d2, d1 + d2, d2 - d1, d1 - d3};
          for (int r = 0; r < 4; ++r) {
            if (n >= M::lanes)
              store(v + r * row_ + k, out[r]);
            else
              store_n(v + r * row_ + k, out[r], n);
          }
        }
      }
    });
  }

  struct Region {
    Range x, y;
    int64_t t, block, lanes;
    S* out;  // (rows, columns, lanes)
  };

  // Where the pixels of a region are: what does not change from tap to tap is computed once.
  struct Pixel {
    int64_t row, x;  // row: of the table of row offsets; x: elements from the start of an input row
    int64_t out;     // elements from the start of the region's partial outputs
  };
  // row_offset[tap row][region row]: elements from the frame's first row in the strip, -1 where the row is zeros.
  int64_t locate(const Region& r, Pixel* pixel, int64_t* row_offset) const {
    const int64_t width = r.x.size(), rows = (r.y.size() + group_pixels_ - 1) / group_pixels_;
    int64_t count = 0;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < width; ++x)
        pixel[count++] = Pixel{y, (r.x.begin + x) * p_.stride[2] * cp_, (y * group_pixels_ * width + x) * r.lanes};
      for (int64_t kh = 0; kh < rows_; ++kh) {
        const int64_t row = p_.winograd ? 0 : row_at(r.y.begin + y, kh);
        row_offset[kh * region_rows_ + y] = p_.winograd ? (((r.y.begin - y0_) / 2 + y) * kWinogradRows + kh) * row_
                                            : row < 0   ? -1
                                                        : (row - in_rows_.begin) * row_;
      }
    }
    for (int64_t i = count; i % kPixels; ++i) pixel[i] = pixel[count - 1];  // the last tile's spare lanes, not stored
    return count;
  }

  // Sums of one region. The taps, in the order (Winograd row, kt, kh, kw, ci), are cut into pieces of at most so many
  // products; a group of pieces is one fresh sum in registers, through which all pixels of the region pass while its
  // weights are in cache.
  void convolve(const Region& r, int64_t* table) const {
    Pixel* pixel = reinterpret_cast<Pixel*>(table);
    const int64_t* row_offset = table + 3 * (kRegionPixels + kPixels);
    const int64_t pixels = locate(r, pixel, table + 3 * (kRegionPixels + kPixels));
    const int64_t taps = (p_.winograd ? p_.kernel[0] : p_.kernel[0] * p_.kernel[1]) * runs_ * cuts_;
    const int64_t passes = p_.winograd ? kWinogradRows : 1;
    bool started[2] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      Sink<M> sink;
      sink.out = r.out;
      sink.second = r.x.size() * r.lanes;
      sink.coef0 = !p_.winograd || pass < 3;
      sink.coef1 = !p_.winograd || pass == 0 ? 0 : pass == 1 ? 1 : -1;
      for (int64_t first = 0; first < taps; first += together_) {
        Piece pieces[kMaxSegments];
        const int count = gather(r, pass, first, min(taps, first + together_), pieces);
        sink.first0 = sink.coef0 && !started[0];
        sink.first1 = sink.coef1 && !started[1];
        if (!count && !sink.first0 && !sink.first1) continue;
        for (int64_t q = 0; q < pixels; q += kPixels) {
          sink.valid = static_cast<int>(min(kPixels, pixels - q));
          tile(r, pixel + q, row_offset, pieces, count, sink);
        }
        started[0] |= sink.coef0 != 0;
        started[1] |= sink.coef1 != 0;
      }
    }
  }

  struct Piece {
    const A *a, *b;  // a: in row 0 of its frame
    int64_t length, row;
  };
  int gather(const Region& r, int64_t pass, int64_t first, int64_t last, Piece* pieces) const {
    const A* weights =
        static_cast<const A*>(p_.packed) + blocks_.begin(r.block) * packed_vector<M>(p_.cin, p_.kernel, p_.winograd);
    int count = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t cut = i % cuts_, run = i / cuts_ % runs_, tap = i / (cuts_ * runs_);
      const int64_t kt = p_.winograd ? tap : tap / p_.kernel[1], row = p_.winograd ? pass : tap % p_.kernel[1];
      const int64_t frame = frame_at(r.t, kt);
      if (frame < 0) continue;
      Piece& piece = pieces[count++];
      piece.a = strip_ + (frame - frames_.begin) * slots_ * row_ + run * p_.dilation[2] * cp_ + cut * piece_;
      piece.b = weights + (((kt * rows_ + row) * p_.kernel[2] + run) * cp_ + cut * piece_) * r.lanes;
      piece.length = min(piece_, run_length_ - cut * piece_);
      piece.row = row;
    }
    return count;
  }

  void tile(const Region& r, const Pixel* pixel, const int64_t* row_offset, const Piece* pieces, int count,
            Sink<M>& sink) const {
    Segment<M> segments[kMaxSegments];
    for (int p = 0; p < kPixels; ++p) sink.offset[p] = pixel[p].out;
    int used = 0;
    for (int i = 0; i < count; ++i) {
      Segment<M>& s = segments[used];
      const int64_t* rows = row_offset + pieces[i].row * region_rows_;
      bool any = false;
      for (int p = 0; p < kPixels; ++p) {
        const int64_t row = rows[pixel[p].row];
        s.a[p] = row < 0 ? zero_ : pieces[i].a + row + pixel[p].x;
        any |= row >= 0;
      }
      s.b = pieces[i].b;
      s.length = pieces[i].length;
      used += any;
    }
    if (used || sink.first0 || sink.first1) run_tile<M>(static_cast<int>(r.lanes / M::lanes), segments, used, sink);
  }

  // Bias, residual, one rounding, and the store in y's layout.
  void finish(const Region& r) const {
    if (p_.wide)
      finish_as<S>(r);
    else
      finish_as<T>(r);
  }
  template <class O>
  void finish_as(const Region& r) const {
    const int64_t co = blocks_.begin(r.block) * M::lanes;
    const int64_t channels = min(r.lanes, p_.cout - co);
    const T* residual = static_cast<const T*>(p_.residual);
    for (int64_t y = r.y.begin; y < r.y.end; ++y) {
      const S* row = r.out + (y - r.y.begin) * r.x.size() * r.lanes;
      O* out = static_cast<O*>(p_.y) + at(p_.y_stride, co, r.t, y, r.x.begin);
      const T* add = residual ? residual + at(p_.residual_stride, co, r.t, y, r.x.begin) : nullptr;
      if (p_.y_stride[1] == 1 && (!add || p_.residual_stride[1] == 1))
        finish_channels(row, r, channels, bias_ + co, out, add);
      else
        finish_strided(row, r, channels, bias_ + co, out, add);
    }
  }
  int64_t at(const int64_t* stride, int64_t c, int64_t t, int64_t y, int64_t x) const {
    return n_ * stride[0] + c * stride[1] + t * stride[2] + y * stride[3] + x * stride[4];
  }
  template <class O>
  void finish_channels(const S* row, const Region& r, int64_t channels, const S* bias, O* out, const T* add) const {
    for (int64_t x = 0; x < r.x.size(); ++x, row += r.lanes) {
      for (int64_t c = 0; c < channels; c += M::lanes) {
        const int n = static_cast<int>(channels - c);
        V v = load(row + c) + load(bias + c);
        O* o = out + x * p_.y_stride[4] + c;
        const T* a = add ? add + x * p_.residual_stride[4] + c : nullptr;
        if (n >= M::lanes) {
          store(o, a ? v + load(a) : v);
        } else {
          store_n(o, a ? v + load_n(a, n) : v, n);
        }
      }
    }
  }
  // Lanes are pixels: a column of the partial outputs is gathered for each channel.
  template <class O>
  void finish_strided(const S* row, const Region& r, int64_t channels, const S* bias, O* out, const T* add) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < r.x.size(); x += M::lanes) {
        const int n = static_cast<int>(min(M::lanes, r.x.size() - x));
        S column[M::lanes] = {};
        for (int j = 0; j < n; ++j) column[j] = row[(x + j) * r.lanes + c];
        V v = load(column) + bias[c];
        O* o = out + c * p_.y_stride[1] + x * p_.y_stride[4];
        if (add) {
          const T* a = add + c * p_.residual_stride[1] + x * p_.residual_stride[4];
          T other[M::lanes] = {};
          for (int j = 0; j < n; ++j) other[j] = a[j * p_.residual_stride[4]];
          v += load(other);
        }
        if (p_.y_stride[4] == 1) {
          if (n == M::lanes)
            store(o, v);
          else
            store_n(o, v, n);
        } else {
          O lane[M::lanes];
          store(lane, v);
          for (int j = 0; j < n; ++j) o[j * p_.y_stride[4]] = lane[j];
        }
      }
    }
  }

  static constexpr int64_t kMaxSegments = 64;

  const Blocks blocks_;
  const int64_t rows_;  // of a packed kernel
  int64_t group_pixels_;
  int64_t runs_, run_length_;        // the taps along W and the channels: one run, or kw runs when dilated
  int64_t cuts_, piece_, together_;  // a run is cut into pieces; so many pieces make one sum
  int64_t strip_frames_ = 1, strip_rows_ = 1, strip_elements_ = 0, region_rows_ = 1, region_cols_ = 1;
  A *strip_ = nullptr, *zero_ = nullptr;
  S *bias_ = nullptr, *temp_ = nullptr;
  int64_t per_thread_ = 0, region_ = 0;  // values of scratch per thread; of them, one region's partial outputs
  // the strip at hand: sample, output frames, output rows, input frames and (direct) rows, rows per frame in strip_
  int64_t n_ = 0, t0_ = 0, t1_ = 0, y0_ = 0, y1_ = 0, slots_ = 0;
  Range frames_{0, 0}, in_rows_{0, 0};
};

}  // namespace

void conv_forward(const ConvParams& p) {
  if (p.n * p.cout * p.to * p.ho * p.wo == 0) return;
  FASTDIT_DTYPE_SWITCH(p.dtype, T, (Conv<T, MathOf<T>::type>(p).run()))
}

void conv_pack(const ConvPackParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
    using M = MathOf<T>::type;
    *p.bytes = Blocks(p.cout, M::lanes).vectors * packed_vector<M>(p.cin, p.kernel, p.winograd) * int64_t(sizeof(M::A));
    if (p.packed) FASTDIT_DTYPE_SWITCH(p.weight_dtype, TW, (pack<M, TW, T>(p)))
  })
}

}  // namespace fastdit::cpu::FASTDIT_ISA
