// Entry points of the patch family on the card.
#pragma once

#include "fastdit/patch.h"
#include "stream.h"

namespace fastdit::cuda {

void patch_embed3d_forward(const PatchEmbedParams& p, Stream stream, const char* op);

// The gradient of x: items' x is where it goes, y is the gradient of the tokens.
void patch_embed3d_dx(const PatchEmbedParams& p, Stream stream, const char* op);

// Gradients of weight (D, C, pt, ph, pw) and bias (D), contiguous, in their dtypes; either may be null. y is the
// gradient of the tokens. partial: fp32, patch_embed3d_splits rows of patch_embed3d_pitch values, which are added in
// their order: the same bits every time.
int64_t patch_embed3d_splits(const PatchEmbedParams& p, int device);
int64_t patch_embed3d_pitch(const PatchEmbedParams& p);
void patch_embed3d_dw(const PatchEmbedParams& p, void* d_weight, void* d_bias, float* partial, Stream stream,
                      const char* op);

// out[i] = sum_s of[s * pitch + i] in fp32, rounded once; i < size. Codes of DType.
struct PatchSum {
  const void* of;
  int dtype;
  int64_t count, pitch;
  void* out;
  int out_dtype;
  int64_t size;
};
void patch_sum(const PatchSum& sum, Stream stream, const char* op);

// Tokens to video, bit for bit, or back. Of an item x is the video and pos the tokens, in the dtype of `itemsize`
// bytes.
struct PatchMove {
  const PatchItem* items;
  int64_t num_items, channels, patch[3];
  int64_t offset[4];  // stride inside a token along c, t, h, w
  int itemsize, back;
};
void patch_move(const PatchMove& p, Stream stream, const char* op);

}  // namespace fastdit::cuda
