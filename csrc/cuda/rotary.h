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

}  // namespace fastdit::cuda
