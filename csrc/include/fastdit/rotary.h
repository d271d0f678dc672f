// qk_norm_rope: per-head or all-heads norm of queries and keys, then the rotation of their first R channels.
#pragma once

#include <cstdint>

#include "fastdit/isa.h"

namespace fastdit {

enum class RotaryNorm : int { none = 0, rms = 1, layer = 2 };
enum class RotaryLayout : int { interleaved = 0, half = 1, axis_half = 2 };

// cos and sin as (B, N, H, R/2) with any strides; the first row belongs to token rope_start.
struct RotaryTable {
  const void* cos;  // null: this operand is not rotated, or takes the axes
  const void* sin;
  int64_t cos_stride[4];
  int64_t sin_stride[4];
  int dtype;
};

// q or k, (B, N, H, D). out may be x itself.
struct RotaryOperand {
  const void* x;
  void* out;
  int64_t tokens, heads;
  int64_t x_stride[3];  // B, N, H
  int64_t out_stride[3];
  const void* weight;  // (D) or (H * D), contiguous
  const void* bias;
  int weight_dtype, bias_dtype;
  RotaryTable table;
  bool use_axes;
};

// cos_a, sin_a (size_a, width_a), contiguous; token (i, j, k) of its grid takes rows i, j and k side by side.
struct RotaryAxes {
  int count;  // 0 to 3
  const void* cos[3];
  const void* sin[3];
  int64_t width[3], size[3];
  int dtype;
  const int32_t* grids;  // (segments, count), contiguous
  int64_t segments;
  bool packed;  // grids follow one another along the tokens; otherwise one per sample, or one for all
};

struct QkNormRopeParams {
  int dtype;
  int64_t batch, head_dim;
  RotaryNorm norm;
  bool all_heads;  // statistics over H * D
  double eps;
  RotaryLayout layout;
  int64_t rotated;  // R
  int64_t rope_start, rope_len;
  bool native;  // round where eager code does
  RotaryAxes axes;
  RotaryOperand q, k;
  int threads;
};

// Gradients of q or k. The gradient of x goes to the operand's `out`; null pointers: nobody wants it.
struct RotaryGrad {
  const void* grad;  // of the output, in its dtype
  int64_t grad_stride[3];
  void* weight;  // as the operand's weight and bias: dtype, contiguous
  void* bias;
  RotaryTable table;  // sums of cos and sin, contiguous, stride 0 where they broadcast; fp64, added to
};

struct QkNormRopeGradParams {
  QkNormRopeParams forward;
  RotaryGrad q, k;
  RotaryAxes axes;  // likewise of the axes; count 0: nobody wants it
};

namespace cpu {
FASTDIT_ENTRY(qk_norm_rope_forward, QkNormRopeParams)
FASTDIT_ENTRY(qk_norm_rope_backward, QkNormRopeGradParams)
}  // namespace cpu

}  // namespace fastdit
