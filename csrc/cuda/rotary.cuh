// What rotary's forward and backward share: the pairs that a thread owns, rows of tables, statistics, the launch.
//
// A head lies in the registers of `lanes` threads, eight pairs of channels each; a warp holds 32 / lanes heads at a
// time, a round. A group of warps takes consecutive tokens with all their heads: one warp round after round, four where
// tokens are few, or, under scope "hidden", as many as hold all heads of a token at once. Every thread owns the same
// channels in each round, so a row of the table is read once per token and serves all heads. A block works for q or for
// k; where both are alike the blocks take turns, and the second reading of a row comes from L2.
#pragma once

#include <algorithm>
#include <string>

#include "fastdit/rotary.h"
#include "launch.h"
#include "rows.h"

namespace fastdit::cuda {

constexpr int kPairs = 8, kMaxHead = 2 * kPairs * 32;

// Where a thread's pairs lie.
enum class Pairs : int {
  neighbours,  // both channels in one pack of 16 bytes
  halves,      // a pack of first channels, a pack of second ones
  single       // one by one: any layout, any alignment
};

// How a call is laid onto blocks.
struct RotaryGrid {
  int lanes, warps, groups;  // threads of a head, warps of a group, groups of a block
  int pairs, turning;        // of a head: (D + 1) / 2, R / 2
  int width[3];              // pairs of each section of the halves; one section: R / 2, 0, 0
  int blocks[2], per[2];     // of q and of k: blocks, and tokens of a group
  bool packs[2];             // rows of the table of q, and of k, in packs
  bool turns;                // blocks of q and of k take turns; else q's come first
};

// q and k, so that a block finds its side by an index.
struct RotarySides {
  RotaryOperand operand[2];
  RotaryGrad grad[2];  // of a backward
};

// ---- the place of a thread --------------------------------------------------------------------------------
struct RotaryPlace {
  int side;                            // 0: q, 1: k
  int block, group, warp, slot, lane;  // of its side; of its side; in its group; of the heads of a round; in a head

  __device__ explicit RotaryPlace(const RotaryGrid& g) {
    const int thread = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x), first = g.blocks[0];
    side = g.turns ? at % 2 : at >= first;
    block = g.turns ? at / 2 : at - side * first;
    warp = thread / 32 % g.warps;
    group = block * g.groups + thread / 32 / g.warps;
    slot = thread % 32 / g.lanes;
    lane = thread % 32 % g.lanes;
  }
};

// Sums over a head, or over all heads of a token.
struct HeadSums {
  Sums all;
  int lanes;
  bool hidden;

  template <int count>
  __device__ __forceinline__ void operator()(float (&v)[count]) {
    if (hidden) return all(v);
#pragma unroll
    for (int k = 0; k < count; ++k)
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        if (step < lanes) v[k] += __shfl_xor_sync(0xffffffffu, v[k], step);
  }
};

// The threads of a head: which channels each owns, how they are read and written.
template <class T, Pairs mode>
struct Lane {
  // channels of a pack, pairs of a piece (a run of neighbours), pieces of a thread
  static constexpr int W = mode == Pairs::single ? 1 : 16 / static_cast<int>(sizeof(T));
  static constexpr int S = mode == Pairs::neighbours ? W / 2 : W, count = kPairs / S;

  struct Channels {
    int first, across;
  };
  struct Raw {
    Pack<T, W> first[count], second[count];  // neighbours: no second
  };

  const QkNormRopeParams& p;
  const RotaryGrid& g;
  const int lane, channels;

  __device__ Lane(const QkNormRopeParams& params, const RotaryGrid& grid, int head_lane)
      : p(params), g(grid), lane(head_lane), channels(static_cast<int>(params.head_dim)) {}

  __device__ __forceinline__ int pair(int piece) const { return (piece * g.lanes + lane) * S; }
  // A piece's first channel, and how far from it the second one of its pair is. What does not rotate pairs up behind.
  __device__ __forceinline__ Channels channels_of(int piece) const {
    const int n = pair(piece);
    if (mode == Pairs::neighbours || (mode == Pairs::single && p.layout == RotaryLayout::interleaved))
      return {2 * n, 1};
    if (n >= g.turning) return {n + g.turning, g.pairs - g.turning};
    if (n >= g.width[0] + g.width[1]) return {n + g.width[0] + g.width[1], g.width[2]};
    if (n >= g.width[0]) return {n + g.width[0], g.width[1]};
    return {n, g.width[0]};
  }
  // The last pair of an odd number of channels has no second one.
  __device__ __forceinline__ bool whole(int piece) const {
    return mode != Pairs::single || (channels % 2 == 0 || pair(piece) < g.pairs - 1);
  }

  template <class F>
  __device__ __forceinline__ void pieces(F&& body) const {
#pragma unroll
    for (int j = 0; j < count; ++j)
      if (pair(j) < g.pairs) body(j);
  }
  // body(pair's register, piece)
  template <class F>
  __device__ __forceinline__ void each(F&& body) const {
    pieces([&](int j) {
#pragma unroll
      for (int k = 0; k < S; ++k) body(j * S + k, j);
    });
  }

  __device__ __forceinline__ void fetch(const T* head, Raw& raw) const {
    pieces([&](int j) {
      const Channels c = channels_of(j);
      raw.first[j] = load_once<W>(head + c.first);
      if constexpr (mode != Pairs::neighbours)
        if (whole(j)) raw.second[j] = load_once<W>(head + c.first + c.across);
    });
  }
  // Zeros where there is no channel.
  __device__ __forceinline__ void widen_pairs(const Raw& raw, bool here, float (&a)[kPairs], float (&b)[kPairs]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) a[i] = b[i] = 0;
    if (!here) return;
    each([&](int i, int j) {
      const int k = i % S;
      if constexpr (mode == Pairs::neighbours) {
        a[i] = to_float(raw.first[j].values[2 * k]), b[i] = to_float(raw.first[j].values[2 * k + 1]);
      } else {
        a[i] = to_float(raw.first[j].values[k]);
        if (whole(j)) b[i] = to_float(raw.second[j].values[k]);
      }
    });
  }
  // The values of a piece that stand at `from` on in a vector whose dtype only the parameters know.
  __device__ __forceinline__ void piece(const void* data, int dtype, int64_t from, int j, float (&a)[S],
                                        float (&b)[S]) const {
    const Channels c = channels_of(j);
    if constexpr (mode == Pairs::neighbours) {
      float v[W];
      load_as<W>(data, dtype, from + c.first, v);
#pragma unroll
      for (int k = 0; k < S; ++k) a[k] = v[2 * k], b[k] = v[2 * k + 1];
    } else {
      load_as<W>(data, dtype, from + c.first, a);
#pragma unroll
      for (int k = 0; k < S; ++k) b[k] = 0;
      if (whole(j)) load_as<W>(data, dtype, from + c.first + c.across, b);
    }
  }
  template <class X>
  __device__ __forceinline__ void store(X* head, const float (&a)[kPairs], const float (&b)[kPairs]) const {
    pieces([&](int j) {
      float v[W], w[W];
#pragma unroll
      for (int k = 0; k < S; ++k) {
        if constexpr (mode == Pairs::neighbours)
          v[2 * k] = a[j * S + k], v[2 * k + 1] = b[j * S + k];
        else
          v[k] = a[j * S + k], w[k] = b[j * S + k];
      }
      const Channels c = channels_of(j);
      store_once(head + c.first, narrow<X, W>(v));
      if constexpr (mode != Pairs::neighbours)
        if (whole(j)) store_once(head + c.first + c.across, narrow<X, W>(w));
    });
  }

  // (mean, 1 / sqrt(variance + eps)) of a head or of all heads; zeros stand where there is no channel.
  __device__ __forceinline__ void statistics(const float (&a)[kPairs], const float (&b)[kPairs], bool here,
                                             float inverse, HeadSums& sums, float& mean, float& root) const {
    mean = 0;
    float total[1] = {0};
    if (p.norm == RotaryNorm::layer) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) total[0] += a[i] + b[i];
      sums(total);
      mean = total[0] * inverse;
    }
    total[0] = 0;
    if (here)
      each([&](int i, int j) {
        const float u = a[i] - mean, v = whole(j) ? b[i] - mean : 0;
        total[0] += u * u + v * v;
      });
    sums(total);
    root = rsqrtf(total[0] * inverse + static_cast<float>(p.eps));
  }
};

// ---- rows of tables ---------------------------------------------------------------------------------------
// The grid of a token, and its first token. Packed grids follow one another along the tokens; a warp walks forward.
struct GridWalk {
  int segment = 0, first = 0, end = 0, next = 0;

  __device__ __forceinline__ void seek(const RotaryAxes& axes, int b, int n) {
    const int segments = static_cast<int>(axes.segments);
    if (!axes.packed) {
      segment = min(b, segments - 1);
      return;
    }
    if (n < end) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int base = next, before = end;; base += 32) {  // a grid per lane; the first that ends beyond the token
      int ends = base + lane < segments;
      for (int a = 0; a < axes.count && base + lane < segments; ++a) ends *= axes.grids[(base + lane) * axes.count + a];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, ends, step);
        if (lane >= step) ends += below;
      }
      ends += before;
      const int passed = static_cast<int>(__reduce_add_sync(0xffffffffu, ends <= n));
      if (passed == 32 && base + 32 < segments) {
        before = __shfl_sync(0xffffffffu, ends, 31);
        continue;
      }
      segment = min(base + passed, segments - 1), next = base + passed + 1;
      first = __shfl_sync(0xffffffffu, ends, max(passed - 1, 0));
      if (!passed) first = before;
      end = __shfl_sync(0xffffffffu, ends, min(passed, 31));
      return;
    }
  }
};

// The row of a table that turns a token, or a head where each has its own: a thread's eight cosines and sines. Tables
// are fp32; under the native law they may be of x's dtype.
template <class T, Pairs mode, bool native>
struct TableRow {
  using L = Lane<T, mode>;
  static constexpr int S = L::S;
  const QkNormRopeParams& p;
  const RotaryTable& t;
  const bool use_axes, packs;
  const int turning;
  GridWalk walk;
  float cos[kPairs], sin[kPairs];

  __device__ TableRow(const QkNormRopeParams& params, const RotaryOperand& o, const RotaryGrid& g, int side)
      : p(params), t(o.table), use_axes(o.use_axes), packs(g.packs[side]), turning(g.turning) {}

  __device__ __forceinline__ bool turns(int n) const {
    return (t.cos || use_axes) && n >= p.rope_start && n - p.rope_start < p.rope_len;
  }
  __device__ __forceinline__ bool per_head() const {
    return !use_axes && (t.cos_stride[2] != 0 || t.sin_stride[2] != 0);
  }
  // Tables of x's dtype: the products round as well.
  __device__ __forceinline__ bool rounds() const {
    return native && static_cast<DType>(use_axes ? p.axes.dtype : t.dtype) != DType::f32;
  }

  // What all heads of a token share, or what one head has.
  __device__ __forceinline__ void load(const L& own, int b, int token, int head) {
    if constexpr (native) {
      if (rounds()) return load_as_type<T>(own, b, token, head);
    }
    load_as_type<float>(own, b, token, head);
  }

 private:
  template <class X>
  __device__ __forceinline__ void load_as_type(const L& own, int b, int token, int head) {
    if (use_axes)
      from_axes<X>(own, b, token - static_cast<int>(p.rope_start));
    else
      dense<X>(own, b, token - p.rope_start, head);
  }

  template <class X>
  __device__ __forceinline__ void dense(const L& own, int b, int64_t n, int head) {
    const X* c = static_cast<const X*>(t.cos) + b * t.cos_stride[0] + n * t.cos_stride[1] + head * t.cos_stride[2];
    const X* s = static_cast<const X*>(t.sin) + b * t.sin_stride[0] + n * t.sin_stride[1] + head * t.sin_stride[2];
#pragma unroll
    for (int j = 0; j < L::count; ++j) {
      const int pair = own.pair(j);
      if (pair >= turning) continue;
      if (packs) {
        read<S>(c + pair, cos + j * S), read<S>(s + pair, sin + j * S);
      } else {
#pragma unroll
        for (int k = 0; k < S; ++k) {
          read<1>(c + (pair + k) * t.cos_stride[3], cos + j * S + k);
          read<1>(s + (pair + k) * t.sin_stride[3], sin + j * S + k);
        }
      }
    }
  }

  template <class X>
  __device__ __forceinline__ void from_axes(const L& own, int b, int n) {
    const RotaryAxes& x = p.axes;
    walk.seek(x, b, n);
    n -= walk.first;
    const int32_t* grid = x.grids + walk.segment * x.count;
    int place[3] = {n, 0, 0};
    if (x.count > 1) {  // the last axis runs fastest
      const int last = max(grid[x.count - 1], 1), middle = x.count > 2 ? max(grid[1], 1) : 1, rest = n / last;
      place[0] = rest / middle, place[1] = x.count > 2 ? rest % middle : n % last, place[2] = n % last;
    }
    const int second = static_cast<int>(x.width[0]), third = second + static_cast<int>(x.width[1]);
    const auto row = [&](int axis) {  // no grid leads out of the table
      return min(place[axis], static_cast<int>(x.size[axis]) - 1) * static_cast<int>(x.width[axis]);
    };
    const int rows[3] = {row(0), row(1) - second, row(2) - third};
    const auto at = [&](int pair, const X*& c, const X*& s) {
      const int axis = (pair >= second) + (pair >= third);
      c = static_cast<const X*>(axis == 0 ? x.cos[0] : axis == 1 ? x.cos[1] : x.cos[2]) + pair;
      s = static_cast<const X*>(axis == 0 ? x.sin[0] : axis == 1 ? x.sin[1] : x.sin[2]) + pair;
      const int from = axis == 0 ? rows[0] : axis == 1 ? rows[1] : rows[2];
      c += from, s += from;
    };
#pragma unroll
    for (int j = 0; j < L::count; ++j) {
      const int pair = own.pair(j);
      if (pair >= turning) continue;
      const X *c, *s;
      if (packs) {
        at(pair, c, s);
        read<S>(c, cos + j * S), read<S>(s, sin + j * S);
      } else {
#pragma unroll
        for (int k = 0; k < S; ++k) {
          at(pair + k, c, s);
          read<1>(c, cos + j * S + k), read<1>(s, sin + j * S + k);
        }
      }
    }
  }

  template <int count, class X>
  static __device__ __forceinline__ void read(const X* from, float* to) {
    const Pack<X, count> v = load_again<count>(from);
#pragma unroll
    for (int k = 0; k < count; ++k) to[k] = to_float(v.values[k]);
  }
};

// ---- the host's part --------------------------------------------------------------------------------------
inline std::string sizes(const QkNormRopeParams& p) {
  return "B=" + std::to_string(p.batch) + " N=" + std::to_string(p.q.tokens) + "," + std::to_string(p.k.tokens) +
         " H=" + std::to_string(p.q.heads) + "," + std::to_string(p.k.heads) + " D=" + std::to_string(p.head_dim) +
         " dtype=" + std::to_string(p.dtype);
}

inline int64_t rows(const QkNormRopeParams& p, const RotaryOperand& o) {
  return o.heads && p.head_dim ? p.batch * o.tokens : 0;
}

// Whether packs of W elements lie on their alignment, wherever the strides of (B, N, H) lead.
inline bool fits(const QkNormRopeParams& p, const RotaryOperand& o, const void* data, const int64_t (&stride)[3],
                 int W) {
  const int size = static_cast<int>(itemsize(static_cast<DType>(p.dtype)));
  return !data || fits(data, size, W,
                       {p.batch > 1 ? stride[0] : 0, o.tokens > 1 ? stride[1] : 0, o.heads > 1 ? stride[2] : 0});
}

// Elements of a pack: 16 bytes where every tensor of q and of k allows it, else single ones.
inline Pairs pairs_of(const QkNormRopeParams& p, const RotaryGrid& g) {
  const int W = static_cast<int>(16 / itemsize(static_cast<DType>(p.dtype)));
  const bool neighbours = p.layout == RotaryLayout::interleaved || !g.turning;
  bool wide = p.head_dim % W == 0;
  if (neighbours) {
    wide = wide && g.turning % (W / 2) == 0;
  } else {
    for (int width : g.width) wide = wide && width % W == 0;
    wide = wide && p.head_dim % 2 == 0 && (g.pairs - g.turning) % W == 0;
  }
  for (const RotaryOperand* o : {&p.q, &p.k}) {
    if (!rows(p, *o)) continue;
    wide = wide && fits(p, *o, o->x, o->x_stride, W) && fits(p, *o, o->out, o->out_stride, W);
    if (o->weight) wide = wide && fits(o->weight, static_cast<int>(itemsize(static_cast<DType>(o->weight_dtype))), W, {});
    if (o->bias) wide = wide && fits(o->bias, static_cast<int>(itemsize(static_cast<DType>(o->bias_dtype))), W, {});
  }
  return !wide ? Pairs::single : neighbours ? Pairs::neighbours : Pairs::halves;
}

// Whether rows of the operand's table can be read S pairs at a time.
inline bool table_packs(const QkNormRopeParams& p, const RotaryOperand& o, int S) {
  if (o.use_axes) {
    const int size = static_cast<int>(itemsize(static_cast<DType>(p.axes.dtype)));
    bool whole = true;
    for (int a = 0; a < p.axes.count; ++a)
      whole = whole && p.axes.width[a] % S == 0 && fits(p.axes.cos[a], size, S, {}) && fits(p.axes.sin[a], size, S, {});
    return whole;
  }
  const RotaryTable& t = o.table;
  const int size = static_cast<int>(itemsize(static_cast<DType>(t.dtype)));
  return !t.cos || (t.cos_stride[3] == 1 && t.sin_stride[3] == 1 &&
                    fits(t.cos, size, S, {t.cos_stride[0], t.cos_stride[1], t.cos_stride[2]}) &&
                    fits(t.sin, size, S, {t.sin_stride[0], t.sin_stride[1], t.sin_stride[2]}));
}

struct RotaryPlan {
  RotaryGrid g;
  Pairs mode;
  int threads() const { return 32 * g.warps * g.groups; }
  int grid() const { return g.blocks[0] + g.blocks[1]; }
};

// resident: threads that a processor holds. with_q, with_k: which sides take part.
inline RotaryPlan rotary_plan(const QkNormRopeParams& p, int device, int resident, bool with_q, bool with_k,
                              const char* op) {
  RotaryGrid g{};
  g.pairs = static_cast<int>((p.head_dim + 1) / 2), g.turning = static_cast<int>(p.rotated / 2);
  g.width[0] = g.turning;
  if (p.layout == RotaryLayout::axis_half)
    for (int a = 0; a < 3; ++a) g.width[a] = p.axes.count ? static_cast<int>(p.axes.width[a]) : g.turning / 3;
  for (g.lanes = 1; g.lanes * kPairs < g.pairs && g.lanes < 64;) g.lanes *= 2;
  const int64_t tokens[2] = {with_q ? rows(p, p.q) : 0, with_k ? rows(p, p.k) : 0};
  const int64_t heads[2] = {p.q.heads, p.k.heads};
  const auto refuse = [&](const char* what) {
    throw std::invalid_argument(std::string(op) + ": " + what + "; got " + sizes(p));
  };
  if (g.lanes > 32) refuse("too many channels in a head");
  if (std::max(tokens[0], tokens[1]) > 0x7fff0000) refuse("too many tokens");
  const int slots = 32 / g.lanes;
  g.warps = std::max(tokens[0], tokens[1]) < int64_t{16} * processors(device) ? kRows : 1;
  if (p.all_heads) {
    g.warps = 1;
    for (int s = 0; s < 2; ++s)
      if (tokens[s]) g.warps = std::max(g.warps, static_cast<int>((heads[s] + slots - 1) / slots));
    if (g.warps > kMaxWarps) refuse("too many channels in a row");
  }
  g.groups = p.all_heads || g.warps > 1 ? 1 : kRows;
  RotaryPlan plan{g, Pairs::single};
  const int64_t work[2] = {tokens[0] * heads[0], tokens[1] * heads[1]};
  const int64_t most = int64_t{processors(device)} * std::clamp(resident / plan.threads(), 1, 16);
  for (int s = 0; s < 2; ++s) {
    if (!tokens[s]) continue;
    const int64_t share = std::max<int64_t>(most * work[s] / (work[0] + work[1]), 1);
    const int64_t blocks = std::min((tokens[s] + g.groups - 1) / g.groups, share);
    const int64_t per = (tokens[s] + blocks * g.groups - 1) / (blocks * g.groups);
    plan.g.per[s] = static_cast<int>(per);
    plan.g.blocks[s] = static_cast<int>((tokens[s] + per * g.groups - 1) / (per * g.groups));
  }
  plan.g.turns = plan.g.blocks[0] == plan.g.blocks[1];
  plan.mode = pairs_of(p, g);
  const int W = static_cast<int>(16 / itemsize(static_cast<DType>(p.dtype)));
  const int S = plan.mode == Pairs::single ? 1 : plan.mode == Pairs::neighbours ? W / 2 : W;
  plan.g.packs[0] = table_packs(p, p.q, S), plan.g.packs[1] = table_packs(p, p.k, S);
  return plan;
}

// Calls run<T>(...) for the dtype of q and k.
#define FASTDIT_ROTARY_DTYPES(p, run, ...)     \
  switch (static_cast<DType>((p).dtype)) {     \
    case DType::f32:                           \
      return run<float>(__VA_ARGS__);          \
    case DType::bf16:                          \
      return run<bf16>(__VA_ARGS__);           \
    default:                                   \
      return run<f16>(__VA_ARGS__);            \
  }

}  // namespace fastdit::cuda
