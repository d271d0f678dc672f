// y = conv3d(act(norm(cat(cache, x)))) + bias + residual, causal in time.
//
// The input is taken in strips (some frames x some rows x some columns): a strip's rows are activated once into a
// buffer, then its outputs are computed, one task per (output channels, frame, region of pixels). A strip is one
// thread's own where there are enough of them; else every thread helps with each. Padding in T and H is a choice of
// row: frames and rows that do not exist are skipped, not convolved.
//
// Winograd F(2,3) along H: from four input rows d, two output rows with 4 instead of 6 row products,
//   V = B d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),  M_i = U_i * V_i,  y = A M:  y0 = M0 + M1 + M2,  y1 = M1 - M2 - M3.
// Over H and W, F(2 x 2, 3 x 3): from a 4 x 4 tile d, a 2 x 2 tile of outputs with 16 instead of 36 products,
//   V = B d B^T,  M_ij = U_ij * V_ij,  y = A M A^T.
//
// A sum's order depends on the output alone, never on strips, threads or chunks: chunked == whole, bitwise.
#include "fastdit/conv.h"

#include "conv_plan.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int kOutput[2][kWinograd] = {{1, 1, 1, 0}, {0, 1, -1, -1}};  // A

template <class T, class M>
class Conv : Plan<T, M> {
  using Base = Plan<T, M>;
  using S = typename M::S;
  using A = typename M::A;
  using V = typename M::V;
  using Base::blocks_, Base::taps_, Base::tiles_, Base::unit_rows_, Base::unit_columns_, Base::region_units_;
  using Base::columns_under, Base::slots_under, Base::strips;
  using Base::p_, Base::cp_, Base::runs_, Base::cuts_, Base::piece_, Base::run_length_, Base::together_;
  using Base::region_rows_, Base::region_columns_, Base::in_row_, Base::slot_, Base::threads_, Base::own_;
  using Base::round_up, Base::pieces, Base::min, Base::max, Base::frame_at, Base::row_at, Base::activate;
  using Base::strip_frames_, Base::strip_rows_, Base::strip_columns_, Base::strip_elements_, Base::kMaxSegments;

 public:
  explicit Conv(const ConvParams& p) : Base(p) {}

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
    const int64_t buffers = own_ ? threads_ : 1;
    const int64_t rows = round_up(strip_elements_ * sizeof(A), 4096), zero = round_up(in_row_ * sizeof(A), 64);
    char* at =
        workspace.get(buffers * rows + zero + (table + bias + per_thread * threads_) * int64_t(sizeof(S)) + 1024);
    A* buffer = reinterpret_cast<A*>(at);
    zero_ = reinterpret_cast<A*>(at += buffers * rows);
    S* weight = reinterpret_cast<S*>(at += zero);
    bias_ = reinterpret_cast<S*>(at += round_up(table * sizeof(S), 64));
    S* scratch = reinterpret_cast<S*>(at += round_up(bias * sizeof(S), 64));
    per_thread_ = per_thread;
    __builtin_memset(static_cast<void*>(zero_), 0, in_row_ * sizeof(A));
    Base::prologue(weight);
    for (int64_t i = p_.cout; i < bias; ++i) bias_[i] = S(0);
    load_channels<S>(p_.bias, p_.bias_dtype, p_.cout, S(0), bias_);
    parallel_tasks(strips(), own_ ? threads_ : 1, [&](int64_t i, int thread) {
      Strip s{};
      s.input = buffer + thread * (rows / int64_t(sizeof(A)));
      s.temp = scratch + thread * per_thread_;
      s.threads = own_ ? 1 : threads_;
      const auto next = [&](int64_t size, int64_t strip) {
        const int64_t count = pieces(size, strip), begin = i % count * strip;
        i /= count;
        return Range{begin, min(size, begin + strip)};
      };
      s.x = next(p_.wo, strip_columns_);
      s.y = next(p_.ho, strip_rows_);
      s.t = next(p_.to, strip_frames_);
      s.n = i;
      run(s);
    });
    workspace.trim(kKeepBytes);
  }

 private:
  // ---- one strip ------------------------------------------------------------------------------------
  struct Strip {
    int64_t n;
    Range t, y, x;                   // outputs
    Range frames, columns, in_rows;  // of the input; rows: direct only
    int64_t slots;                   // rows of `input` per frame
    A* input;
    S* temp;      // scratch of the first of its threads
    int threads;  // that work on it
  };

  void run(Strip& s) const {
    s.frames = Base::frames_of(s.t.begin, s.t.end);
    s.columns.begin = s.x.begin * p_.stride[2];
    s.columns.end = s.columns.begin + columns_under(s.x.size());
    if (p_.winograd) {
      s.slots = slots_under(s.y.size());
      transform(s);
    } else {
      s.in_rows = Base::rows_of(s.y.begin, s.y.end);
      s.slots = s.in_rows.size();
      parallel_ranges(s.frames.size() * s.slots, s.threads, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i)
          activate(s.n, s.frames.begin + i / s.slots, s.in_rows.begin + i % s.slots, s.columns,
                   s.temp + thread * per_thread_, s.input + i * slot_);
      });
    }
    const int64_t down = pieces(s.y.size(), region_rows_);
    const int64_t across = pieces(s.x.size(), region_columns_);
    parallel_tasks(blocks_.count * s.t.size() * down * across, s.threads, [&](int64_t task, int thread) {
      Region r;
      const int64_t x = s.x.begin + task % across * region_columns_;
      const int64_t y = s.y.begin + task / across % down * region_rows_;
      r.x = Range{x, min(s.x.end, x + region_columns_)};
      r.y = Range{y, min(s.y.end, y + region_rows_)};
      r.t = s.t.begin + task / (across * down) % s.t.size();
      r.block = task / (across * down * s.t.size());
      r.lanes = blocks_.size(r.block) * M::lanes;
      r.pitch = round_up(r.x.size(), unit_columns_) * r.lanes;
      r.out = s.temp + thread * per_thread_;
      convolve(s, r, reinterpret_cast<int64_t*>(r.out + region_));
      finish(s.n, r);
    });
  }

  // Winograd's data transform: the slots of every pair of output rows, in every frame. Rows 2 and 3 of a pair are 0 and
  // 1 of the next.
  void transform(const Strip& s) const {
    const int64_t pairs = pieces(s.y.size(), 2);
    parallel_ranges(s.frames.size() * pairs, s.threads, [&](int64_t begin, int64_t end, int thread) {
      S* tmp = s.temp + thread * per_thread_;
      A* ring = reinterpret_cast<A*>(tmp + round_up(p_.cin * M::lanes, 16));
      const A* d[kWinograd] = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t frame = s.frames.begin + i / pairs, pair = i % pairs;
        const bool follows = i > begin && pair > 0;
        for (int64_t r = 0; r < kWinograd; ++r) {
          if (follows && r < 2) {
            d[r] = d[r + 2];
            continue;
          }
          const int64_t row = map_index(s.y.begin + 2 * pair + r - p_.pad_h, p_.h, p_.space_pad);
          A* dst = ring + (2 * (pair % 2) + r) % kWinograd * in_row_;
          // below the last output row (odd heights) nothing is read: any row that exists will do
          d[r] = row < 0 || row >= p_.h ? zero_ : dst;
          if (d[r] == dst) activate(s.n, frame, row, s.columns, tmp, dst);
        }
        A* v = s.input + i * taps_.rows * slot_;
        if (tiles_)
          transform_tiles(d, s.columns.size(), v);
        else
          transform_rows(d, s.columns.size(), v);
      }
    });
  }

  struct Column {
    V v[kWinograd];
  };
  static FASTDIT_INLINE Column combine(V d0, V d1, V d2, V d3) { return {{d0 - d2, d1 + d2, d2 - d1, d1 - d3}}; }

  void transform_rows(const A* const* d, int64_t columns, A* v) const {
    const int64_t values = columns * cp_;
    for (int64_t k = 0; k < values; k += M::lanes) {
      const int n = static_cast<int>(values - k);
      const auto at = [&](int r) { return n >= M::lanes ? load(d[r] + k) : load_n(d[r] + k, n); };
      const Column out = combine(at(0), at(1), at(2), at(3));
      for (int r = 0; r < kWinograd; ++r) put(v + r * slot_ + k, out.v[r], n);
    }
  }

  void transform_tiles(const A* const* d, int64_t columns, A* v) const {
    for (int64_t x = 0; x + 2 < columns; x += 2, v += cp_) {
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
  int64_t locate(const Strip& s, const Region& r, Unit* unit, int64_t* row_offset) const {
    const int64_t step = tiles_ ? cp_ : p_.stride[2] * cp_;
    const int64_t across = pieces(r.x.size(), unit_columns_);
    const int64_t down = pieces(r.y.size(), unit_rows_);
    const int64_t x0 = (r.x.begin - s.x.begin) / unit_columns_, y0 = (r.y.begin - s.y.begin) / unit_rows_;
    int64_t count = 0;
    for (int64_t y = 0; y < down; ++y) {
      for (int64_t x = 0; x < across; ++x)
        unit[count++] = Unit{y, (x0 + x) * step, y * unit_rows_ * r.pitch + x * unit_columns_ * r.lanes};
      for (int64_t kh = 0; kh < taps_.rows; ++kh) {
        const int64_t row = p_.winograd ? 0 : row_at(r.y.begin + y, kh);
        row_offset[kh * region_rows_ + y] = p_.winograd ? ((y0 + y) * taps_.rows + kh) * slot_
                                            : row < 0   ? -1
                                                        : (row - s.in_rows.begin) * slot_;
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
  void convolve(const Strip& s, const Region& r, int64_t* table) const {
    Unit* unit = reinterpret_cast<Unit*>(table);
    int64_t* row_offset = table + 3 * (region_units_ + kPixels);
    const int64_t units = locate(s, r, unit, row_offset);
    const int64_t taps = (p_.winograd ? p_.kernel[0] : p_.kernel[0] * p_.kernel[1]) * runs_ * cuts_;
    const int64_t passes = p_.winograd ? taps_.rows : 1;
    Piece found[kMaxSegments];
    Sink<M> sink;
    sink.out = r.out;
    sink.sum = p_.winograd ? r.out + region_rows_ * region_columns_ * kMaxVectors * M::lanes : r.out;
    bool started[4] = {};  // by output of a unit
    for (int64_t pass = 0; pass < passes; ++pass) {
      aim(sink, r, pass, started);
      int64_t end = taps;  // of the pieces whose frame exists
      while (end > together_ && !gather(s, r, pass, (end - 1) / together_ * together_, end, found))
        end = (end - 1) / together_ * together_;
      sink.begun = false;
      for (int64_t first = 0; first < end; first += together_) {
        const int count = gather(s, r, pass, first, min(end, first + together_), found);
        sink.last = first + together_ >= end;
        if (!count && !sink.last) continue;
        for (int64_t q = 0; q < units; q += kPixels) {
          sink.valid = static_cast<int>(min(kPixels, units - q));
          for (int p = 0; p < kPixels; ++p) {
            sink.offset[p] = unit[q + p].out;
            sink.at[p] = p_.winograd ? (q + p) * r.lanes : unit[q + p].out;
          }
          tile(r, unit + q, row_offset, found, count, sink);
        }
        sink.begun = true;
      }
    }
  }

  struct Piece {
    const A *a, *b;  // a: in row 0 of its frame
    int64_t length, row;
  };
  int gather(const Strip& s, const Region& r, int64_t pass, int64_t first, int64_t last, Piece* pieces) const {
    const A* weights =
        static_cast<const A*>(p_.packed) + blocks_.begin(r.block) * packed_vector<M>(p_.cin, p_.kernel, p_.winograd);
    int count = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t cut = i % cuts_, run = i / cuts_ % runs_, tap = i / (cuts_ * runs_);
      const int64_t kt = p_.winograd ? tap : tap / p_.kernel[1], row = p_.winograd ? pass : tap % p_.kernel[1];
      const int64_t frame = frame_at(r.t, kt);
      if (frame < 0) continue;
      Piece& piece = pieces[count++];
      piece.a = s.input + (frame - s.frames.begin) * s.slots * slot_ + run * p_.dilation[2] * cp_ + cut * piece_;
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
  void finish(int64_t n, const Region& r) const {
    if (p_.wide)
      finish_as<S>(n, r);
    else
      finish_as<T>(n, r);
  }
  template <class O>
  void finish_as(int64_t n, const Region& r) const {
    const int64_t co = blocks_.begin(r.block) * M::lanes;
    const int64_t channels = min(r.lanes, p_.cout - co);
    const T* residual = static_cast<const T*>(p_.residual);
    for (int64_t y = r.y.begin; y < r.y.end; ++y) {
      const S* row = r.out + (y - r.y.begin) * r.pitch;
      O* out = static_cast<O*>(p_.y) + at(n, p_.y_stride, co, r.t, y, r.x.begin);
      const T* add = residual ? residual + at(n, p_.residual_stride, co, r.t, y, r.x.begin) : nullptr;
      if (p_.y_stride[1] == 1 && (!add || p_.residual_stride[1] == 1))
        finish_channels(row, r, channels, bias_ + co, out, add);
      else
        finish_strided(row, r, channels, bias_ + co, out, add);
    }
  }
  static int64_t at(int64_t n, const int64_t* stride, int64_t c, int64_t t, int64_t y, int64_t x) {
    return n * stride[0] + c * stride[1] + t * stride[2] + y * stride[3] + x * stride[4];
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

  A* zero_ = nullptr;
  S* bias_ = nullptr;
  int64_t per_thread_ = 0, region_ = 0;  // values of scratch per thread; of them, one region's partial outputs
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
