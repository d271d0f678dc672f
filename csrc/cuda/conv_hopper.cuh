// The tiles and rings of conv_hopper.cu, and who picks them.
#pragma once

#include "conv.cuh"

namespace fastdit::cuda {

constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // 256 and 128 of them, of 64 Ki
constexpr int kSpan = 128, kChannels = 64;  // bytes and channels of a pixel in a patch, of a filter in a tap's weights
constexpr int kMostPatches = 4, kMostStages = 8;
constexpr int kMatrix = 64;  // pixels of a wgmma

// Rectangles of a tile, tiles of a launch, and the rings.
struct HopperPlan {
  int columns, lines, frames;  // log2 of a tile's extents in pixels
  int shared;                  // taps that read a patch: a column of the kernel, or one
  int patch_lines;
  int patches, stages;  // of the rings
  int peers;            // blocks of a cluster, which share their weights: neighbours in a plane of pixels
  int tiles_w, tiles_h, tiles_t, tiles_n;
  int places, tiles;  // of a plane, and in all: each is one tile for every block of a cluster
  int flipped[3];     // axes of the kernel that the weight's map holds last tap first
  int packs;          // y and the residual are read and written 16 bytes at a time
  int bias;           // floats in shared memory
};

struct HopperChoice {
  HopperPlan plan;
  int columns;     // of Cout
  int64_t clocks;  // by the model of conv_hopper_plan.cu; 0: no shape fits
};
// For checked parameters. peers: 1 or 2, or 0 for the model to pick. Kept for the sizes of a call.
const HopperChoice& hopper_choice(const ConvParams& p, int peers, int device, const char* op);

}  // namespace fastdit::cuda
