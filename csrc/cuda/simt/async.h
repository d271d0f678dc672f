// Copies and matrix products that run beside the threads: cp.async, mbarrier, bulk and tensor copies, wgmma.
//
// eager: they happen when they are issued. lazy: when a thread waits for them and nothing else can run, oldest last.
// random: some time in between. Whichever it is, nobody may touch what they work on before the wait that orders it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"

namespace fastdit::simt {

constexpr int kMaxRank = 5, kWarpgroup = 128;
enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };  // as in a wgmma descriptor
enum class MmaType : int { bf16 = 0, f16 = 1, tf32 = 2 };

// A tensor as the copy engine sees it: dim 0 is contiguous, the strides of the others are in bytes.
struct TensorMap {
  const void* base;
  int rank, itemsize;
  int64_t dims[kMaxRank], strides[kMaxRank];
  int box[kMaxRank];
  Swizzle swizzle;
};

// Where byte `address` of a tile stands: 16-byte chunks are permuted inside rows of the pattern, by absolute address.
uint32_t swizzled(uint32_t address, Swizzle mode);

struct Barrier {
  const void* place;
  int block;  // whose shared memory it lies in
  int expected, pending;
  int64_t bytes = 0;  // still to come; negative when they came before they were announced
  uint64_t phase = 0;
  bool fenced = false;
  int made_by;
  uint32_t made_at;
  int agent[kMaxPeers] = {-1, -1};  // of the copies that each block of the cluster announces on it
  uint32_t copies[kMaxPeers] = {};
  Vector joined, done;
  std::vector<int> waiting;
  Vector remote;  // arrivals from other blocks of the cluster: a clock per thread
};

// A copy in chunks, issued and not yet landed.
struct Copy {
  struct Chunk {
    char* to;
    const char* from;  // null: zeros
    uint32_t bytes;
  };
  std::vector<Chunk> chunks;
  Barrier* barrier = nullptr;  // of a load
  int64_t bytes = 0;
  int agent = -1;
  uint32_t clock = 0;
  bool add = false;  // fp32 reduction to global memory
};

// One wgmma instruction of a warpgroup, complete when its 128 threads have issued it.
struct Product {
  Site site{};
  int arrived = 0, n = 0, k = 0;
  MmaType type{};
  bool a_registers = false, accumulate = true, executed = false, trans_a = false, trans_b = false;
  uint64_t a = 0, b = 0;
  float* d[kWarpgroup] = {};
  uint32_t a_values[kWarpgroup][4] = {};
  int group = -1;
};

class Async {
 public:
  void begin_block();
  void end_block();
  void block_ends(int rank, const Vector& knows);  // a block of a cluster, whose threads knew this at their ends
  void thread_exits(Thread& t);
  bool progress();  // nothing else can run: whether something could be done
  void progress_randomly();

  // ---- cp.async ------------------------------------------------------------------------------------------
  void copy(void* to, const void* from, int bytes, int filled);
  void copy_commit();
  void copy_wait(int groups);  // at most that many of the newest may be under way

  // ---- mbarrier ------------------------------------------------------------------------------------------
  void barrier_init(uint64_t* barrier, int count);
  void barrier_fence_init();
  void barrier_arrive(uint64_t* barrier, int64_t bytes);
  void barrier_arrive_at(uint32_t peer_address);
  void barrier_expect(uint64_t* barrier, int64_t bytes);
  void barrier_wait(uint64_t* barrier, int parity, Site site);

  // ---- bulk copies ---------------------------------------------------------------------------------------
  void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
  // peers: a bit per block of the cluster, in each of which the copy lands at the same place; 0: the running one alone
  void tensor_load(void* to, const TensorMap& map, const int* at, uint64_t* barrier, uint32_t peers = 0);
  void tensor_store(const TensorMap& map, const int* at, const void* from);
  void bulk_store(float* to, const float* from, uint32_t bytes, bool add);
  void store_commit();
  void store_wait(int groups, bool read_only);  // read_only: the source alone
  void proxy_fence();
  void must_fence(const Thread& t) { threads_[t.index].global_fenced = false; }  // after an acquire
  void proxy_fence_global();

  // ---- wgmma ---------------------------------------------------------------------------------------------
  void product_fence();
  void product(const Product& what, float* d, const uint32_t* a_values);
  void product_commit();
  void product_wait(int groups, Site site);

 private:
  struct Group {  // cp.async or bulk stores of a thread
    std::vector<Copy> copies;
    uint32_t clock = 0;  // of the last store
  };
  struct PerThread {
    std::vector<Group> loads{1}, stores{1};
    int store_agent = -1, source_agent = -1;  // what stores write, and what they read
    uint32_t store_clock = 0;
    bool product_fenced = false, global_fenced = true;
    int products = 0, committed = 0, groups = 0;
  };
  struct Warpgroup {
    std::vector<Product> products;
    std::vector<int> group_ends;  // products before the end of each group
    std::vector<int> waiting;
    int agent = -1;
  };

  Barrier& barrier(const void* place, const char* what);
  void arrive(const void* place, int64_t bytes);
  void issue(Copy copy, Barrier& b);
  void land(Copy& copy);
  void settle(Barrier& b);
  void perform(Copy& copy);
  PerThread& storing();
  std::vector<Copy::Chunk> tile(const TensorMap& map, const int* at, char* shared);
  void check_operands(const Product& p, int agent, uint32_t clock);
  void execute(Warpgroup& w, Product& p);
  bool complete(const Warpgroup& w, int end) const;

  std::vector<PerThread> threads_;
  std::vector<std::unique_ptr<Barrier>> barriers_;
  std::vector<Copy> in_flight_;
  std::vector<Warpgroup> warpgroups_;
};

Async& asynchronous();

}  // namespace fastdit::simt
