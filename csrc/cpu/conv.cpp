// y = conv3d(act(norm(cat(cache, x)))) + bias + residual, causal in time.
//
// The input is taken in strips (some frames x some rows x some columns): a strip's rows are activated once into a
// buffer, every thread helping; then its outputs are computed, one task per (output channels, frame, region of pixels).
// Padding in T and H is a choice of row: frames and rows that do not exist are skipped, not convolved.
//
// Winograd F(2,3) along H: from four input rows d, two output rows with 4 instead of 6 row products,
//   V = B d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),  M_i = U_i * V_i,  y = A M:  y0 = M0 + M1 + M2,  y1 = M1 - M2 - M3.
// Over H and W, F(2 x 2, 3 x 3): from a 4 x 4 tile d, a 2 x 2 tile of outputs with 16 instead of 36 products,
//   V = B d B^T,  M_ij = U_ij * V_ij,  y = A M A^T.
//
// A sum's order depends on the output alone, never on strips, threads or chunks: chunked == whole, bitwise.
#include "fastdit/conv.h"

#include "conv_input.h"
#include "conv_pack.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kStripBytes = int64_t{3} << 19;  // activated rows in flight per thread: about its share of the caches
// Products summed in one register: short chains, small error. What a tile's transform adds to it takes shorter ones;
// what the norm's backward subtracts magnifies errors (bf16 rounds coarser anyway).
constexpr int64_t kMaxChain = 160, kMaxTileChain = 64, kMaxGradChain = 64, kMaxTileGradChain = 32;
constexpr int64_t kRegionPixels = 128;  // of Winograd along H 64 pairs, of tiles 64
constexpr int64_t kMinTasks = 32;
constexpr double kTransform = 0.25;                                    // cost of a transformed value in activated ones
constexpr int kOutput[2][kWinograd] = {{1, 1, 1, 0}, {0, 1, -1, -1}};  // A

template <class T, class M>
class Conv : Input<T, M> {
  using Base = Input<T, M>;
  using S = typename M::S;
  using A = typename M::A;
  using V = typename M::V;
  using Base::p_, Base::cp_, Base::row_;
  using Base::round_up, Base::min, Base::max, Base::frame_at, Base::row_at, Base::activate;

 public:
  explicit Conv(const ConvParams& p)
      : Base(p),
        blocks_(p.cout, M::lanes),
        taps_(packed_taps(p.kernel, p.winograd)),
        tiles_(p.winograd == static_cast<int>(Winograd::tiles)),
        unit_rows_(p.winograd ? 2 : 1),
        unit_columns_(tiles_ ? 2 : 1),
        region_units_(p.winograd ? 32 : kRegionPixels) {
    runs_ = p.dilation[2] == 1 ? 1 : taps_.columns;
    run_length_ = taps_.columns / runs_ * cp_;
    const int64_t chain = M::step * (M::step > 1  ? kMaxChain
                                     : p.gradient ? (tiles_ ? kMaxTileGradChain : kMaxGradChain)
                                                  : (tiles_ ? kMaxTileChain : kMaxChain));
    const int64_t fewest = (run_length_ + chain - 1) / chain;
    for (int64_t cuts = fewest, best = 0; cuts <= (tiles_ ? 4 * fewest : fewest); ++cuts) {  // a tile's runs are short
      const int64_t piece = round_up((run_length_ + cuts - 1) / cuts, M::step);
      const int64_t together = max(1, min(kMaxSegments, chain / piece));
      const int64_t sums = (p.kernel[0] * cuts + together - 1) / together;
      if (best && sums >= best) continue;
      best = sums;
      cuts_ = cuts, piece_ = piece, together_ = together;
    }
    plan();
  }

  void run() {
    const int64_t table = round_up(p_.cin, M::lanes) + M::lanes;
    const int64_t bias = blocks_.vectors * M::lanes;
    const int64_t region =
        (region_rows_ * region_columns_ + (p_.winograd ? region_units_ : 0)) * kMaxVectors * M::lanes;
    const int64_t temp =
        p_.cin * M::lanes + (p_.winograd ? kWinograd * in_row_ : 0) * int64_t(sizeof(A)) / int64_t(sizeof(S)) + 64;
    const int64_t tables =
        (3 * (region_units_ + kPixels) + taps_.rows * region_rows_) * int64_t(sizeof(int64_t) / sizeof(S));
    region_ = round_up(region, 64);
    const int64_t per_thread = round_up(max(region_ + tables, temp), 64);
    const int threads = p_.threads < 1 ? 1 : p_.threads;
    const int64_t rows = round_up(strip_elements_ * sizeof(A), 64), zero = round_up(in_row_ * sizeof(A), 64);
    char* at = workspace.get(rows + zero + (table + bias + per_thread * threads) * int64_t(sizeof(S)) + 1024);
    strip_ = reinterpret_cast<A*>(at);
    zero_ = reinterpret_cast<A*>(at += rows);
    S* weight = reinterpret_cast<S*>(at += zero);
    bias_ = reinterpret_cast<S*>(at += round_up(table * sizeof(S), 64));
    temp_ = reinterpret_cast<S*>(at += round_up(bias * sizeof(S), 64));
    per_thread_ = per_thread;
    __builtin_memset(static_cast<void*>(zero_), 0, in_row_ * sizeof(A));
    Base::prologue(weight);
    for (int64_t i = p_.cout; i < bias; ++i) bias_[i] = S(0);
    load_channels<S>(p_.bias, p_.bias_dtype, p_.cout, S(0), bias_);
    for (n_ = 0; n_ < p_.n; ++n_)
      for (t_.begin = 0; t_.begin < p_.to; t_.begin += strip_frames_)
        for (y_.begin = 0; y_.begin < p_.ho; y_.begin += strip_rows_)
          for (x_.begin = 0; x_.begin < p_.wo; x_.begin += strip_columns_) strip();
    workspace.trim(kKeepBytes);
  }

 private:
  // Of the padded input, under so many output columns.
  int64_t columns_under(int64_t columns) const {
    return (round_up(columns, unit_columns_) - 1) * p_.stride[2] + (p_.kernel[2] - 1) * p_.dilation[2] + 1;
  }
  int64_t slot_size(int64_t columns) const {
    return (tiles_ ? round_up(columns, 2) / 2 : columns_under(columns)) * cp_;
  }
  int64_t slots_under(int64_t rows) const {
    return p_.winograd ? round_up(rows, 2) / 2 * (tiles_ ? taps_.rows : kWinograd) : Base::rows_under(rows);
  }
  int64_t strip_size(int64_t frames, int64_t rows, int64_t columns) const {
    return Base::frames_under(frames) * slots_under(rows) * slot_size(columns);
  }

  // Strips: as little activated and transformed twice as the budget allows; no result depends on them. Regions: enough
  // tasks for many cores, the same regions for any number of them.
  void plan() {
    const int64_t budget = kStripBytes * max(2, p_.threads) / int64_t(sizeof(A));
    const int64_t narrow = kPixels * unit_columns_;
    double best = 0;
    for (int64_t columns = p_.wo;; columns = round_up(columns / 2, narrow)) {
      for (int64_t frames = p_.to;; frames = frames > 32 ? 32 : max(1, frames / 2)) {
        int64_t rows = p_.ho;
        while (rows > 2 && strip_size(frames, rows, columns) > budget) rows = round_up(rows / 2, 2);
        while (rows > 2 && rows < p_.ho && strip_size(frames, rows + 2, columns) <= budget) rows += 2;
        rows = min(rows, p_.ho);
        const int64_t size = strip_size(frames, rows, columns);
        const int64_t in_rows = p_.winograd ? round_up(rows, 2) + 2 : Base::rows_under(rows);
        const double activated = double(Base::frames_under(frames) * in_rows * columns_under(columns) * cp_);
        const double cost =
            (activated + (p_.winograd ? kTransform * double(size) : 0)) / double(frames * rows * columns) +
            (size > budget ? 1e30 * double(size) : 0);
        if (best == 0 || cost < best) {
          best = cost;
          strip_frames_ = frames, strip_rows_ = rows, strip_columns_ = columns;
        }
        if (frames == 1) break;
      }
      if (columns <= 2 * narrow) break;
    }
    strip_elements_ = strip_size(strip_frames_, strip_rows_, strip_columns_);
    in_row_ = columns_under(strip_columns_) * cp_;
    slot_ = slot_size(strip_columns_);
    const int64_t wide = region_units_ * unit_columns_;
    const int64_t across = (strip_columns_ + wide - 1) / wide;
    region_columns_ = min(round_up(strip_columns_, unit_columns_),
                          round_up((strip_columns_ + across - 1) / across, kPixels * unit_columns_));
    region_rows_ = unit_rows_ * min((strip_rows_ + unit_rows_ - 1) / unit_rows_,
                                    max(1, region_units_ * unit_columns_ / region_columns_));
    const auto tasks = [&] {
      return strip_frames_ * ((strip_rows_ + region_rows_ - 1) / region_rows_) *
             ((strip_columns_ + region_columns_ - 1) / region_columns_) * blocks_.count;
    };
    while (tasks() < kMinTasks && region_rows_ >= 2 * unit_rows_) region_rows_ = round_up(region_rows_ / 2, unit_rows_);
  }

  // ---- one strip ------------------------------------------------------------------------------------
  void strip() {
    t_.end = min(p_.to, t_.begin + strip_frames_);
    y_.end = min(p_.ho, y_.begin + strip_rows_);
    x_.end = min(p_.wo, x_.begin + strip_columns_);
    frames_ = Base::frames_of(t_.begin, t_.end);
    columns_.begin = x_.begin * p_.stride[2];
    columns_.end = columns_.begin + columns_under(x_.size());
    if (p_.winograd) {
      slots_ = slots_under(y_.size());
      transform();
    } else {
      in_rows_ = Base::rows_of(y_.begin, y_.end);
      slots_ = in_rows_.size();
      parallel_ranges(frames_.size() * slots_, p_.threads, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i)
          activate(n_, frames_.begin + i / slots_, in_rows_.begin + i % slots_, columns_, temp_ + thread * per_thread_,
                   strip_ + i * slot_);
      });
    }
    const int64_t down = (y_.size() + region_rows_ - 1) / region_rows_;
    const int64_t across = (x_.size() + region_columns_ - 1) / region_columns_;
    parallel_tasks(blocks_.count * t_.size() * down * across, p_.threads, [&](int64_t task, int thread) {
      Region r;
      const int64_t x = x_.begin + task % across * region_columns_, y = y_.begin + task / across % down * region_rows_;
      r.x = Range{x, min(x_.end, x + region_columns_)};
      r.y = Range{y, min(y_.end, y + region_rows_)};
      r.t = t_.begin + task / (across * down) % t_.size();
      r.block = task / (across * down * t_.size());
      r.lanes = blocks_.size(r.block) * M::lanes;
      r.pitch = round_up(r.x.size(), unit_columns_) * r.lanes;
      r.out = temp_ + thread * per_thread_;
      convolve(r, reinterpret_cast<int64_t*>(r.out + region_));
      finish(r);
    });
  }

  // Winograd's data transform: the slots of every pair of output rows, in every frame. Rows 2 and 3 of a pair are 0 and
  // 1 of the next.
  void transform() {
    const int64_t pairs = (y_.size() + 1) / 2, per_pair = slots_ / pairs;
    parallel_ranges(frames_.size() * pairs, p_.threads, [&](int64_t begin, int64_t end, int thread) {
      S* tmp = temp_ + thread * per_thread_;
      A* ring = reinterpret_cast<A*>(tmp + round_up(p_.cin * M::lanes, 16));
      const A* d[kWinograd] = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t frame = frames_.begin + i / pairs, pair = i % pairs;
        const bool follows = i > begin && pair > 0;
        for (int64_t r = 0; r < kWinograd; ++r) {
          if (follows && r < 2) {
            d[r] = d[r + 2];
            continue;
          }
          const int64_t row = map_index(y_.begin + 2 * pair + r - p_.pad_h, p_.h, p_.space_pad);
          A* dst = ring + (2 * (pair % 2) + r) % kWinograd * in_row_;
          // below the last output row (odd heights) nothing is read: any row that exists will do
          d[r] = row < 0 || row >= p_.h ? zero_ : dst;
          if (d[r] == dst) activate(n_, frame, row, columns_, tmp, dst);
        }
        A* v = strip_ + i * per_pair * slot_;
        if (tiles_)
          transform_tiles(d, v);
        else
          transform_rows(d, v);
      }
    });
  }

  struct Column {
    V v[kWinograd];
  };
  static FASTDIT_INLINE Column combine(V d0, V d1, V d2, V d3) { return {{d0 - d2, d1 + d2, d2 - d1, d1 - d3}}; }

  void transform_rows(const A* const* d, A* v) const {
    const int64_t values = columns_.size() * cp_;
    for (int64_t k = 0; k < values; k += M::lanes) {
      const int n = static_cast<int>(values - k);
      const auto at = [&](int r) { return n >= M::lanes ? load(d[r] + k) : load_n(d[r] + k, n); };
      const Column out = combine(at(0), at(1), at(2), at(3));
      for (int r = 0; r < kWinograd; ++r) put(v + r * slot_ + k, out.v[r], n);
    }
  }

  void transform_tiles(const A* const* d, A* v) const {
    for (int64_t x = 0; x + 2 < columns_.size(); x += 2, v += cp_) {
      for (int64_t k = 0; k < cp_; k += M::lanes) {
        const int n = static_cast<int>(cp_ - k);
        Column h[kWinograd];
#pragma GCC unroll 4
        for (int c = 0; c < kWinograd; ++c) {
          const auto at = [&](int r) {
            const A* a = d[r] + (x + c) * cp_ + k;
            return n >= M::lanes ? load(a) : load_n(a, n);
          };
          h[c] = combine(at(0), at(1), at(2), at(3));
        }
#pragma GCC unroll 4
        for (int r = 0; r < kWinograd; ++r) {
          const Column out = combine(h[0].v[r], h[1].v[r], h[2].v[r], h[3].v[r]);
#pragma GCC unroll 4
          for (int c = 0; c < kWinograd; ++c) put(v + (kWinograd * r + c) * slot_ + k, out.v[c], n);
        }
      }
    }
  }

  static FASTDIT_INLINE void put(A* to, V v, int n) {
    if (n >= M::lanes)
      store(to, v);
    else
      store_n(to, v, n);
  }

  struct Region {
    Range x, y;
    int64_t t, block, lanes, pitch;  // pitch: of a row of `out`
    S* out;                          // (rows, columns, lanes), in whole units
  };

  // What a tile's pixels stand for: a pixel, a pair of rows, or a tile of 2 x 2. Where they are in a region; what does
  // not change from tap to tap is computed once.
  struct Unit {
    int64_t row, x;  // row: of the table of row offsets; x: elements from the start of a slot
    int64_t out;     // elements from the start of the region's partial outputs
  };
  // row_offset[tap row][region row]: elements from the frame's first slot in the strip, -1 where the row is zeros.
  int64_t locate(const Region& r, Unit* unit, int64_t* row_offset) const {
    const int64_t step = tiles_ ? cp_ : p_.stride[2] * cp_;
    const int64_t across = (r.x.size() + unit_columns_ - 1) / unit_columns_;
    const int64_t down = (r.y.size() + unit_rows_ - 1) / unit_rows_;
    const int64_t x0 = (r.x.begin - x_.begin) / unit_columns_, y0 = (r.y.begin - y_.begin) / unit_rows_;
    int64_t count = 0;
    for (int64_t y = 0; y < down; ++y) {
      for (int64_t x = 0; x < across; ++x)
        unit[count++] = Unit{y, (x0 + x) * step, y * unit_rows_ * r.pitch + x * unit_columns_ * r.lanes};
      for (int64_t kh = 0; kh < taps_.rows; ++kh) {
        const int64_t row = p_.winograd ? 0 : row_at(r.y.begin + y, kh);
        row_offset[kh * region_rows_ + y] = p_.winograd ? ((y0 + y) * taps_.rows + kh) * slot_
                                            : row < 0   ? -1
                                                        : (row - in_rows_.begin) * slot_;
      }
    }
    for (int64_t i = count; i % kPixels; ++i) unit[i] = unit[count - 1];  // the last tile's spare lanes, not stored
    return count;
  }

  // Outputs of a unit to which the sums of a Winograd pass contribute.
  void aim(Sink<M>& sink, const Region& r, int64_t pass, bool* started) const {
    sink.targets = 0;
    if (!p_.winograd) return;
    for (int a = 0; a < 2; ++a) {
      for (int b = 0; b < unit_columns_; ++b) {
        const int sign = tiles_ ? kOutput[a][pass / kWinograd] * kOutput[b][pass % kWinograd] : kOutput[a][pass];
        if (!sign) continue;
        sink.to[sink.targets] = a * r.pitch + b * r.lanes;
        sink.sign[sink.targets] = sign;
        sink.first[sink.targets++] = !started[2 * a + b];
        started[2 * a + b] = true;
      }
    }
  }

  // Sums of one region. The taps, in the order (Winograd pass, kt, kh, kw, ci), are cut into pieces of at most so many
  // products; a group of pieces is one fresh sum in registers, through which all units of the region pass while its
  // weights are in cache.
  void convolve(const Region& r, int64_t* table) const {
    Unit* unit = reinterpret_cast<Unit*>(table);
    int64_t* row_offset = table + 3 * (region_units_ + kPixels);
    const int64_t units = locate(r, unit, row_offset);
    const int64_t taps = (p_.winograd ? p_.kernel[0] : p_.kernel[0] * p_.kernel[1]) * runs_ * cuts_;
    const int64_t passes = p_.winograd ? taps_.rows : 1;
    Piece pieces[kMaxSegments];
    Sink<M> sink;
    sink.out = r.out;
    sink.sum = p_.winograd ? r.out + region_rows_ * region_columns_ * kMaxVectors * M::lanes : r.out;
    bool started[4] = {};  // by output of a unit
    for (int64_t pass = 0; pass < passes; ++pass) {
      aim(sink, r, pass, started);
      int64_t end = taps;  // of the pieces whose frame exists
      while (end > together_ && !gather(r, pass, (end - 1) / together_ * together_, end, pieces))
        end = (end - 1) / together_ * together_;
      sink.begun = false;
      for (int64_t first = 0; first < end; first += together_) {
        const int count = gather(r, pass, first, min(end, first + together_), pieces);
        sink.last = first + together_ >= end;
        if (!count && !sink.last) continue;
        for (int64_t q = 0; q < units; q += kPixels) {
          sink.valid = static_cast<int>(min(kPixels, units - q));
          for (int p = 0; p < kPixels; ++p) {
            sink.offset[p] = unit[q + p].out;
            sink.at[p] = p_.winograd ? (q + p) * r.lanes : unit[q + p].out;
          }
          tile(r, unit + q, row_offset, pieces, count, sink);
        }
        sink.begun = true;
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
      piece.a = strip_ + (frame - frames_.begin) * slots_ * slot_ + run * p_.dilation[2] * cp_ + cut * piece_;
      piece.b = weights + (((kt * taps_.rows + row) * taps_.columns + run) * cp_ + cut * piece_) * r.lanes;
      piece.length = min(piece_, run_length_ - cut * piece_);
      piece.row = row;
    }
    return count;
  }

  void tile(const Region& r, const Unit* unit, const int64_t* row_offset, const Piece* pieces, int count,
            const Sink<M>& sink) const {
    Segment<M> segments[kMaxSegments];
    int used = 0;
    for (int i = 0; i < count; ++i) {
      Segment<M>& s = segments[used];
      const int64_t* rows = row_offset + pieces[i].row * region_rows_;
      bool any = false;
      for (int p = 0; p < kPixels; ++p) {
        const int64_t row = rows[unit[p].row];
        s.a[p] = row < 0 ? zero_ : pieces[i].a + row + unit[p].x;
        any |= row >= 0;
      }
      s.b = pieces[i].b;
      s.length = pieces[i].length;
      used += any;
    }
    run_tile<M>(static_cast<int>(r.lanes / M::lanes), segments, used, sink);
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
      const S* row = r.out + (y - r.y.begin) * r.pitch;
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
  const Taps taps_;  // of a packed kernel
  const bool tiles_;
  const int64_t unit_rows_, unit_columns_, region_units_;
  int64_t runs_, run_length_;        // the taps along W and the channels: one run, or kw runs when dilated
  int64_t cuts_, piece_, together_;  // a run is cut into pieces; so many pieces make one sum
  int64_t strip_frames_ = 1, strip_rows_ = 1, strip_columns_ = 1, strip_elements_ = 0;
  int64_t region_rows_ = 1, region_columns_ = 1;
  int64_t in_row_ = 0, slot_ = 0;  // elements of an activated row, and of a row of strip_
  A *strip_ = nullptr, *zero_ = nullptr;
  S *bias_ = nullptr, *temp_ = nullptr;
  int64_t per_thread_ = 0, region_ = 0;  // values of scratch per thread; of them, one region's partial outputs
  // the strip at hand: sample, outputs, input frames, columns and (direct) rows, slots per frame
  int64_t n_ = 0, slots_ = 0;
  Range t_{0, 0}, y_{0, 0}, x_{0, 0}, frames_{0, 0}, columns_{0, 0}, in_rows_{0, 0};
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
