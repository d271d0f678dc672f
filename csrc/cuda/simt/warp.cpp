#include "warp.h"

#include <cstring>

#include "convert.h"
#include "memory.h"

namespace fastdit::simt {
namespace {

struct ShuffleFrame {
  Shuffle how;
  uint64_t value, result;
  int argument, width;
};

void shuffle_all(void** frames, uint32_t mask) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    ShuffleFrame& f = *static_cast<ShuffleFrame*>(frames[lane]);
    const int first = lane & ~(f.width - 1), last = first + f.width - 1;
    int from = lane;
    switch (f.how) {
      case Shuffle::index:
        from = first + (f.argument & (f.width - 1));
        break;
      case Shuffle::up:
        from = lane - f.argument >= first ? lane - f.argument : lane;
        break;
      case Shuffle::down:
        from = lane + f.argument <= last ? lane + f.argument : lane;
        break;
      case Shuffle::exclusive_or:
        from = (lane ^ f.argument) <= last ? lane ^ f.argument : lane;
        break;
    }
    if (!(mask >> from & 1)) machine().fault("shuffle: lane %d reads lane %d, which is not in the mask", lane, from);
    f.result = static_cast<ShuffleFrame*>(frames[from])->value;
  }
}

struct VoteFrame {
  uint32_t value, result;
};

void ballot_all(void** frames, uint32_t mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i)
    if ((mask >> i & 1) && static_cast<VoteFrame*>(frames[i])->value) bits |= 1u << i;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) static_cast<VoteFrame*>(frames[i])->result = bits;
}

void add_all(void** frames, uint32_t mask) {
  uint32_t sum = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) sum += static_cast<VoteFrame*>(frames[i])->value;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) static_cast<VoteFrame*>(frames[i])->result = sum;
}

struct MatrixFrame {
  uint32_t* to;
  const void* row;
  int count;
  bool transposed;
};

// Lane l gets elements 2 (l % 4) and the next of row l / 4; transposed: of column l / 4.
void load_all(void** frames, uint32_t) {
  const auto frame = [&](int lane) { return static_cast<MatrixFrame*>(frames[lane]); };
  for (int i = 0; i < frame(0)->count; ++i)
    for (int lane = 0; lane < kWarp; ++lane) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int major = lane / 4, minor = 2 * (lane % 4) + e;
        const int row = frame(0)->transposed ? minor : major, column = frame(0)->transposed ? major : minor;
        memcpy(&pair[e], static_cast<const char*>(frame(8 * i + row)->row) + 2 * column, 2);
      }
      memcpy(&frame(lane)->to[i], pair, 4);
    }
}

struct MultiplyFrame {
  float* d;
  const uint32_t *a, *b;
  const float* c;
  MmaType type;
};

// As wgmma's fragments: row l / 4 and eight more, `per` elements at per * (l % 4) of each half of K.
void multiply_all(void** frames, uint32_t) {
  const auto frame = [&](int lane) { return static_cast<MultiplyFrame*>(frames[lane]); };
  const MmaType type = frame(0)->type;
  const int size = type == MmaType::tf32 ? 4 : 2, per = 4 / size, K = 32 / size;
  float a[16][16], b[8][16], d[16][8];
  for (int k = 0; k < K; ++k) {
    const int quarter = k / per % 4, half = k / (4 * per), byte = k % per * size;
    for (int r = 0; r < 16; ++r)
      a[r][k] = widen(reinterpret_cast<const char*>(&frame(r % 8 * 4 + quarter)->a[half * 2 + r / 8]) + byte, type);
    for (int n = 0; n < 8; ++n)
      b[n][k] = widen(reinterpret_cast<const char*>(&frame(n * 4 + quarter)->b[half]) + byte, type);
  }
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n) {
      float sum = frame(r % 8 * 4 + n / 2)->c[r / 8 * 2 + n % 2];
      for (int k = 0; k < K; ++k) sum += a[r][k] * b[n][k];
      d[r][n] = sum;
    }
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n) frame(r % 8 * 4 + n / 2)->d[r / 8 * 2 + n % 2] = d[r][n];
}

constexpr uint32_t kAll = 0xffffffffu;

}  // namespace

uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t value, int argument, int width, Site site) {
  const auto inside = entered(machine());
  ShuffleFrame frame{how, value, 0, argument, width};
  machine().gather(mask, site, &frame, shuffle_all);
  return frame.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  const auto inside = entered(machine());
  VoteFrame frame{predicate, 0};
  machine().gather(mask, site, &frame, ballot_all);
  return frame.result;
}

uint32_t reduce_add(uint32_t mask, uint32_t value, Site site) {
  const auto inside = entered(machine());
  VoteFrame frame{value, 0};
  machine().gather(mask, site, &frame, add_all);
  return frame.result;
}

void sync_warp(uint32_t mask, Site site) {
  const auto inside = entered(machine());
  machine().gather(mask, site, nullptr, [](void**, uint32_t) {}, true);
}

void load_matrices(uint32_t* to, const void* row, int count, bool transposed, Site site) {
  const auto inside = entered(machine());
  Machine& m = machine();
  MatrixFrame frame{to, row, count, transposed};
  if (m.self().lane() < 8 * count) {
    if (!memory().is_shared(row)) m.fault("ldmatrix reads %p, which is not shared memory", row);
    memory().access(row, 16, Access::read);
  }
  m.gather(kAll, site, &frame, load_all);
}

void multiply(float* d, const uint32_t* a, const uint32_t* b, const float* c, MmaType type, Site site) {
  const auto inside = entered(machine());
  MultiplyFrame frame{d, a, b, c, type};
  machine().gather(kAll, site, &frame, multiply_all);
}

}  // namespace fastdit::simt
