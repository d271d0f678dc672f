// Tiles for the matrix unit of a warp (sm_80): rows of 16-bit channels in shared memory, fragments of m16n8k16,
// cp.async.
//
// With g = lane / 4 and q = lane % 4 a lane holds
//   a[4]  of A, 16 x 16   a[i]: row g + 8 (i % 2), columns 2q + 8 (i / 2) and the next, low half first
//   b[2]  of B, 16 x 8    b[i]: rows 2q + 8 i and the next, column g
//   d[4]  of A B, fp32    d[i]: row g + 8 (i / 2), column 2q + i % 2
// so two neighbouring d of one product are, rounded to 16 bits, an a of the next.
#pragma once

#include "packs.h"
#include "ptx.h"

namespace fastdit::cuda {

// `channels` 16-bit values a row. A row's 16-byte chunks are permuted so that one chunk of eight neighbouring rows lies
// in eight different groups of banks: ldmatrix and 16-byte stores meet no conflict, and rows need no padding.
template <int channels>
struct Tile {
  static_assert(channels % 16 == 0);
  static constexpr int chunks = channels / 8;
  static constexpr int turns = chunks % 8 == 0   ? 8
                               : chunks % 4 == 0 ? 4
                                                 : 2,
                       step = turns == 8   ? 0
                              : turns == 4 ? 1
                                           : 2;
  static constexpr __host__ __device__ int bytes(int rows) { return rows * channels * 2; }
  // What is XORed to the chunks of a row; the same for rows that are eight apart.
  static __device__ __forceinline__ int turn(int row) { return row >> step & (turns - 1); }

  char* data;  // 16-byte aligned
  __device__ __forceinline__ char* at(int row, int chunk) const {
    return data + (row * chunks + (chunk ^ turn(row))) * 16;
  }
};

// How a tile holds an operand: its rows are rows of A, columns of B (a product with the tile transposed), or, as
// `by_k`, the dimension that is summed over.
enum class Operand { a, b, a_by_k, b_by_k };

// One lane's view of a tile for ldmatrix: 16 x 16 values from (row, column) on, both multiples of 16.
template <Operand operand, int channels>
class Fragments {
  static constexpr bool transposed = operand == Operand::a_by_k || operand == Operand::b_by_k;
  static constexpr bool straight = operand == Operand::a || operand == Operand::b_by_k;
  const char* base_;
  int turn_;

 public:
  __device__ __forceinline__ explicit Fragments(Tile<channels> tile, int first_row = 0) {
    const int lane = opaque(static_cast<int>(threadIdx.x) % 32);  // addresses are made where they are used
    const int row = straight ? lane % 16 : lane % 8 + lane / 16 * 8, chunk = straight ? lane / 16 : lane / 8 % 2;
    base_ = tile.data + (first_row + row) * tile.chunks * 16;
    turn_ = chunk ^ tile.turn(row);
  }
  // a: to = a. b: {to[0], to[1]} is the b of eight columns, {to[2], to[3]} that of the next eight.
  __device__ __forceinline__ void operator()(uint32_t (&to)[4], int row, int column) const {
    load_matrices<transposed>(to, base_ + (row * Tile<channels>::chunks + (column / 8 ^ turn_)) * 16);
  }
};

// d += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, bf16>)
    mma_bf16(d, a, b);
  else
    mma_f16(d, a, b);
}

// Two values as a fragment holds them.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

// A row of global memory as `stage` copies it; not there: zeros.
struct Source {
  const void* at;  // 16-byte aligned
  bool there;
};

// Starts the copies of `rows` rows by `threads` threads, who then commit. row(r): the Source of row r. `present`: of
// the tile's channels, a multiple of 8; the others become zero. elsewhere: any address of global memory.
template <int rows, int threads, int channels, class Row>
__device__ __forceinline__ void stage(Tile<channels> to, int thread, int present, const void* elsewhere, Row&& row) {
  constexpr int total = rows * to.chunks;
#pragma unroll 1  // addresses take registers, and nobody waits for a copy here
  for (int k = 0; k < (total + threads - 1) / threads; ++k) {
    const int i = thread + k * threads, r = i / to.chunks, chunk = i % to.chunks;
    if (total % threads == 0 || i < total) {
      const Source from = row(r);
      const bool there = from.there && chunk * 8 < present;
      copy_async<16>(to.at(r, chunk), there ? static_cast<const char*>(from.at) + chunk * 16 : elsewhere,
                     there ? 16 : 0);
    }
  }
}

}  // namespace fastdit::cuda
