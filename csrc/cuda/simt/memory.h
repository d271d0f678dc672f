// Shadow memory: what every two bytes of shared and global memory allow, who wrote them and who read them last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace fastdit::simt {

enum class Access { read, write, atomic, add };  // add: to what is there, in an order that must be known

struct Cell {
  enum : uint16_t {
    readable = 1,
    writable = 2,
    initialised = 4,
    by_async = 8,  // written by a bulk copy or read so: no generic access, no fence needed between two of them
    by_atomic = 16,
    in_flight = 32,  // an asynchronous copy will write it
  };
  uint16_t flags = 0;
  uint16_t writer = 0;
  uint32_t write_block = 0, write_clock = 0;  // block 0: nobody
  struct Reader {
    uint32_t block = 0, clock = 0;
    uint16_t agent = 0, async = 0;
  } reader[2];  // the last ones among even and odd warps (or agents): a race with either is seen
};

// Who reads or writes, when not the running thread itself: an asynchronous copy or the matrix unit.
struct Agent {
  int number;
  uint32_t clock;
};

class Memory {
 public:
  static constexpr size_t kSharedBytes = 228 * 1024;  // of a Hopper multiprocessor; a block may have 1024 fewer
  static constexpr size_t kSharedBlock = 227 * 1024;
  static constexpr int kRankBit = 24;  // of a shared::cluster address: above it stands the block's rank + 1

  Memory();

  // ---- global memory -------------------------------------------------------------------------------------
  // A tensor's elements: sizes and strides in elements. Reading what was never written is a fault, unless `filled`.
  void allow(uintptr_t address, int itemsize, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             bool filled, bool writable);
  void forget() { pages_.clear(), last_page_ = nullptr, last_number_ = 0; }

  // ---- shared memory -------------------------------------------------------------------------------------
  void begin_block(size_t dynamic_bytes, int blocks);
  // A static variable of the kernel: the same place for every thread of the block, and in every block of the cluster.
  char* shared_static(const void* key, size_t bytes, size_t align);
  // Aligned as declared, and deliberately no better.
  char* shared_dynamic(size_t align);
  bool is_shared(const void* p) const {
    return static_cast<size_t>(static_cast<const char*>(p) - shared_) < kMaxPeers * kArena;
  }
  int block_of(const void* p) const { return static_cast<int>((static_cast<const char*>(p) - shared_) / kArena); }
  uint32_t shared_address(const void* p);  // in its block
  uint32_t peer_address(const void* p, int rank);
  char* in_block(const void* p, int rank) { return from_shared_address(peer_address(p, rank), 1); }
  // address: in the running block, or a peer_address()
  char* from_shared_address(uint32_t address, size_t bytes);

  // ---- accesses ------------------------------------------------------------------------------------------
  // By the running thread. Faults: bounds, alignment, never written, races, copies in flight.
  void access(const void* p, size_t bytes, Access kind);
  // By an agent beside the threads, issued by the running thread: it must know of everything that it depends on.
  void access_async(const void* p, size_t bytes, Access kind, const Thread& issuer, Agent agent);
  void mark_in_flight(const void* p, size_t bytes);
  void land(const void* p, size_t bytes, Agent agent, bool by_async);

 private:
  static constexpr size_t kPage = 4096, kCell = 2, kArena = kSharedBytes + 4096;
  using Page = Cell[kPage / kCell];

  Cell* cell(uintptr_t address);  // null: nobody's
  Cell* global_cell(uintptr_t address);
  Cell* cells(const void* p, size_t bytes, Access kind);
  void check(Cell& c, const void* p, Access kind, const Thread& t, const Agent* agent);
  [[noreturn]] void race(const Cell& c, const void* p, const char* now, const char* then, int other, uint32_t block);
  bool fenced(const Thread& reader, int writer, uint32_t clock) const;
  const char* space(const void* p) const { return is_shared(p) ? "shared" : "global"; }

  struct Static {
    const void* key;
    size_t at;
  };
  char* own(size_t offset);  // in the running block
  void allow_shared(size_t from);
  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  Cell* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
  char* shared_;
  std::vector<Cell> shared_cells_;
  std::vector<Static> statics_;
  size_t shared_used_ = 0, dynamic_bytes_ = 0;
  size_t dynamic_ = 0, dynamic_align_ = 0;  // no alignment: not declared so far
  int blocks_ = 1;
};

Memory& memory();
void raw_copy(void* to, const void* from, size_t bytes);  // of what was checked already

}  // namespace fastdit::simt
