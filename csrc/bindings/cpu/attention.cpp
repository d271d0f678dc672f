#include "../attention.h"

using namespace fastdit;

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](const py::tuple& shared) {
        AttentionParams p;
        fill(p, shared);
        py::gil_scoped_release release;
        cpu::attention_forward(p);
      },
      "o = softmax(scale * q k^T) v over the visible keys, and lse; see fastdit/attention.h.");
  m.def(
      "attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle dq, py::handle dk, py::handle dv) {
        AttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.dq, p.dq_stride, dq), tensor(p.dk, p.dk_stride, dk), tensor(p.dv, p.dv_stride, dv);
        py::gil_scoped_release release;
        cpu::attention_backward(p);
      },
      "dq, dk, dv of attention_forward; see fastdit/attention.h.");
  m.def(
      "merge_attention_forward",
      [](const py::tuple& shared, py::handle o, py::handle lse) {
        MergeAttentionParams p;
        fill(p, shared);
        tensor(p.o, p.o_stride, o), tensor(p.lse, p.lse_stride, lse);
        py::gil_scoped_release release;
        cpu::merge_attention_forward(p);
      },
      "The attention over the union of two sets of keys; see fastdit/attention.h.");
  m.def(
      "merge_attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle d_o1, py::handle d_lse1, py::handle d_o2,
         py::handle d_lse2) {
        MergeAttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.d_o1, p.d_o1_stride, d_o1), tensor(p.d_lse1, p.d_lse1_stride, d_lse1);
        tensor(p.d_o2, p.d_o2_stride, d_o2), tensor(p.d_lse2, p.d_lse2_stride, d_lse2);
        py::gil_scoped_release release;
        cpu::merge_attention_backward(p);
      },
      "Every gradient of merge_attention_forward; see fastdit/attention.h.");
}
