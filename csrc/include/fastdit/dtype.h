// Element types as they travel from Python: a code in the parameter structs, a POD type in the kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdit {

// Codes are mirrored by fastdit.backends.cpu._abi.DTYPE.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t itemsize(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

}  // namespace fastdit

// The only dtype dispatch: calls `body` with T bound to the element type of `code`.
#define FASTDIT_DTYPE_SWITCH(code, T, ...)       \
  switch (static_cast<::fastdit::DType>(code)) { \
    case ::fastdit::DType::f32: {                \
      using T = float;                           \
      __VA_ARGS__;                               \
      break;                                     \
    }                                            \
    case ::fastdit::DType::bf16: {               \
      using T = ::fastdit::bf16;                 \
      __VA_ARGS__;                               \
      break;                                     \
    }                                            \
    case ::fastdit::DType::f16: {                \
      using T = ::fastdit::f16;                  \
      __VA_ARGS__;                               \
      break;                                     \
    }                                            \
    case ::fastdit::DType::f64: {                \
      using T = double;                          \
      __VA_ARGS__;                               \
      break;                                     \
    }                                            \
  }
