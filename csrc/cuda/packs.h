// Channels as they travel: W neighbours of one dtype in one access (two where 16 bytes do not hold them), math in fp32.
#pragma once

#include "fastdit/dtype.h"
#include "platform.h"

namespace fastdit::cuda {

// ---- one value --------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
#if defined(__CUDACC__)
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
#else
inline float to_float(bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(f16 x) { return simt::half_to_float(x.bits); }
#endif

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
#if defined(__CUDACC__)
  } else if constexpr (std::is_same_v<T, bf16>) {
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return f16{__half_as_ushort(__float2half_rn(x))};
#else
  } else if constexpr (std::is_same_v<T, bf16>) {
    return bf16{simt::float_to_bf16(x)};
  } else {
    return f16{simt::float_to_half(x)};
#endif
  }
}

// As eager code stores it between two operations, where `native` is the law.
template <class T, bool native>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (native && !std::is_same_v<T, float>) return to_float(from_float<T>(x));
  return x;
}

// ---- packs ------------------------------------------------------------------------------------------------
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T, int W>
struct Pack {
  static constexpr int bytes = W * static_cast<int>(sizeof(T)), piece = bytes < 16 ? bytes : 16, pieces = bytes / piece;
  using word = typename Word<piece>::type;
  union {
    word words[pieces];
    T values[W];
  };
  __device__ Pack() {}
};

// For tensors that are read once: they do not displace what the kernel reads again.
template <int W, class T>
__device__ __forceinline__ Pack<T, W> load_once(const T* p) {
  Pack<T, W> v;
  const auto* from = reinterpret_cast<const typename Pack<T, W>::word*>(p);
#pragma unroll
  for (int i = 0; i < v.pieces; ++i) v.words[i] = __ldcs(from + i);
  return v;
}
template <int W, class T>
__device__ __forceinline__ Pack<T, W> load_again(const T* p) {
  Pack<T, W> v;
  const auto* from = reinterpret_cast<const typename Pack<T, W>::word*>(p);
#pragma unroll
  for (int i = 0; i < v.pieces; ++i) v.words[i] = __ldg(from + i);
  return v;
}
template <class T, int W>
__device__ __forceinline__ void store_once(T* p, const Pack<T, W>& v) {
  auto* to = reinterpret_cast<typename Pack<T, W>::word*>(p);
#pragma unroll
  for (int i = 0; i < v.pieces; ++i) __stcs(to + i, v.words[i]);
}

template <class T, int W>
__device__ __forceinline__ void widen(const Pack<T, W>& from, float (&to)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = to_float(from.values[i]);
}
template <class T, int W>
__device__ __forceinline__ Pack<T, W> narrow(const float (&from)[W]) {
  Pack<T, W> v;
#pragma unroll
  for (int i = 0; i < W; ++i) v.values[i] = from_float<T>(from[i]);
  return v;
}

// W values of a tensor whose dtype only the parameters know, at element `at`.
template <int W>
__device__ __forceinline__ void load_as(const void* p, int dtype, int64_t at, float (&to)[W]) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return widen(load_again<W>(static_cast<const float*>(p) + at), to);
    case DType::bf16:
      return widen(load_again<W>(static_cast<const bf16*>(p) + at), to);
    default:
      return widen(load_again<W>(static_cast<const f16*>(p) + at), to);
  }
}
template <int W>
__device__ __forceinline__ void store_as(void* p, int dtype, int64_t at, const float (&from)[W]) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return store_once(static_cast<float*>(p) + at, narrow<float, W>(from));
    case DType::bf16:
      return store_once(static_cast<bf16*>(p) + at, narrow<bf16, W>(from));
    default:
      return store_once(static_cast<f16*>(p) + at, narrow<f16, W>(from));
  }
}

// Whether every access of W elements lies on its alignment: an address and the strides that are added to it, in
// elements.
inline bool fits(const void* p, int itemsize, int W, std::initializer_list<int64_t> strides) {
  const int piece = W * itemsize < 16 ? W * itemsize : 16;
  if (reinterpret_cast<uintptr_t>(p) % piece) return false;
  for (int64_t s : strides)
    if (s * itemsize % piece) return false;
  return true;
}

}  // namespace fastdit::cuda
