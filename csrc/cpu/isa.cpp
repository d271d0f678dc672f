#include "fastdit/isa.h"

#include <pthread.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastdit {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
bool forked = false;

Isa detect() {
#if defined(FASTDIT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa parse(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) {
      if (i > static_cast<int>(best_isa()))
        throw std::invalid_argument("FASTDIT_CPU_ISA: this machine cannot run it; got " + name + ", expected at most " +
                                    isa_name(best_isa()) + "; choose a smaller one");
      return static_cast<Isa>(i);
    }
  }
  throw std::invalid_argument("FASTDIT_CPU_ISA: unknown name; got " + name +
                              ", expected portable, avx2, avx512 or avx512_bf16; unset it for the best one");
}

Isa& slot() {
  static Isa isa = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    const char* forced = std::getenv("FASTDIT_CPU_ISA");
    return forced && *forced ? parse(forced) : best_isa();
  }();
  return isa;
}

// Not sysconf's: on AMD glibc multiplies what one group of cores shares by a number of groups that a guest may not have
// (320 MB for 32).
int64_t& cache_slot() {
  static int64_t size = [] {
    int64_t kib = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
      std::fclose(file);
    }
    return kib > 0 ? kib << 10 : int64_t{32} << 20;
  }();
  return size;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}
Isa current_isa() { return slot(); }
void set_isa(const char* name) { slot() = parse(name); }
const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool in_forked_child() { return forked; }
int64_t last_level_cache() { return cache_slot(); }
void set_last_level_cache(int64_t bytes) { cache_slot() = bytes; }

}  // namespace fastdit
