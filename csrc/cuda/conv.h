// The conv family's entry points on the card. Tensors are (B, C, T, H, W) by strides in elements.
#pragma once

#include "fastdit/conv.h"
#include "stream.h"

namespace fastdit::cuda {

// A weight (N, C, kt, kh, kw) in x's dtype: channels adjacent, all else multiples of 16 bytes; strides may be negative.
struct ConvTaps {
  const void* data;
  int64_t n, t, h, w;
};

// y = conv(pad(cat(cache, x)), taps) + bias + residual. x and cache: channels adjacent, all else multiples of 16 bytes;
// of p, packed, norm, silu, up and threads are not read.
void conv_forward(const ConvParams& p, const ConvTaps& taps, Stream stream, const char* op);
// For sm_90a (conv_hopper.cu): 16 bits, y in x's dtype, no stride in space, zeros where taps leave a frame. peers:
// blocks that share their weights, 1 or 2; 0: as many as conv_hopper_plan.cu picks. The bits of y do not depend on it.
void conv_forward_hopper(const ConvParams& p, const ConvTaps& taps, int peers, Stream stream, const char* op);
// The tile that it takes: of Cout, and of pixels; taps that share a patch of x; how many tiles there are; blocks of a
// cluster.
struct ConvTile {
  int cout, frames, lines, columns, shared, tiles, peers;
};
ConvTile conv_hopper_tile(const ConvParams& p, const ConvTaps& taps, int peers, int device);

// How many parts the gradient of a weight is summed in; each is (cout, taps, cin) fp32.
int conv_weight_grad_parts(const ConvWeightGradParams& q, int device);
// q.d_weight: the parts. q.d_bias and q.weight_dtype are not read; x, cache and grad as in conv_forward.
void conv_weight_grad(const ConvWeightGradParams& q, int parts, Stream stream, const char* op);
// For sm_90a (conv_weight_hopper.cu): 16 bits, no stride in space, zeros where taps leave a frame, Cout and C multiples
// of 8, at most 8 columns in the kernel.
int conv_weight_grad_hopper_parts(const ConvWeightGradParams& q, int device);
void conv_weight_grad_hopper(const ConvWeightGradParams& q, int parts, Stream stream, const char* op);
// The tile that it takes: of C; taps of a block; lines and columns of pixels; stages; blocks of a part, and parts.
struct ConvWeightTile {
  int cin, taps, lines, columns, stages, blocks, parts;
};
ConvWeightTile conv_weight_hopper_tile(const ConvWeightGradParams& q, int device);

// to[n, c, tap] = the sum over `parts` of from[part, n, c, tap], in their order.
struct WeightMove {
  const void* from;
  void* to;
  int from_dtype, to_dtype;
  int64_t n, c, kernel[3], from_stride[5], to_stride[5];
  int64_t parts, part_stride;
};
void conv_move_weight(const WeightMove& m, Stream stream, const char* op);

int conv_processors(int device);  // what a caller fits its programs to

// Frames before those of x; null: none.
struct Cache {
  const void* data;
  int64_t frames, stride[5];
};
// y = act(norm(cat(cache, x))), p.t frames in all. stats: (B, 2, C) mean and 1 / deviation of each channel's group.
void conv_normalize(const NormSiluParams& p, const Cache& cache, int silu, const float* stats, Stream stream,
                    const char* op);

// What the backward of a norm reads and writes beside its tensors.
struct NormSums {
  const float *stats, *moments;  // of groups: (B, 2, C) mean and 1 / deviation; means of w * g * u and of w * g
  float* parts;                  // (programs, 2, C): sums of g * u and of g, g before the SiLU; or null
};
// q.d_weight and q.d_bias are not read; q.d_x may be q.grad where one block holds all channels of a pixel.
void conv_normalize_backward(const NormSiluGradParams& q, const NormSums& sums, int programs, Stream stream,
                             const char* op);

// to[c] = the sum over `rows` of parts[row * distance + c]
struct RowSums {
  const float* parts;
  void* to;
  int dtype;
  int64_t rows, columns, distance;
};
void conv_sum_rows(const RowSums& r, Stream stream, const char* op);

// GroupNorm in small steps; parts have `programs` entries a sample.
// parts (B, programs, 3, C): values seen, their mean, summed squared distance from it.
void conv_group_statistics(const NormSiluParams& p, float* parts, int programs, Stream stream, const char* op);
// stats (B, 2, C): mean and 1 / deviation of each channel's group.
void conv_group_combine(const NormSiluParams& p, const float* parts, float* stats, int programs, Stream stream,
                        const char* op);
// parts (B, programs, 2, C): sums of g * u and of g as in NormSums; without x the second, of q.grad itself.
void conv_group_sums(const NormSiluGradParams& q, const float* stats, float* parts, int programs, Stream stream,
                     const char* op);
// sums (B, 2, C): the parts added; moments as in NormSums.
void conv_group_moments(const NormSiluParams& p, const float* parts, float* sums, float* moments, int programs,
                        Stream stream, const char* op);

}  // namespace fastdit::cuda
