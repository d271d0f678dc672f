// Modulation's entry points on the card.
#pragma once

#include "fastdit/modulation.h"
#include "stream.h"

namespace fastdit::cuda {

// Walks tokens in the order of the table rows that they use: tokens[offsets[r] .. offsets[r + 1]] use row r.
struct RowOrder {
  const int32_t* tokens;   // null: they stand in that order already
  const int32_t* offsets;  // null: no index; runs follow from the tables' shapes
};

void modulation_forward(const ModulationParams& p, Stream stream, const char* op);

// Groups of warps that share the tokens of a backward: each writes two partial rows of fp32 per wanted table.
int64_t modulation_programs(const ModulationGradParams& q, int device);

// One pass. With an order the gradients of tables are of the ones that it belongs to (and of vectors). partial:
// (wanted, 2 * programs, C) fp32. The order of the sums does not depend on who runs when: the same bits every time.
void modulation_backward(const ModulationGradParams& q, const RowOrder& order, float* partial, Stream stream,
                         const char* op);

}  // namespace fastdit::cuda
