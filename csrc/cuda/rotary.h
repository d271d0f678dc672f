// Rotary's entry points on the card.
#pragma once

#include "fastdit/rotary.h"
#include "stream.h"

namespace fastdit::cuda {

void qk_norm_rope_forward(const QkNormRopeParams& p, Stream stream, const char* op);

}  // namespace fastdit::cuda
