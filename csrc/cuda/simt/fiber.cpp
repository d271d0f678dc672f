#include "fiber.h"

#include <sys/mman.h>

#include <new>

namespace fastdit::simt {

#if defined(FASTDIT_SIMT_PORTABLE)

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// The System V ABI keeps six registers across a call; the floating-point control words never change here. ucontext
// makes two system calls per pair of switches, which is half of the simulator's time.
extern "C" void fastdit_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl fastdit_simt_switch
.hidden fastdit_simt_switch
.type fastdit_simt_switch, @function
fastdit_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastdit_simt_switch, .-fastdit_simt_switch
)");

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  // six registers, the address to return to, and a return address that nobody takes: at entry the stack is 8 off a
  // multiple of 16, as after a call
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_to(Fiber& from, Fiber& to) { fastdit_simt_switch(&from.stack_pointer, to.stack_pointer); }

#endif

Stacks::~Stacks() {
  if (base_) munmap(base_, static_cast<size_t>(count_) * (kBytes + kGuard));
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (base_) munmap(base_, static_cast<size_t>(count_) * (kBytes + kGuard));
  const size_t bytes = static_cast<size_t>(count) * (kBytes + kGuard);
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(found);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(at(i) - kGuard, kGuard, PROT_NONE);
}

}  // namespace fastdit::simt
