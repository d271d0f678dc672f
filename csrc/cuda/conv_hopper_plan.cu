// Which tile of conv_hopper.cu a convolution takes.
#include <algorithm>

#include "conv_hopper.cuh"

namespace fastdit::cuda {
namespace {

// Of all shapes of a tile of N x 128 MI, the one that takes the fewest clocks, by a model: the larger of the matrix
// unit's (a product takes N / 2), shared memory's (128 bytes a clock, A and B of each product and what the copies
// write) and L2's (24 bytes a clock where all multiprocessors ask, at most 64 that one receives) for a tile, times the
// rounds of the device. Two blocks that share their weights ask L2 for half of them; at equal clocks they do, since
// L2's rate is the least certain. They need a whole round of tiles, and two in a plane of pixels.
HopperChoice choose(const ConvParams& p, int given, int N, int MI, int processors) {
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
        const int64_t w = pieces(p.wo, width), h = pieces(p.ho, height), t = pieces(p.to, deep), n = pieces(p.cout, N);
        const int64_t all = w * h * t * n * p.n;
        if (all > 0x3fffffff) continue;
        plan.tiles_w = static_cast<int>(w), plan.tiles_h = static_cast<int>(h), plan.tiles_t = static_cast<int>(t);
        plan.tiles_n = static_cast<int>(n), plan.bias = bias;
        const int64_t k16 = taps * ((p.cin + 15) / 16), bytes = taps * chunks * (patch / shared + weights);
        const int64_t matrix = k16 * MI * N, banks = k16 * MI * (32 + N / 2) + bytes / 128;
        const auto read = [&](int64_t filters) {  // zeros are not
          return taps * (patch / shared + filters) * p.cin / kChannels;
        };
        for (int peers : {2, 1}) {
          if (given ? peers != given : peers > 1 && (w * h < 2 || all < processors)) continue;
          const int64_t places = pieces(w * h, peers), tiles = places * t * n * p.n;
          const int64_t at_once = std::max(processors / peers, 1);
          const int64_t rate = 24 * processors / (std::min(tiles, at_once) * peers);
          const int64_t l2 = std::max(read(weights) / 64, read(weights / peers) / rate);
          const int64_t clocks = pieces(tiles, at_once) * (std::max({matrix, banks, l2}) + 2000);
          if (best.clocks && clocks >= best.clocks) continue;
          plan.peers = peers, plan.places = static_cast<int>(places), plan.tiles = static_cast<int>(tiles);
          best = {plan, N, clocks};
        }
      }
  return best;
}

}  // namespace

const HopperChoice& hopper_choice(const ConvParams& p, int peers, int device, const char* op) {
  if (peers < 0 || peers > 2)
    throw std::invalid_argument(std::string(op) + ": blocks that share weights; got " + std::to_string(peers) +
                                ", expected 1 or 2, or 0 for the model to pick");
  return kept_choice<HopperChoice>(p, peers, device, op, [&](int processors) {
    HopperChoice best{};
    constexpr int kTiles[][2] = {{192, 2}, {128, 2}, {96, 2}, {64, 1}};  // N, MI
    for (const auto& [N, MI] : kTiles) {
      const HopperChoice one = choose(p, peers, N, MI, processors);
      if (one.clocks && (!best.clocks || one.clocks < best.clocks)) best = one;
    }
    return best;
  });
}

ConvTile conv_hopper_tile(const ConvParams& given, const ConvTaps& taps, int peers, int device) {
  const char* const op = "causal_conv3d";
  const HopperChoice& best = hopper_choice(conv_checked(given, taps, op), peers, device, op);
  const HopperPlan& plan = best.plan;
  const int tiles = static_cast<int>(plan.tiles_w * plan.tiles_h * plan.tiles_t * plan.tiles_n * given.n);
  return {best.columns, 1 << plan.frames, 1 << plan.lines, 1 << plan.columns, plan.shared, tiles, plan.peers};
}

}  // namespace fastdit::cuda
