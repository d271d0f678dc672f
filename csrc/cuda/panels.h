// Products of a warp over panels: tiles in shared memory whose width only the call knows, of 16-bit values or of fp32.
// (mma.h: tiles whose width the kernel knows.)
//
//   multiply<a, b>(d, A, B, depth):   d += A B over `depth` values of the inner dimension
//
// d[i][j][e] is row 16 i + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2, whatever the type: 16-bit values go
// to the matrix unit, fp32 to FMAs, each rounded once. Products of 16-bit values are exact, all sums are fp32.
//
// A panel's rows stand `pitch` values apart, on 16 bytes, an odd number of 16-byte chunks from one to the next: the
// eight rows of an ldmatrix, and those that the lanes of a warp read in fp32, lie in different banks, whatever the
// width.
#pragma once

#include "mma.h"

namespace fastdit::cuda {

// What a row of a panel runs along: the inner dimension, or the rows of A and the columns of B.
enum class Along { inner, outer };

template <class T>
struct Panel {
  T* at;
  int pitch;

  static constexpr int kStep = sizeof(T) == 2 ? 16 : 4;  // of the inner dimension: filled with zeros up to there

  // The pitch of rows that hold `width` values.
  static __host__ __device__ int pitch_of(int width) {
    constexpr int size = static_cast<int>(sizeof(T));
    return ((width * size + 15) / 16 | 1) * 16 / size;
  }
  __device__ __forceinline__ T* row(int r) const { return at + r * pitch; }
  // From `outer` rows of A or columns of B and `inner` of the inner dimension on.
  template <Along along>
  __device__ __forceinline__ Panel from(int outer, int inner = 0) const {
    return {along == Along::inner ? row(outer) + inner : row(inner) + outer, pitch};
  }
};

// Fragments of the matrix unit: 16 rows of A, 16 columns of B ({b[0], b[1]} and {b[2], b[3]}), 16 of the inner
// dimension.
template <Along along, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Panel<T>& A) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (along == Along::inner)
    load_matrices<false>(a, A.row(lane % 16) + lane / 16 * 8);
  else
    load_matrices<true>(a, A.row(lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 8);
}
template <Along along, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Panel<T>& B) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (along == Along::inner)
    load_matrices<false>(b, B.row(lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 8);
  else
    load_matrices<true>(b, B.row(lane % 16) + lane / 16 * 8);
}

// Four values along the inner dimension of a row of A or a column of B.
template <Along along>
__device__ __forceinline__ void load_four(float (&v)[4], const Panel<float>& panel) {
  if constexpr (along == Along::inner) {
    const float4 four = *reinterpret_cast<const float4*>(panel.at);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = *panel.row(k);
  }
}

template <Along along_a, Along along_b, class T, int M, int N>
__device__ __forceinline__ void multiply(float (&d)[M][N][4], const Panel<T>& A, const Panel<T>& B, int depth) {
  static_assert(N % 2 == 0);
  if constexpr (sizeof(T) == 2) {
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[M][4];
#pragma unroll
      for (int i = 0; i < M; ++i) load_a<along_a>(a[i], A.template from<along_a>(16 * i, k));
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        uint32_t b[4];
        load_b<along_b>(b, B.template from<along_b>(8 * j, k));
#pragma unroll
        for (int i = 0; i < M; ++i) {
          multiply_add<T>(d[i][j], a[i], b[0], b[1]);
          multiply_add<T>(d[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else {
    constexpr int run = 32;  // of the inner dimension, summed by themselves first: fewer roundings of a large sum
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Panel<T> mine_a = A.template from<along_a>(lane / 4), mine_b = B.template from<along_b>(lane % 4 * 2);
    for (int begin = 0; begin < depth; begin += run) {
      float part[M][N][4] = {};
      const int end = begin + run < depth ? begin + run : depth;
      for (int k = begin; k < end; k += 4) {
        float a[2 * M][4];
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) load_four<along_a>(a[i], mine_a.template from<along_a>(8 * i, k));
#pragma unroll
        for (int j = 0; j < 2 * N; ++j) {
          float b[4];
          load_four<along_b>(b, mine_b.template from<along_b>(j / 2 * 8 + j % 2, k));
#pragma unroll
          for (int i = 0; i < 2 * M; ++i)
#pragma unroll
            for (int s = 0; s < 4; ++s) part[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i][s] * b[s];
        }
      }
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) d[i][j][e] += part[i][j][e];
    }
  }
}

}  // namespace fastdit::cuda
