// Who sees whom: the keys that a tile of queries has to meet, those of them that need no mask, and the masks of the
// rest.
//
// i counts queries and j keys, both from the start of their segment (of their sample, when dense).
//
//   lines    query i sees the keys j < key_end(i), a bound that never falls with i: all keys, or, frame-causal, the
//            frames up to its own. shift = keys - queries, since the queries are the last of the keys.
//   window   per axis of n tokens, window W and stride S:  start(i) <= j < start(i) + min(W, n),
//            start(i) = clamp(i / S * S + S / 2 - W / 2, 0, n - W)
//
// Both are monotone: what a run of queries sees together is one range between the bounds of its first and its last one,
// and so are the queries that see a run of keys. With windows that holds on each axis, so tiles are bricks: what a
// brick meets is a box, walked in bricks from its lower corner; what lies in the box's core is met by every token of
// the brick and takes no mask. A line is an axis of its own, and its tiles are bricks of 1 x 1 x n.
#pragma once

#include <string>

#include "attention.h"
#include "launch.h"
#include "mma.h"

namespace fastdit::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The forward's exponentials are powers of two, of q . k by `factor`, > 0. fp32 rounds that factor, and lse would be as
// much off as the scores are large: what stands in this base goes back by kLn2 + `rest`.
struct Base {
  float factor, rest;
};
inline Base base_of(const AttentionParams& p) {
  const double scale = std::abs(p.scale), factor = scale * 1.4426950408889634;
  const float rounded = factor > 1e-30 ? static_cast<float>(factor) : 1e-30f;  // of scale 0: no score survives it
  return {rounded, static_cast<float>(scale / rounded - kLn2)};
}
// top: maximum of the scores in the base; sum: of the exponentials under it, 0 in a row without keys.
__device__ __forceinline__ float lse_of(float top, float sum, const Base& base) {
  return sum == 0 ? -INFINITY : fmaf(top, kLn2, fmaf(top, base.rest, logf(sum)));
}

__device__ __forceinline__ int pieces(int n, int size) { return (n + size - 1) / size; }

// ---- lines ------------------------------------------------------------------------------------------------
struct __align__(16) Line {
  int queries, keys, shift;
  int frame;  // tokens of a frame, at least 1; 0: every key is visible

  __device__ __forceinline__ int all_keys() const {
    return queries + shift;
  }  // keys: the first of them, that may be seen

  __device__ __forceinline__ int key_end(int i) const {
    if (!frame) return keys;
    const int at = i + shift;
    return at < 0 ? 0 : min((at / frame + 1) * frame, keys);  // more queries than keys: the first see none
  }
  __device__ __forceinline__ int first_query(int j) const { return frame ? max(j / frame * frame - shift, 0) : 0; }
};

// A frame longer than the keys is as good as one that holds them, and cannot overflow.
__device__ __forceinline__ int frame_length(int64_t frame, int keys) {
  return max(static_cast<int>(min(frame, static_cast<int64_t>(keys))), 1);
}

// ---- axes -------------------------------------------------------------------------------------------------
struct __align__(16) Span {
  int lo, hi;            // met by some token
  int core_lo, core_hi;  // by all
};
constexpr int kFar = 1 << 30;  // a core that has no end: what is not there is zero anyway

__device__ __forceinline__ int window_start(int i, int n, int window, int stride) {
  return max(min(i / stride * stride + stride / 2 - window / 2, n - window), 0);
}
// Of the queries i0 <= i < min(i1, n).
__device__ __forceinline__ Span seen_span(int i0, int i1, int n, int window, int stride) {
  const int first = window_start(i0, n, window, stride), last = window_start(min(i1, n) - 1, n, window, stride);
  return {first, min(last + window, n), last, min(first + window, n)};
}

// The queries i with first_viewer(j) <= i < viewers_end(j) see key j < n.
__device__ __forceinline__ int first_viewer(int j, int window, int stride) {
  const int least = j - window + 1, ahead = max(least - (stride / 2 - window / 2), 0);
  return least <= 0 ? 0 : pieces(ahead, stride) * stride;
}
__device__ __forceinline__ int viewers_end(int j, int n, int window, int stride) {
  const int ahead = j - (stride / 2 - window / 2);  // at least 0 where it counts
  return j >= n - window ? n : min((ahead / stride + 1) * stride, n);
}
// Of the keys j0 <= j < min(j1, n).
__device__ __forceinline__ Span viewer_span(int j0, int j1, int n, int window, int stride) {
  const int last = min(j1, n) - 1;
  return {first_viewer(j0, window, stride), viewers_end(last, n, window, stride), first_viewer(last, window, stride),
          viewers_end(j0, n, window, stride)};
}

// ---- bricks -----------------------------------------------------------------------------------------------
struct Point {
  int t, h, w;
};
__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

// Token `number` of a brick, w fastest.
__device__ __forceinline__ Point brick_token(int number, Brick b) {
  const int w_bits = log2_of(b.w), h_bits = log2_of(b.h);
  return {number >> (w_bits + h_bits), number >> w_bits & (b.h - 1), number & (b.w - 1)};
}
__device__ __forceinline__ int bricks(int t, int h, int w, Brick b) {
  return pieces(t, b.t) * pieces(h, b.h) * pieces(w, b.w);
}
__device__ __forceinline__ Point brick_corner(int number, int h, int w, Brick b) {
  const int across = pieces(w, b.w), down = pieces(h, b.h);
  return {number / (across * down) * b.t, number / across % down * b.h, number % across * b.w};
}

// ---- what a block works at --------------------------------------------------------------------------------
// One thread finds it out, all read it in shared memory.
struct Work {
  int batch, head, kv_head, real;  // real: not the rows behind the last segment
  int segment;                     // or sample
  int64_t q_row, k_row;            // of the segment's first tokens, in the tensor (packed) or the sample
  Line line;
  int T, H, W;   // the segment's grid; a line's is 1 x 1 x tokens
  Point corner;  // of the tile that the block owns
  Span t, h, w;  // what it meets
  int count;     // bricks of that
};

struct Segment {
  int segment, tile;
};
__device__ __forceinline__ Segment find_tile(const int32_t* plan, int tile, int segments) {
  int low = 0, high = segments + 1;  // plan[low] <= tile < plan[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan[middle] <= tile)
      low = middle;
    else
      high = middle;
  }
  return {plan[segments + 2 + low], tile - plan[low]};
}

__device__ __forceinline__ int tiles_of(const AttentionParams& p, const Cut& cut) {
  return cut.plan ? cut.plan[p.batch + 1] : static_cast<int>(cut.programs);
}

// The segment (or sample) of a tile, and the number that the tile has there. A plane is a sample's head, of q or (keys)
// of k.
__device__ __forceinline__ int place(const AttentionParams& p, const Cut& cut, bool keys, int plane, int tile,
                                     Work& w) {
  const int group = static_cast<int>(p.heads / p.kv_heads), planes = static_cast<int>(keys ? p.kv_heads : p.heads);
  const int segments = static_cast<int>(p.batch), head = plane % planes;
  w.head = keys ? head * group : head, w.kv_head = w.head / group;
  int segment, queries, valid, all;
  if (cut.plan) {
    const Segment s = find_tile(cut.plan, tile, segments);
    segment = s.segment, tile = s.tile, w.real = segment < segments, w.batch = 0;
    w.q_row = p.cu_q[segment], w.k_row = p.cu_k[segment];
    queries = static_cast<int>((w.real ? p.cu_q[segment + 1] : p.q_len) - w.q_row);
    valid = all = static_cast<int>((w.real ? p.cu_k[segment + 1] : p.k_len) - w.k_row);
  } else {
    segment = w.batch = plane / planes, w.real = 1, w.q_row = w.k_row = 0;
    queries = static_cast<int>(p.q_len), all = static_cast<int>(p.k_len);
    valid = p.kv_len ? max(min(p.kv_len[segment], all), 0) : all;
  }
  w.segment = segment;
  int64_t frame = p.frame_tokens;
  if (p.frame_tokens_of) frame = w.real ? p.frame_tokens_of[segment] : 1;
  w.line = {queries, valid, all - queries, frame ? frame_length(frame, all) : 0};
  if (p.grids && w.real)
    w.T = p.grids[3 * segment], w.H = p.grids[3 * segment + 1], w.W = p.grids[3 * segment + 2];
  else
    w.T = w.H = 1, w.W = keys ? all : queries;
  return tile;
}

// A box of the grid that a brick meets, axis by axis: span(corner, end of the brick, side of the grid, window, stride).
template <class F>
__device__ __forceinline__ void meet_box(const AttentionParams& p, int number, Brick own, Work& w, F&& span) {
  const Point at = w.corner = brick_corner(number, w.H, w.W, own);
  const auto axis = [&](int i, int from, int side, int n) {
    return span(from, from + side, n, static_cast<int>(p.window[i]), static_cast<int>(p.window_stride[i]));
  };
  w.t = axis(0, at.t, own.t, w.T), w.h = axis(1, at.h, own.h, w.H), w.w = axis(2, at.w, own.w, w.W);
}
__device__ __forceinline__ void count_bricks(const Cut& cut, Work& w) {
  w.count = w.real ? bricks(w.t.hi - w.t.lo, w.h.hi - w.h.lo, max(w.w.hi - w.w.lo, 0), cut.met) : 0;
}

// The tile of queries with this number, and the keys that it meets.
__device__ __forceinline__ void meet_keys(const AttentionParams& p, const Cut& cut, int number, Work& w) {
  if (p.grids) {
    meet_box(p, number, cut.own, w, seen_span);
  } else {
    const int tiles = pieces(w.W, cut.own.w), i0 = (w.line.frame ? tiles - 1 - number : number) * cut.own.w;
    w.corner = {0, 0, i0};  // with frames the longest first
    w.t = w.h = {0, 1, 0, kFar};
    const int end = w.line.key_end(min(i0 + cut.own.w, w.line.queries) - 1);
    w.w = {0, end, 0, min(w.line.key_end(i0), end)};
  }
  count_bricks(cut, w);
}

// The tile of keys with this number, and the queries that it meets.
__device__ __forceinline__ void meet_queries(const AttentionParams& p, const Cut& cut, int number, Work& w) {
  if (p.grids) {
    meet_box(p, number, cut.own, w, viewer_span);
  } else {
    const int j0 = number * cut.own.w, last = min(j0 + cut.own.w, w.line.keys) - 1;
    w.corner = {0, 0, j0};
    w.t = w.h = {0, 1, 0, kFar};
    w.w = {w.line.first_query(j0), j0 < w.line.keys ? w.line.queries : 0, w.line.first_query(last), kFar};
  }
  count_bricks(cut, w);
}

// A tile of a plane, of keys or of queries, and what it meets.
template <bool keys>
__device__ __forceinline__ void meet(const AttentionParams& p, const Cut& cut, int plane, int tile, Work& w) {
  const int number = place(p, cut, keys, plane, tile, w);
  keys ? meet_queries(p, cut, number, w) : meet_keys(p, cut, number, w);
}

// The bricks of a box, one after the other.
__device__ __forceinline__ Point first_brick(const Work& w) { return {w.t.lo, w.h.lo, w.w.lo}; }
__device__ __forceinline__ Point next_brick(Point at, const Work& w, Brick b) {
  at.w += b.w;
  if (at.w < w.w.hi) return at;
  at.w = w.w.lo, at.h += b.h;
  if (at.h < w.h.hi) return at;
  at.h = w.h.lo, at.t += b.t;
  return at;
}
// Whether every token that the block owns meets the whole brick.
__device__ __forceinline__ bool in_core(Point at, const Work& w, Brick b) {
  return at.t >= w.t.core_lo && at.h >= w.h.core_lo && at.w >= w.w.core_lo && at.t + b.t <= w.t.core_hi &&
         at.h + b.h <= w.h.core_hi && at.w + b.w <= w.w.core_hi;
}

// Row of token `number` of the brick at a point of the segment; -1: outside the segment, or behind `hi`.
__device__ __forceinline__ int token_row(const Work& w, Point at, Point hi, Brick b, int number, bool windowed) {
  if (!windowed) return at.w + number < hi.w ? at.w + number : -1;
  const Point in = brick_token(number, b);
  const int t = at.t + in.t, h = at.h + in.h, x = at.w + in.w;
  return t < hi.t && h < hi.h && x < hi.w ? (t * w.H + h) * w.W + x : -1;
}

// ---- queries ----------------------------------------------------------------------------------------------
// Of a query: its row in the segment, or -1, and the first keys that it sees (lines: behind the last one, in w).
struct __align__(16) Query {
  int row, t, h, w;
};

// Token `number` of the brick that the block owns.
__device__ __forceinline__ Query query_of(const AttentionParams& p, const Cut& cut, const Work& w, int number) {
  const bool windowed = p.grids != nullptr;
  const int row = token_row(w, w.corner, {w.T, w.H, w.W}, cut.own, number, windowed);
  if (!windowed) return {row, 0, 0, w.line.key_end(w.corner.w + number)};
  const Point in = brick_token(number, cut.own);
  const auto start = [&](int axis, int at, int n) {
    return window_start(at, n, static_cast<int>(p.window[axis]), static_cast<int>(p.window_stride[axis]));
  };
  return {row, start(0, w.corner.t + in.t, w.T), start(1, w.corner.h + in.h, w.H), start(2, w.corner.w + in.w, w.W)};
}

// Calls use(shows): shows(n) says of key n of the brick at a point which Query sees it.
template <class F>
__device__ __forceinline__ void with_visibility(const AttentionParams& p, const Work& work, Point at, Brick brick,
                                                F&& use) {
  if (!p.grids)
    return use([&](int n) {
      const int key = at.w + n;
      return [=](const Query& i) { return key < i.w; };
    });
  const unsigned t = min(work.T, static_cast<int>(p.window[0])), h = min(work.H, static_cast<int>(p.window[1])),
                 w = min(work.W, static_cast<int>(p.window[2]));
  use([&](int n) {
    const Point in = brick_token(n, brick), key{at.t + in.t, at.h + in.h, at.w + in.w};
    return [=](const Query& i) {
      return static_cast<unsigned>(key.t - i.t) < t && static_cast<unsigned>(key.h - i.h) < h &&
             static_cast<unsigned>(key.w - i.w) < w;
    };
  });
}

// ---- rows of the backward -----------------------------------------------------------------------------------
// A row that the block owns, a query or a key, and what it meets.
struct __align__(16) Owned {
  int row;     // in the segment, or -1
  int usable;  // 0: behind kv_len, its gradient is 0
  int t, t_end, h, h_end, w, w_end;
};

// Token `number` of the brick that the block owns.
template <bool keys>
__device__ __forceinline__ Owned owned_of(const AttentionParams& p, const Cut& cut, const Work& w, int number) {
  const int row = token_row(w, w.corner, {w.T, w.H, w.W}, cut.own, number, p.grids != nullptr);
  Owned o{row, row >= 0, 0, 0, 0, 0, 0, 0};
  if (p.grids) {
    const Point in = brick_token(number, cut.own);
    const auto range = [&](int axis, int i, int n, int& begin, int& end) {
      const int window = static_cast<int>(p.window[axis]), stride = static_cast<int>(p.window_stride[axis]);
      if (keys)
        begin = first_viewer(i, window, stride), end = viewers_end(i, n, window, stride);
      else
        begin = window_start(i, n, window, stride), end = min(begin + window, n);
    };
    range(0, w.corner.t + in.t, w.T, o.t, o.t_end);
    range(1, w.corner.h + in.h, w.H, o.h, o.h_end);
    range(2, w.corner.w + in.w, w.W, o.w, o.w_end);
  } else if (keys) {
    if (row >= w.line.keys) o.usable = 0;
    o.w = w.line.first_query(w.corner.w + number), o.w_end = kFar;
  } else {
    o.w_end = w.line.key_end(w.corner.w + number);
  }
  return o;
}

// Calls use(sees): sees(n)(half) says whether owned(half) meets token n of the brick at a point.
template <class Own, class F>
__device__ __forceinline__ void with_sight(const AttentionParams& p, const Work& w, Point at, Brick brick, Own&& owned,
                                           F&& use) {
  if (in_core(at, w, brick)) return use([](int) { return [](int) { return true; }; });
  const Owned own[2] = {owned(0), owned(1)};
  if (!p.grids)
    return use([&](int n) {
      const int i = at.w + n;
      return [&own, i](int half) { return i >= own[half].w && i < own[half].w_end; };
    });
  use([&](int n) {
    const Point in = brick_token(n, brick), i{at.t + in.t, at.h + in.h, at.w + in.w};
    return [&own, i](int half) {
      const Owned& o = own[half];
      return i.t >= o.t && i.t < o.t_end && i.h >= o.h && i.h < o.h_end && i.w >= o.w && i.w < o.w_end;
    };
  });
}

// ---- products of a warp -----------------------------------------------------------------------------------
// s = a b^T: 16 M rows of a from `first` on, 8 N rows of b.
template <class T, int M, int N, int D>
__device__ __forceinline__ void product(float (&s)[M][N][4], Tile<D> a_tile, int first, Tile<D> b_tile) {
  const Fragments<Operand::a, D> a_at(a_tile, first);
  const Fragments<Operand::b, D> b_at(b_tile);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) a_at(a[m], 16 * m, d);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      b_at(b, 8 * n, d);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(s[m][n], a[m], b[0], b[1]);
        multiply_add<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sum += w b: w as fragments, row by row of its accumulators; 8 N rows of b.
template <class T, int M, int N, int D>
__device__ __forceinline__ void add_product(float (&sum)[M][D / 8][4], const uint32_t (&w)[M][N][2], Tile<D> b_tile) {
  const Fragments<Operand::b_by_k, D> b_at(b_tile);
#pragma unroll
  for (int k = 0; k < N; k += 2)
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t b[4];
      b_at(b, 8 * k, d);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const uint32_t a[4] = {w[m][k][0], w[m][k][1], w[m][k + 1][0], w[m][k + 1][1]};
        multiply_add<T>(sum[m][d / 8], a, b[0], b[1]);
        multiply_add<T>(sum[m][d / 8 + 1], a, b[2], b[3]);
      }
    }
}

// ---- rows of a head ---------------------------------------------------------------------------------------
// A tensor at a head, in the first row of a segment. Rows are less than 2^32 bytes apart.
struct Rows {
  char* at;
  uint32_t step;  // bytes
  __device__ __forceinline__ Rows(const void* t, const int64_t (&stride)[3], const Work& w, int head, int64_t row)
      : at(static_cast<char*>(const_cast<void*>(t)) + (w.batch * stride[0] + head * stride[2] + row * stride[1]) * 2),
        step(static_cast<uint32_t>(stride[1] * 2)) {}
  __device__ __forceinline__ char* operator()(int row) const {
    return at + static_cast<uint64_t>(static_cast<uint32_t>(row)) * step;
  }
};

// Starts the copies of the brick of tokens at a point of the box that the block meets.
template <int tokens, int threads, int D>
__device__ __forceinline__ void stage_brick(Tile<D> to, const Rows& from, const Work& w, Point at, Brick brick,
                                            bool windowed, int present) {
  const Point hi = {w.t.hi, w.h.hi, w.w.hi};
  const auto copy = [&](auto with_window) {
    stage<tokens, threads>(to, opaque(static_cast<int>(threadIdx.x)), present, from.at, [&](int n) {
      const int row = token_row(w, at, hi, brick, n, decltype(with_window)::value);
      return Source{from(row), row >= 0};
    });
  };
  if (windowed)
    copy(std::true_type{});
  else
    copy(std::false_type{});
}

// Rows first .. first + rows of a tile that this warp wrote, to global memory. row(r): where row r belongs, or -1.
template <int rows, class Tile, class Row>
__device__ __forceinline__ void store_rows(const Rows& to, Tile tile, int first, int present, Row&& row) {
  __syncwarp();
#pragma unroll 4
  for (int i = opaque(static_cast<int>(threadIdx.x)) % 32; i < rows * tile.chunks; i += 32) {
    const int r = first + i / tile.chunks, chunk = i % tile.chunks, at = row(r);
    if (at < 0 || chunk * 8 >= present) continue;
    __stcs(reinterpret_cast<uint4*>(to(at) + chunk * 16), *reinterpret_cast<const uint4*>(tile.at(r, chunk)));
  }
}

// ---- the host ---------------------------------------------------------------------------------------------
inline std::string sizes(const AttentionParams& p) {
  return "q=" + std::to_string(p.q_len) + " k=" + std::to_string(p.k_len) + (p.cu_q ? " segments=" : " B=") +
         std::to_string(p.batch) + " H=" + std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) +
         " D=" + std::to_string(p.head_dim) + " dtype=" + std::to_string(p.dtype);
}

// Calls run<T, D>(...) for the dtype, and for the least D that holds a head.
#define FASTDIT_ATTENTION_DTYPE(T, p, run, ...)           \
  if ((p).head_dim <= 64) return run<T, 64>(__VA_ARGS__); \
  if ((p).head_dim <= 80) return run<T, 80>(__VA_ARGS__); \
  if ((p).head_dim <= 96) return run<T, 96>(__VA_ARGS__); \
  return run<T, 128>(__VA_ARGS__);
#define FASTDIT_ATTENTION(p, run, ...)                 \
  if (static_cast<DType>((p).dtype) == DType::bf16) {  \
    FASTDIT_ATTENTION_DTYPE(bf16, p, run, __VA_ARGS__) \
  }                                                    \
  FASTDIT_ATTENTION_DTYPE(f16, p, run, __VA_ARGS__)

// What the kernels count in 32 bits, and what they copy in 16 bytes.
inline void check_attention(const AttentionParams& p, const char* op) {
  const auto refuse = [&](const char* what) {
    throw std::invalid_argument(std::string(op) + ": " + what + "; got " + sizes(p));
  };
  if (p.q_len > 0x7fff0000 || p.k_len > 0x7fff0000) refuse("too many tokens for the CUDA kernels");
  if (p.head_dim > 128 || p.head_dim % 8) refuse("the CUDA kernels hold heads of 8 to 128 channels, a multiple of 8");
  for (const auto& [t, stride] : {std::pair{p.q, p.q_stride}, {p.k, p.k_stride}, {p.v, p.v_stride}})
    if (!fits(t, 2, 8, {stride[0], stride[1], stride[2]}) || stride[1] >= int64_t{1} << 31)
      refuse("the CUDA kernels read rows of aligned 16-byte packs, less than 2^32 bytes apart");
}

// A block for every program of every head.
inline dim3 grid_of(const AttentionParams& p, const Cut& cut, bool keys, const char* op) {
  const int64_t blocks = (cut.plan ? 1 : p.batch) * (keys ? p.kv_heads : p.heads) * cut.programs;
  if (blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(op) + ": more tiles than a launch has blocks; got " + sizes(p));
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace fastdit::cuda
