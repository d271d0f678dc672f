// A tensor as the copy engine sees it. encode() is called on the host; kernels take the result as
// `const __grid_constant__ TensorMap`.
#pragma once

#include "fastdit/dtype.h"
#include "launch.h"
#include "ptx.h"
#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace fastdit::cuda {

enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };  // as in a wgmma descriptor

// Dim 0 is contiguous; strides of the others in elements. Elements outside of the tensor are read as zeros.
struct TensorShape {
  const void* base;
  DType dtype;
  int rank;
  int64_t dims[5], strides[5];
  int box[5];
  Swizzle swizzle;
};

// From one element of dim d to the next, in bytes. What torch says of a dim of size 1 has no meaning; any will do that
// the engine takes, so that of the dim before.
inline void byte_strides(const TensorShape& t, int64_t (&to)[5]) {
  const int64_t size = static_cast<int64_t>(itemsize(t.dtype));
  to[0] = size;
  for (int d = 1; d < t.rank; ++d)
    to[d] = t.dims[d] != 1 ? t.strides[d] * size : d == 1 ? (t.dims[0] * size + 15) / 16 * 16 : to[d - 1];
}

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

inline TensorMap encode(const TensorShape& t, const char* op, const std::string& sizes) {
  // looked up at run time: the module must import where there is no driver
  static void* const entry = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status), op,
          sizes, "cudaGetDriverEntryPoint");
    return found;
  }();
  if (!entry) raise(op, sizes, "cuTensorMapEncodeTiled", "a driver without it");
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  cuuint64_t dims[5], strides[5];
  cuuint32_t box[5], steps[5];
  int64_t bytes[5];
  byte_strides(t, bytes);
  for (int d = 0; d < t.rank; ++d) {
    dims[d] = t.dims[d], box[d] = t.box[d], steps[d] = 1;
    if (d) strides[d - 1] = bytes[d];
  }
  TensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, types[static_cast<int>(t.dtype)], t.rank, const_cast<void*>(t.base), dims, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(t.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    raise(op, sizes, "cuTensorMapEncodeTiled", ("CUresult " + std::to_string(static_cast<int>(status))).c_str());
  return map;
}

#else

using TensorMap = simt::TensorMap;

inline TensorMap encode(const TensorShape& t, const char* op, const std::string& sizes) {
  TensorMap map{t.base, t.rank, static_cast<int>(itemsize(t.dtype)), {}, {}, {}, static_cast<simt::Swizzle>(t.swizzle)};
  bool legal = reinterpret_cast<uintptr_t>(t.base) % 16 == 0 && t.rank >= 1 && t.rank <= 5;
  byte_strides(t, map.strides);
  for (int d = 0; d < t.rank; ++d) {
    map.dims[d] = t.dims[d], map.box[d] = t.box[d];
    legal = legal && t.box[d] >= 1 && t.box[d] <= 256;
    if (d) legal = legal && map.strides[d] % 16 == 0 && map.strides[d] >= 0 && map.strides[d] < int64_t{1} << 40;
  }
  if (!legal) raise(op, sizes, "cuTensorMapEncodeTiled", "CUresult 1");
  return map;
}

#endif

// ---- copies of a box: `at` is its first element, dim 0 first ----------------------------------------------
// tensor_load_peers: to the same place of every block of the cluster whose bit `peers` has, each copy announced on the
// block's own mbarrier at the same place as this one.
#if defined(__CUDACC__)
#define FASTDIT_TENSOR_COPY(rank, next, list, ...)                                                              \
  __device__ __forceinline__ void tensor_load(void* to, const TensorMap& map, const int (&at)[rank],            \
                                              uint64_t* barrier) {                                              \
    asm volatile("cp.async.bulk.tensor." #rank                                                                  \
                 "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" list                      \
                 "}], [%2];" ::"r"(shared_address(to)),                                                         \
                 "l"(&map), "r"(shared_address(barrier)), __VA_ARGS__                                           \
                 : "memory");                                                                                   \
  }                                                                                                             \
  __device__ __forceinline__ void tensor_load_peers(void* to, const TensorMap& map, const int (&at)[rank],      \
                                                    uint64_t* barrier, uint16_t peers) {                        \
    asm volatile("cp.async.bulk.tensor." #rank                                                                  \
                 "d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" list   \
                 "}], [%2], %" #next ";" ::"r"(shared_address(to)),                                             \
                 "l"(&map), "r"(shared_address(barrier)), __VA_ARGS__, "h"(peers)                               \
                 : "memory");                                                                                   \
  }                                                                                                             \
  __device__ __forceinline__ void tensor_store(const TensorMap& map, const int (&at)[rank], const void* from) { \
    asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.bulk_group [%1, {" list                    \
                 "}], [%0];" ::"r"(shared_address(from)),                                                       \
                 "l"(&map), "r"(0), __VA_ARGS__                                                                 \
                 : "memory");                                                                                   \
  }
FASTDIT_TENSOR_COPY(1, 4, "%3", "r"(at[0]))
FASTDIT_TENSOR_COPY(2, 5, "%3, %4", "r"(at[0]), "r"(at[1]))
FASTDIT_TENSOR_COPY(3, 6, "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]))
FASTDIT_TENSOR_COPY(4, 7, "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]))
FASTDIT_TENSOR_COPY(5, 8, "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]))
#undef FASTDIT_TENSOR_COPY
#else
template <int rank>
void tensor_load(void* to, const TensorMap& map, const int (&at)[rank], uint64_t* barrier) {
  async()->tensor_load(to, map, at, barrier);
}
template <int rank>
void tensor_load_peers(void* to, const TensorMap& map, const int (&at)[rank], uint64_t* barrier, uint16_t peers) {
  async()->tensor_load(to, map, at, barrier, peers);
}
template <int rank>
void tensor_store(const TensorMap& map, const int (&at)[rank], const void* from) {
  async()->tensor_store(map, at, from);
}
#endif

}  // namespace fastdit::cuda
