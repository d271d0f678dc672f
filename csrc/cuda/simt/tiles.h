// Small kernels of the tile instructions (simt/tiles.cu), for tests of the simulator; nvcc assembles them too.
#pragma once

#include <cstdint>
#include <string>

namespace fastdit::simt {

// C (M, N) fp32 = A (M, K) * B, both bf16. kind: "mma", "mma/transposed", "wgmma", "wgmma/transposed",
// "wgmma/registers", or a fault of those after a colon, e.g. "wgmma:no fence". B is (N, K), transposed: (K, N).
void run_gemm(const std::string& kind, int64_t a, int64_t b, int64_t c, int M, int N, int K);

// The bytes of shared memory after a tensor copy of a box (rows, 64) bf16 at (row, column) of a (M, N) tensor; store:
// the box is then copied back to `out` as a tensor of the same shape.
void run_tile(int64_t tensor, int64_t out, int M, int N, int rows, int row, int column, int swizzle, bool store);

}  // namespace fastdit::simt
