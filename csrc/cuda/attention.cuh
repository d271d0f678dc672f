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
// Both are monotone: what a run of queries sees together is one range between the bounds of its first and its last one.
// With windows that holds on each axis, so tiles are bricks: the keys of a brick of queries are a box, walked in bricks
// from its lower corner. What lies inside its core is seen by every query of the brick. A line is an axis of its own,
// and its tiles are bricks of 1 x 1 x n.
#pragma once

#include <string>

#include "attention.h"
#include "launch.h"
#include "mma.h"

namespace fastdit::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- lines ------------------------------------------------------------------------------------------------
struct __align__(16) Line {
  int queries, keys, shift;
  int frame;  // tokens of a frame, at least 1; 0: every key is visible

  __device__ __forceinline__ int key_end(int i) const {
    if (!frame) return keys;
    const int at = i + shift;
    return at < 0 ? 0 : min((at / frame + 1) * frame, keys);  // more queries than keys: the first see none
  }
};

// A frame longer than the keys is as good as one that holds them, and cannot overflow.
__device__ __forceinline__ int frame_length(int64_t frame, int keys) {
  return max(static_cast<int>(min(frame, static_cast<int64_t>(keys))), 1);
}

// ---- axes -------------------------------------------------------------------------------------------------
struct __align__(16) Span {
  int lo, hi;            // met by some query
  int core_lo, core_hi;  // by all
};

__device__ __forceinline__ int window_start(int i, int n, int window, int stride) {
  return max(min(i / stride * stride + stride / 2 - window / 2, n - window), 0);
}
// Of the queries i0 <= i < min(i1, n).
__device__ __forceinline__ Span seen_span(int i0, int i1, int n, int window, int stride) {
  const int first = window_start(i0, n, window, stride), last = window_start(min(i1, n) - 1, n, window, stride);
  return {first, min(last + window, n), last, min(first + window, n)};
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
__device__ __forceinline__ int pieces(int n, int size) { return (n + size - 1) / size; }
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
  int64_t q_row, k_row;            // of the segment's first tokens, in the tensor (packed) or the sample
  Line line;
  int T, H, W;                     // the segment's grid; a line's is 1 x 1 x tokens
  Point corner;                    // of the tile of queries
  Span t, h, w;                    // keys that it meets
  int count;                       // bricks of them
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

// The segment (or sample) of a tile, and the number that the tile has there.
__device__ __forceinline__ int place(const AttentionParams& p, const Cut& cut, int plane, int tile, Work& w) {
  const int heads = static_cast<int>(p.heads), segments = static_cast<int>(p.batch);
  w.head = plane % heads, w.kv_head = w.head / (heads / static_cast<int>(p.kv_heads));
  int segment, queries, keys, all;
  if (cut.plan) {
    const Segment s = find_tile(cut.plan, tile, segments);
    segment = s.segment, tile = s.tile, w.real = segment < segments, w.batch = 0;
    w.q_row = p.cu_q[segment], w.k_row = p.cu_k[segment];
    queries = static_cast<int>((w.real ? p.cu_q[segment + 1] : p.q_len) - w.q_row);
    keys = all = static_cast<int>((w.real ? p.cu_k[segment + 1] : p.k_len) - w.k_row);
  } else {
    segment = w.batch = plane / heads, w.real = 1, w.q_row = w.k_row = 0;
    queries = static_cast<int>(p.q_len), all = static_cast<int>(p.k_len);
    keys = p.kv_len ? max(min(p.kv_len[segment], all), 0) : all;
  }
  int64_t frame = p.frame_tokens;
  if (p.frame_tokens_of) frame = w.real ? p.frame_tokens_of[segment] : 1;
  w.line = {queries, keys, all - queries, frame ? frame_length(frame, all) : 0};
  if (p.grids && w.real)
    w.T = p.grids[3 * segment], w.H = p.grids[3 * segment + 1], w.W = p.grids[3 * segment + 2];
  else
    w.T = w.H = 1, w.W = queries;
  return tile;
}

// The tile of queries with this number, and the keys that it meets.
__device__ __forceinline__ void meet_keys(const AttentionParams& p, const Cut& cut, int number, Work& w) {
  const Brick b = cut.queries;
  if (p.grids) {
    w.corner = brick_corner(number, w.H, w.W, b);
    const auto span = [&](int axis, int from, int side, int n) {
      return seen_span(from, from + side, n, static_cast<int>(p.window[axis]), static_cast<int>(p.window_stride[axis]));
    };
    w.t = span(0, w.corner.t, b.t, w.T), w.h = span(1, w.corner.h, b.h, w.H), w.w = span(2, w.corner.w, b.w, w.W);
  } else {
    const int tiles = pieces(w.W, b.w), i0 = (w.line.frame ? tiles - 1 - number : number) * b.w;  // the longest first
    w.corner = {0, 0, i0};
    w.t = w.h = {0, 1, 0, 1};
    const int end = w.line.key_end(min(i0 + b.w, w.line.queries) - 1);
    w.w = {0, end, 0, min(w.line.key_end(i0), end)};
  }
  w.count = w.real ? bricks(w.t.hi - w.t.lo, w.h.hi - w.h.lo, w.w.hi - w.w.lo, cut.keys) : 0;
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
// Whether every query sees the whole brick.
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

// ---- the host ---------------------------------------------------------------------------------------------
inline std::string sizes(const AttentionParams& p) {
  return "q=" + std::to_string(p.q_len) + " k=" + std::to_string(p.k_len) + (p.cu_q ? " segments=" : " B=") +
         std::to_string(p.batch) + " H=" + std::to_string(p.heads) + "/" + std::to_string(p.kv_heads) +
         " D=" + std::to_string(p.head_dim) + " dtype=" + std::to_string(p.dtype);
}

// Calls run<T, D>(...) for the dtype, and for the least D that holds a head.
#define FASTDIT_ATTENTION_DTYPE(T, p, run, ...)               \
  if ((p).head_dim <= 64) return run<T, 64>(__VA_ARGS__);     \
  if ((p).head_dim <= 80) return run<T, 80>(__VA_ARGS__);     \
  if ((p).head_dim <= 96) return run<T, 96>(__VA_ARGS__);     \
  return run<T, 128>(__VA_ARGS__);
#define FASTDIT_ATTENTION(p, run, ...)                        \
  if (static_cast<DType>((p).dtype) == DType::bf16) {         \
    FASTDIT_ATTENTION_DTYPE(bf16, p, run, __VA_ARGS__)        \
  }                                                           \
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

}  // namespace fastdit::cuda
