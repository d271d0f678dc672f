// Counters in global memory, by which the blocks of a launch take turns: a block releases what it has done when it
// raises one, and who waits for that value knows of it.
//
// Blocks run one after the other (those of a cluster beside each other), so a wait is over at once or never: what it
// waits for must have been done by a block that ran before. A block knows of others through its counters alone.
#pragma once

#include <unordered_map>

#include "machine.h"

namespace fastdit::simt {

class Counters {
 public:
  void begin_launch();
  void begin_block();
  void raise(int* counter);
  void wait(const int* counter, int value, Site site);
  // Whether t knows what `agent` of an earlier block had done at its `clock`.
  bool known(const Thread& t, uint32_t block, int agent, uint32_t clock) const;

 private:
  struct Release {
    uint32_t block;
    Vector knows;
    std::vector<int> before;  // releases that it follows
    bool covers(uint32_t b, int agent, uint32_t at) const {
      return block == b && agent < static_cast<int>(knows.size()) && knows[agent] >= at;
    }
  };
  struct Waiter {  // a thread of the running block; its waits are an agent's clock
    int thread, agent;
    std::vector<int> acquired;
  };
  size_t acquired(const Thread& t, const Waiter& w) const;  // how many of them t knows of

  std::vector<Release> releases_;               // of the launch
  std::unordered_map<const int*, int> newest_;  // of a counter
  std::vector<Waiter> waiters_;
  std::vector<std::pair<const int*, int>> asleep_;  // thread that waits at a counter
};

Counters& counters();

}  // namespace fastdit::simt
