#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "counters.h"

// The bounds of this module in memory: constants that a kernel reads lie inside.
extern "C" char __ehdr_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));

namespace fastdit::simt {

Memory& memory() {
  static Memory one;
  return one;
}

void raw_copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

Memory::Memory() : shared_cells_(kMaxPeers * kArena / kCell) {
  void* found = mmap(nullptr, kMaxPeers * kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  shared_ = static_cast<char*>(found);
}

// ---- global memory --------------------------------------------------------------------------------------
Cell* Memory::global_cell(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (number != last_number_) {
    const auto found = pages_.find(number);
    if (found == pages_.end()) return nullptr;
    last_page_ = found->second.data(), last_number_ = number;
  }
  return &last_page_[address % kPage / kCell];
}

void Memory::allow(uintptr_t address, int itemsize, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, bool filled, bool writable) {
  const uint16_t flags = Cell::readable | (filled ? Cell::initialised : 0) | (writable ? Cell::writable : 0);
  std::vector<int64_t> index(sizes.size(), 0);
  for (int64_t size : sizes)
    if (size == 0) return;
  const auto set = [&](uintptr_t from, uintptr_t to) {
    for (uintptr_t a = from & ~(kCell - 1); a < to; a += kCell) {
      Cell* c = global_cell(a);
      if (!c) {
        pages_[a / kPage].resize(kPage / kCell);
        c = global_cell(a);
      }
      c->flags |= flags;
    }
  };
  const int rank = static_cast<int>(sizes.size());
  const bool rows = rank && strides[rank - 1] == 1;
  const uintptr_t width = static_cast<uintptr_t>(itemsize) * (rows ? sizes[rank - 1] : 1);
  for (;;) {
    int64_t offset = 0;
    for (int d = 0; d < rank; ++d) offset += index[d] * strides[d];
    set(address + offset * itemsize, address + offset * itemsize + width);
    int d = rank - 1 - rows;
    while (d >= 0 && (++index[d] == sizes[d] || strides[d] == 0)) index[d--] = 0;
    if (d < 0) return;
  }
}

// ---- shared memory --------------------------------------------------------------------------------------
void Memory::begin_block(size_t dynamic_bytes, int blocks) {
  for (int b = 0; b < blocks_; ++b)
    std::fill_n(shared_cells_.begin() + b * (kArena / kCell), (shared_used_ + kCell - 1) / kCell, Cell{});
  statics_.clear();
  shared_used_ = 0, dynamic_align_ = 0, dynamic_bytes_ = dynamic_bytes, blocks_ = blocks;
}

char* Memory::own(size_t offset) { return shared_ + machine().self().block * kArena + offset; }

void Memory::allow_shared(size_t from) {
  for (int b = 0; b < blocks_; ++b)
    for (size_t i = from / kCell; i < (shared_used_ + kCell - 1) / kCell; ++i)
      shared_cells_[b * (kArena / kCell) + i].flags = Cell::readable | Cell::writable;
}

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

char* Memory::shared_static(const void* key, size_t bytes, size_t align) {
  for (const Static& s : statics_)
    if (s.key == key) return own(s.at);
  // sixteen bytes between variables belong to nobody
  const size_t at = round_up(shared_used_ + (shared_used_ ? 16 : 0), align < 16 ? 16 : align);
  if (at + bytes > kSharedBlock) machine().fault("shared memory: more than %zu bytes", kSharedBlock);
  shared_used_ = at + bytes;
  allow_shared(at);
  statics_.push_back({key, at});
  return own(at);
}

char* Memory::shared_dynamic(size_t align) {
  if (dynamic_align_) {
    if (align != dynamic_align_) machine().fault("dynamic shared memory is declared with two alignments");
    return own(dynamic_);
  }
  size_t at = round_up(shared_used_ + 16, align);
  if (at % (2 * align) == 0) at += align;
  if (at + dynamic_bytes_ > kArena) machine().fault("shared memory: more than %zu bytes", kSharedBlock);
  shared_used_ = at + dynamic_bytes_;
  allow_shared(at);
  dynamic_ = at, dynamic_align_ = align;
  return own(at);
}

uint32_t Memory::shared_address(const void* p) {
  if (!is_shared(p)) machine().fault("a shared address is asked of a pointer that is not shared");
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_ - block_of(p) * kArena);
}

uint32_t Memory::peer_address(const void* p, int rank) {
  if (rank < 0 || rank >= blocks_) machine().fault("mapa: block %d of a cluster of %d", rank, blocks_);
  return static_cast<uint32_t>(rank + 1) << kRankBit | shared_address(p);
}

char* Memory::from_shared_address(uint32_t address, size_t bytes) {
  const size_t rank = address >> kRankBit, offset = address & ((1u << kRankBit) - 1);
  if (offset + bytes > kArena || rank > static_cast<size_t>(blocks_))
    machine().fault("shared address 0x%x lies outside of shared memory", address);
  return rank ? shared_ + (rank - 1) * kArena + offset : own(offset);
}

// ---- accesses -------------------------------------------------------------------------------------------
Cell* Memory::cell(uintptr_t address) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(shared_);
  return offset < kMaxPeers * kArena ? &shared_cells_[offset / kCell] : global_cell(address);
}

static const char* name(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "write" : kind == Access::add ? "addition" : "atomic";
}

void Memory::race(const Cell&, const void* p, const char* now, const char* then, int other, uint32_t block) {
  Machine& m = machine();
  if (block != m.block_serial)
    m.fault("race: %s of %s memory at %p, which another block of the launch has %s", now, space(p), p, then);
  m.fault("race: %s of %s memory at %p, and no barrier since %s has %s it", now, space(p), p,
          m.agent_name(other).c_str(), then);
}

// A generic write is seen by the asynchronous proxy when its thread fenced after it and the reader knows of the fence.
bool Memory::fenced(const Thread& reader, int writer, uint32_t clock) const {
  const Machine& m = machine();
  if (writer >= m.threads) return true;
  const std::vector<uint32_t>& fences = m.thread[writer].fences;
  const auto first = std::lower_bound(fences.begin(), fences.end(), clock);
  return first != fences.end() && (writer == reader.index || m.known(reader, writer, *first + 1));
}

void Memory::check(Cell& c, const void* p, Access kind, const Thread& t, const Agent* agent) {
  Machine& m = machine();
  const bool writes = kind != Access::read, atomic = kind == Access::atomic;
  if (c.flags & Cell::in_flight)
    m.fault("%s of %s memory at %p, where an asynchronous copy is under way: a wait is missing", name(kind), space(p),
            p);
  const bool own = !agent || agent->number == t.index;
  if (c.write_block >= m.first_serial && !(atomic && (c.flags & Cell::by_atomic))) {
    const bool same = c.write_block == m.block_serial;
    // two pieces of work of one agent are in order; another agent's must be known to the thread that issues
    const bool ordered = same ? (agent && agent->number == c.writer) || (own && c.writer == t.index) ||
                                    m.known(t, c.writer, c.write_clock)
                              : counters().known(t, c.write_block, c.writer, c.write_clock);
    if (!ordered) race(c, p, name(kind), "written", c.writer, c.write_block);
    if (same && agent && is_shared(p) && !(c.flags & Cell::by_async) && !fenced(t, c.writer, c.write_clock))
      m.fault(
          "asynchronous %s of %s memory at %p, which thread %d wrote without a fence.proxy.async before the barrier",
          name(kind), space(p), p, c.writer);
  }
  if (writes) {
    for (const Cell::Reader& r : c.reader) {
      if (r.block < m.first_serial) continue;
      const bool mine = agent ? r.agent == agent->number : r.agent == t.index;
      const bool ordered = r.block == m.block_serial ? mine || m.known(t, r.agent, r.clock)
                                                     : counters().known(t, r.block, r.agent, r.clock);
      if (!ordered) race(c, p, name(kind), "read", r.agent, r.block);
    }
  }
  const int who = agent ? agent->number : t.index;
  const uint32_t clock = agent ? agent->clock : t.clock;
  if (writes) {
    c.writer = static_cast<uint16_t>(who), c.write_block = m.block_serial, c.write_clock = clock;
    c.reader[0] = c.reader[1] = {};
    c.flags = (c.flags | Cell::initialised) & ~(Cell::by_async | Cell::by_atomic);
    if (atomic) c.flags |= Cell::by_atomic;
    if (agent) c.flags |= Cell::by_async;
  } else {
    Cell::Reader& r = c.reader[agent ? who & 1 : t.warp() & 1];
    r = {m.block_serial, clock, static_cast<uint16_t>(who), static_cast<uint16_t>(agent != nullptr)};
  }
}

// Permissions; returns the cells of the access.
Cell* Memory::cells(const void* p, size_t bytes, Access kind) {
  Machine& m = machine();
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  Cell* first = cell(address);
  for (uintptr_t a = address & ~(kCell - 1); a < address + bytes; a += kCell) {
    Cell* c = cell(a);
    const void* at = reinterpret_cast<const void*>(a);
    if (!c || !(c->flags & (Cell::readable | Cell::writable)))
      m.fault("out of bounds: %s of %zu bytes of %s memory at %p", name(kind), bytes, space(p), at);
    if (kind != Access::read && !(c->flags & Cell::writable))
      m.fault("%s of %zu bytes at %p, in a tensor that the kernel may only read", name(kind), bytes, at);
    if (kind != Access::write && !(c->flags & (Cell::initialised | Cell::in_flight)))
      m.fault("%s of %s memory at %p, which was never written", name(kind), space(p), at);
  }
  return first;
}

void Memory::access(const void* p, size_t bytes, Access kind) {
  Machine& m = machine();
  if (!m.inside()) return;
  const Thread& t = m.self();
  const char* c = static_cast<const char*>(p);
  if (c >= t.stack && c < t.stack_end) return;
  const char* parameters = static_cast<const char*>(m.current.parameters);
  if (kind == Access::read && c >= parameters && c < parameters + m.current.parameter_bytes) return;
  if (c >= m.thread.front().stack && c < m.thread.back().stack_end)
    m.fault("%s of %zu bytes at %p, in another thread's local memory", name(kind), bytes, p);
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const Cell* first = cell(address);
  if (c >= &__ehdr_start && c < &_end && !(first && first->flags)) {  // a constant of the module
    if (kind != Access::read) m.fault("%s of %zu bytes at %p, a variable of the host", name(kind), bytes, p);
    return;
  }
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && address % bytes)
    m.fault("misaligned %s of %zu bytes of %s memory at %p", name(kind), bytes, space(p), p);
  if (is_shared(p) && block_of(p) != t.block)
    m.fault("%s of %zu bytes at %p, in the shared memory of another block, whose address mapa gives", name(kind), bytes,
            p);
  cells(p, bytes, kind);
  for (uintptr_t a = address & ~(kCell - 1); a < address + bytes; a += kCell)
    check(*cell(a), reinterpret_cast<const void*>(a), kind, t, nullptr);
}

void Memory::access_async(const void* p, size_t bytes, Access kind, const Thread& issuer, Agent agent) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  cells(p, bytes, kind);
  for (uintptr_t a = address & ~(kCell - 1); a < address + bytes; a += kCell)
    check(*cell(a), reinterpret_cast<const void*>(a), kind, issuer, &agent);
}

void Memory::mark_in_flight(const void* p, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = address; a < address + bytes; a += kCell) cell(a)->flags |= Cell::in_flight;
}

void Memory::land(const void* p, size_t bytes, Agent agent, bool by_async) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = address; a < address + bytes; a += kCell) {
    Cell& c = *cell(a);
    c.flags = (c.flags | Cell::initialised) & ~(Cell::in_flight | Cell::by_async | Cell::by_atomic);
    if (by_async) c.flags |= Cell::by_async;
    c.writer = static_cast<uint16_t>(agent.number), c.write_block = machine().block_serial;
    c.write_clock = agent.clock;
    c.reader[0] = c.reader[1] = {};
  }
}

}  // namespace fastdit::simt
