#include "async.h"

#include <cstring>

#include "memory.h"

namespace fastdit::simt {

Async& asynchronous() { return *machine().async; }

void Async::begin_block() {
  threads_.assign(machine().threads, PerThread{});
  barriers_.clear();
  in_flight_.clear();
  warpgroups_.assign((machine().threads + kWarpgroup - 1) / kWarpgroup, Warpgroup{});
}

void Async::end_block() {
  if (!in_flight_.empty()) machine().fault("the block ends while bulk copies into its shared memory are under way");
}

// Whatever its peers signal or copy into its shared memory has happened before the block ends.
void Async::block_ends(int rank, const Vector& knows) {
  Machine& m = machine();
  const auto known = [&](size_t agent, uint32_t clock) { return agent < knows.size() && clock <= knows[agent]; };
  for (const auto& b : barriers_) {
    if (b->block != rank) continue;
    for (int peer = 0; peer < kMaxPeers; ++peer)
      if (b->copies[peer] && !known(b->agent[peer], b->copies[peer]))
        m.fault("block %d of the cluster ends while bulk copies into its shared memory are under way", rank);
    for (size_t t = 0; t < b->remote.size(); ++t)
      if (!known(t, b->remote[t]))
        m.fault("block %d of the cluster ends, and nothing says that %s has signalled its mbarrier", rank,
                m.agent_name(static_cast<int>(t)).c_str());
  }
}

void Async::thread_exits(Thread& t) {
  PerThread& mine = threads_[t.index];
  for (const Group& g : mine.loads)
    if (!g.copies.empty()) machine().fault("the thread ends without waiting for its cp.async");
  for (Group& g : mine.stores) {
    if (!g.copies.empty() && &g == &mine.stores.back()) machine().fault("the thread ends with uncommitted bulk stores");
    if (!g.copies.empty()) machine().fault("the thread ends without waiting for its bulk stores: their source may go");
  }
  const Warpgroup& w = warpgroups_[t.index / kWarpgroup];
  for (int i = 0; i < mine.products && i < static_cast<int>(w.products.size()); ++i)
    if (!w.products[i].executed) machine().fault("the thread ends without waiting for its wgmma");
}

bool Async::progress() {
  if (in_flight_.empty()) return false;
  // the latest legal order: what was issued last comes first
  const size_t i = machine().schedule() == Schedule::lazy ? in_flight_.size() - 1 : 0;
  Copy copy = std::move(in_flight_[i]);
  in_flight_.erase(in_flight_.begin() + i);
  land(copy);
  return true;
}

void Async::progress_randomly() {
  while (!in_flight_.empty() && machine().random(4) == 0) {
    const size_t i = machine().random(in_flight_.size());
    Copy copy = std::move(in_flight_[i]);
    in_flight_.erase(in_flight_.begin() + i);
    land(copy);
  }
}

// ---- cp.async ---------------------------------------------------------------------------------------------
void Async::copy(void* to, const void* from, int bytes, int filled) {
  Machine& m = machine();
  Memory& mem = memory();
  Thread& t = m.self();
  if (!mem.is_shared(to)) m.fault("cp.async writes to %p, which is not shared memory", to);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    m.fault("misaligned cp.async of %d bytes from %p to %p", bytes, from, to);
  if (filled) mem.access(from, filled, Access::read);
  mem.access(to, bytes, Access::write);
  mem.mark_in_flight(to, bytes);
  Copy c;
  c.chunks.push_back({static_cast<char*>(to), static_cast<const char*>(from), static_cast<uint32_t>(filled)});
  c.bytes = bytes;
  threads_[t.index].loads.back().copies.push_back(std::move(c));
}

void Async::copy_commit() { threads_[machine().self().index].loads.emplace_back(); }

// The data stays under way until here, whatever the schedule: no thread, the issuing one included, may read it earlier.
void Async::copy_wait(int groups) {
  Thread& t = machine().self();
  std::vector<Group>& loads = threads_[t.index].loads;
  const int last = static_cast<int>(loads.size()) - 1 - groups;  // the open group does not count
  for (int g = 0; g < last; ++g) {
    for (const Copy& c : loads[g].copies) {
      const Copy::Chunk& chunk = c.chunks[0];
      memcpy(chunk.to, chunk.from, chunk.bytes);
      memset(chunk.to + chunk.bytes, 0, c.bytes - chunk.bytes);
      memory().land(chunk.to, c.bytes, {t.index, t.clock}, false);
    }
    loads[g].copies.clear();
  }
}

// ---- mbarrier ---------------------------------------------------------------------------------------------
void Async::barrier_init(uint64_t* address, int count) {
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(address) % 8) m.fault("misaligned mbarrier at %p", static_cast<void*>(address));
  memory().access(address, 8, Access::write);
  const uint32_t at = memory().shared_address(address);
  for (const auto& b : barriers_)
    if (b->place == address) m.fault("mbarrier at shared address 0x%x is initialised twice", at);
  auto b = std::make_unique<Barrier>();
  b->place = address, b->block = m.self().block, b->expected = b->pending = count;
  b->made_by = m.self().index, b->made_at = m.self().clock;
  b->agent[b->block] = m.add_agent("bulk copies of mbarrier", static_cast<int>(barriers_.size()));
  barriers_.push_back(std::move(b));
}

void Async::barrier_fence_init() {
  for (auto& b : barriers_)
    if (b->made_by == machine().self().index) b->fenced = true;
}

Barrier& Async::barrier(const void* place, const char* what) {
  Machine& m = machine();
  const int block = memory().block_of(place);
  for (const auto& b : barriers_) {
    if (b->place != place) continue;
    if (!m.known(m.self(), b->made_by, b->made_at))
      m.fault("%s: no barrier since %s initialised the mbarrier", what, m.agent_name(b->made_by).c_str());
    if (!m.blocks[block].live) m.fault("%s: block %d of the cluster, whose mbarrier it is, has ended", what, block);
    return *b;
  }
  m.fault("%s: no mbarrier was initialised at shared address 0x%x%s", what, memory().shared_address(place),
          block == m.self().block ? "" : " of a peer, or the cluster's barrier is missing");
}

void Async::settle(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  join(b.done, b.joined);
  for (int t : b.waiting) machine().wake(t);
  b.waiting.clear();
}

void Async::barrier_expect(uint64_t* address, int64_t bytes) { barrier(address, "mbarrier.expect_tx").bytes += bytes; }

void Async::arrive(const void* place, int64_t bytes) {
  Machine& m = machine();
  Barrier& b = barrier(place, "mbarrier.arrive");
  Thread& t = m.self();
  if (b.block != t.block) {
    if (!b.fenced) m.fault("mbarrier.arrive at a peer's mbarrier without fence.mbarrier_init after its initialisation");
    if (b.remote.size() <= static_cast<size_t>(t.index)) b.remote.resize(t.index + 1, 0);
    b.remote[t.index] = t.clock;
  }
  b.bytes += bytes;
  if (b.pending == 0) m.fault("mbarrier.arrive beyond the pending count of %d", b.expected);
  m.release(t, b.joined);
  --b.pending;
  settle(b);
}

void Async::barrier_arrive(uint64_t* place, int64_t bytes) { arrive(place, bytes); }
void Async::barrier_arrive_at(uint32_t peer_address) { arrive(memory().from_shared_address(peer_address, 8), 0); }

void Async::barrier_wait(uint64_t* address, int parity, Site site) {
  Machine& m = machine();
  Barrier& b = barrier(address, "mbarrier.try_wait");
  m.yield_randomly();
  while (static_cast<int>(b.phase & 1) == parity) {
    b.waiting.push_back(m.self().index);
    m.wait(site);
  }
  m.acquire(m.self(), b.done);
}

// ---- bulk copies ------------------------------------------------------------------------------------------
uint32_t swizzled(uint32_t a, Swizzle mode) {
  switch (mode) {
    case Swizzle::b128:
      return a ^ ((a >> 3) & 0x70);
    case Swizzle::b64:
      return a ^ ((a >> 3) & 0x30);
    case Swizzle::b32:
      return a ^ ((a >> 3) & 0x10);
    default:
      return a;
  }
}

void Async::issue(Copy copy, Barrier& b) {
  Machine& m = machine();
  if (!b.fenced) m.fault("bulk copy on an mbarrier without fence.mbarrier_init after its initialisation");
  const int from = m.self().block;
  if (b.agent[from] < 0) b.agent[from] = m.add_agent("a peer's bulk copies to block", b.block);
  copy.barrier = &b, copy.agent = b.agent[from], copy.clock = ++b.copies[from];
  const Agent agent{copy.agent, copy.clock};
  for (const Copy::Chunk& c : copy.chunks) {
    if (c.from) memory().access_async(c.from, c.bytes, Access::read, m.self(), agent);
    memory().access_async(c.to, c.bytes, Access::write, m.self(), agent);
  }
  for (const Copy::Chunk& c : copy.chunks) memory().mark_in_flight(c.to, c.bytes);
  if (m.schedule() == Schedule::eager)
    land(copy);
  else
    in_flight_.push_back(std::move(copy));
}

void Async::perform(Copy& copy) {
  for (const Copy::Chunk& c : copy.chunks) {
    if (copy.add) {
      for (uint32_t i = 0; i < c.bytes / 4; ++i)
        reinterpret_cast<float*>(c.to)[i] += reinterpret_cast<const float*>(c.from)[i];
    } else if (c.from) {
      memcpy(c.to, c.from, c.bytes);
    } else {
      memset(c.to, 0, c.bytes);
    }
  }
}

void Async::land(Copy& copy) {
  Barrier& b = *copy.barrier;
  perform(copy);
  for (const Copy::Chunk& c : copy.chunks) memory().land(c.to, c.bytes, {copy.agent, copy.clock}, true);
  if (b.joined.size() < static_cast<size_t>(machine().agents())) b.joined.resize(machine().agents(), 0);
  b.joined[copy.agent] = std::max(b.joined[copy.agent], copy.clock);
  b.bytes -= copy.bytes;
  settle(b);
}

void Async::bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* address) {
  Machine& m = machine();
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    m.fault("bulk copy of %u bytes from %p to %p: all must be multiples of 16", bytes, from, to);
  Copy copy;
  copy.chunks.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
  copy.bytes = bytes;
  issue(std::move(copy), barrier(address, "cp.async.bulk"));
}

// The chunks of a box of `map` at coordinates `at`: 16 bytes each; from == null where they lie outside the tensor. The
// box is dense in shared memory, dim 0 fastest, then swizzled.
std::vector<Copy::Chunk> Async::tile(const TensorMap& map, const int* at, char* shared) {
  Machine& m = machine();
  const uint32_t base = memory().shared_address(shared),
                 cluster = memory().peer_address(shared, memory().block_of(shared)) - base;
  const uint32_t inner = map.box[0] * map.itemsize;
  const uint32_t span = map.swizzle == Swizzle::b128 ? 128 : map.swizzle == Swizzle::b64 ? 64 : 32;
  if (base % 128) m.fault("tensor copy: shared address 0x%x is not 128-byte aligned", base);
  if (map.swizzle != Swizzle::none && (base % (8 * span) || inner > span))
    m.fault(
        "tensor copy: a swizzle of %u bytes wants tiles at multiples of %u and rows of at most %u bytes; got "
        "0x%x and %u",
        span, 8 * span, span, base, inner);
  if (inner % 16) m.fault("tensor copy: the box is %u bytes wide, no multiple of 16", inner);
  std::vector<Copy::Chunk> chunks;
  int64_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (int64_t r = 0; r < rows; ++r) {
    bool inside = true;
    const char* from = static_cast<const char*>(map.base);
    int64_t rest = r;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t i = at[d] + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && i >= 0 && i < map.dims[d];
      from += i * map.strides[d];
    }
    for (uint32_t byte = 0; byte < inner;) {
      // pieces of one element at the tensor's edge, of 16 bytes elsewhere
      const int64_t i = at[0] + byte / map.itemsize, last = i + 16 / map.itemsize;
      const bool whole = byte % 16 == 0 && ((i >= 0 && last <= map.dims[0]) || last <= 0 || i >= map.dims[0]);
      const uint32_t bytes = whole ? 16 : map.itemsize;
      const uint32_t place = swizzled(base + static_cast<uint32_t>(r) * inner + byte, map.swizzle);
      char* to = memory().from_shared_address(place + cluster, bytes);
      chunks.push_back({to, inside && i >= 0 && i < map.dims[0] ? from + i * map.itemsize : nullptr, bytes});
      byte += bytes;
    }
  }
  return chunks;
}

void Async::tensor_load(void* to, const TensorMap& map, const int* at, uint64_t* address, uint32_t peers) {
  Machine& m = machine();
  if (peers >> m.blocks.size()) m.fault("multicast to blocks 0x%x of a cluster of %zu", peers, m.blocks.size());
  if (!peers) peers = 1u << m.self().block;
  for (int rank = 0; peers >> rank; ++rank) {  // each lands when it lands
    if (!(peers >> rank & 1)) continue;
    Copy copy;
    copy.chunks = tile(map, at, memory().in_block(to, rank));
    for (const Copy::Chunk& c : copy.chunks) copy.bytes += c.bytes;
    issue(std::move(copy), barrier(memory().in_block(address, rank), "cp.async.bulk.tensor"));
  }
}

// The running thread, about to store.
Async::PerThread& Async::storing() {
  Machine& m = machine();
  PerThread& mine = threads_[m.self().index];
  if (mine.store_agent < 0) {
    mine.store_agent = m.add_agent("bulk stores of thread", m.self().index);
    mine.source_agent = m.add_agent("reads for bulk stores of thread", m.self().index);
  }
  if (!mine.global_fenced) m.fault("bulk store after a wait for another block, without fence.proxy.async.global");
  return mine;
}

void Async::tensor_store(const TensorMap& map, const int* at, const void* from) {
  Machine& m = machine();
  PerThread& mine = storing();
  Copy copy;
  copy.clock = ++mine.store_clock;
  for (const Copy::Chunk& c : tile(map, at, static_cast<char*>(const_cast<void*>(from)))) {
    memory().access_async(c.to, c.bytes, Access::read, m.self(), {mine.source_agent, copy.clock});
    if (!c.from) continue;
    char* to = const_cast<char*>(c.from);
    memory().access_async(to, c.bytes, Access::write, m.self(), {mine.store_agent, copy.clock});
    copy.chunks.push_back({to, c.to, c.bytes});
  }
  if (m.schedule() == Schedule::eager) perform(copy), copy.chunks.clear();
  mine.stores.back().copies.push_back(std::move(copy));
}

void Async::bulk_store(float* to, const float* from, uint32_t bytes, bool add) {
  Machine& m = machine();
  PerThread& mine = storing();
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    m.fault("cp.async.bulk or cp.reduce.async.bulk of %u bytes: addresses and size must be multiples of 16", bytes);
  if (!memory().is_shared(from))
    m.fault("bulk store of %p, which is not shared memory", static_cast<const void*>(from));
  Copy copy;
  copy.clock = ++mine.store_clock, copy.add = add;
  memory().access_async(from, bytes, Access::read, m.self(), {mine.source_agent, copy.clock});
  memory().access_async(to, bytes, add ? Access::add : Access::write, m.self(), {mine.store_agent, copy.clock});
  copy.chunks.push_back({reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), bytes});
  if (m.schedule() == Schedule::eager) perform(copy), copy.chunks.clear();
  mine.stores.back().copies.push_back(std::move(copy));
}

void Async::store_commit() {
  PerThread& mine = threads_[machine().self().index];
  mine.stores.back().clock = mine.store_clock;
  mine.stores.emplace_back();
}

void Async::store_wait(int groups, bool read_only) {
  Machine& m = machine();
  PerThread& mine = threads_[m.self().index];
  const int last = static_cast<int>(mine.stores.size()) - 1 - groups;
  for (int g = 0; g < last; ++g) {
    Group& group = mine.stores[g];
    for (Copy& c : group.copies) perform(c);
    group.copies.clear();
    if (!group.clock) continue;
    m.learn(m.self(), mine.source_agent, group.clock);
    if (!read_only) m.learn(m.self(), mine.store_agent, group.clock);
  }
}

void Async::proxy_fence_global() { threads_[machine().self().index].global_fenced = true; }

void Async::proxy_fence() {
  Thread& t = machine().self();
  t.fences.push_back(t.clock++);
}

}  // namespace fastdit::simt
