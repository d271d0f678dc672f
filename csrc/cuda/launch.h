// From the host to a kernel: where to run, and every error raised with the op, its sizes and the driver's own text.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "fastdit/dtype.h"
#include "platform.h"
#include "stream.h"

namespace fastdit::cuda {

[[noreturn]] inline void raise(const char* op, const std::string& sizes, const char* what, const char* text) {
  throw std::runtime_error(std::string(op) + ": " + what + " failed; got " + text + ", expected success for " + sizes +
                           "; an earlier kernel of this process may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which");
}

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* op, const std::string& sizes, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // errors that are not sticky end here
  raise(op, sizes, what, (std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")").c_str());
}

inline int processors(int device) {
  static int known[64] = {};
  if (device < 0 || device >= 64) throw std::invalid_argument("cuda: no device " + std::to_string(device));
  if (!known[device]) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cuda",
          "device " + std::to_string(device), "cudaDeviceGetAttribute");
    known[device] = count;
  }
  return known[device];
}

// Bytes of shared memory that a block may ask for.
inline int shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cuda",
        "device " + std::to_string(device), "cudaDeviceGetAttribute");
  return bytes;
}

template <class Kernel>
void prepare_launch(Kernel* kernel, size_t shared, Stream stream, const char* op, const std::string& sizes) {
  check(cudaSetDevice(stream.device), op, sizes, "cudaSetDevice");
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), op,
          sizes, "cudaFuncSetAttribute");
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, const char* op,
            const std::string& sizes, A&&... arguments) {
  prepare_launch(kernel, shared, stream, op, sizes);
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream.handle)>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), op, sizes, "the launch");
}

// Clusters of `peers` blocks, neighbours along x; grid.x is a multiple of it.
template <class... P, class... A>
void launch_clusters(int peers, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream,
                     const char* op, const std::string& sizes, A&&... arguments) {
  prepare_launch(kernel, shared, stream, op, sizes);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(peers), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = block, how.dynamicSmemBytes = shared;
  how.stream = static_cast<cudaStream_t>(stream.handle), how.attrs = &cluster, how.numAttrs = 1;
  const std::string what = "the launch of clusters of " + std::to_string(peers) + " blocks";
  const cudaError_t status = cudaLaunchKernelEx(&how, kernel, static_cast<P>(arguments)...);
  check(status == cudaSuccess ? cudaGetLastError() : status, op, sizes, what.c_str());
}

#else

inline int processors(int) { return 4; }
inline int shared_limit(int) { return static_cast<int>(simt::Memory::kSharedBlock); }

template <class... P, class... A>
void launch_clusters(int peers, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, const char* op,
                     const std::string&, A&&... arguments) {
  const struct {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> parameters;
  } call{kernel, {static_cast<P>(arguments)...}};
  simt::machine().launch(
      {op, grid, block, shared, [&call] { std::apply(call.kernel, call.parameters); }, &call, sizeof(call), peers});
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, const char* op,
            const std::string& sizes, A&&... arguments) {
  launch_clusters(1, kernel, grid, block, shared, stream, op, sizes, std::forward<A>(arguments)...);
}

#endif

// Returns run<T>(...) for the dtype of a call.
#define FASTDIT_DTYPE(dtype, run, ...) \
  switch (static_cast<DType>(dtype)) { \
    case DType::f32:                   \
      return run<float>(__VA_ARGS__);  \
    case DType::bf16:                  \
      return run<bf16>(__VA_ARGS__);   \
    default:                           \
      return run<f16>(__VA_ARGS__);    \
  }

// Returns run<T, U>(...): `other` is the dtype itself or fp32.
#define FASTDIT_DTYPES(dtype, other, run, ...)                                                  \
  switch (static_cast<DType>(dtype)) {                                                          \
    case DType::f32:                                                                            \
      return run<float, float>(__VA_ARGS__);                                                    \
    case DType::bf16:                                                                           \
      return (other) == (dtype) ? run<bf16, bf16>(__VA_ARGS__) : run<bf16, float>(__VA_ARGS__); \
    default:                                                                                    \
      return (other) == (dtype) ? run<f16, f16>(__VA_ARGS__) : run<f16, float>(__VA_ARGS__);    \
  }

}  // namespace fastdit::cuda
