// Rotary's entry points on the card.
#pragma once

#include "fastdit/rotary.h"
#include "stream.h"

namespace fastdit::cuda {

void qk_norm_rope_forward(const QkNormRopeParams& p, Stream stream, const char* op);

// Values of fp32 that the backward needs for the sums of weights and biases: a row of each per block.
int64_t qk_norm_rope_partials(const QkNormRopeGradParams& q, int device);

// Gradients of q, k, weights and biases. The order of the sums does not depend on who runs when: the same bits.
void qk_norm_rope_backward(const QkNormRopeGradParams& q, float* partial, Stream stream, const char* op);

// What each of the `length` rotated tokens of a sample adds to its row of cos and of sin: (B, length, H or 1, R/2).
struct RotaryTableRows {
  float *cos, *sin;
  int64_t length;
  bool per_head;
};

// Rows of the one operand that has a gradient.
void rotary_table_rows(const QkNormRopeGradParams& q, const RotaryTableRows& rows, Stream stream, const char* op);

// The sums of those rows over the positions of every axis, into the fp64 tables of `sums`.
void rotary_axes_sums(const QkNormRopeParams& p, const RotaryAxes& sums, const RotaryTableRows& rows, Stream stream,
                      const char* op);

}  // namespace fastdit::cuda
