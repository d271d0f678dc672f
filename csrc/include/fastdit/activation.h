// Activation: y = act(x), or act(x) * up for gated MLPs.
#pragma once

#include <cstdint>

#include "fastdit/isa.h"

namespace fastdit {

enum class Act : int { gelu = 0, gelu_tanh = 1, silu = 2, relu = 3 };

// Rows of C contiguous elements; strides between rows in elements. up may be null.
struct ActivationParams {
  int64_t rows, C;
  int dtype;
  Act act;
  const void *x, *up;
  int64_t x_stride, up_stride;
  void* y;  // (rows, C) contiguous
  int threads;
};

// d_x = grad * up * act'(x), d_up = grad * act(x); contiguous, null: nobody wants it. forward.y is not read.
struct ActivationGradParams {
  ActivationParams forward;
  const void* grad;
  int64_t grad_stride;
  void *d_x, *d_up;
};

namespace cpu {
FASTDIT_ENTRY(activation_forward, ActivationParams)
FASTDIT_ENTRY(activation_backward, ActivationGradParams)
}  // namespace cpu
}  // namespace fastdit
