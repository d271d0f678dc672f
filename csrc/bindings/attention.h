// Attention's parameters as Python gives them, for every compiled backend.
#pragma once

#include "bind.h"
#include "fastdit/attention.h"

namespace fastdit {

template <size_t N>
inline void copy(int64_t (&to)[N], const py::handle& from) {
  for (size_t i = 0; i < N; ++i) to[i] = item(from, static_cast<py::ssize_t>(i));
}

// (batch, token, head) strides of (B, N, H, D), or of packed (N, H, D).
inline void strides(int64_t (&to)[3], const py::handle& from) {
  const py::ssize_t packed = size(from) == 3;
  to[0] = packed ? 0 : item(from, 0), to[1] = item(from, 1 - packed), to[2] = item(from, 2 - packed);
}

// The arguments that forward and backward share; o and lse are contiguous.
inline void fill(AttentionParams& p, const py::tuple& a) {
  p.q = pointer(a, 0), p.k = pointer(a, 1), p.v = pointer(a, 2), p.o = pointer(a, 3), p.lse = pointer(a, 4);
  const py::handle q = part(a, 5), k = part(a, 6), window = part(a, 16);
  const py::ssize_t packed = size(q) == 3;
  p.batch = packed ? item(a, 10) : item(q, 0);
  p.q_len = item(q, 1 - packed), p.heads = item(q, 2 - packed), p.head_dim = item(q, 3 - packed);
  p.k_len = item(k, 1 - packed), p.kv_heads = item(k, 2 - packed);
  strides(p.q_stride, part(a, 7)), strides(p.k_stride, part(a, 8)), strides(p.v_stride, part(a, 9));
  p.o_stride[2] = p.head_dim, p.o_stride[1] = p.heads * p.head_dim;
  p.lse_stride[1] = p.q_len;
  p.o_stride[0] = packed ? 0 : p.q_len * p.o_stride[1], p.lse_stride[0] = packed ? 0 : p.heads * p.q_len;
  p.cu_q = pointer<int32_t>(a, 11), p.cu_k = pointer<int32_t>(a, 12), p.kv_len = pointer<int32_t>(a, 13);
  p.frame_tokens_of = pointer<int32_t>(a, 14), p.frame_tokens = item(a, 15);
  p.grids = nullptr;
  if (!window.is_none()) {  // (address of the grids, window, stride)
    p.grids = pointer<int32_t>(window, 0);
    copy(p.window, part(window, 1)), copy(p.window_stride, part(window, 2));
  }
  p.scale = part(a, 17).cast<double>(), p.dtype = static_cast<int>(item(a, 18));
  p.threads = static_cast<int>(item(a, 19));
}

inline void fill(MergeAttentionParams& p, const py::tuple& a) {
  p.o1 = pointer(a, 0), p.lse1 = pointer(a, 1), p.o2 = pointer(a, 2), p.lse2 = pointer(a, 3);
  copy(p.o1_stride, part(a, 4)), copy(p.lse1_stride, part(a, 5));
  copy(p.o2_stride, part(a, 6)), copy(p.lse2_stride, part(a, 7));
  p.batch = item(a, 8), p.tokens = item(a, 9), p.heads = item(a, 10), p.head_dim = item(a, 11);
  p.dtype = static_cast<int>(item(a, 12)), p.threads = static_cast<int>(item(a, 13));
}

// (address, strides), or None
template <class P>
inline void tensor(P*& p, int64_t (&stride)[3], const py::handle& h) {
  p = nullptr;
  if (h.is_none()) return;
  p = pointer<P>(h, 0);
  copy(stride, part(h, 1));
}

}  // namespace fastdit
