// Kernels are compiled with -fsanitize=thread and linked without its library: the calls that g++ puts before every
// load and store come here, so each is checked as what it is, an access of the CUDA thread that runs.
#include "memory.h"

using fastdit::simt::Access;

static void check(const void* p, size_t bytes, Access kind) {
  if (fastdit::simt::checks_are_on()) fastdit::simt::entered(fastdit::simt::memory())->access(p, bytes, kind);
}

extern "C" {
#define FASTDIT_HOOK(name, bytes)                                    \
  void __tsan_read##name(void* p) { check(p, bytes, Access::read); } \
  void __tsan_write##name(void* p) { check(p, bytes, Access::write); }
FASTDIT_HOOK(1, 1)
FASTDIT_HOOK(2, 2)
FASTDIT_HOOK(4, 4)
FASTDIT_HOOK(8, 8)
FASTDIT_HOOK(16, 16)
#undef FASTDIT_HOOK
// g++ calls an access unaligned when it cannot prove otherwise (a packed struct); the machine still wants alignment
#define FASTDIT_HOOK(name, bytes)                                              \
  void __tsan_unaligned_read##name(void* p) { check(p, bytes, Access::read); } \
  void __tsan_unaligned_write##name(void* p) { check(p, bytes, Access::write); }
FASTDIT_HOOK(2, 2)
FASTDIT_HOOK(4, 4)
FASTDIT_HOOK(8, 8)
FASTDIT_HOOK(16, 16)
#undef FASTDIT_HOOK
void __tsan_read_range(void* p, unsigned long bytes) { check(p, bytes, Access::read); }
void __tsan_write_range(void* p, unsigned long bytes) { check(p, bytes, Access::write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
