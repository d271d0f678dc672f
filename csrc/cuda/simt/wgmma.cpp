// wgmma: D (64 x N, fp32, in the registers of 128 threads) = A (64 x K) * B (K x N) [+ D], operands in shared memory
// behind descriptors, A also in registers. K is 32 bytes. Layouts: PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Operation using wgmma"; tests/test_simt_layouts.py writes them down once more, from the picture.
#include <cstring>

#include "async.h"
#include "convert.h"
#include "memory.h"

namespace fastdit::simt {
namespace {

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  Swizzle mode;
};

Descriptor decode(uint64_t d) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(d >> bit & 0x3fff) << 4; };
  if (d >> 49 & 7) machine().fault("wgmma: descriptor with a base offset; align its tile to the swizzle pattern");
  return {field(0), field(16), field(32), static_cast<Swizzle>(d >> 62)};
}

// The byte of element (r, k) of an operand, r along M or N. A core matrix is 8 rows of 16 bytes.
uint32_t place(const Descriptor& d, int r, int k, int itemsize, bool transposed) {
  const uint32_t span = d.mode == Swizzle::b128 ? 128 : d.mode == Swizzle::b64 ? 64 : d.mode == Swizzle::b32 ? 32 : 16;
  uint32_t a;
  if (!transposed) {  // rows of K: eight of them make a group, `stride` apart
    const uint32_t byte = k * itemsize;
    a = d.start + r / 8 * d.stride + r % 8 * span;
    a += d.mode == Swizzle::none ? byte / 16 * d.leading + byte % 16 : byte;
  } else {  // rows of M or N, `span` bytes each; the next span is `leading` on, the next eight k are `stride` on
    const uint32_t byte = r * itemsize;
    const uint32_t outer = d.mode == Swizzle::none ? d.stride : d.leading;
    const uint32_t eight = d.mode == Swizzle::none ? d.leading : d.stride;
    a = d.start + byte / span * outer + k / 8 * eight + k % 8 * span + byte % span;
  }
  return swizzled(a, d.mode);
}

int itemsize(MmaType type) { return type == MmaType::tf32 ? 4 : 2; }

float element(const Descriptor& d, int r, int k, MmaType type, bool transposed) {
  const int size = itemsize(type);
  return widen(memory().from_shared_address(place(d, r, k, size, transposed), size), type);
}

}  // namespace

void Async::product_fence() { threads_[machine().self().index].product_fenced = true; }

// A warp's first lane looks at the operands for all: it must know of whatever wrote them.
void Async::check_operands(const Product& p, int agent, uint32_t clock) {
  Machine& m = machine();
  const int size = itemsize(p.type), k = 32 / size;
  const auto check = [&](uint64_t descriptor, int rows, bool transposed) {
    const Descriptor d = decode(descriptor);
    if (transposed && size != 2) m.fault("wgmma: only 16-bit operands can be transposed");
    const int step = 16 / size;  // sixteen bytes stay together
    for (int r = 0; r < rows; r += transposed ? step : 1)
      for (int c = 0; c < k; c += transposed ? 1 : step)
        memory().access_async(memory().from_shared_address(place(d, r, c, size, transposed), 16), 16, Access::read,
                              m.self(), {agent, clock});
  };
  if (!p.a_registers) check(p.a, 64, p.trans_a);
  check(p.b, p.n, p.trans_b);
}

void Async::product(const Product& what, float* d, const uint32_t* a_values) {
  Machine& m = machine();
  Thread& t = m.self();
  PerThread& mine = threads_[t.index];
  m.aligned(what.site);
  if (!mine.product_fenced) m.fault("wgmma without wgmma.fence: registers of D or A may still be written");
  Warpgroup& w = warpgroups_[t.index / kWarpgroup];
  if (w.agent < 0) w.agent = m.add_agent("wgmma of warpgroup", t.index / kWarpgroup);
  const size_t i = mine.products++;
  if (w.products.size() <= i) w.products.push_back(what);
  Product& p = w.products[i];
  if (!(p.site == what.site) || p.a != what.a || p.b != what.b || p.accumulate != what.accumulate)
    m.fault("wgmma: the warps of a warpgroup differ in the operation (line %d, line %d) or its descriptors",
            p.site.line, what.site.line);
  const int lane = t.index % kWarpgroup;
  p.d[lane] = d;
  if (what.a_registers) memcpy(p.a_values[lane], a_values, sizeof p.a_values[lane]);
  if (t.lane() == 0) check_operands(p, w.agent, static_cast<uint32_t>(i) + 1);
  if (++p.arrived == kWarpgroup && m.schedule() == Schedule::eager) execute(w, p);
  for (int waiting : w.waiting) m.wake(waiting);
  w.waiting.clear();
}

void Async::product_commit() {
  Thread& t = machine().self();
  PerThread& mine = threads_[t.index];
  Warpgroup& w = warpgroups_[t.index / kWarpgroup];
  if (static_cast<int>(w.group_ends.size()) <= mine.groups) w.group_ends.push_back(mine.products);
  if (w.group_ends[mine.groups] != mine.products) machine().fault("wgmma: warps commit different groups");
  ++mine.groups;
}

bool Async::complete(const Warpgroup& w, int end) const {
  for (int i = 0; i < end; ++i)
    if (w.products[i].arrived < kWarpgroup) return false;
  return true;
}

void Async::product_wait(int groups, Site site) {
  Machine& m = machine();
  Thread& t = m.self();
  PerThread& mine = threads_[t.index];
  Warpgroup& w = warpgroups_[t.index / kWarpgroup];
  m.aligned(site);
  mine.product_fenced = false;
  const int last = mine.groups - groups;
  if (last <= 0) return;
  const int end = w.group_ends[last - 1];
  while (!complete(w, end)) {
    w.waiting.push_back(t.index);
    m.wait(site);
  }
  for (int i = 0; i < end; ++i)
    if (!w.products[i].executed) execute(w, w.products[i]);
  if (end) m.learn(t, w.agent, static_cast<uint32_t>(end));
}

void Async::execute(Warpgroup& w, Product& p) {
  for (Product& before : w.products) {  // in order
    if (&before == &p) break;
    if (!before.executed) execute(w, before);
  }
  p.executed = true;
  const int k = 32 / itemsize(p.type);
  const Descriptor da = p.a_registers ? Descriptor{} : decode(p.a), db = decode(p.b);
  std::vector<float> a(64 * k), b(static_cast<size_t>(p.n) * k);
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < k; ++c) {
      if (!p.a_registers) {
        a[r * k + c] = element(da, r, c, p.type, p.trans_a);
        continue;
      }
      // rows 16 per warp, eight per half; a register holds 4 bytes: elements 2q, 2q + 1 of each eight columns
      const int per = 4 / itemsize(p.type), quarter = c / per % 4, half = c / (4 * per);
      const uint32_t* values = p.a_values[r / 16 * 32 + r % 8 * 4 + quarter];
      const char* bytes = reinterpret_cast<const char*>(&values[half * 2 + r % 16 / 8]);
      a[r * k + c] = widen(bytes + c % per * itemsize(p.type), p.type);
    }
  for (int n = 0; n < p.n; ++n)
    for (int c = 0; c < k; ++c) b[n * k + c] = element(db, n, c, p.type, p.trans_b);
  for (int r = 0; r < 64; ++r)
    for (int n = 0; n < p.n; ++n) {
      float* d = p.d[r / 16 * 32 + r % 8 * 4 + n % 8 / 2] + n / 8 * 4 + r % 16 / 8 * 2 + n % 2;
      float sum = p.accumulate ? *d : 0.0f;
      for (int c = 0; c < k; ++c) sum += a[r * k + c] * b[n * k + c];
      *d = sum;
    }
}

}  // namespace fastdit::simt
