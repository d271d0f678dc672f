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

constexpr int kPairs = 8, kHeldWarps = 12;  // of a thread in a head; of a block that holds all heads of a token

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
  bool turns;                // blocks of q and of k take turns; else q's come first
};

// q and k, so that a block finds its side by an index.
struct RotarySide {
  RotaryOperand operand;
  RotaryGrad grad;  // of a backward
};
struct RotarySides {
  RotarySide of[2];
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

// A block's side in shared memory: as parameters that an index finds they would take a register each.
__device__ __forceinline__ void copy_side(const RotarySides& sides, int side, RotarySide& to) {
  const auto* from = reinterpret_cast<const unsigned*>(&sides.of[side]);
  auto* words = reinterpret_cast<unsigned*>(&to);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(RotarySide) / 4); i += blockDim.x)
    words[i] = from[i];
  __syncthreads();
}

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
  // a = with(a, v), b = with(b, v) for a piece; v from a vector of the head, whose dtype only the parameters know.
  template <class F>
  __device__ __forceinline__ void apply(const void* data, int dtype, int64_t from, int j, float (&a)[kPairs],
                                        float (&b)[kPairs], F&& with) const {
    const Channels c = channels_of(j);
    float v[W];
    load_as<W>(data, dtype, from + c.first, v);
    if constexpr (mode == Pairs::neighbours) {
#pragma unroll
      for (int k = 0; k < S; ++k)
        a[j * S + k] = with(a[j * S + k], v[2 * k]), b[j * S + k] = with(b[j * S + k], v[2 * k + 1]);
    } else {
#pragma unroll
      for (int k = 0; k < S; ++k) a[j * S + k] = with(a[j * S + k], v[k]);
      if (!whole(j)) return;
      load_as<W>(data, dtype, from + c.first + c.across, v);
#pragma unroll
      for (int k = 0; k < S; ++k) b[j * S + k] = with(b[j * S + k], v[k]);
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

// The row of a table that turns a token, or of each head of a round where heads have their own, in shared memory: a
// warp reads it once, neighbours by neighbours, and every thread finds the values of its pairs. Tables are fp32; under
// the native law they may be of x's dtype.
constexpr int kRow = 32 * kPairs, kRowBytes = 2 * kRow * static_cast<int>(sizeof(float));  // of a warp: cos, then sin

template <class T, bool native>
struct TableRow {
  const QkNormRopeParams& p;
  const RotaryTable& t;
  const RotaryGrid& g;
  const bool use_axes, per_head;
  float* const stage;
  GridWalk walk;

  __device__ TableRow(const QkNormRopeParams& params, const RotaryOperand& o, const RotaryGrid& grid, char* shared)
      : p(params),
        t(o.table),
        g(grid),
        use_axes(o.use_axes),
        per_head(!o.use_axes && (o.table.cos_stride[2] != 0 || o.table.sin_stride[2] != 0)),
        stage(reinterpret_cast<float*>(shared + threadIdx.x / 32 * kRowBytes)) {}

  __device__ __forceinline__ bool turns(int n) const {
    return (t.cos || use_axes) && n >= p.rope_start && n - p.rope_start < p.rope_len;
  }
  // Tables of x's dtype: the products round as well.
  __device__ __forceinline__ bool rounds() const {
    return native && static_cast<DType>(use_axes ? p.axes.dtype : t.dtype) != DType::f32;
  }

  // The row of a token, for all heads; the whole warp calls it.
  __device__ __forceinline__ void load(int b, int token) {
    const int n = token - static_cast<int>(p.rope_start), lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();  // nobody reads the last row any more
    if (use_axes)
      from_axes(b, n, lane);
    else
      dense(b, n, 0, stage, lane, 32);
    __syncwarp();
  }
  // The rows of the heads of a round; `head` is this thread's.
  __device__ __forceinline__ void load(int b, int token, int head, bool here, const RotaryPlace& place) {
    __syncwarp();
    if (here)
      dense(b, token - static_cast<int>(p.rope_start), head, stage + place.slot * g.lanes * kPairs, place.lane,
            g.lanes);
    __syncwarp();
  }
  // Cosines and sines of S pairs from `pair` on.
  template <int S>
  __device__ __forceinline__ void read(int pair, const RotaryPlace& place, float (&c)[S], float (&s)[S]) const {
    const float* row = stage + (per_head ? place.slot * g.lanes * kPairs : 0) + pair;
    using word = typename Pack<float, S>::word;
    Pack<float, S> v;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < v.pieces; ++i) v.words[i] = reinterpret_cast<const word*>(row + side * kRow)[i];
#pragma unroll
      for (int k = 0; k < S; ++k) (side ? s : c)[k] = v.values[k];
    }
  }

 private:
  __device__ __forceinline__ float value(const void* from, int dtype, int64_t at) const {
    if constexpr (native)
      if (static_cast<DType>(dtype) != DType::f32)
        return to_float(load_again<1>(static_cast<const T*>(from) + at).values[0]);
    return load_again<1>(static_cast<const float*>(from) + at).values[0];
  }

  __device__ __forceinline__ void dense(int b, int n, int head, float* row, int first, int step) const {
    const int64_t c = b * t.cos_stride[0] + n * t.cos_stride[1] + head * t.cos_stride[2];
    const int64_t s = b * t.sin_stride[0] + n * t.sin_stride[1] + head * t.sin_stride[2];
#pragma unroll 1
    for (int i = first; i < g.turning; i += step) {
      row[i] = value(t.cos, t.dtype, c + i * t.cos_stride[3]);
      row[kRow + i] = value(t.sin, t.dtype, s + i * t.sin_stride[3]);
    }
  }

  __device__ __forceinline__ void from_axes(int b, int n, int lane) {
    const RotaryAxes& x = p.axes;
    walk.seek(x, b, n);
    n -= walk.first;
    const int32_t* grid = x.grids + walk.segment * x.count;
    int place[3] = {n, 0, 0};
    if (x.count > 1) {  // the last axis runs fastest
      const int last = max(grid[x.count - 1], 1), middle = x.count > 2 ? max(grid[1], 1) : 1, rest = n / last;
      place[0] = rest / middle, place[1] = x.count > 2 ? rest % middle : n % last, place[2] = n % last;
    }
    int begin = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      if (a == x.count) break;
      const int width = static_cast<int>(x.width[a]);
      const int at = min(place[a], static_cast<int>(x.size[a]) - 1) * width;  // no grid leads out of the table
      for (int i = lane; i < width; i += 32) {
        stage[begin + i] = value(x.cos[a], x.dtype, at + i);
        stage[kRow + begin + i] = value(x.sin[a], x.dtype, at + i);
      }
      begin += width;
    }
  }
};

// What works on the heads of a block's side.
template <class T, Pairs mode>
struct RotaryWorker {
  const QkNormRopeParams& p;
  const RotaryOperand& o;
  const RotaryPlace place;
  const Lane<T, mode> own;
  HeadSums sums;
  const int heads, tokens, slots;
  const float inverse;  // 1 / the channels that share a statistic

  __device__ RotaryWorker(const QkNormRopeParams& params, const RotaryGrid& g, const RotaryPlace& where,
                          const RotaryOperand& operand, float (*buffer)[2][kMaxWarps])
      : p(params),
        o(operand),
        place(where),
        own(params, g, where.lane),
        sums{{buffer, g.warps}, g.lanes, params.all_heads},
        heads(static_cast<int>(operand.heads)),
        tokens(static_cast<int>(operand.tokens)),
        slots(32 / g.lanes),
        inverse(1.0f / static_cast<float>((params.all_heads ? heads : 1) * static_cast<int>(params.head_dim))) {}

  // The rounds of this warp end here. Under scope "hidden" every warp takes part in the sums of every token.
  __device__ __forceinline__ int rounds() const { return p.all_heads ? place.warp + 1 : (heads + slots - 1) / slots; }
  // Where the weight and the bias of a head begin.
  __device__ __forceinline__ int64_t affine_at(int head) const { return p.all_heads ? head * p.head_dim : 0; }
};
#define FASTDIT_ROTARY_WORKER(T, mode) \
  using Base = RotaryWorker<T, mode>;  \
  using Base::p, Base::o, Base::place, Base::own, Base::sums, Base::heads, Base::tokens, Base::slots, Base::inverse

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
  return !data ||
         fits(data, size, W, {p.batch > 1 ? stride[0] : 0, o.tokens > 1 ? stride[1] : 0, o.heads > 1 ? stride[2] : 0});
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
    if (o->weight)
      wide = wide && fits(o->weight, static_cast<int>(itemsize(static_cast<DType>(o->weight_dtype))), W, {});
    if (o->bias) wide = wide && fits(o->bias, static_cast<int>(itemsize(static_cast<DType>(o->bias_dtype))), W, {});
  }
  return !wide ? Pairs::single : neighbours ? Pairs::neighbours : Pairs::halves;
}

struct RotaryPlan {
  RotaryGrid g;
  Pairs mode;
  int threads() const { return 32 * g.warps * g.groups; }
  int shared() const { return g.warps * g.groups * kRowBytes; }
  int grid() const { return g.blocks[0] + g.blocks[1]; }
};

// resident: threads that a processor holds. with_q, with_k: which sides take part; the blocks of one do not depend on
// the other's.
inline RotaryPlan rotary_plan(const QkNormRopeParams& p, int device, int resident, bool with_q, bool with_k,
                              const char* op) {
  RotaryGrid g{};
  g.pairs = static_cast<int>((p.head_dim + 1) / 2), g.turning = static_cast<int>(p.rotated / 2);
  g.width[0] = g.turning;
  if (p.layout == RotaryLayout::axis_half)
    for (int a = 0; a < 3; ++a) g.width[a] = p.axes.count ? static_cast<int>(p.axes.width[a]) : g.turning / 3;
  for (g.lanes = 1; g.lanes * kPairs < g.pairs && g.lanes < 64;) g.lanes *= 2;
  const int64_t tokens[2] = {rows(p, p.q), rows(p, p.k)}, heads[2] = {p.q.heads, p.k.heads};
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
    if (g.warps > kHeldWarps) refuse("too many heads in a row");
  }
  g.groups = p.all_heads || g.warps > 1 ? 1 : kRows;
  const int64_t most = int64_t{processors(device)} * std::clamp(resident / (32 * g.warps * g.groups), 1, 16);
  const int64_t work[2] = {tokens[0] * heads[0], tokens[1] * heads[1]};
  for (int s = 0; s < 2; ++s) {
    if (!tokens[s] || !(s ? with_k : with_q)) continue;
    const int64_t share = std::max<int64_t>(most * work[s] / (work[0] + work[1]), 1);
    const int64_t blocks = std::min((tokens[s] + g.groups - 1) / g.groups, share);
    const int64_t per = (tokens[s] + blocks * g.groups - 1) / (blocks * g.groups);
    g.per[s] = static_cast<int>(per);
    g.blocks[s] = static_cast<int>((tokens[s] + per * g.groups - 1) / (per * g.groups));
  }
  g.turns = g.blocks[0] == g.blocks[1];
  return {g, pairs_of(p, g)};
}

}  // namespace fastdit::cuda
