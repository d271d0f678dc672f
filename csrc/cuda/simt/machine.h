// One thread block, or the blocks of one cluster, as fibers: who runs next, who waits for what, and which earlier event
// each thread knows of.
//
// Happens-before is kept as vector clocks. An agent is a thread of the block or something that works beside them (the
// bulk copies of an mbarrier, the matrix unit of a warpgroup). Each has a clock; a thread knows (agent, clock) when a
// chain of barriers leads there. After a barrier of the whole block everybody in it knows the same: `Block::base`; what
// a thread learned since stands in a vector of its own. Clusters of one launch know of each other by counters
// (counters.h). Threads, warps and agents are numbered through a cluster.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace fastdit::simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

enum class Schedule { eager, lazy, random };
constexpr int kWarp = 32, kMaxThreads = 1024, kMaxBarriers = 16, kMaxPeers = 2;

// Where an operation stands in the kernel's source.
struct Site {
  const char* operation;
  const char* file;
  int line;
  bool operator==(const Site& o) const {
    return line == o.line && !std::strcmp(operation, o.operation) && !std::strcmp(file, o.file);
  }
};

using Vector = std::vector<uint32_t>;  // a clock per agent
void join(Vector& into, const Vector& from);

struct Thread {
  Fiber fiber;
  int index = 0;  // in the cluster
  int block = 0;  // rank in the cluster
  Dim3 thread_idx;
  char *stack = nullptr, *stack_end = nullptr;
  bool exited = false;
  Site waits{};  // what it waits at, while it does
  std::string waits_for;

  uint32_t clock = 1;
  bool fresh = true;             // knows `base` and nothing since
  Vector knows;                  // unless fresh
  std::vector<uint32_t> fences;  // its clock at each fence.proxy.async
  int warp() const { return index / kWarp; }
  int lane() const { return index % kWarp; }
};

// Threads of a warp that came to one collective operation; the last of them does the work of all.
struct Gathering {
  uint32_t mask = 0, arrived = 0;
  Site site{};
  void* frames[kWarp] = {};
};

struct Warp {
  uint32_t live = 0;  // lanes that have not exited
  uint32_t aligned = 0;
  Site aligned_site{};  // the .aligned operation that `aligned` of its lanes have come to
  std::vector<Gathering> gatherings;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  Site site{};
  std::vector<int> waiting;
  Vector joined;
};

struct Block {
  Dim3 index;
  Vector base;
  NamedBarrier barriers[kMaxBarriers];
  int at_barrier = 0, live = 0;
  Site site{};  // of the barrier of the whole block
  Vector end;   // what its threads knew when they ended
};

struct ClusterBarrier {
  int arrived = 0;
  uint64_t phase = 0;
  std::vector<int> waiting;
  Vector joined, done;
};

class Async;  // async.h

struct Launch {
  const char* name;
  Dim3 grid, block;
  size_t dynamic_shared;
  std::function<void()> body;
  const void* parameters;  // of the kernel, which it may read
  size_t parameter_bytes;
  int peers = 1;  // blocks of a cluster, neighbours along x
};

class Machine {
 public:
  Machine();
  ~Machine();

  void launch(const Launch& launch);
  void set_schedule(Schedule schedule, uint64_t seed);
  Schedule schedule() const { return schedule_; }
  uint64_t random(uint64_t below) { return random_() % below; }

  // ---- what device code calls ------------------------------------------------------------------------
  Thread& self() { return *running_; }
  bool inside() const { return running_ != nullptr; }
  void block_barrier(Site site);
  void named_barrier(int id, int count, bool waits, Site site);
  void cluster_barrier(Site site);
  // All lanes of `mask` meet; `work` runs once, with a frame per lane. orders: each then knows what the others did.
  void gather(uint32_t mask, Site site, void* frame, void (*work)(void** frames, uint32_t mask), bool orders = false);
  // Waits until every live lane of the warp has come to this very operation.
  void aligned(Site site);
  void wait(Site site);  // until wake()
  void wake(int thread) { ready_[thread / 64] |= uint64_t{1} << (thread % 64); }
  void yield_randomly();
  [[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 2, 3)));

  // ---- what is known ---------------------------------------------------------------------------------
  int add_agent(const char* kind, int number);
  std::string agent_name(int agent) const;
  bool known(const Thread& t, int agent, uint32_t clock) const {
    return agent == t.index || clock <= blocks[t.block].base[agent] || (!t.fresh && clock <= t.knows[agent]);
  }
  // What t knows now, itself included; afterwards t's accesses are later ones.
  void release(Thread& t, Vector& into);
  void acquire(Thread& t, const Vector& from);
  void learn(Thread& t, int agent, uint32_t clock);
  int agents() const { return static_cast<int>(blocks[0].base.size()); }

  Launch current{};
  int threads = 0;                              // of the cluster
  uint32_t block_serial = 0, first_serial = 1;  // of the running cluster, and of the launch's first one
  std::vector<Block> blocks;                    // of the cluster
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  Async* async;

 private:
  static void entry();
  void run_blocks();
  int choose();
  bool any_ready() const;
  void deadlock();
  void leave();
  Vector& vector_of(Thread& t);
  void release_barrier(NamedBarrier& b);
  void finish_block_barrier(Block& b);
  void finish_cluster_barrier();
  std::string where() const;

  Fiber scheduler_;
  Stacks stacks_;
  Thread* running_ = nullptr;
  std::string fault_;
  uint64_t ready_[kMaxThreads / 64] = {};
  Schedule schedule_ = Schedule::eager;
  std::mt19937_64 random_{1};

  std::vector<std::pair<const char*, int>> agent_names_;  // beyond the threads
  ClusterBarrier cluster_;
  int live_ = 0;
};

Machine& machine();

// Code of the standard library may be shared between kernels and the simulator, with the kernels' checks in it; they
// are off while device code is inside a call of the simulator. `entered(machine())->...` is such a call.
bool checks_are_on();
int enter();
void leave(int before);
template <class T>
struct Entered {
  T* it;
  int before;
  explicit Entered(T& t) : it(&t), before(enter()) {}
  Entered(const Entered&) = delete;
  ~Entered() { leave(before); }
  T* operator->() const { return it; }
};
template <class T>
Entered<T> entered(T& t) {
  return Entered<T>(t);
}

Dim3 thread_index();
Dim3 block_index();
Dim3 block_size();
Dim3 grid_size();

}  // namespace fastdit::simt
