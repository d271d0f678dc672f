#include "fastdit/attention.h"

#include "../bind.h"

namespace {

template <size_t N>
void copy(int64_t (&to)[N], const py::handle& from) {
  const auto t = py::reinterpret_borrow<py::tuple>(from);
  for (size_t i = 0; i < N; ++i) to[i] = t[i].cast<int64_t>();
}

// The arguments that forward and backward share, in the order of AttentionParams.
void fill(fastdit::AttentionParams& p, const py::tuple& a) {
  const auto integer = [&](int i) { return a[i].cast<int64_t>(); };
  p.q = ptr<void>(integer(0)), p.k = ptr<void>(integer(1)), p.v = ptr<void>(integer(2));
  p.o = ptr<void>(integer(3)), p.lse = ptr<void>(integer(4));
  copy(p.q_stride, a[5]), copy(p.k_stride, a[6]), copy(p.v_stride, a[7]), copy(p.o_stride, a[8]);
  copy(p.lse_stride, a[9]);
  p.batch = integer(10), p.q_len = integer(11), p.k_len = integer(12);
  p.heads = integer(13), p.kv_heads = integer(14), p.head_dim = integer(15);
  p.cu_q = ptr<int32_t>(integer(16)), p.cu_k = ptr<int32_t>(integer(17)), p.kv_len = ptr<int32_t>(integer(18));
  p.frame_tokens_of = ptr<int32_t>(integer(19)), p.frame_tokens = integer(20), p.grids = ptr<int32_t>(integer(21));
  copy(p.window, a[22]), copy(p.window_stride, a[23]);
  p.scale = a[24].cast<double>(), p.dtype = a[25].cast<int>(), p.threads = a[26].cast<int>();
}

void fill(fastdit::MergeAttentionParams& p, const py::tuple& a) {
  const auto integer = [&](int i) { return a[i].cast<int64_t>(); };
  p.o1 = ptr<void>(integer(0)), p.lse1 = ptr<void>(integer(1));
  p.o2 = ptr<void>(integer(2)), p.lse2 = ptr<void>(integer(3));
  copy(p.o1_stride, a[4]), copy(p.lse1_stride, a[5]), copy(p.o2_stride, a[6]), copy(p.lse2_stride, a[7]);
  p.batch = integer(8), p.tokens = integer(9), p.heads = integer(10), p.head_dim = integer(11);
  p.dtype = a[12].cast<int>(), p.threads = a[13].cast<int>();
}

// (address, strides), or None
template <class P>
void tensor(P*& p, int64_t (&stride)[3], const py::handle& h) {
  p = nullptr;
  if (h.is_none()) return;
  const auto t = py::reinterpret_borrow<py::tuple>(h);
  p = ptr<P>(t[0].cast<int64_t>());
  copy(stride, t[1]);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](const py::tuple& shared) {
        fastdit::AttentionParams p;
        fill(p, shared);
        py::gil_scoped_release release;
        fastdit::cpu::attention_forward(p);
      },
      "o = softmax(scale * q k^T) v over the visible keys, and lse; see fastdit/attention.h.");
  m.def(
      "attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle dq, py::handle dk, py::handle dv) {
        fastdit::AttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.dq, p.dq_stride, dq), tensor(p.dk, p.dk_stride, dk), tensor(p.dv, p.dv_stride, dv);
        py::gil_scoped_release release;
        fastdit::cpu::attention_backward(p);
      },
      "dq, dk, dv of attention_forward; see fastdit/attention.h.");
  m.def(
      "merge_attention_forward",
      [](const py::tuple& shared, py::handle o, py::handle lse) {
        fastdit::MergeAttentionParams p;
        fill(p, shared);
        tensor(p.o, p.o_stride, o), tensor(p.lse, p.lse_stride, lse);
        py::gil_scoped_release release;
        fastdit::cpu::merge_attention_forward(p);
      },
      "The attention over the union of two sets of keys; see fastdit/attention.h.");
  m.def(
      "merge_attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle d_o1, py::handle d_lse1, py::handle d_o2,
         py::handle d_lse2) {
        fastdit::MergeAttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.d_o1, p.d_o1_stride, d_o1), tensor(p.d_lse1, p.d_lse1_stride, d_lse1);
        tensor(p.d_o2, p.d_o2_stride, d_o2), tensor(p.d_lse2, p.d_lse2_stride, d_lse2);
        py::gil_scoped_release release;
        fastdit::cpu::merge_attention_backward(p);
      },
      "Every gradient of merge_attention_forward; see fastdit/attention.h.");
}
