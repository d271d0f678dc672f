// GEMMs of one tile shape on the warp's and on the warpgroup's matrix unit, each with the mistakes that the simulator
// must see. They are no library kernels: they are the smallest that use every instruction of ptx.h and wgmma.h.
#include <map>
#include <stdexcept>

#include "../packs.h"
#include "../tensor_map.h"
#include "../wgmma.h"
#include "tiles.h"

namespace fastdit::cuda {
namespace {

enum Fault {
  kSound,
  kNoFullWait,
  kWrongParity,
  kNoEmptyWait,
  kEarlyRelease,
  kNoProductWait,
  kNoFence,
  kHalfBytes,
  kWrongStride,
  kNoProxyFence,
  kNoCopyWait
};

// ---- mma.sync: a warp, 16 x 16 of C, 16 of K at a time ---------------------------------------------------------
template <bool transposed, Fault fault>
__global__ void gemm_mma(float* C, const bf16* A, const bf16* B, int M, int N, int K) {
  FASTDIT_SHARED_ALIGNED(bf16[16][16], a_tile, 16);
  FASTDIT_SHARED_ALIGNED(bf16[16][16], b_tile, 16);
  const int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 16;
  float d[2][4] = {};
  for (int k = 0; k < K; k += 16) {
    const int r = lane / 2, c = lane % 2 * 8;  // sixteen bytes of each tile
    const bool a_in = row + r < M && k + c < K,
               b_in = transposed ? k + r < K && column + c < N : column + r < N && k + c < K;
    const bf16* b = transposed ? B + static_cast<int64_t>(k + r) * N + column + c
                               : B + static_cast<int64_t>(column + r) * K + k + c;
    copy_async<16>(&a_tile[r][c], a_in ? A + static_cast<int64_t>(row + r) * K + k + c : A, a_in ? 16 : 0);
    copy_async<16>(&b_tile[r][c], b_in ? b : B, b_in ? 16 : 0);
    copy_commit();
    if (fault != kNoCopyWait) copy_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[4];
    load_matrices<false>(fa, &a_tile[lane % 16][lane / 16 * 8]);
    if constexpr (transposed)
      load_matrices<true>(fb, &b_tile[lane % 16][lane / 16 * 8]);
    else
      load_matrices<false>(fb, &b_tile[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    const uint32_t first[2] = {fb[0], fb[1]}, second[2] = {fb[2], fb[3]};
    mma_bf16(d[0], fa, first);
    mma_bf16(d[1], fa, second);
    __syncwarp();
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int r = row + lane / 4 + i / 2 * 8, c = column + n * 8 + lane % 4 * 2 + i % 2;
      if (r < M && c < N) C[static_cast<int64_t>(r) * N + c] = d[n][i];
    }
}

// ---- wgmma: a producer warp and a warpgroup, 64 x 64 of C, 64 of K in each of two stages ------------------------
constexpr int kStages = 2, kTile = 64 * 64 * 2, kConsumers = 128;

// transposed: B has a row per k; of both: A too.
template <bool transposed, bool registers, Fault fault, bool both = false>
__global__ void __launch_bounds__(kConsumers + 32)
    gemm_wgmma(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* C, int M, int N,
               int K) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTDIT_SHARED_DYNAMIC(bytes, 1024);
  FASTDIT_SHARED(uint64_t[kStages], full);
  FASTDIT_SHARED(uint64_t[kStages], empty);
  const int thread = threadIdx.x, row = blockIdx.y * 64, column = blockIdx.x * 64, steps = (K + 63) / 64;
  char *a_tiles = bytes, *b_tiles = bytes + kStages * kTile;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kConsumers);
    barrier_fence_init();
  }
  __syncthreads();
  if (thread >= kConsumers) {
    if (thread > kConsumers) return;
    for (int t = 0; t < steps; ++t) {
      const int s = t % kStages, round = t / kStages;
      if (fault != kNoEmptyWait) barrier_wait(&empty[s], (round & 1) ^ 1);
      barrier_arrive_expect(&full[s], fault == kHalfBytes ? kTile : 2 * kTile);
      const int a_at[2] = {both ? row : t * 64, both ? t * 64 : row},
                b_at[2] = {transposed ? column : t * 64, transposed ? t * 64 : column};
      tensor_load(a_tiles + s * kTile, a_map, a_at, &full[s]);
      tensor_load(b_tiles + s * kTile, b_map, b_at, &full[s]);
    }
    return;
  }
  float d[32] = {};
  const int warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
  for (int t = 0; t < steps; ++t) {
    const int s = t % kStages, round = t / kStages;
    if (fault != kNoFullWait) barrier_wait(&full[s], fault == kWrongParity ? (round & 1) ^ 1 : round & 1);
    char *a = a_tiles + s * kTile, *b = b_tiles + s * kTile;
    uint32_t fragments[4][4];
    if constexpr (registers)
      for (int k = 0; k < 4; ++k)
        for (int j = 0; j < 4; ++j) {  // row r, columns c and c + 1 of a swizzled tile of 128-byte rows
          const int r = 16 * warp + g + j % 2 * 8, c = k * 16 + 2 * q + j / 2 * 8;
          const uint32_t at = r * 128 + c * 2;
          fragments[k][j] = *reinterpret_cast<const uint32_t*>(a + (at ^ ((at >> 3) & 0x70)));
        }
    if constexpr (fault == kNoProxyFence) {  // a generic store to the tile, for the matrix unit to read
      if (thread == 0) *reinterpret_cast<uint32_t*>(b) = 0;
      named_barrier<1>(kConsumers);
    }
    if (fault != kNoFence) product_fence();
    for (int k = 0; k < 4; ++k) {
      const uint64_t b_matrix = transposed ? matrix(b + k * 2048, 8192, 1024, 1)
                                           : matrix(b + k * 32, 16, fault == kWrongStride ? 512 : 1024, 1);
      if constexpr (registers)
        product<bf16, transposed>(d, fragments[k], b_matrix);
      else
        product<bf16, both, transposed>(d, matrix(a + k * (both ? 2048 : 32), 16, 1024, 1), b_matrix);
    }
    product_commit();
    if (fault == kEarlyRelease) barrier_arrive(&empty[s]);
    if (fault != kNoProductWait) product_wait<0>();
    if (fault != kEarlyRelease) barrier_arrive(&empty[s]);
  }
  for (int i = 0; i < 32; ++i) {
    const int r = row + 16 * warp + g + 8 * (i / 2 % 2), c = column + 8 * (i / 4) + 2 * q + i % 2;
    if (r < M && c < N) C[static_cast<int64_t>(r) * N + c] = d[i];
  }
#endif
}

// ---- one box ----------------------------------------------------------------------------------------------------
__global__ void tile(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap to, uint16_t* out,
                     int rows, int row, int column, int span, int store) {
  FASTDIT_SHARED_DYNAMIC(bytes, 1024);
  FASTDIT_SHARED(uint64_t, full);
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    barrier_fence_init();
  }
  __syncthreads();
  const int at[2] = {column, row};
  if (threadIdx.x == 0) {
    barrier_arrive_expect(&full, rows * span);
    tensor_load(bytes, map, at, &full);
  }
  barrier_wait(&full, 0);
  if (!store) {
    for (int i = threadIdx.x; i < rows * span / 2; i += blockDim.x) out[i] = reinterpret_cast<uint16_t*>(bytes)[i];
    return;
  }
  if (threadIdx.x == 0) {
    tensor_store(to, at, bytes);
    store_commit();
    store_wait<0>();
  }
}

TensorMap map_of(const bf16* base, int rows, int columns, int box_rows, int box_columns, cuda::Swizzle swizzle) {
  return encode({base, DType::bf16, 2, {columns, rows}, {1, columns}, {box_columns, box_rows}, swizzle}, "gemm", "");
}

using Gemm = void (*)(const bf16*, const bf16*, float*, int, int, int);

template <bool transposed, Fault fault>
void mma(const bf16* a, const bf16* b, float* c, int M, int N, int K) {
  launch(gemm_mma<transposed, fault>, dim3((N + 15) / 16, (M + 15) / 16), dim3(32), 0, {}, "gemm", "", c, a, b, M, N,
         K);
}

template <bool transposed, bool registers, Fault fault, bool both = false>
void wgmma(const bf16* a, const bf16* b, float* c, int M, int N, int K) {
  const TensorMap a_map = map_of(a, both ? K : M, both ? M : K, 64, 64, cuda::Swizzle::b128);
  const TensorMap b_map = map_of(b, transposed ? K : N, transposed ? N : K, 64, 64, cuda::Swizzle::b128);
  launch(gemm_wgmma<transposed, registers, fault, both>, dim3((N + 63) / 64, (M + 63) / 64), dim3(kConsumers + 32),
         2 * kStages * kTile, {}, "gemm", "", a_map, b_map, c, M, N, K);
}

const std::map<std::string, Gemm> kGemms = {
    {"mma", mma<false, kSound>},
    {"mma/transposed", mma<true, kSound>},
    {"mma:no copy wait", mma<false, kNoCopyWait>},
    {"wgmma", wgmma<false, false, kSound>},
    {"wgmma/transposed", wgmma<true, false, kSound>},
    {"wgmma/transposed both", wgmma<true, false, kSound, true>},
    {"wgmma/registers", wgmma<false, true, kSound>},
    {"wgmma:no full wait", wgmma<false, false, kNoFullWait>},
    {"wgmma:wrong parity", wgmma<false, false, kWrongParity>},
    {"wgmma:no empty wait", wgmma<false, false, kNoEmptyWait>},
    {"wgmma:early release", wgmma<false, false, kEarlyRelease>},
    {"wgmma:no wait", wgmma<false, false, kNoProductWait>},
    {"wgmma:no fence", wgmma<false, false, kNoFence>},
    {"wgmma:half the bytes", wgmma<false, false, kHalfBytes>},
    {"wgmma:wrong stride", wgmma<false, false, kWrongStride>},
    {"wgmma:no proxy fence", wgmma<false, false, kNoProxyFence>},
};

}  // namespace
}  // namespace fastdit::cuda

namespace fastdit::simt {

using namespace cuda;

void run_gemm(const std::string& kind, int64_t a, int64_t b, int64_t c, int M, int N, int K) {
  const auto found = kGemms.find(kind);
  if (found == kGemms.end()) throw std::invalid_argument("run_gemm: no kernel '" + kind + "'");
  found->second(reinterpret_cast<const bf16*>(a), reinterpret_cast<const bf16*>(b), reinterpret_cast<float*>(c), M, N,
                K);
}

void run_tile(int64_t tensor, int64_t out, int M, int N, int rows, int row, int column, int swizzle, bool store) {
  const auto mode = static_cast<cuda::Swizzle>(swizzle);
  const int span = mode == cuda::Swizzle::b64 ? 64 : mode == cuda::Swizzle::b32 ? 32 : 128;
  const TensorMap map = map_of(reinterpret_cast<const bf16*>(tensor), M, N, rows, span / 2, mode);
  const TensorMap to = map_of(reinterpret_cast<const bf16*>(store ? out : tensor), M, N, rows, span / 2, mode);
  launch(tile, dim3(1), dim3(32), rows * span, {}, "tile", "", map, to, reinterpret_cast<uint16_t*>(out), rows, row,
         column, span, static_cast<int>(store));
}

}  // namespace fastdit::simt
