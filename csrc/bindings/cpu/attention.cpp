#include "fastdit/attention.h"

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"

namespace {

using Triple = std::array<int64_t, 3>;

template <size_t N>
void copy(int64_t (&to)[N], const std::array<int64_t, N>& from) {
  for (size_t i = 0; i < N; ++i) to[i] = from[i];
}

void attention_forward(int64_t q, int64_t k, int64_t v, int64_t o, int64_t lse, const Triple& q_stride,
                       const Triple& k_stride, const Triple& v_stride, const Triple& o_stride,
                       const std::array<int64_t, 2>& lse_stride, int64_t batch, int64_t q_len, int64_t k_len,
                       int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t cu_q, int64_t cu_k, int64_t kv_len,
                       int64_t frame_tokens_of, int64_t frame_tokens, int64_t grids, const Triple& window,
                       const Triple& window_stride, double scale, int dtype, int threads) {
  fastdit::AttentionParams p;
  p.q = ptr<void>(q), p.k = ptr<void>(k), p.v = ptr<void>(v), p.o = ptr<void>(o), p.lse = ptr<void>(lse);
  copy(p.q_stride, q_stride), copy(p.k_stride, k_stride), copy(p.v_stride, v_stride), copy(p.o_stride, o_stride);
  copy(p.lse_stride, lse_stride);
  p.batch = batch, p.q_len = q_len, p.k_len = k_len;
  p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
  p.cu_q = ptr<int32_t>(cu_q), p.cu_k = ptr<int32_t>(cu_k), p.kv_len = ptr<int32_t>(kv_len);
  p.frame_tokens_of = ptr<int32_t>(frame_tokens_of), p.frame_tokens = frame_tokens;
  p.grids = ptr<int32_t>(grids);
  copy(p.window, window), copy(p.window_stride, window_stride);
  p.scale = scale, p.dtype = dtype, p.threads = threads;
  py::gil_scoped_release release;
  fastdit::cpu::attention_forward(p);
}

void merge_attention_forward(int64_t o1, int64_t lse1, int64_t o2, int64_t lse2, int64_t o, int64_t lse,
                             const Triple& o1_stride, const Triple& lse1_stride, const Triple& o2_stride,
                             const Triple& lse2_stride, const Triple& o_stride, const Triple& lse_stride, int64_t batch,
                             int64_t tokens, int64_t heads, int64_t head_dim, int dtype, int threads) {
  fastdit::MergeAttentionParams p;
  p.o1 = ptr<void>(o1), p.o2 = ptr<void>(o2), p.o = ptr<void>(o);
  p.lse1 = ptr<void>(lse1), p.lse2 = ptr<void>(lse2), p.lse = ptr<void>(lse);
  copy(p.o1_stride, o1_stride), copy(p.o2_stride, o2_stride), copy(p.o_stride, o_stride);
  copy(p.lse1_stride, lse1_stride), copy(p.lse2_stride, lse2_stride), copy(p.lse_stride, lse_stride);
  p.batch = batch, p.tokens = tokens, p.heads = heads, p.head_dim = head_dim, p.dtype = dtype, p.threads = threads;
  py::gil_scoped_release release;
  fastdit::cpu::merge_attention_forward(p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward);
  m.def("merge_attention_forward", &merge_attention_forward);
}
