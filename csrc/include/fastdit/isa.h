// Runtime choice of instruction set. Every csrc/cpu/<family>.cpp is compiled once per ISA, in its own namespace.
#pragma once

#include <cstdint>

namespace fastdit {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa best_isa();                  // what this machine has
Isa current_isa();               // best_isa(), or what FASTDIT_CPU_ISA / set_isa asked for
void set_isa(const char* name);  // throws std::invalid_argument with the reason
const char* isa_name(Isa isa);
bool in_forked_child();  // after fork() OpenMP pools are gone: run on one thread
// Bytes of the last cache. Tests set it, to 0 for outputs of any size to bypass it.
int64_t last_level_cache();
void set_last_level_cache(int64_t bytes);
// Whether outputs of so many bytes bypass the caches, where their stores can.
inline bool outgrow_caches(int64_t bytes) { return bytes > last_level_cache() / 2; }

}  // namespace fastdit

#if defined(FASTDIT_X86)
#define FASTDIT_FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FASTDIT_FOR_EACH_ISA(X) X(portable)
#endif

// FASTDIT_ENTRY(name, Params): declares fastdit::cpu::<isa>::name(const Params&) for every ISA compiled in,
// and fastdit::cpu::name, which calls the current one.
#if defined(FASTDIT_X86)
#define FASTDIT_ENTRY(name, Params)     \
  namespace portable {                  \
  void name(const Params&);             \
  }                                     \
  namespace avx2 {                      \
  void name(const Params&);             \
  }                                     \
  namespace avx512 {                    \
  void name(const Params&);             \
  }                                     \
  namespace avx512_bf16 {               \
  void name(const Params&);             \
  }                                     \
  inline void name(const Params& p) {   \
    switch (::fastdit::current_isa()) { \
      case ::fastdit::Isa::avx512_bf16: \
        return avx512_bf16::name(p);    \
      case ::fastdit::Isa::avx512:      \
        return avx512::name(p);         \
      case ::fastdit::Isa::avx2:        \
        return avx2::name(p);           \
      default:                          \
        return portable::name(p);       \
    }                                   \
  }
#else
#define FASTDIT_ENTRY(name, Params) \
  namespace portable {              \
  void name(const Params&);         \
  }                                 \
  inline void name(const Params& p) { portable::name(p); }
#endif
