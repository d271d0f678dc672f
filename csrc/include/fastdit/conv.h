// The conv family on the CPU: causal 3-D convolution over a virtual concat of cache and input, and norm + SiLU.
#pragma once

#include "fastdit/dtype.h"
#include "fastdit/isa.h"

namespace fastdit {

enum class Pad : int { zeros = 0, edge = 1, reflect = 2 };  // edge: "first" in time, "replicate" in space
enum class Norm : int { none = 0, channel_l2 = 1, channel_rms = 2, group = 3 };
enum class Winograd : int { none = 0, rows = 1, tiles = 2 };  // F(2, 3) along H; F(2 x 2, 3 x 3) over H and W

// Strides are in elements, in the order (N, C, T, H, W).
struct ConvParams {
  const void* x;            // (n, cin, t, h, w)
  const void* cache;        // (n, cin, cache_t, h, w), unread when cache_t == 0
  const void* packed;       // what conv_pack wrote for this ISA, dtype and algorithm
  const void* bias;         // (cout) or null
  const void* norm_weight;  // (cin) or null
  const void* residual;     // y's shape and dtype, or null
  void* y;                  // (n, cout, to, ho, wo)
  int64_t n, cin, cout, cache_t, t, h, w, to, ho, wo;
  int64_t x_stride[5], cache_stride[5], y_stride[5], residual_stride[5];
  int64_t kernel[3], stride[3], dilation[3];
  int64_t up[2];                // along T and H: only every up-th position of the input holds something (1: all do)
  int64_t pad_t, pad_h, pad_w;  // on the near side; what lies beyond the far side follows from to, ho, wo
  double norm_eps;
  int time_pad, space_pad;  // Pad
  int norm;                 // Norm: none, channel_l2 or channel_rms
  int silu;
  int winograd;  // Winograd
  int gradient;  // x is the gradient of an output, y that of an input: shorter sums
  int wide;      // y is stored in the arithmetic type, unrounded
  int dtype, bias_dtype, norm_weight_dtype;
  int threads;
};

// Gradients of a convolution's weight and bias; the gradient of its input is conv_forward with the weight flipped.
struct ConvWeightGradParams {
  ConvParams forward;  // packed, bias, residual and y are not read
  const void* grad;    // of y, in x's dtype
  int64_t grad_stride[5];
  void* d_weight;  // (cout, cin, kt, kh, kw) by strides, or null
  int64_t d_weight_stride[5];
  double* d_bias;  // (cout), or null
  int weight_dtype;
};

struct ConvPackParams {
  const void* weight;  // (cout, cin, kt, kh, kw) by strides
  void* packed;        // null: only the size is asked for
  int64_t* bytes;      // out: size of the packed buffer
  int64_t cout, cin, kernel[3], stride[5];
  int winograd;  // Winograd
  int weight_dtype;
  int dtype;  // of x; the weight is rounded to it
  int threads;
};

struct ConvHashParams {
  const void* data;
  int64_t bytes;
  uint64_t* digest;  // two words
  int threads;
};

struct NormSiluParams {
  const void* x;  // (n, c, t, h, w) by strides; y likewise
  const void* weight;
  const void* bias;
  void* y;
  int64_t n, c, t, h, w, groups;
  int64_t x_stride[5], y_stride[5];
  double eps;
  int norm;  // Norm
  int dtype, weight_dtype, bias_dtype;
  int threads;
};

// What comes after act(norm(x)) hands back `grad`; d_x may lie over it.
struct NormSiluGradParams {
  NormSiluParams forward;  // y is not read; norm may be none
  const void* grad;
  void* d_x;  // or null
  int64_t grad_stride[5], d_x_stride[5];
  double *d_weight, *d_bias;  // (c) or null; added to
  int silu;
  int grad_dtype;  // x's, or what its arithmetic is in
};

namespace cpu {
FASTDIT_ENTRY(conv_forward, ConvParams)
FASTDIT_ENTRY(conv_weight_grad, ConvWeightGradParams)
FASTDIT_ENTRY(conv_pack, ConvPackParams)
FASTDIT_ENTRY(conv_hash, ConvHashParams)
FASTDIT_ENTRY(norm_silu_forward, NormSiluParams)
FASTDIT_ENTRY(norm_silu_backward, NormSiluGradParams)
}  // namespace cpu
}  // namespace fastdit
