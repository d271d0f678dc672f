// A 128-bit digest of a weight's bytes: how the cache of packed weights sees every edit, also those without a version.
#include "fastdit/conv.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {

// Not cryptographic, but no single change goes unseen: every step of a lane is a bijection of its state.
void conv_hash(const ConvHashParams& p) {
  constexpr int64_t kChunk = 1 << 18;
  constexpr int kLanes = 64;
  const int64_t chunks = (p.bytes + kChunk - 1) / kChunk;
  Scratch<uint64_t> parts(2 * chunks);
  parallel_ranges(chunks, p.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const char* data = static_cast<const char*>(p.data) + chunk * kChunk;
      const int64_t bytes = p.bytes - chunk * kChunk < kChunk ? p.bytes - chunk * kChunk : kChunk;
      typedef uint32_t lanes_t __attribute__((vector_size(kLanes * 4)));
      lanes_t h = lanes_t{} + 0x811c9dc5u, word;
      int64_t i = 0;
      for (; i + kLanes * 4 <= bytes; i += kLanes * 4) {
        __builtin_memcpy(&word, data + i, kLanes * 4);
        h = (h ^ word) * 0x9e3779b1u;
        h ^= h >> 15;
      }
      word = lanes_t{};
      __builtin_memcpy(&word, data + i, bytes - i);
      h = (h ^ word) * 0x9e3779b1u;
      uint64_t a = 0xcbf29ce484222325u, b = 0x84222325cbf29ce4u;
      for (int lane = 0; lane < kLanes; ++lane) {
        a = (a ^ h[lane]) * 0x9e3779b97f4a7c15u;
        a ^= a >> 29;
        b = (b + h[lane]) * 0xbf58476d1ce4e5b9u;
        b ^= b >> 31;
      }
      parts.get()[2 * chunk] = a;
      parts.get()[2 * chunk + 1] = b;
    }
  });
  uint64_t a = static_cast<uint64_t>(p.bytes), b = ~a;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    a = (a ^ parts.get()[2 * chunk]) * 0x9e3779b97f4a7c15u;
    a ^= a >> 29;
    b = (b + parts.get()[2 * chunk + 1]) * 0xbf58476d1ce4e5b9u;
    b ^= b >> 31;
  }
  p.digest[0] = a;
  p.digest[1] = b;
}

}  // namespace fastdit::cpu::FASTDIT_ISA
