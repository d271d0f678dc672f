// 16-bit floating point on the host, to the bit as the card rounds: to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "async.h"

namespace fastdit::simt {

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the card's one NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return float_of(sign | ((rest << 13) + 0x38000000u));
  const float f = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -f : f;
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits_of(f), a = u & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));
  }
  const uint32_t r = a - 0x38000000u;
  return static_cast<uint16_t>(sign | (r + 0xfffu + (r >> 13 & 1u)) >> 13);
}

// An operand of the matrix unit; tf32 drops 13 bits.
inline float widen(const void* p, MmaType type) {
  if (type == MmaType::tf32) {
    uint32_t u;
    std::memcpy(&u, p, 4);
    return float_of(u & 0xffffe000u);
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return type == MmaType::bf16 ? bf16_to_float(h) : half_to_float(h);
}

}  // namespace fastdit::simt
