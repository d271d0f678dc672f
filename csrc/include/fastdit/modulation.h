// Modulation: norm + shift/scale, gated residual, and both in one pass.
#pragma once

#include <cstdint>

#include "fastdit/isa.h"

namespace fastdit {

// A modulation table and how a token (b, n) finds its row: row_index[b * N + n], else entry (b, n / tokens_per_row).
struct Table {
  const void* data;  // null: absent
  int dtype;
  int64_t stride_b, stride_m;  // elements; with row_index stride_m is the row stride
  int64_t tokens_per_row;
};

enum class Norm : int { none = 0, layer = 1, rms = 2 };
enum class GateAct : int { none = 0, tanh = 1 };

// r = residual + act(gate) * [rms](y)      when residual is given, else r = y (then nothing is stored to r)
// h = n(r) * (1 + scale) + shift           when norm is not none
struct ModulationParams {
  int64_t B, N, C;
  int dtype;           // of y and h
  int residual_dtype;  // dtype, or f32
  const void* y;
  int64_t y_stride_b, y_stride_n;
  const void* residual;
  int64_t residual_stride_b, residual_stride_n;
  void* r;  // (B, N, C) contiguous
  void* h;  // (B, N, C) contiguous
  Table gate, shift, scale;
  Table weight, bias, post_weight;  // (C,): strides 0
  const void* gate_row_index;       // (B, N) contiguous, int32 or int64
  const void* row_index;
  int index_is_64;  // both indices
  Norm norm;
  GateAct gate_act;
  int post_norm;  // 0 or 1 (rms)
  double eps, post_eps, weight_offset;
  int native;  // 1: round after each elementary operation
  int threads;
};

// A gradient of a table: `rows` contiguous rows of C in the table's dtype; null: nobody wants it.
struct TableGrad {
  void* data;
  int dtype;
  int64_t rows;    // in all
  int64_t rows_b;  // of one batch entry (M); unused with a row_index
};

// Gradients of modulation_forward; forward.r and forward.h are not read. All gradients are contiguous.
struct ModulationGradParams {
  ModulationParams forward;
  const void* grad_r;  // residual's dtype; null: zero
  int64_t grad_r_stride_b, grad_r_stride_n;
  const void* grad_h;  // dtype of h; null: zero, then grad_r is given
  int64_t grad_h_stride_b, grad_h_stride_n;
  void *d_residual, *d_y;
  TableGrad gate, shift, scale, weight, bias, post_weight;
};

namespace cpu {
FASTDIT_ENTRY(modulation_forward, ModulationParams)
FASTDIT_ENTRY(modulation_backward, ModulationGradParams)
}  // namespace cpu
}  // namespace fastdit
