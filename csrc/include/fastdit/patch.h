// patch_embed3d: patches of x times weight, plus bias and position. unpatchify3d: tokens back to a video, bitwise.
#pragma once

#include <cstdint>

#include "fastdit/isa.h"

namespace fastdit {

// One video, or one batch of equal videos. All strides are in elements.
struct PatchItem {
  const void* x;
  int64_t batch;
  int64_t grid[3];        // tokens along T, H, W
  int64_t stride[5];      // of x along B, C, T, H, W
  const void* pos;        // or null; its last dimension is contiguous
  int64_t pos_stride[2];  // along B and N
  int64_t first_row;      // its first row of y
};

struct PatchEmbedParams {
  const PatchItem* items;
  int64_t num_items, rows;  // rows: tokens of all items
  const void* weight;       // (D, C, pt, ph, pw)
  int64_t weight_stride[5];
  const void* bias;  // (D), contiguous, or null
  void* y;           // (rows, D), contiguous
  int64_t dim, channels, patch[3];
  int dtype;         // of x and y
  int weight_dtype;  // weight, bias, pos: dtype, or f32
  int bias_dtype;
  int pos_dtype;
  int threads;
};

struct UnpatchifyItem {
  void* tokens;  // read by the forward, written by the backward
  void* y;       // (B, C, T, H, W), contiguous
  int64_t batch;
  int64_t grid[3];     // tokens along T, H, W
  int64_t stride[2];   // of tokens along B and N; the values of a token are contiguous
  int64_t first_line;  // lines (b, t, h) of the items before it
};

struct UnpatchifyParams {
  const UnpatchifyItem* items;
  int64_t num_items, lines;  // lines: batch * grid_t * grid_h of all items
  int64_t channels, patch[3];
  int64_t offset[4];  // stride inside a token along c, t, h, w
  int itemsize;       // 2, 4 or 8 bytes
  int threads;
};

}  // namespace fastdit

namespace fastdit::cpu {
FASTDIT_ENTRY(patch_embed3d_forward, PatchEmbedParams)
FASTDIT_ENTRY(unpatchify3d_forward, UnpatchifyParams)
FASTDIT_ENTRY(unpatchify3d_backward, UnpatchifyParams)
}  // namespace fastdit::cpu
