// The tiles and rings of conv_hopper.cu, and who picks them; what it shares with conv_weight_hopper.cu.
#pragma once

#include <array>
#include <map>

#include "conv.cuh"
#include "tensor_map.h"

namespace fastdit::cuda {

constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // 256 and 128 of them, of 64 Ki
constexpr int kSpan = 128, kChannels = 64;  // bytes and channels of a pixel in a patch, of a filter in a tap's weights
constexpr int kMostPatches = 4, kMostStages = 8;
constexpr int kMatrix = 64;  // pixels of a wgmma
constexpr int kSharedBytes = 227 * 1024;

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Boxes of kChannels x columns x lines in a frame of a video of `size` (kAxes).
inline TensorMap video_map(const void* data, int dtype, const int64_t (&size)[kAxes], const int64_t (&stride)[kAxes],
                           int columns, int lines, const char* op, const std::string& of) {
  return encode({data,
                 static_cast<DType>(dtype),
                 5,
                 {size[1], size[4], size[3], size[2], size[0]},
                 {1, stride[4], stride[3], stride[2], stride[0]},
                 {kChannels, columns, lines, 1, 1},
                 Swizzle::b128},
                op, of);
}

// pick(processors), kept for the sizes of a call; its `clocks` are 0 where no shape fits. given: what else it knows.
template <class Choice, class F>
const Choice& kept_choice(const ConvParams& p, int given, int device, const char* op, F&& pick) {
  using Sizes = std::array<int64_t, 12>;
  thread_local std::map<Sizes, Choice> known;
  const int many = processors(device);
  const Sizes key{p.n,  p.cin,       p.cout,      p.to,        p.ho,          p.wo,
                  many, p.kernel[0], p.kernel[1], p.kernel[2], p.dilation[1], given};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const Choice best = pick(many);
  if (!best.clocks)
    throw std::invalid_argument(std::string(op) + ": no tile fits the copy engine or shared memory; got " + sizes(p) +
                                ", expected what backends/cuda/conv.py lets through");
  if (known.size() >= 4096) known.clear();  // what ragged shapes leave behind
  return known[key] = best;
}

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
