// What modulation's forward and backward share: where tokens and table rows stand, and a row's statistics.
#pragma once

#include <string>

#include "fastdit/modulation.h"
#include "launch.h"
#include "rows.h"

namespace fastdit::cuda {

// Where a table's row for token i starts, in elements; it serves the tokens before `end`.
struct TableRow {
  int64_t at;
  int end;
};
__device__ __forceinline__ int64_t index_at(const void* index, int is_64, int i) {
  return is_64 ? static_cast<const int64_t*>(index)[i] : static_cast<const int32_t*>(index)[i];
}
__device__ __forceinline__ TableRow table_row(const Table& t, const void* index, int is_64, int N, int i) {
  if (index) return {index_at(index, is_64, i) * t.stride_m, i + 1};
  const int per = static_cast<int>(t.tokens_per_row), b = i / N, n = i - b * N, m = n / per;
  return {b * t.stride_b + m * t.stride_m, i - n + min((m + 1) * per, N)};
}

// Row of token i of a tensor (B, N, C).
template <class T>
__device__ __forceinline__ T* token(const void* p, int64_t stride_b, int64_t stride_n, int N, int i) {
  const int b = i / N;
  return const_cast<T*>(static_cast<const T*>(p)) + b * stride_b + (i - b * N) * stride_n;
}

// Mean (0 unless centred) and 1 / sqrt(mean square about it + eps) of a row. Zeros stand beyond C. Two readings of the
// registers: what rounding left in the mean is taken out of the square. inverse: 1 / C.
template <int W, int V>
__device__ __forceinline__ void moments(const float (&x)[V][W], bool centred, int C, float inverse, float eps,
                                        const Place& place, Sums& sums, float& mean, float& root) {
  mean = 0;
  if (centred) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j)
#pragma unroll
      for (int i = 0; i < W; ++i) sum += x[j][i];
    mean = sums.one(sum) * inverse;
  }
  float both[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (place.channel<W>(j) < C)
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float u = x[j][i] - mean;
        both[0] += u, both[1] += u * u;
      }
  sums(both);
  const float rest = centred ? both[0] * inverse : 0;
  mean += rest;
  root = rsqrtf(both[1] * inverse - rest * rest + eps);
}

__device__ __forceinline__ float act(GateAct kind, float gate) { return kind == GateAct::tanh ? tanhf(gate) : gate; }

// The widest pack that every tensor of the call allows: 16 bytes of y, or single values.
inline int pack_width(const ModulationParams& p) {
  const int itemsize_ = static_cast<int>(itemsize(static_cast<DType>(p.dtype))), W = 16 / itemsize_;
  const auto whole = [&](const void* t, int dtype, std::initializer_list<int64_t> strides) {
    return !t || fits(t, static_cast<int>(itemsize(static_cast<DType>(dtype))), W, strides);
  };
  bool wide = p.C % W == 0 && whole(p.y, p.dtype, {p.y_stride_b, p.y_stride_n}) &&
              whole(p.residual, p.residual_dtype, {p.residual_stride_b, p.residual_stride_n}) &&
              whole(p.r, p.residual_dtype, {}) && whole(p.h, p.dtype, {});
  for (const Table* t : {&p.gate, &p.shift, &p.scale, &p.weight, &p.bias, &p.post_weight})
    wide = wide && whole(t->data, t->dtype, {t->stride_b, t->stride_m});
  return wide ? W : 1;
}

inline std::string sizes(const ModulationParams& p) {
  return "B=" + std::to_string(p.B) + " N=" + std::to_string(p.N) + " C=" + std::to_string(p.C) +
         " dtype=" + std::to_string(p.dtype);
}

// Tokens are counted in 32 bits, elements in 64.
inline void check_tokens(const ModulationParams& p, const char* op) {
  if (p.B * p.N > 0x7fff0000)
    throw std::invalid_argument(std::string(op) + ": too many tokens; got " + sizes(p) + ", expected B * N < 2^31");
}

}  // namespace fastdit::cuda
