// Where pixels, padding and channels of a video lie: what the conv kernels share.
#pragma once

#include <stdexcept>
#include <string>

#include "conv.h"
#include "launch.h"
#include "packs.h"

namespace fastdit::cuda {

constexpr int kAxes = 5;  // B, C, T, H, W

// The index of [0, n) whose value padding repeats at i; outside of it where there is none.
__device__ __forceinline__ int fold(int i, int n, int pad) {
  if (pad == static_cast<int>(Pad::edge)) return min(max(i, 0), n - 1);
  if (pad == static_cast<int>(Pad::reflect)) {
    i = i < 0 ? -i : i;
    return i < n ? i : 2 * (n - 1) - i;
  }
  return i;
}

// How many of start, start + step, ... (`most` of them) lie below `limit`.
__host__ __device__ inline int taps_before(int start, int limit, int step, int most) {
  return limit > start ? min((limit - start + step - 1) / step, most) : 0;
}

// Frames of the kernel that meet a frame of cat(cache, x), whose tap 0 is frame `first`.
struct TapRange {
  int begin, end;
};
__device__ __forceinline__ TapRange taps_of(const ConvParams& p, int first) {
  const int count = static_cast<int>(p.kernel[0]), step = static_cast<int>(p.dilation[0]);
  if (p.time_pad != static_cast<int>(Pad::zeros)) return {0, count};
  return {taps_before(first, 0, step, count), taps_before(first, static_cast<int>(p.cache_t + p.t), step, count)};
}

// A frame of cat(cache, x): its first element, and the strides of its rows and columns.
template <class T>
struct Frame {
  const T* data;
  int64_t stride_h, stride_w;
};
template <class T>
__device__ __forceinline__ Frame<T> frame_of(const ConvParams& p, int b, int frame) {
  const int cached = static_cast<int>(p.cache_t), frames = cached + static_cast<int>(p.t);
  if (p.time_pad != static_cast<int>(Pad::zeros)) frame = min(max(frame, 0), frames - 1);
  const bool old = frame < cached;
  const auto stride = [&](int axis) { return old ? p.cache_stride[axis] : p.x_stride[axis]; };
  return {static_cast<const T*>(old ? p.cache : p.x) + b * stride(0) + (old ? frame : frame - cached) * stride(2),
          stride(3), stride(4)};
}

template <int threads, class F>
__device__ __forceinline__ void each(int count, F&& body) {
#pragma unroll 1  // for registers
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) body(i);
}

inline std::string sizes(const ConvParams& p) {
  return "B=" + std::to_string(p.n) + " C=" + std::to_string(p.cin) + " Cout=" + std::to_string(p.cout) +
         " T=" + std::to_string(p.to) + " H=" + std::to_string(p.ho) + " W=" + std::to_string(p.wo) +
         " dtype=" + std::to_string(p.dtype);
}

inline unsigned grid(int64_t blocks, const char* op, const std::string& of) {
  if (blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(op) + ": too many blocks; got " + of + ", expected fewer than 2^31");
  return static_cast<unsigned>(blocks);
}

// Channels adjacent, every pixel on 16 bytes.
inline bool packed(const void* data, const int64_t (&stride)[kAxes], int itemsize) {
  return (stride[1] == 1) && fits(data, itemsize, 16 / itemsize, {stride[0], stride[2], stride[3], stride[4]});
}

// `others`: likewise of what else the kernel reads in packs.
inline void check_packed(const ConvParams& p, bool others, const char* op) {
  const int size = static_cast<int>(itemsize(static_cast<DType>(p.dtype)));
  if (!others || !packed(p.x, p.x_stride, size) || (p.cache_t && !packed(p.cache, p.cache_stride, size)))
    throw std::invalid_argument(std::string(op) + ": tensors must have adjacent channels on 16 bytes; got " + sizes(p));
}

// As the forward's kernels take them: checked, and frames that are one run of pixels as one row.
ConvParams conv_checked(const ConvParams& given, const ConvTaps& taps, const char* op);

}  // namespace fastdit::cuda
