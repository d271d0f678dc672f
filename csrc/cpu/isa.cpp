#include "fastdit/isa.h"

#include <pthread.h>
#include <unistd.h>

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

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}
Isa current_isa() { return slot(); }
void set_isa(const char* name) { slot() = parse(name); }
const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool in_forked_child() { return forked; }
int64_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t{32} << 20;
}

}  // namespace fastdit
