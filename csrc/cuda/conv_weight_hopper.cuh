// The tiles and the ring of conv_weight_hopper.cu, and who picks them.
#pragma once

#include "conv_hopper.cuh"

namespace fastdit::cuda::weight_hopper {

constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // its own: of kConsumers and kProducers
constexpr int kStep = 16, kChunk = 4;                             // pixels of a wgmma; of them committed together
constexpr int kMostColumns = 8;                                   // of the kernel: a map of x each

// A tile: 128 or 256 of Cout by `channels` of C, for one tap or for three of a column of the kernel.
struct Shape {
  int channels, taps, tiles;  // tiles: of 64 Cout in a warpgroup
};
constexpr Shape kShapes[] = {{64, 3, 2}, {96, 3, 1}, {128, 3, 1}, {64, 1, 2}, {96, 1, 2}, {128, 1, 2}, {192, 1, 2}};

struct Plan {
  int columns, lines, patch_lines;  // a rectangle of output pixels, and of the lines of x that its taps meet
  int spans;                        // 64 of Cout each, of a stage
  int stages;
  int tiles_w, tiles_h;          // rectangles of a frame
  int tiles_n, tiles_c, groups;  // of Cout, of C, and of a column's taps
  int blocks, parts;             // of a part; of the sum
};

struct Choice {
  int shape;  // of kShapes
  Plan plan;
  int64_t clocks;  // by the model of conv_weight_hopper_plan.cu; 0: no shape fits
};
// For parameters whose y is the gradient. Kept for the sizes of a call.
const Choice& choose(const ConvParams& p, int device, const char* op);

// As conv_checked, with the gradient as y: frames that are one run of pixels are one row.
ConvParams prepared(const ConvWeightGradParams& q, const char* op);

}  // namespace fastdit::cuda::weight_hopper
