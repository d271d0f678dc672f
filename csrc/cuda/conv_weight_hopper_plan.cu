// Which tile of conv_weight_hopper.cu a weight's gradient takes, and in how many parts it is summed.
#include <algorithm>
#include <iterator>

#include "conv_weight_hopper.cuh"

namespace fastdit::cuda::weight_hopper {
namespace {

// Fewest clocks for a shape, by a model: of a rectangle the larger of the matrix unit's (a product takes N / 2), shared
// memory's (128 bytes a clock, both operands and what the copies write) and L2's (24 bytes a clock where all
// multiprocessors ask); then the rounds of the device, and the parts: written, read again, added one after the other.
void fit(const ConvParams& p, int number, int processors, Choice& best) {
  const Shape& shape = kShapes[number];
  const int64_t kh = p.kernel[1];
  if (kh % shape.taps) return;
  const bool merged = shape.taps == 3 && shape.channels == kChannels;
  const int N = merged ? shape.taps * kChannels : shape.channels, products = merged ? 1 : shape.taps;
  const int spans_c = (shape.channels + kChannels - 1) / kChannels;
  const int64_t spans_n = std::min<int64_t>(2 * shape.tiles, pieces(p.cout, kChannels));
  const int64_t room = kSharedBytes - 1024 - 2 * kMostStages * 8;
  const int64_t tiles_n = pieces(p.cout, 2 * shape.tiles * kChannels), tiles_c = pieces(p.cin, shape.channels);
  const int64_t groups = kh / shape.taps, blocks = tiles_n * tiles_c * groups * p.kernel[0] * p.kernel[2];
  const int64_t taps = p.kernel[0] * kh * p.kernel[2], weights = p.cout * p.cin * taps * 4;
  // a frame of all tiles of Cout and C: 64-row products, channels that are read
  const int64_t rows = pieces(p.cout, kChannels) * tiles_c;
  const int64_t read_n = p.cout * tiles_c,
                read_c = std::min<int64_t>(p.cin + (spans_c * kChannels - shape.channels) * (tiles_c - 1), p.cin * 2) *
                         tiles_n;
  for (int columns = kStep; columns <= 256 && columns < p.wo + kStep; columns += kStep)
    for (int lines = 1; lines <= std::min<int64_t>(p.ho, 256) && lines * columns <= 1024; ++lines) {
      const int64_t patch_lines = lines + (shape.taps - 1) * p.dilation[1];
      const int64_t stage = (spans_n * lines + spans_c * patch_lines) * columns * kSpan;
      if (patch_lines > 256 || 2 * stage > room) continue;
      const int64_t w = pieces(p.wo, columns), h = pieces(p.ho, lines), sets = p.n * p.to * w * h;
      const int stages = static_cast<int>(std::min<int64_t>(room / stage, kMostStages));
      const int64_t k16 = p.ho * w * (columns / kStep), pixels = h * w * columns;
      const int64_t matrix = k16 * rows * products * (N / 2);
      const int64_t banks = k16 * rows * products * (16 + N / 4) + stage * w * h * tiles_n * tiles_c / 128;
      const int64_t l2 = pixels * (read_n * lines + read_c * patch_lines) * 2 / 24;
      const int64_t wait = (stages < 3 ? 800 : 60) * w * h * tiles_n * tiles_c;  // until a stage has come again
      const int64_t frame = (std::max({matrix, banks, l2}) + wait) * groups * p.kernel[0] * p.kernel[2];
      const int64_t most = std::max<int64_t>(1, sets / 2);
      for (int full = 1; full <= 4; ++full) {  // rounds of the device
        const int64_t parts = std::clamp<int64_t>(full * processors / blocks, 1, most);
        const int64_t rounds = pieces(blocks * parts, processors);
        const int64_t clocks =
            rounds * (pieces(frame * p.n * p.to, blocks * parts) + 4000) + parts * (weights * 2 / 1500 + taps * 150);
        if (best.clocks && clocks >= best.clocks) continue;
        best.shape = number, best.clocks = clocks;
        best.plan = {columns,
                     lines,
                     static_cast<int>(patch_lines),
                     static_cast<int>(spans_n),
                     stages,
                     static_cast<int>(w),
                     static_cast<int>(h),
                     static_cast<int>(tiles_n),
                     static_cast<int>(tiles_c),
                     static_cast<int>(groups),
                     static_cast<int>(blocks),
                     static_cast<int>(parts)};
      }
    }
}

}  // namespace

const Choice& choose(const ConvParams& p, int device, const char* op) {
  return kept_choice<Choice>(p, 0, device, op, [&](int processors) {
    Choice best{};
    for (int i = 0; i < static_cast<int>(std::size(kShapes)); ++i) fit(p, i, processors, best);
    return best;
  });
}

ConvParams prepared(const ConvWeightGradParams& q, const char* op) {
  ConvParams p = q.forward;
  p.y = const_cast<void*>(q.grad), p.residual = nullptr;
  std::copy(q.grad_stride, q.grad_stride + kAxes, p.y_stride);
  check_packed(p, packed(p.y, p.y_stride, static_cast<int>(itemsize(static_cast<DType>(p.dtype)))), op);
  if (p.n * p.to * p.ho * p.wo > 0x7fffffff)
    throw std::invalid_argument(std::string(op) + ": too many pixels; got " + sizes(p) + ", expected fewer than 2^31");
  return conv_checked(p, ConvTaps{}, op);
}

}  // namespace fastdit::cuda::weight_hopper

namespace fastdit::cuda {

ConvWeightTile conv_weight_hopper_tile(const ConvWeightGradParams& q, int device) {
  const char* op = "causal_conv3d_backward";
  const weight_hopper::Choice& best = weight_hopper::choose(weight_hopper::prepared(q, op), device, op);
  const weight_hopper::Plan& plan = best.plan;
  const weight_hopper::Shape& shape = weight_hopper::kShapes[best.shape];
  return {shape.channels, shape.taps, plan.lines, plan.columns, plan.stages, plan.blocks, plan.parts};
}

}  // namespace fastdit::cuda
