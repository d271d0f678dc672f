#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <stdexcept>

#include "async.h"
#include "counters.h"
#include "memory.h"

namespace fastdit::simt {

Machine& machine() {
  static Machine one;
  return one;
}

static int inside_simulator = 0;
bool checks_are_on() { return !inside_simulator && machine().inside(); }
int enter() {
  const int before = inside_simulator;
  inside_simulator = 1;
  return before;
}
void leave(int before) { inside_simulator = before; }

Dim3 thread_index() { return machine().self().thread_idx; }
Dim3 block_index() { return machine().blocks[machine().self().block].index; }
Dim3 block_size() { return machine().current.block; }
Dim3 grid_size() { return machine().current.grid; }

Machine::Machine() : async(new Async) {}
Machine::~Machine() { delete async; }

void join(Vector& into, const Vector& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = into[i] > from[i] ? into[i] : from[i];
}

void Machine::set_schedule(Schedule schedule, uint64_t seed) {
  schedule_ = schedule;
  random_.seed(seed);
}

// ---- a launch -------------------------------------------------------------------------------------------
void Machine::launch(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  current = launch;
  const int peers = launch.peers, of_block = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  threads = peers * of_block;
  const uint64_t clusters = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / peers;
  if (of_block < 1 || threads > kMaxThreads || clusters < 1 || launch.grid.y > 65535 || launch.grid.z > 65535)
    throw std::runtime_error(std::string(launch.name) + ": invalid configuration argument");
  if (peers < 1 || peers > kMaxPeers || launch.grid.x % peers || (peers > 1 && of_block % kWarpgroup))
    throw std::runtime_error(std::string(launch.name) + ": invalid cluster: 1 or 2 blocks of whole warpgroups along x");
  stacks_.reserve(threads);
  first_serial = block_serial + 1;
  counters().begin_launch();
  for (uint64_t i = 0; i < clusters; ++i) {
    uint64_t b = schedule_ == Schedule::lazy ? clusters - 1 - i : i;
    if (schedule_ == Schedule::random) b = (i * 2654435761u + 7) % clusters;  // the factor is prime: a permutation
    blocks.assign(peers, Block{});
    const uint64_t across = launch.grid.x / peers;
    for (int k = 0; k < peers; ++k)
      blocks[k].index = Dim3(b % across * peers + k, b / across % launch.grid.y, b / across / launch.grid.y);
    ++block_serial;
    run_blocks();
    if (!fault_.empty()) {
      const std::string message = std::move(fault_);
      fault_.clear();
      throw std::runtime_error(message);
    }
  }
}

void Machine::run_blocks() {
  thread.resize(threads);
  warp.assign((threads + kWarp - 1) / kWarp, Warp{});
  const int of_block = threads / current.peers;
  for (Block& b : blocks) b.base.assign(threads, 0), b.live = of_block;
  agent_names_.clear();
  cluster_ = ClusterBarrier{};
  live_ = threads;
  memory().begin_block(current.dynamic_shared, current.peers);
  async->begin_block();
  counters().begin_block();
  for (uint64_t& word : ready_) word = 0;
  for (int i = 0; i < threads; ++i) {
    Thread& t = thread[i];
    t = Thread{};
    t.index = i, t.block = i / of_block;
    const int in_block = i % of_block;
    t.thread_idx = Dim3(in_block % current.block.x, in_block / current.block.x % current.block.y,
                        in_block / current.block.x / current.block.y);
    t.stack = stacks_.at(i), t.stack_end = t.stack + Stacks::kBytes;
    warp[t.warp()].live |= 1u << t.lane();
    prepare(t.fiber, t.stack, Stacks::kBytes, entry);
    wake(i);
  }
  while (live_ && fault_.empty()) {
    if (!any_ready() && !async->progress()) {
      deadlock();
      break;
    }
    if (!any_ready()) continue;
    const int next = choose();
    ready_[next / 64] &= ~(uint64_t{1} << (next % 64));
    running_ = &thread[next];
    switch_to(scheduler_, running_->fiber);
    running_ = nullptr;
    if (schedule_ == Schedule::random && fault_.empty()) async->progress_randomly();
  }
  if (fault_.empty()) async->end_block();
  running_ = nullptr;
}

void Machine::entry() {
  Machine& m = machine();
  inside_simulator = 0;
  m.current.body();
  inside_simulator = 1;
  m.leave();
}

// A thread ends. Barriers of the whole block or cluster and warp operations do not wait for it any more.
void Machine::leave() {
  Thread& t = *running_;
  async->thread_exits(t);
  t.exited = true;
  --live_;
  Warp& w = warp[t.warp()];
  if (w.aligned)
    fault("thread exits while %d lanes of its warp wait at %s, line %d", __builtin_popcount(w.aligned),
          w.aligned_site.operation, w.aligned_site.line);
  w.live &= ~(1u << t.lane());
  for (const Gathering& g : w.gatherings)
    if (g.arrived && (g.mask & ~w.live))
      fault("thread exits, but %s at line %d names it in its mask", g.site.operation, g.site.line);
  Block& b = blocks[t.block];
  --b.live;
  if (b.live && b.at_barrier == b.live) finish_block_barrier(b);
  if (current.peers > 1) {
    if (live_ && cluster_.arrived == live_) finish_cluster_barrier();
    release(t, b.end);
    if (!b.live) async->block_ends(t.block, b.end);
  }
  switch_to(t.fiber, scheduler_);
}

bool Machine::any_ready() const {
  uint64_t any = 0;
  for (uint64_t word : ready_) any |= word;
  return any != 0;
}

// eager: the first, lazy: the last, random: any.
int Machine::choose() {
  constexpr int kWords = kMaxThreads / 64;
  if (schedule_ == Schedule::eager) {
    for (int i = 0; i < kWords; ++i)
      if (ready_[i]) return i * 64 + __builtin_ctzll(ready_[i]);
  } else if (schedule_ == Schedule::lazy) {
    for (int i = kWords - 1; i >= 0; --i)
      if (ready_[i]) return i * 64 + 63 - __builtin_clzll(ready_[i]);
  }
  int count = 0;
  for (uint64_t word : ready_) count += __builtin_popcountll(word);
  int skip = static_cast<int>(random(count));
  for (int i = 0;; ++i) {
    const int here = __builtin_popcountll(ready_[i]);
    if (skip >= here) {
      skip -= here;
      continue;
    }
    uint64_t word = ready_[i];
    while (skip--) word &= word - 1;
    return i * 64 + __builtin_ctzll(word);
  }
}

void Machine::wait(Site site) {
  Thread& t = *running_;
  t.waits = site;
  switch_to(t.fiber, scheduler_);
  t.waits = Site{};
}

// Lets another thread go first, sometimes: waiting in a loop must not starve the one that is waited for.
void Machine::yield_randomly() {
  if (schedule_ != Schedule::random || random(2)) return;
  wake(running_->index);
  wait({"yield", "", 0});
}

void Machine::fault(const char* format, ...) {
  enter();  // nothing of this thread runs again
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fault_ = where() + text;
  if (running_) {
    switch_to(running_->fiber, scheduler_);  // for good: the block is given up
    __builtin_unreachable();
  }
  throw std::runtime_error(std::move(fault_));
}

std::string Machine::where() const {
  const Dim3 b = blocks[running_ ? running_->block : 0].index;
  char text[256];
  int end = snprintf(text, sizeof text, "%s: block (%u, %u, %u)", current.name, b.x, b.y, b.z);
  if (running_) {
    const Dim3 t = running_->thread_idx;
    end += snprintf(text + end, sizeof text - end, " thread (%u, %u, %u)", t.x, t.y, t.z);
  }
  return std::string(text, end) + ": ";
}

void Machine::deadlock() {
  std::string text = "deadlock:";
  for (size_t w = 0; w < warp.size(); ++w) {
    std::string line;
    for (int lane = 0; lane < kWarp && static_cast<int>(w) * kWarp + lane < threads; ++lane) {
      const Thread& t = thread[w * kWarp + lane];
      if (t.exited) continue;
      const std::string at = std::string(t.waits.operation) + " at line " + std::to_string(t.waits.line) + t.waits_for;
      if (line.find(at) == std::string::npos) line += (line.empty() ? "" : ", ") + at;
    }
    const size_t of_block = warp.size() / current.peers, rank = w / of_block;
    if (!line.empty())
      text += (rank ? " block " + std::to_string(rank) + " of the cluster, warp " : " warp ") +
              std::to_string(w - rank * of_block) + " waits at " + line + ";";
  }
  fault_ = where() + text;
}

// ---- barriers -------------------------------------------------------------------------------------------
void Machine::aligned(Site site) {
  Thread& t = *running_;
  Warp& w = warp[t.warp()];
  if (w.aligned && !(w.aligned_site == site))
    fault("warp-divergent .aligned operation: %s at line %d, while others of its warp are at %s, line %d",
          site.operation, site.line, w.aligned_site.operation, w.aligned_site.line);
  w.aligned_site = site;
  w.aligned |= 1u << t.lane();
  if (w.aligned != w.live) return wait(site);
  w.aligned = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((w.live >> lane & 1) && lane != t.lane()) wake(t.warp() * kWarp + lane);
}

void Machine::block_barrier(Site site) {
  aligned(site);
  Block& b = blocks[running_->block];
  if (b.at_barrier && !(b.site == site))
    fault("diverging barriers: __syncthreads at line %d, while others wait at line %d", site.line, b.site.line);
  b.site = site;
  ++b.at_barrier;
  if (b.at_barrier == b.live)
    finish_block_barrier(b);
  else
    wait(site);
}

void Machine::finish_block_barrier(Block& b) {
  b.at_barrier = 0;
  const int of_block = threads / current.peers, first = static_cast<int>(&b - blocks.data()) * of_block;
  for (int i = first; i < first + of_block; ++i) {
    Thread& t = thread[i];
    if (!t.fresh) {
      for (int a = 0; a < first; ++a) b.base[a] = std::max(b.base[a], t.knows[a]);
      for (int a = first + of_block; a < agents(); ++a) b.base[a] = std::max(b.base[a], t.knows[a]);
      t.fresh = true;
    }
    if (t.exited) continue;
    b.base[t.index] = t.clock++;
    if (&t != running_ && t.waits.operation == b.site.operation && t.waits.line == b.site.line) wake(t.index);
  }
}

void Machine::cluster_barrier(Site site) {
  release(*running_, cluster_.joined);
  const uint64_t phase = cluster_.phase;
  if (++cluster_.arrived == live_) {
    finish_cluster_barrier();
  } else {
    cluster_.waiting.push_back(running_->index);
    while (cluster_.phase == phase) wait(site);
  }
  acquire(*running_, cluster_.done);
}

void Machine::finish_cluster_barrier() {
  cluster_.arrived = 0;
  ++cluster_.phase;
  cluster_.done = cluster_.joined;
  for (int i : cluster_.waiting) wake(i);
  cluster_.waiting.clear();
}

void Machine::named_barrier(int id, int count, bool waits, Site site) {
  aligned(site);
  if (id < 0 || id >= kMaxBarriers || count % kWarp || count <= 0)
    fault("%s: barrier %d of %d threads; there are 16 of them, and a multiple of 32 threads", site.operation, id,
          count);
  NamedBarrier& b = blocks[running_->block].barriers[id];
  if (b.arrived && b.expected != count)
    fault("barrier %d: %d threads expected at line %d, %d at line %d", id, count, site.line, b.expected, b.site.line);
  b.expected = count, b.site = site;
  release(*running_, b.joined);
  if (waits) b.waiting.push_back(running_->index);
  if (++b.arrived > b.expected) fault("barrier %d: more threads than the %d that it expects", id, count);
  if (b.arrived == b.expected)
    release_barrier(b);
  else if (waits)
    wait(site);
}

void Machine::release_barrier(NamedBarrier& b) {
  for (int i : b.waiting) {
    acquire(thread[i], b.joined);
    if (&thread[i] != running_) wake(i);
  }
  b = NamedBarrier{};
}

void Machine::gather(uint32_t mask, Site site, void* frame, void (*work)(void**, uint32_t), bool orders) {
  Thread& t = *running_;
  Warp& w = warp[t.warp()];
  if (!(mask >> t.lane() & 1)) fault("%s at line %d: the mask %08x lacks the caller", site.operation, site.line, mask);
  // a warp at the block's edge has fewer lanes: a full mask names those that never were, as hardware allows
  const int first = t.warp() * kWarp, count = threads - first < kWarp ? threads - first : kWarp;
  if (count < kWarp) mask &= (1u << count) - 1;
  if (mask & ~w.live)
    fault("%s at line %d: the mask %08x names threads that have exited", site.operation, site.line, mask);
  Gathering* g = nullptr;
  for (Gathering& one : w.gatherings) {
    if (!one.arrived || !(one.mask & mask)) continue;
    if (one.mask != mask || !(one.site == site))
      fault("warp-divergent %s: line %d with mask %08x, while others of its warp are at %s, line %d with mask %08x",
            site.operation, site.line, mask, one.site.operation, one.site.line, one.mask);
    g = &one;
  }
  if (!g)
    for (Gathering& one : w.gatherings)
      if (!one.arrived) g = &one;
  if (!g) g = &w.gatherings.emplace_back();
  g->mask = mask, g->site = site;
  g->arrived |= 1u << t.lane();
  g->frames[t.lane()] = frame;
  if (g->arrived != mask) return wait(site);
  void* frames[kWarp];
  for (int i = 0; i < kWarp; ++i) frames[i] = g->frames[i];
  g->arrived = 0;
  work(frames, mask);
  if (orders) {
    Vector joined;
    for (int i = 0; i < count; ++i)
      if (mask >> i & 1) release(thread[first + i], joined);
    for (int i = 0; i < count; ++i)
      if (mask >> i & 1) acquire(thread[first + i], joined);
  }
  for (int i = 0; i < count; ++i)
    if ((mask >> i & 1) && i != t.lane()) wake(first + i);
}

// ---- clocks ---------------------------------------------------------------------------------------------
Vector& Machine::vector_of(Thread& t) {
  const Vector& base = blocks[t.block].base;
  if (t.fresh) t.knows = base, t.fresh = false;
  if (t.knows.size() < base.size()) t.knows.resize(base.size(), 0);
  return t.knows;
}

void Machine::release(Thread& t, Vector& into) {
  join(into, t.fresh ? blocks[t.block].base : vector_of(t));
  into[t.index] = into[t.index] > t.clock ? into[t.index] : t.clock;
  ++t.clock;
}

void Machine::acquire(Thread& t, const Vector& from) { join(vector_of(t), from); }

void Machine::learn(Thread& t, int agent, uint32_t clock) {
  Vector& v = vector_of(t);
  v[agent] = v[agent] > clock ? v[agent] : clock;
}

int Machine::add_agent(const char* kind, int number) {
  for (Block& b : blocks) b.base.push_back(0);
  for (Thread& t : thread)
    if (!t.fresh) t.knows.push_back(0);
  agent_names_.emplace_back(kind, number);
  return agents() - 1;
}

std::string Machine::agent_name(int agent) const {
  if (agent < threads && current.peers == 1) return "thread " + std::to_string(agent);
  if (agent < threads) {
    const int of_block = threads / current.peers;
    return "thread " + std::to_string(agent % of_block) + " of block " + std::to_string(agent / of_block) +
           " of the cluster";
  }
  const auto& [kind, number] = agent_names_[agent - threads];
  return kind + std::string(" ") + std::to_string(number);
}

}  // namespace fastdit::simt
