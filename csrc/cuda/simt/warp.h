// Operations of a warp: its lanes meet, the last one works for all.
#pragma once

#include <cstdint>

#include "async.h"
#include "machine.h"

namespace fastdit::simt {

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t value, int argument, int width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint32_t reduce_add(uint32_t mask, uint32_t value, Site site);
void sync_warp(uint32_t mask, Site site);

// ldmatrix: `count` 8x8 matrices of 16 bits; lane 8 i + r names row r of matrix i.
void load_matrices(uint32_t* to, const void* row, int count, bool transposed, Site site);
// mma.sync m16n8: A 16 x K row-major, B K x 8 column-major, K = 32 bytes (16 of bf16 and f16, 8 of tf32); fp32 sums.
void multiply(float* d, const uint32_t* a, const uint32_t* b, const float* c, MmaType type, Site site);

}  // namespace fastdit::simt
