// How the convolution cuts its work: sums into pieces, the input into strips, a strip's outputs into regions.
#pragma once

#include "conv_input.h"
#include "conv_pack.h"

namespace fastdit::cpu::FASTDIT_ISA {

constexpr int64_t kStripBytes = int64_t{3} << 19;  // activated rows in flight per thread: about its share of the caches
// Steps summed in one register: short chains, small error. What a tile's transform adds to it takes shorter ones; what
// the norm's backward subtracts magnifies errors. bf16 rounds coarser anyway: there a chain ends before its weights,
// 192 bytes a step, crowd the second-level cache.
constexpr int64_t kMaxChain = 160, kMaxTileChain = 48, kMaxGradChain = 32, kMaxPairChain = 1280;
constexpr int64_t kRegionPixels = 128, kRegionUnits = 32;  // direct; Winograd's pairs or tiles: sums stay in cache
constexpr int64_t kMinTasks = 32, kOwnStrips = 8;
constexpr double kTransform = 0.25;  // cost of a transformed value in activated ones

template <class T, class M>
class Plan : public Input<T, M> {
 protected:
  using Base = Input<T, M>;
  using A = typename M::A;
  using Base::p_, Base::cp_;
  using Base::round_up, Base::pieces, Base::min, Base::max;

  explicit Plan(const ConvParams& p)
      : Base(p),
        blocks_(p.cout, M::lanes),
        taps_(packed_taps(p.kernel, p.winograd)),
        tiles_(p.winograd == static_cast<int>(Winograd::tiles)),
        unit_rows_(p.winograd ? 2 : 1),
        unit_columns_(tiles_ ? 2 : 1),
        region_units_(p.winograd ? kRegionUnits : kRegionPixels) {
    runs_ = p.dilation[2] == 1 ? 1 : taps_.columns;
    run_length_ = taps_.columns / runs_ * cp_;
    const int64_t chain = M::step * (M::step > 1  ? kMaxPairChain
                                     : p.gradient ? kMaxGradChain
                                     : tiles_     ? kMaxTileChain
                                                  : kMaxChain);
    const int64_t fewest = pieces(run_length_, chain);
    for (int64_t cuts = fewest, best = 0; cuts <= (tiles_ ? 4 * fewest : fewest); ++cuts) {  // a tile's runs are short
      const int64_t piece = round_up(pieces(run_length_, cuts), M::step);
      const int64_t together = max(1, min(kMaxSegments, chain / piece));
      const int64_t sums = pieces(p.kernel[0] * cuts, together);
      if (best && sums >= best) continue;
      best = sums;
      cuts_ = cuts, piece_ = piece, together_ = together;
    }
    plan();
  }

  // Of the padded input, under so many output columns.
  int64_t columns_under(int64_t columns) const {
    return (round_up(columns, unit_columns_) - 1) * p_.stride[2] + (p_.kernel[2] - 1) * p_.dilation[2] + 1;
  }
  int64_t slot_size(int64_t columns) const { return (tiles_ ? pieces(columns, 2) : columns_under(columns)) * cp_; }
  int64_t slots_under(int64_t rows) const {
    return p_.winograd ? pieces(rows, 2) * taps_.rows : Base::rows_under(rows);
  }
  int64_t strip_size(int64_t frames, int64_t rows, int64_t columns) const {
    return Base::frames_under(frames) * slots_under(rows) * slot_size(columns);
  }

  int64_t strips() const {
    return p_.n * pieces(p_.to, strip_frames_) * pieces(p_.ho, strip_rows_) * pieces(p_.wo, strip_columns_);
  }

  // No result depends on strips or regions. Threads with strips of their own wait for nobody, but each goes through all
  // weights for each of its strips, and where strips are few the last ones leave threads idle.
  void plan() {
    cut(kStripBytes);
    own_ = strips() >= kOwnStrips * threads_;
    if (!own_) cut(kStripBytes * max(2, threads_));
    strip_elements_ = strip_size(strip_frames_, strip_rows_, strip_columns_);
    in_row_ = columns_under(strip_columns_) * cp_;
    slot_ = slot_size(strip_columns_);
    region();
  }

  // Strips: as little activated and transformed twice as so many bytes allow.
  void cut(int64_t bytes) {
    const int64_t budget = bytes / int64_t(sizeof(A));
    const int64_t narrow = kPixels * unit_columns_;
    double best = 0;
    for (int64_t columns = p_.wo;; columns = round_up(columns / 2, narrow)) {
      for (int64_t frames = p_.to;; frames = frames > 32 ? 32 : max(1, frames / 2)) {
        int64_t rows = p_.ho;
        while (rows > 2 && strip_size(frames, rows, columns) > budget) rows = round_up(rows / 2, 2);
        while (rows > 2 && rows < p_.ho && strip_size(frames, rows + 2, columns) <= budget) rows += 2;
        rows = min(rows, p_.ho);
        const int64_t size = strip_size(frames, rows, columns);
        const int64_t in_rows = p_.winograd ? round_up(rows, 2) + 2 : Base::rows_under(rows);
        const double activated = double(Base::frames_under(frames) * in_rows * columns_under(columns) * cp_);
        const double cost =
            (activated + (p_.winograd ? kTransform * double(size) : 0)) / double(frames * rows * columns) +
            (size > budget ? 1e30 * double(size) : 0);
        if (best == 0 || cost < best) {
          best = cost;
          strip_frames_ = frames, strip_rows_ = rows, strip_columns_ = columns;
        }
        if (frames == 1) break;
      }
      if (columns <= 2 * narrow) break;
    }
  }

  // Regions: enough tasks of a strip for many cores.
  void region() {
    const int64_t wide = region_units_ * unit_columns_;
    const int64_t across = pieces(strip_columns_, wide);
    region_columns_ =
        min(round_up(strip_columns_, unit_columns_), round_up(pieces(strip_columns_, across), kPixels * unit_columns_));
    region_rows_ =
        unit_rows_ * min(pieces(strip_rows_, unit_rows_), max(1, region_units_ * unit_columns_ / region_columns_));
    const auto tasks = [&] {
      return strip_frames_ * pieces(strip_rows_, region_rows_) * pieces(strip_columns_, region_columns_) *
             blocks_.count;
    };
    while (!own_ && tasks() < kMinTasks && region_rows_ >= 2 * unit_rows_)
      region_rows_ = round_up(region_rows_ / 2, unit_rows_);
  }

  static constexpr int64_t kMaxSegments = 64;

  const Blocks blocks_;
  const Taps taps_;  // of a packed kernel
  const bool tiles_;
  const int64_t unit_rows_, unit_columns_, region_units_;
  int64_t runs_, run_length_;        // the taps along W and the channels: one run, or kw runs when dilated
  int64_t cuts_, piece_, together_;  // a run is cut into pieces; so many pieces make one sum
  int64_t strip_frames_ = 1, strip_rows_ = 1, strip_columns_ = 1, strip_elements_ = 0;
  int64_t region_rows_ = 1, region_columns_ = 1;
  int64_t in_row_ = 0, slot_ = 0;  // elements of an activated row, and of a slot
  const int threads_ = p_.threads < 1 ? 1 : p_.threads;
  bool own_ = true;  // a strip is one thread's own
};

}  // namespace fastdit::cpu::FASTDIT_ISA
