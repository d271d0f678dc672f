// unpatchify3d: y[b, c, t*pt + dt, h*ph + dh, w*pw + dw] = token(b, t, h, w)[order(c, dt, dh, dw)], bit for bit.
//
// A line of tokens (b, t, h, :) fills C * pt * ph rows of the video. What is contiguous in a token (the channels, or
// a run of pw pixels) is contiguous across rows of the video, so each line is a transpose of small units. The backward
// is the same transpose the other way.
#include "fastdit/patch.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));
struct Unit16 {
  uint64_t bits[2];
};
FASTDIT_INLINE Unit16 low(Unit16 a, Unit16) { return a; }
FASTDIT_INLINE Unit16 high(Unit16 a, Unit16) { return a; }

FASTDIT_INLINE u16x8 low(u16x8 a, u16x8 b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
FASTDIT_INLINE u16x8 high(u16x8 a, u16x8 b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
FASTDIT_INLINE u32x4 low(u32x4 a, u32x4 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FASTDIT_INLINE u32x4 high(u32x4 a, u32x4 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
FASTDIT_INLINE u64x2 low(u64x2 a, u64x2 b) { return __builtin_shufflevector(a, b, 0, 2); }
FASTDIT_INLINE u64x2 high(u64x2 a, u64x2 b) { return __builtin_shufflevector(a, b, 1, 3); }

// dst[m][to + r] = src[r][from + m] by square blocks of N units in registers; the last block of a side overlaps the one
// before it. A unit of two values may be aligned as one value only, hence memcpy everywhere.
template <class V, class U>
void transpose(U* const* src, int64_t from, int64_t rows, U* const* dst, int64_t to, int64_t columns) {
  constexpr int N = 16 / sizeof(U);
  if (rows < N || columns < N) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t m = 0; m < columns; ++m) __builtin_memcpy(dst[m] + to + r, src[r] + from + m, sizeof(U));
    return;
  }
  for (int64_t r = 0; r < rows; r += N) {
    if (r + N > rows) r = rows - N;
    for (int64_t m = 0; m < columns; m += N) {
      if (m + N > columns) m = columns - N;
      V a[N], b[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) a[i] = load_raw<V>(src[r + i] + from + m);
#pragma GCC unroll 3
      for (int pass = 1; pass < N; pass *= 2) {  // log2(N) perfect shuffles
#pragma GCC unroll 4
        for (int i = 0; i < N / 2; ++i) b[2 * i] = low(a[i], a[i + N / 2]), b[2 * i + 1] = high(a[i], a[i + N / 2]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) a[i] = b[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store_raw(dst[m + i] + to + r, a[i]);
    }
  }
}
struct Line {
  const UnpatchifyItem* item;
  int64_t b, t, h;
};
FASTDIT_INLINE Line find_line(const UnpatchifyParams& p, int64_t line) {
  const UnpatchifyItem* item = p.items;
  while (item + 1 < p.items + p.num_items && line >= item[1].first_line) ++item;
  line -= item->first_line;
  const int64_t th = line / item->grid[1];
  return {item, th / item->grid[0], th % item->grid[0], line % item->grid[1]};
}
// Row (c, dt, dh) of the line's part of the video, in elements from item.y.
FASTDIT_INLINE int64_t video_row(const UnpatchifyParams& p, const Line& l, int64_t c, int64_t dt, int64_t dh) {
  const int64_t* grid = l.item->grid;
  const int64_t frames = grid[0] * p.patch[0], height = grid[1] * p.patch[1], width = grid[2] * p.patch[2];
  return (((l.b * p.channels + c) * frames + l.t * p.patch[0] + dt) * height + l.h * p.patch[1] + dh) * width;
}
FASTDIT_INLINE int64_t token_offset(const Line& l, int64_t w) {
  return l.b * l.item->stride[0] + ((l.t * l.item->grid[1] + l.h) * l.item->grid[2] + w) * l.item->stride[1];
}

// order ends in w: units of pw pixels, U; every (c, dt, dh) is a column of the transpose.
template <bool back, class V, class U>
void move_runs(const UnpatchifyParams& p, const Line& l, U** tokens, U** video) {
  const int64_t width = l.item->grid[2], rows = p.channels * p.patch[0] * p.patch[1];
  for (int64_t w = 0; w < width; ++w)
    tokens[w] = reinterpret_cast<U*>(static_cast<char*>(l.item->tokens) + token_offset(l, w) * p.itemsize);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t dt = 0; dt < p.patch[0]; ++dt)
      for (int64_t dh = 0; dh < p.patch[1]; ++dh)
        video[(c * p.offset[0] + dt * p.offset[1] + dh * p.offset[2]) / p.patch[2]] =
            reinterpret_cast<U*>(static_cast<char*>(l.item->y) + video_row(p, l, c, dt, dh) * p.itemsize);
  back ? transpose<V>(video, 0, rows, tokens, 0, width) : transpose<V>(tokens, 0, width, video, 0, rows);
}

// Any other order: pixel by pixel, or with the channels contiguous, one transpose per (dt, dh).
template <bool back, class V, class U>
void move_pixels(const UnpatchifyParams& p, const Line& l, U** tokens, U** video) {
  const int64_t pw = p.patch[2], width = l.item->grid[2] * pw, C = p.channels;
  for (int64_t w = 0; w < width; ++w)
    tokens[w] = static_cast<U*>(l.item->tokens) + token_offset(l, w / pw) + w % pw * p.offset[3];
  for (int64_t dt = 0; dt < p.patch[0]; ++dt)
    for (int64_t dh = 0; dh < p.patch[1]; ++dh) {
      const int64_t shift = dt * p.offset[1] + dh * p.offset[2];
      for (int64_t c = 0; c < C; ++c) video[c] = static_cast<U*>(l.item->y) + video_row(p, l, c, dt, dh);
      if (p.offset[0] == 1) {
        back ? transpose<V>(video, 0, C, tokens, shift, width) : transpose<V>(tokens, shift, width, video, 0, C);
        continue;
      }
      for (int64_t c = 0; c < C; ++c)
        for (int64_t w = 0; w < width; ++w) {
          U *const token = tokens[w] + shift + c * p.offset[0], *const pixel = video[c] + w;
          back ? __builtin_memcpy(token, pixel, sizeof(U)) : __builtin_memcpy(pixel, token, sizeof(U));
        }
    }
}

template <bool back>
void move(const UnpatchifyParams& p) {
  int64_t widest = 0;
  for (int64_t i = 0; i < p.num_items; ++i)
    if (p.items[i].grid[2] > widest) widest = p.items[i].grid[2];
  const int64_t unit = p.offset[3] == 1 ? p.itemsize * p.patch[2] : 0;
  parallel_ranges(p.lines, p.threads, [&](int64_t begin, int64_t end, int) {
    const Scratch<void*> of_tokens(widest * p.patch[2]), of_video(p.channels * p.patch[0] * p.patch[1]);
    void *tokens = of_tokens.get(), *video = of_video.get();
#define FASTDIT_MOVE(how, V, U) how<back, V, U>(p, line, static_cast<U**>(tokens), static_cast<U**>(video))
    for (int64_t i = begin; i < end; ++i) {
      const Line line = find_line(p, i);
      if (unit == 2)
        FASTDIT_MOVE(move_runs, u16x8, uint16_t);
      else if (unit == 4)
        FASTDIT_MOVE(move_runs, u32x4, uint32_t);
      else if (unit == 8)
        FASTDIT_MOVE(move_runs, u64x2, uint64_t);
      else if (unit == 16)
        FASTDIT_MOVE(move_runs, Unit16, Unit16);
      else if (p.itemsize == 2)
        FASTDIT_MOVE(move_pixels, u16x8, uint16_t);
      else if (p.itemsize == 4)
        FASTDIT_MOVE(move_pixels, u32x4, uint32_t);
      else
        FASTDIT_MOVE(move_pixels, u64x2, uint64_t);
    }
#undef FASTDIT_MOVE
  });
}

}  // namespace

void unpatchify3d_forward(const UnpatchifyParams& p) { move<false>(p); }
void unpatchify3d_backward(const UnpatchifyParams& p) { move<true>(p); }

}  // namespace fastdit::cpu::FASTDIT_ISA
