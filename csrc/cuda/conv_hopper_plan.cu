// Which tile of conv_hopper.cu a convolution takes.
#include <algorithm>
#include <array>
#include <map>

#include "conv_hopper.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kSharedBytes = 227 * 1024;

// Of all shapes of a tile of N x 128 MI, the one that takes the fewest clocks, by a model: the larger of the matrix
// unit's (a product takes N / 2), shared memory's (128 bytes a clock, A and B of each product and what the copies
// write) and L2's (24 bytes a clock where all multiprocessors ask) for a tile, times the rounds of the device.
HopperChoice choose(const ConvParams& p, int N, int MI, int processors) {
  const int rows = 2 * MI * kMatrix, bias = static_cast<int>((p.cout + N - 1) / N * N);
  const int room = kSharedBytes - 1024 - 2 * (kMostPatches + kMostStages) * 8 - bias * 4;
  const int64_t chunks = (p.cin + kChannels - 1) / kChannels, taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int kh = static_cast<int>(p.kernel[1]), weights = N * kSpan;
  HopperChoice best{};
  for (int columns = 8; columns >= 3; --columns)  // wide first: whole runs of memory
    for (int frames = 0; rows >> frames >= kMatrix && rows >> frames >> columns >= 1; ++frames)
      for (int shared : {kh, 1}) {
        HopperPlan plan{};
        plan.columns = columns, plan.frames = frames, plan.shared = shared;
        const int width = 1 << columns, height = rows >> frames >> columns, deep = 1 << frames;
        while (1 << plan.lines < height) ++plan.lines;
        plan.patch_lines = height + (shared - 1) * static_cast<int>(p.dilation[1]);
        const int64_t patch = int64_t{deep} * plan.patch_lines * width * kSpan;
        if (plan.patch_lines > 256 || patch > room) continue;
        plan.patches = static_cast<int>(std::min<int64_t>(room / (patch + shared * weights), kMostPatches));
        if (plan.patches < 2) continue;
        plan.stages = static_cast<int>(std::min<int64_t>((room - plan.patches * patch) / weights, kMostStages));
        const auto count = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
        const int64_t w = count(p.wo, width), h = count(p.ho, height), t = count(p.to, deep), n = count(p.cout, N);
        const int64_t tiles = w * h * t * n * p.n;
        if (tiles > 0x3fffffff) continue;
        const int64_t k16 = taps * ((p.cin + 15) / 16), bytes = taps * chunks * (patch / shared + weights);
        const int64_t matrix = k16 * MI * N, banks = k16 * MI * (32 + N / 2) + bytes / 128;
        const int64_t read = bytes / chunks * p.cin / kChannels;  // zeros are not
        const int64_t l2 = read / std::min<int64_t>(64, 24 * processors / std::min<int64_t>(tiles, processors));
        const int64_t clocks = count(tiles, processors) * (std::max({matrix, banks, l2}) + 2000);
        if (best.clocks && clocks >= best.clocks) continue;
        plan.tiles_w = static_cast<int>(w), plan.tiles_h = static_cast<int>(h), plan.tiles_t = static_cast<int>(t);
        plan.tiles_n = static_cast<int>(n), plan.tiles = static_cast<int>(tiles), plan.bias = bias;
        best = {plan, N, clocks};
      }
  return best;
}

}  // namespace

const HopperChoice& hopper_choice(const ConvParams& p, int device, const char* op) {
  using Sizes = std::array<int64_t, 11>;
  thread_local std::map<Sizes, HopperChoice> known;
  const int many = processors(device);
  const Sizes key{p.n, p.cin, p.cout, p.to, p.ho, p.wo, many, p.kernel[0], p.kernel[1], p.kernel[2], p.dilation[1]};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  HopperChoice best{};
  constexpr int kTiles[][2] = {{192, 2}, {128, 2}, {96, 2}, {64, 1}};  // N, MI
  for (const auto& [N, MI] : kTiles) {
    const HopperChoice one = choose(p, N, MI, many);
    if (one.clocks && (!best.clocks || one.clocks < best.clocks)) best = one;
  }
  if (!best.clocks)
    throw std::invalid_argument(std::string(op) + ": no tile fits the copy engine or shared memory; got " + sizes(p) +
                                ", expected what backends/cuda/conv.py lets through");
  if (known.size() >= 4096) known.clear();  // what ragged shapes leave behind
  return known[key] = best;
}

ConvTile conv_hopper_tile(const ConvParams& given, const ConvTaps& taps, int device) {
  const HopperChoice& best = hopper_choice(conv_checked(given, taps, "causal_conv3d"), device, "causal_conv3d");
  const HopperPlan& plan = best.plan;
  return {best.columns, 1 << plan.frames, 1 << plan.lines, 1 << plan.columns, plan.shared, plan.tiles};
}

}  // namespace fastdit::cuda
