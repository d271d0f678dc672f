// Stackful coroutines: every CUDA thread of the simulated block is one. All of them run on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(FASTDIT_SIMT_UCONTEXT)
#include <ucontext.h>
#define FASTDIT_SIMT_PORTABLE 1
#endif

namespace fastdit::simt {

struct Fiber {
#if defined(FASTDIT_SIMT_PORTABLE)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

// Prepares `fiber` to run entry() on [stack, stack + bytes) when it is switched to for the first time. entry never
// returns: its last act is a switch.
void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());
void switch_to(Fiber& from, Fiber& to);

// One stack per thread, kept between launches, each above a page that faults.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 * 1024;

  ~Stacks();
  void reserve(int count);
  char* at(int i) const { return base_ + static_cast<size_t>(i) * (kBytes + kGuard) + kGuard; }

 private:
  static constexpr size_t kGuard = 4096;
  char* base_ = nullptr;
  int count_ = 0;
};

}  // namespace fastdit::simt
